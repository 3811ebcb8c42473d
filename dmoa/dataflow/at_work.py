"""What an answering actor works with: an event loop of its own, and an outbox to the actor that writes.

Several shards are under way at once in one actor, and their queries share the loop, the room and the outbox, so that the
end of a shard leaves no engine idle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from threading import Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class OwnLoop:
    """An event loop in a thread of its own: Ray Data's would stand still whenever its output queue is full."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="answering", daemon=True).start()

    def run_all(self, work: Iterable[Coroutine[Any, Any, None]]) -> int:
        """Run coroutines side by side to their ends and return how many; raises what one of them raised.

        May be called from several threads at once.
        """
        under_way = [asyncio.run_coroutine_threadsafe(part, self._loop) for part in work]
        for part in under_way:
            part.result()
        return len(under_way)


class Outbox(Generic[T]):
    """Hands items to a writer; those that come while a hand-over is under way go together in the next."""

    def __init__(self, send: Callable[[list[T]], Awaitable[object]]) -> None:
        """`send` returns once the items are safe."""
        self._send = send
        self._waiting: list[tuple[T, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None

    async def put(self, item: T) -> None:
        """Return once the item is safe; raises what the writer met."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting.append((item, done))
        if self._flusher is None:
            self._flusher = loop.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    await self._send([item for item, _ in batch])
                except Exception as error:  # the writer is an actor: what it met belongs to every item of the batch
                    for _, done in batch:
                        done.set_exception(error)
                    continue
                for _, done in batch:
                    done.set_result(None)
        finally:
            self._flusher = None
