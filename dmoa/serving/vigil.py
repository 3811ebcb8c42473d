"""Calls to agents that have lost all their replicas: given up, not waited for.

Serve keeps a call without a replica in the caller's queue for as long as it takes, and tells nobody. The router sees Serve's
status; what calls are slow is known here. So slow calls ask the router, once a second for all of them, whether anything runs
that could answer them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Absent:
    """Whom no call can reach, as the router sees it."""

    agents: frozenset[str] = frozenset()
    """Those that should have a replica and that none can still be answering calls to."""
    version: str | None = None
    """Of the pool that the router serves; None where it could not be asked."""


Gone = Callable[[], Awaitable[Absent]]
"""Asks the router who is absent."""
SLOW_S = 2.0
"""How long a call is trusted to be under way."""
_LOOK_S = 1.0


class Vigil:
    """Watches the slow calls of one process."""

    def __init__(self, gone: Gone) -> None:
        self._ask = gone
        self._known = Absent()
        self._known_s = float("-inf")
        self._looking = asyncio.Lock()

    def watch(self, agent: str, give_up: Callable[[], None]) -> Watched:
        """Watch one call from now on; `give_up` is called once, if its agent turns out to be gone."""
        return Watched(self, agent, give_up)

    @property
    def served(self) -> str | None:
        """Version of the pool that the router served when it was last asked; None where that is not known."""
        return self._known.version

    async def is_gone(self, agent: str) -> bool:
        """Tell whether an agent has no replica, as of a second ago at most."""
        async with self._looking:
            if time.monotonic() - self._known_s > _LOOK_S:
                self._known = await self._ask()
                self._known_s = time.monotonic()
        return agent in self._known.agents


class Watched:
    """One call under watch."""

    def __init__(self, vigil: Vigil, agent: str, give_up: Callable[[], None]) -> None:
        self._vigil = vigil
        self._agent = agent
        self._give_up = give_up
        self.is_given_up = False
        self._looking: asyncio.Task[None] | None = None
        # A timer, not a task: nearly all calls end before it goes off.
        self._timer = asyncio.get_running_loop().call_later(SLOW_S, self._begin)

    def end(self) -> None:
        """Stop watching: the call is over, or its replica has answered."""
        self._timer.cancel()
        if self._looking is not None:
            self._looking.cancel()

    def _begin(self) -> None:
        self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while not await self._vigil.is_gone(self._agent):  # noqa: ASYNC110 Serve is watched, by asking
            await asyncio.sleep(_LOOK_S)
        self.is_given_up = True
        self._give_up()
