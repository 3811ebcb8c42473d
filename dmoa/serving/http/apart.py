"""Runs an ingress's HTTP server in a thread of its own: who is refused does not wait for the work of those who are not.

The server, its front and its bounds have an event loop there, and requests that are let through one in the loop of the app. A
request costs two wake-ups: one for it, and one for an answer that is not streamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from concurrent.futures import Future

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Passage:
    """ASGI middleware between the thread of the server, in which it is called, and the app's event loop."""

    def __init__(self, app: ASGIApp, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self._loop = loop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = _Request(await receive(), asyncio.get_running_loop())
        answering = request.run(self.app, scope)
        try:
            running = asyncio.run_coroutine_threadsafe(answering, self._loop)
        except RuntimeError:  # the app's loop has ended
            answering.close()
            return
        watching = asyncio.create_task(self._watch(receive, request))
        try:
            while messages := await request.answered.get():
                for message in messages:
                    await send(message)
                if messages[-1]["type"] == "http.response.body" and not messages[-1].get("more_body", False):
                    return
            if not request.is_gone:
                with contextlib.suppress(asyncio.CancelledError):  # in which the app may end
                    await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            running.cancel()
            raise
        finally:
            watching.cancel()

    async def _watch(self, receive: Receive, request: _Request) -> None:
        """Tell the app that its client went away, and wait no longer: it ends by itself."""
        while (await receive())["type"] != "http.disconnect":
            pass
        request.is_gone = True
        request.answered.put_nowait(None)
        with contextlib.suppress(RuntimeError):  # the app's loop has ended
            self._loop.call_soon_threadsafe(request.gone.set)


class _Request:
    """One request, as the app sees it."""

    def __init__(self, body: Message, server: asyncio.AbstractEventLoop) -> None:
        self.gone = asyncio.Event()
        self.answered: asyncio.Queue[list[Message] | None] = asyncio.Queue()
        self.is_gone = False
        self._server = server
        self._body: Message | None = body
        self._start: list[Message] = []

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        finally:
            self._tell(None)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return body
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        """Hand a message over; the start of an answer goes with what follows."""
        self._start.append(message)
        if message["type"] != "http.response.start":
            messages, self._start = self._start, []
            self._tell(messages)

    def _tell(self, messages: list[Message] | None) -> None:
        with contextlib.suppress(RuntimeError):  # the server's loop has ended
            self._server.call_soon_threadsafe(self.answered.put_nowait, messages)


def serve_apart() -> None:
    """Have the uvicorn server that this process starts next run in a thread of its own."""

    class Apart(uvicorn.Server):
        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            """Return once the server has ended, which it does where this is cancelled; raises what ended it."""
            loop, serving = asyncio.get_running_loop(), super().serve(sockets)
            ended: Future[None] = Future()
            ended.set_running_or_notify_cancel()  # from now on whoever waits for it cannot cancel it

            def run() -> None:
                try:
                    with asyncio.Runner(loop_factory=type(loop)) as runner:
                        runner.run(serving)
                except BaseException as error:  # SystemExit too, of which a thread says nothing: raised where it is awaited
                    ended.set_exception(error)
                else:
                    ended.set_result(None)

            threading.Thread(target=run, name="dmoa-http", daemon=True).start()
            try:
                await asyncio.wrap_future(ended)
            finally:
                self.should_exit = self.force_exit = True

    uvicorn.Server = Apart  # type: ignore[misc]
