"""Bounds of a connection, on real sockets: endless headers, late headers, clients that never read."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest
from starlette.types import Receive, Scope, Send

from dmoa.serving.http.connection import MAX_HEAD_BYTES, MAX_HEADERS, MAX_WAITING, MIN_BYTES_PER_S, BoundedProtocol
from tests.unit.serving.fake_service import listening, until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
PIECE = b"a" * 65_536


class Patient(BoundedProtocol):
    """The bounds with few connections, and with short times where a client does nothing wrong by being slow."""

    stall_s: ClassVar[float] = 0.15
    linger_s: ClassVar[float] = 0.2
    max_opening: ClassVar[int] = 3
    opening: ClassVar[dict[BoundedProtocol, None]] = {}
    max_idle: ClassVar[int] = 2
    idle: ClassVar[dict[BoundedProtocol, None]] = {}


class Quick(Patient):
    """The same, in a hurry."""

    head_s: ClassVar[float] = 0.15


CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the number of the body's bytes."""
    seen = 0
    while (message := await receive())["type"] == "http.request":
        seen += len(message["body"])
        if not message["more_body"]:
            break
    body = b"%d" % seen
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(self) -> tuple[int, Any]:
        """The status and the body of one answer."""
        async with asyncio.timeout(5.0):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            length = next(line for line in head.splitlines() if line.startswith("content-length: ")).split(": ")[1]
            body = json.loads(await self.reader.readexactly(int(length)))
        return int(head.split()[1]), body

    async def is_closed(self) -> bool:
        async with asyncio.timeout(5.0):
            try:
                return await self.reader.read() == b""
            except ConnectionResetError:
                return True


@asynccontextmanager
async def clients(app: Any = echo, number: int = 1, protocol: type[BoundedProtocol] = Patient) -> AsyncIterator[list[Client]]:
    """Connections to a bounded server."""
    Patient.opening.clear()
    async with listening(app, http=protocol) as port:
        made = [Client(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(number)]
        try:
            yield made
        finally:
            for client in made:
                client.writer.close()


@pytest.mark.parametrize(
    "begun",
    [
        b"GET / HTTP/1.1\r\nX: ",
        b"GET /",
        GET + b"X",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: ",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1;x=",
        GET + b"\r\n" + GET + b"X: ",
    ],
    ids=["value", "url", "name", "trailer", "extension", "second request"],
)
async def test_what_never_ends_is_refused_at_the_bound(begun: bytes) -> None:
    async with clients() as (client,):
        await client.send(begun, PIECE, PIECE, PIECE)
        if begun.startswith(GET + b"\r\n"):
            assert await client.answer() == (200, 0)
        status, body = await client.answer()
        assert (status, body["error"]["code"]) == (431, "headers_too_large")
        assert f"at most {MAX_HEAD_BYTES} bytes" in body["error"]["message"]
        assert await client.is_closed()


async def test_a_refused_client_may_send_on_and_reads_why() -> None:
    async with clients() as (client,):
        await client.send(GET + b"X: ", *[PIECE] * 20)  # what is not read would reset the connection
        assert (await client.answer())[0] == 431


@pytest.mark.parametrize(("number", "status"), [(MAX_HEADERS - 1, 200), (MAX_HEADERS, 431)])
async def test_headers_are_counted(number: int, status: int) -> None:
    async with clients() as (client,):
        await client.send(GET + b"".join(b"X-%d: y\r\n" % i for i in range(number)) + b"\r\n")
        assert (await client.answer())[0] == status


@pytest.mark.parametrize(("size", "status"), [(60_000, 200), (66_000, 431)])
async def test_headers_that_come_in_one_piece_are_measured(size: int, status: int) -> None:
    async with clients() as (client,):
        await client.send(GET + b"X: " + b"a" * size + b"\r\n\r\n")
        assert (await client.answer())[0] == status


async def test_bodies_are_no_headers() -> None:
    """Neither a large body nor one of many small chunks counts."""
    tiny = b"".join(b"1\r\na\r\n" for _ in range(40_000))
    async with clients() as (client,):
        await client.send(POST + b"Content-Length: 655360\r\n\r\n", *[PIECE] * 10)
        assert await client.answer() == (200, 655_360)
        await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n", tiny, b"0\r\n\r\n")
        assert await client.answer() == (200, 40_000)


@pytest.mark.parametrize("chunks", [b"-5\r\nabcde", b"0x5\r\nabcde", b"f" * 18, b"5\r\nabcdeXX", b"5\nabcde\n"])
async def test_a_body_that_is_framed_wrongly_is_told_so(chunks: bytes) -> None:
    """The request waits for its body, so that no other answer is on its way."""
    async with clients() as (client,):
        await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"\r\n0\r\n\r\n")
        status, body = await client.answer()
        assert (status, body["error"]["code"]) == (400, "bad_request")
        assert await client.is_closed()


async def test_no_http_is_told_in_json() -> None:
    async with clients() as (client,):
        await client.send(b"\x16\x03\x01 hello\r\n\r\n")
        status, body = await client.answer()
        assert (status, body["error"]["code"]) == (400, "bad_request")


async def test_late_headers_are_408_and_silence_is_closed() -> None:
    async with clients(number=3, protocol=Quick) as (silent, late, second):
        await late.send(GET)
        await second.send(GET + b"\r\n" + GET)
        assert await second.answer() == (200, 0)
        for client in (late, second):
            status, body = await client.answer()
            assert (status, body["error"]["code"]) == (408, "request_timeout")
        assert await silent.is_closed()
    assert not Patient.opening


async def test_a_connection_that_asked_may_idle() -> None:
    async with clients(protocol=Quick) as (client,):
        for _ in range(2):
            await client.send(GET + b"\r\n")
            assert await client.answer() == (200, 0)
            await asyncio.sleep(2 * Quick.head_s)


async def test_the_oldest_half_sent_headers_make_room() -> None:
    async with clients(number=3) as half:
        for client in half:
            await client.send(GET)
        await until(lambda: len(Patient.opening) == 3)
        port = half[0].writer.get_extra_info("peername")[1]
        fresh = Client(*await asyncio.open_connection("127.0.0.1", port))
        started = time.perf_counter()
        assert (await half[0].answer())[0] == 408
        assert time.perf_counter() - started < Patient.head_s
        await fresh.send(GET + b"\r\n")
        assert await fresh.answer() == (200, 0)
        fresh.writer.close()


async def test_the_oldest_idle_connection_makes_room() -> None:
    async with clients(number=3) as (busy, oldest, other):
        for client in (busy, oldest, busy, other):
            await client.send(GET + b"\r\n")
            assert await client.answer() == (200, 0)
        assert await oldest.is_closed()
        for client in (busy, other):
            await client.send(GET + b"\r\n")
            assert await client.answer() == (200, 0)


async def test_a_client_that_never_reads_is_let_go() -> None:
    gone = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

        async def flood() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": PIECE, "more_body": True})
                await asyncio.sleep(0)

        flooding = asyncio.create_task(flood())
        assert (await receive())["type"] == "http.disconnect"
        flooding.cancel()
        gone.set()

    async with clients(endless) as (client,):
        await client.send(GET + b"\r\n")
        await asyncio.wait_for(gone.wait(), 5.0)


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        (POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400, "Duplicate Content-Length"),
        (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "Transfer-Encoding"),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, "Transfer-Encoding: expected chunked"),
        (POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501, "of HTTP/1.1"),
        (GET + b"Host: y\r\n\r\n", 400, "host: sent twice"),
        (GET + b"Authorization: a\r\nAuthorization: b\r\n\r\n", 400, "authorization: sent twice"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "host: missing"),
        (b"GET /\r\n\r\n", 505, "HTTP/0.9; expected HTTP/1.1"),
        (b"GET / HTTP/2.0\r\n\r\n", 505, "HTTP/2.0; expected HTTP/1.1"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "send that"),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n", 405, "no proxy"),
        (b"GET http://x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 400, "send that"),
        (GET + b"X: a\r\n b\r\n\r\n", 400, "send that"),
        (GET.replace(b"\r\n", b"\n") + b"\n", 400, "send that"),
    ],
)
async def test_what_another_server_may_read_otherwise_is_refused(sent: bytes, status: int, says: str) -> None:
    async with clients() as (client,):
        await client.send(sent)
        found, body = await client.answer()
        assert (found, says in body["error"]["message"]) == (status, True), body
        assert await client.is_closed()


async def headers(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the names of the headers, read after the body, and the body."""
    seen = b""
    while (message := await receive())["more_body"]:
        seen += message["body"]
    told = {"headers": [name.decode() for name, _ in scope["headers"]], "body": (seen + message["body"]).decode()}
    body = json.dumps(told).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def test_trailers_are_no_headers() -> None:
    async with clients(headers) as (client,):
        await client.send(CHUNKED + b"1\r\na\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
        assert await client.answer() == (200, {"headers": ["host", "transfer-encoding"], "body": "a"})


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("is_split", [False, True])
async def test_who_asks_for_another_protocol_is_answered_in_this_one(protocol: bytes, is_split: bool) -> None:
    """Java's HttpClient asks so with every first request; its body was lost, and read as the next request."""
    asking = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol + b"\r\nHTTP2-Settings: AA\r\n"
    head, body = POST + asking + b"Content-Length: 27\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    async with clients(headers) as (client,):
        for _ in range(2):
            if is_split:
                await client.send(head[:30])
                await asyncio.sleep(0.02)
                await client.send(head[30:])
                await asyncio.sleep(0.02)
                await client.send(body)
            else:
                await client.send(head + body + head + body)
                assert (await client.answer())[1]["body"] == body.decode()
            told = (await client.answer())[1]
            assert told["body"] == body.decode()
            assert "upgrade" not in told["headers"]


async def test_what_is_wrong_with_a_second_request_does_not_end_the_first() -> None:
    may_answer = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await may_answer.wait()
        await echo(scope, receive, send)

    async with clients(slow, number=3, protocol=Quick) as (wrong, late, framed):
        await wrong.send(GET + b"\r\n" + GET + b"X\0: y\r\n")
        await late.send(GET + b"\r\n" + GET)
        await framed.send(GET + b"\r\n" + CHUNKED + b"zz\r\n")
        await asyncio.sleep(2 * Quick.head_s)
        may_answer.set()
        for client, status in ((wrong, 400), (late, 408), (framed, 400)):
            assert await client.answer() == (200, 0)
            assert (await client.answer())[0] == status
            assert await client.is_closed()


async def test_requests_that_wait_for_an_answer_are_counted() -> None:
    async with clients() as (client,):
        await client.send((GET + b"\r\n") * (MAX_WAITING + 5))
        answers = [await client.answer() for _ in range(MAX_WAITING + 1)]
        assert {status for status, _ in answers[:-1]} == {200}
        assert answers[-1][0] == 429
        assert await client.is_closed()


async def test_line_ends_between_requests_keep_no_connection_open() -> None:
    async with listening(echo, http=Patient, timeout_keep_alive=0.2) as port:
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        await client.send(GET + b"\r\n")
        assert await client.answer() == (200, 0)
        await client.send(b"\r\n")
        assert await client.is_closed()
        client.writer.close()


def small_window(port: int) -> socket.socket:
    """A client whose system takes little that it does not read."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", port))
    made.setblocking(False)
    return made


class Unread(Patient):
    """Remembers its connections."""

    made: ClassVar[list[BoundedProtocol]] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)
        self.made.append(self)


class Unhurried(Unread):
    """Gives clients a little longer."""

    stall_s: ClassVar[float] = 0.5


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
async def test_an_answer_that_nobody_reads_holds_no_connection(close: bytes) -> None:
    """Also one so short that the server never has to wait for its client."""

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": PIECE[:40_000]})

    Unread.made.clear()
    async with listening(answers, http=Unread, timeout_keep_alive=0.05) as port:
        with small_window(port) as client:
            await asyncio.get_running_loop().sock_sendall(client, GET + close + b"\r\n")
            await until(lambda: bool(Unread.made) and Unread.made[0].transport.is_closing())
            assert Unread.made[0].transport.get_write_buffer_size() > 0, "the client's system took all of it"
            await until(lambda: Unread.made[0].parser is None)


async def test_who_reads_slowly_is_not_let_go() -> None:
    size = 400_000
    assert size / (2 * Unhurried.stall_s) > 10 * MIN_BYTES_PER_S

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    async with listening(answers, http=Unhurried) as port:
        with small_window(port) as client:
            loop, seen, started = asyncio.get_running_loop(), 0, time.perf_counter()
            await loop.sock_sendall(client, GET + b"\r\n")
            while seen < size:
                piece = await loop.sock_recv(client, 8192)
                assert piece, f"cut after {seen} bytes"
                seen += len(piece)
                await asyncio.sleep(max(0.0, 2 * Unhurried.stall_s * seen / size - (time.perf_counter() - started)))
