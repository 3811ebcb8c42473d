"""An HTTP server in a thread of its own: what passes between it and the app's event loop, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import asynccontextmanager, closing

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from dmoa.serving.http.apart import Passage, serve_apart
from dmoa.serving.http.errors import SurpriseGuard
from dmoa.serving.http.front import Bounds, Front
from tests.unit.serving.fake_service import until

App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def reply(send: Send, *pieces: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    monkeypatch.setattr(uvicorn, "Server", uvicorn.Server)  # to be restored
    serve_apart()

    @asynccontextmanager
    async def serving(app: App, queries: int = 256, loop: asyncio.AbstractEventLoop | None = None) -> AsyncIterator[str]:
        front = Front(Passage(app, loop or asyncio.get_running_loop()))
        front._any.bounds = Bounds(queries=queries)
        with closing(socket.socket()) as own:
            own.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(SurpriseGuard(front), lifespan="off", log_level="critical"))
            running = asyncio.create_task(server.serve([own]))
            try:
                await until(lambda: server.started)
                yield f"http://127.0.0.1:{own.getsockname()[1]}"
            finally:
                server.should_exit = True
                await running

    return serving


async def test_who_is_refused_does_not_wait_for_the_apps_work(serve: Callable[..., object]) -> None:
    is_busy, is_refused = threading.Event(), threading.Event()
    threads: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        threads.append(threading.current_thread().name)
        assert (await receive())["body"] == b"first"
        is_busy.set()
        assert is_refused.wait(30), "the loop of the app stands still until then"
        await reply(send, b"done")

    def clients(url: str) -> tuple[int, int]:
        first: list[int] = []
        asking = threading.Thread(
            target=lambda: first.append(httpx.post(f"{url}/v1/first", content=b"first", timeout=60).status_code)
        )
        asking.start()
        assert is_busy.wait(30)
        second = httpx.post(f"{url}/v1/second", content=b"second", timeout=60).status_code
        is_refused.set()
        asking.join()
        return first[0], second

    async with serve(app, queries=1) as url:  # type: ignore[attr-defined]
        assert await asyncio.to_thread(clients, url) == (200, 429)
    assert threads == [threading.current_thread().name]


async def test_a_stream_comes_in_order_and_a_client_that_goes_away_is_told_of(serve: Callable[..., object]) -> None:
    told: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if scope["path"] == "/stream":
            await reply(send, *(b"%d;" % number for number in range(200)))
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        told.append((await receive())["type"])

    async with serve(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:  # type: ignore[attr-defined]
        assert (await http.post("/stream")).text == "".join(f"{number};" for number in range(200))
        async with http.stream("POST", "/half") as answer:
            assert await anext(answer.aiter_raw()) == b"begun"
        await until(lambda: told == ["http.disconnect"])


async def test_the_place_of_a_client_that_goes_away_is_free_before_the_app_has_heard_of_it(serve: Callable[..., object]) -> None:
    is_busy, is_refused = threading.Event(), threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if scope["path"] == "/v1/cut":
            is_busy.set()
            assert is_refused.wait(30), "the loop of the app stands still until then"
        await reply(send, b"done")

    def clients(url: str) -> int:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as cut:
            cut.sendall(b"POST /v1/cut HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert is_busy.wait(30)
        deadline = time.monotonic() + 30
        with ThreadPoolExecutor(1) as pool:
            while True:
                asked = pool.submit(httpx.post, f"{url}/v1/next", timeout=60)
                if not wait([asked], 0.2).done or time.monotonic() > deadline:  # it is let through, and the app stands still
                    is_refused.set()
                    return asked.result().status_code

    async with serve(app, queries=1) as url:  # type: ignore[attr-defined]
        assert await asyncio.to_thread(clients, url) == 200


async def test_an_app_that_fails_or_ends_without_an_answer_is_an_error(serve: Callable[..., object]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/fails":
            raise ValueError("a bug")
        if scope["path"] == "/cancelled":
            raise asyncio.CancelledError

    async with serve(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:  # type: ignore[attr-defined]
        found = await http.post("/fails")
        assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")
        for path in ("/cancelled", "/silent"):
            found = await http.post(path)
            assert (found.status_code, found.json()["error"]["code"]) == (503, "server_lost")


async def test_where_the_apps_loop_has_ended_clients_are_told_to_come_again(serve: Callable[..., object]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("it has no loop")

    ended = asyncio.new_event_loop()
    ended.close()
    async with serve(app, loop=ended) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:  # type: ignore[attr-defined]
        for _ in range(2):
            found = await http.post("/v1/x")
            assert (found.status_code, found.json()["error"]["code"]) == (503, "server_lost")
            assert found.headers["retry-after"] == "1"


async def test_what_ends_the_server_ends_who_waits_for_it(serve: Callable[..., object]) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = uvicorn.Server(uvicorn.Config(lambda: None, lifespan="off", log_level="critical", port=taken.getsockname()[1]))
        with pytest.raises(SystemExit):
            async with asyncio.timeout(30):
                await server.serve()
