"""Work for a client that may hang up: one task per query, cancelled when nobody is left to read the answer.

`until_gone` races any work against the disconnect; `EventStream` is the server-sent-events response built on it.
Starlette's own StreamingResponse sends its headers before the first item exists, so that an early error could not
become an HTTP status any more, and stops listening for the disconnect under newer ASGI servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it and raise ClientDisconnect when the client goes away first."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and watch.exception() is None:
            raise ClientDisconnect
        return await task
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close an iterator at the end of the block, if it is one that can be closed."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


class EventStream(Response):
    """Sends server-sent events; an error before the first event is raised, so that it becomes an HTTP status."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        self.events = events
        self._is_started = False
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send_all(send))
        except ClientDisconnect:
            if not self._is_started:
                raise

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            async for event in events:
                if not self._is_started:
                    self._is_started = True
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                if event:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
