"""The room of an answering actor's engines: how many agent calls its queries may have under way together."""

from __future__ import annotations

import asyncio
from collections import deque

FILL = 2
"""Agent calls let in per place of the engines' batches: the early finishers of a step leave places empty until its last
agent ends, and calls that wait fill them."""


class Room:
    """Lets in as many queries as the engines have places for, first come first served."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = places
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, width: int) -> int:
        """Wait for `width` places and take them; returns how many were taken, to be given back by `leave`."""
        width = min(width, self._places)
        if self._free >= width and not self._waiting:
            self._free -= width
            return width
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((width, turn))
        await turn
        return width

    def leave(self, width: int) -> None:
        """Give places back."""
        self._free += width
        while self._waiting and self._waiting[0][0] <= self._free:
            needed, turn = self._waiting.popleft()
            self._free -= needed
            turn.set_result(None)
