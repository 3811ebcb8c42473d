"""Bounds of a connection, on real sockets: endless headers, late headers, clients that never read."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest
from starlette.types import Receive, Scope, Send

from dmoa.serving.http.connection import MAX_HEAD_BYTES, MAX_HEADERS, BoundedProtocol
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
