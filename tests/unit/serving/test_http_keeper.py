"""A server that is killed (SIGKILL) behind a kept port: what its clients hear of it, over real sockets."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import uvicorn
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.types import Receive, Scope, Send

from dmoa.serving.http.keeper import IDLE, KeptProtocol, PortKeeper, _SilentServer
from tests.unit.serving.fake_service import until
from tests.unit.serving.test_http_connection import Client

GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"
STARTS = multiprocessing.get_context("forkserver")
STARTS.set_forkserver_preload(["tests.unit.serving.test_http_keeper"])  # Serve is imported once, not by each server


class Replica:
    """Stands in for Serve's object, whose method is what Serve's server calls, behind middlewares."""

    _shutting_down = False

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as `app`, or once Serve ends this replica."""
        if scope["path"] == "/end":
            self._shutting_down = True
            await until(lambda: KeptProtocol.kept.port.fileno() < 0)
        await app(scope, receive, send)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once, never, half, or with a stream that goes on."""
    path = scope["path"]
    if path.startswith("/v1/"):
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
        )
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.Event().wait()
    if path == "/never":
        await asyncio.Event().wait()
    length = b"4" if path == "/half" else b"2"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": b"42", "more_body": path == "/half"})
    if path == "/half":
        await asyncio.Event().wait()


def run(path: str, port: int) -> None:
    """Serve in a process of its own, as Serve's proxy does: on a socket of its own, unless a keeper gives it one."""
    from dmoa.serving.http.connection import bound_connections
    from dmoa.serving.http.keeper import keep_port

    bound_connections()
    assert keep_port(path)
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    own.bind(("127.0.0.1", port))
    uvicorn.Server(uvicorn.Config(RequestIdMiddleware(Replica().asgi), lifespan="off", log_level="critical")).run(sockets=[own])


class Kept:
    """A kept port and the server on it."""

    def __init__(self, patience_s: float, return_s: float) -> None:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.keeper = PortKeeper(patience_s=patience_s, return_s=return_s)
        self.keeper.listen("127.0.0.1", self.port)
        self.process: multiprocessing.process.BaseProcess | None = None
        self.clients: list[Client] = []

    def start(self) -> None:
        self.process = STARTS.Process(target=run, args=(self.keeper.path, self.port))
        self.process.start()

    def copies(self) -> list[object]:
        return [copy for proxy in list(self.keeper._proxies.values()) for copy in list(proxy.copies)]

    def num_idle(self) -> int:
        """Connections that are marked as idle, which their server does after the answer has left."""
        proxies = list(self.keeper._proxies.values())
        return sum(proxy.states[number] == IDLE for proxy in proxies for number in list(proxy.copies))

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.join(10)

    async def client(self, asked: bytes = b"") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(client)
        if asked:
            await client.send(GET % asked)
        return client


@pytest.fixture
async def kept(request: pytest.FixtureRequest) -> AsyncIterator[Kept]:
    found = Kept(*getattr(request, "param", (60.0, 0.0)))
    try:
        yield found
    finally:
        for client in found.clients:
            client.writer.close()
        if found.process is not None:
            found.kill()
        found.keeper.close()


async def answered(client: Client) -> tuple[int, bytes]:
    async with asyncio.timeout(60.0):  # a process starts meanwhile
        head = (await client.reader.readuntil(b"\r\n\r\n")).decode()
        length = next(line for line in head.splitlines() if line.startswith("content-length: ")).split(": ")[1]
        return int(head.split()[1]), await client.reader.readexactly(int(length))


def test_a_keeper_whose_thread_saw_first_that_it_is_over_can_be_closed() -> None:
    """What woke the thread between the word that it is over and the wake-up for it: a client, say."""
    keeper = PortKeeper()
    keeper._is_over = True
    keeper._writer.send(b"!")
    keeper._thread.join(10)
    keeper.close()
    assert not Path(keeper.path).exists()


async def test_a_killed_server_loses_no_connection(kept: Kept) -> None:
    waiting = await kept.client(b"")
    await waiting.send(GET % b"early")  # before there is a server
    kept.start()
    assert await answered(waiting) == (200, b"42")
    asked, half = await kept.client(b"never"), await kept.client(b"half")
    assert await half.reader.readuntil(b"\r\n\r\n42")
    fresh = await kept.client()  # it has asked nothing yet
    await until(lambda: (len(kept.copies()), kept.num_idle()) == (4, 2))
    kept.kill()

    status, body = await answered(asked)
    assert status == 503
    assert b"server_lost" in body
    assert await asked.is_closed()
    assert await half.is_closed(), "what was answered in part cannot be told anything else"
    await waiting.send(GET % b"idle")
    await fresh.send(GET % b"fresh")
    late = await kept.client(b"late")
    kept.start()
    for client in (waiting, fresh, late):
        assert await answered(client) == (200, b"42"), "the next server has the connection"


@pytest.mark.parametrize(
    ("path", "event"), [(b"v1/chat/completions", b'data: {"error":'), (b"v1/responses/", b'event: error\ndata: {"type":"error",')]
)
async def test_a_stream_whose_server_is_killed_ends_with_an_event(kept: Kept, path: bytes, event: bytes) -> None:
    kept.start()
    client = await kept.client(path)
    await client.reader.readuntil(b"data: 1\n\n\r\n")
    kept.kill()
    async with asyncio.timeout(60.0):
        length = int(await client.reader.readline(), 16)
        last = await client.reader.readexactly(length)
        assert await client.reader.read() == b"\r\n0\r\n\r\n", "the stream's own end"
    assert last.startswith(event)
    assert b"server_lost" in last
    assert last.endswith(b"data: [DONE]\n\n") == (b"chat" in path)


@pytest.mark.parametrize("kept", [(0.0, 0.0), (60.0, 60.0)], indirect=True)
async def test_where_no_server_comes_the_keeper_answers_itself(kept: Kept) -> None:
    kept.start()
    idle = await kept.client(b"first")
    assert await answered(idle) == (200, b"42")
    await until(lambda: kept.num_idle() == 1)
    kept.kill()
    for client in (idle, await kept.client()):
        await client.send(GET % b"again")
        status, body = await answered(client)
        assert (status, b"server_lost" in body) == (503, True)
        assert await client.is_closed()
    kept.start()
    while (await answered(client := await kept.client(b"back")))[0] != 200:
        await client.is_closed()
        await asyncio.sleep(0.1)  # the keeper answers at once, and a server takes a while to start


@pytest.mark.parametrize("kept", [(3600.0, 3600.0)], indirect=True)
async def test_clients_are_told_when_to_come_again_and_who_does_waits_for_the_next_server(kept: Kept) -> None:
    kept.start()
    silent = await kept.client(b"first")
    assert await answered(silent) == (200, b"42")
    asked = await kept.client(b"never")
    await until(lambda: (len(kept.copies()), kept.num_idle()) == (2, 1))
    kept.kill()
    for client in (asked, await kept.client(b"now")):
        async with asyncio.timeout(60.0):
            head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        told = next(line for line in head.splitlines() if line.startswith(b"retry-after: "))
        assert 3000 < int(told.partition(b": ")[2]) <= 3600, "until another one is due"
    early = await kept.client()  # it is taken while the keeper stands in, and asks when it no longer does
    await until(lambda: len(kept.keeper._idle) == 2)
    kept.keeper._return_s = 0.0
    await until(lambda: not kept.keeper._is_standing_in)
    for client in (silent, early):
        await client.send(GET % b"late")
    late = await kept.client(b"late")
    kept.start()
    for client in (silent, early, late):
        assert await answered(client) == (200, b"42")


async def test_a_closed_connection_ends_for_its_client_too(kept: Kept) -> None:
    kept.start()
    client = await kept.client()
    await client.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert await answered(client) == (200, b"42")
    assert await client.is_closed()
    await until(lambda: not kept.copies())


@pytest.mark.parametrize("kept", [(7200.0, 3600.0)], indirect=True)
@pytest.mark.parametrize("is_last", [False, True], ids=["replaced", "ended"])
async def test_an_ingress_that_is_to_end_stops_to_listen_and_who_asks_then_is_for_the_next(kept: Kept, is_last: bool) -> None:
    kept.start()
    ending = await kept.client(b"end")  # which is answered once nobody listens there
    if is_last:
        kept.keeper.stand_in()
    assert await answered(ending) == (200, b"42")
    assert await ending.is_closed()
    late = await kept.client(b"late")
    if not is_last:
        assert kept.process is not None
        kept.process.join(60)
        kept.start()
    assert (await answered(late))[0] == (503 if is_last else 200)


async def test_a_silent_server_listens_nowhere() -> None:
    with closing(socket.socket()) as own:
        own.bind(("127.0.0.1", 0))
        server = _SilentServer(uvicorn.Config(app, lifespan="off", log_level="critical"))
        server.should_exit = True
        await server.serve(sockets=[own])
        assert (server.started, server.servers, own.fileno()) == (True, [], -1)
