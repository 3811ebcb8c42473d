"""Calls that no replica can or will take: given up, not waited for.

Serve keeps a call without a replica in the caller's queue for as long as it takes, and tells nobody. The router sees Serve's
status; what calls are slow is known here. So slow calls ask the router, once a second for all of them, whether anything runs
that could answer them. What runs need not take a call: one that no replica has accepted has its patience. A queue that moves
is no such case, and a replica that is being started from zero may take longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dmoa.dispatch import COLD_PATIENCE_S, PATIENCE_S


@dataclass(frozen=True, slots=True)
class Absent:
    """Whom no call can reach, as the router sees it."""

    agents: frozenset[str] = frozenset()
    """Those that should have a replica and that none can still be answering calls to."""
    version: str | None = None
    """Of the pool that the router serves; None where it could not be asked."""
    cold: frozenset[str] = frozenset()
    """Agents scaled to zero, or on their way up from there: no replica can take calls to them yet."""


Gone = Callable[[], Awaitable[Absent]]
"""Asks the router who is absent."""
SLOW_S = 2.0
"""How long a call is trusted to be under way."""
_LOOK_S = 1.0


def _taken() -> bool:
    return True


class Vigil:
    """Watches the slow calls of one process."""

    def __init__(self, gone: Gone) -> None:
        self._ask = gone
        self._known = Absent()
        self._known_s = float("-inf")
        self._looking = asyncio.Lock()
        self._moved: dict[object, tuple[float, float]] = {}

    def watch(
        self,
        agent: str,
        give_up: Callable[[], None],
        *,
        is_taken: Callable[[], bool] = _taken,
        patience_s: float = PATIENCE_S,
        queue: object = None,
    ) -> Watched:
        """Watch one call from now on; `give_up` is called once, if its agent turns out to be gone.

        So it is where no replica takes the call for `patience_s`, as `is_taken` tells. That time begins anew with every call
        of the same `queue` that was sent before it and is answered, and while the agent is cold.
        """
        return Watched(self, agent, give_up, is_taken=is_taken, patience_s=patience_s, queue=queue)

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

    def is_cold(self, agent: str) -> bool:
        """Tell whether an agent was cold when the router was last asked."""
        return agent in self._known.cold

    def answered(self, queue: object, sent_s: float) -> None:
        """Note that a call of a queue was answered; times are `time.monotonic()`."""
        self._moved[queue] = (sent_s, time.monotonic())

    def moved_s(self, queue: object, sent_s: float) -> float:
        """Return when a call of a queue that was sent before `sent_s` was answered, as far as the last answer tells."""
        last_sent_s, at_s = self._moved.get(queue, (float("inf"), 0.0))
        return at_s if last_sent_s < sent_s else float("-inf")


class Watched:
    """One call under watch."""

    def __init__(
        self,
        vigil: Vigil,
        agent: str,
        give_up: Callable[[], None],
        *,
        is_taken: Callable[[], bool],
        patience_s: float,
        queue: object,
    ) -> None:
        self._vigil = vigil
        self._agent = agent
        self._give_up = give_up
        self._is_taken = is_taken
        self.patience_s = patience_s
        self._queue = queue
        self._sent_s = time.monotonic()
        self.is_given_up = False
        self.is_untaken = False
        """Whether it was given up because no replica took it, though its agent has some."""
        self._looking: asyncio.Task[None] | None = None
        # A timer, not a task: nearly all calls end before it goes off.
        self._timer = asyncio.get_running_loop().call_later(SLOW_S, self._begin)

    def end(self) -> None:
        """Stop watching: the call is over, or its replica has answered."""
        self._timer.cancel()
        if self._looking is not None:
            self._looking.cancel()

    def answered(self) -> None:
        """Stop watching: its replica has answered, so its queue moves."""
        self.end()
        self._vigil.answered(self._queue, self._sent_s)

    def _begin(self) -> None:
        self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        since_s = self._sent_s
        while not await self._vigil.is_gone(self._agent):
            since_s = max(since_s, self._waits_since_s())
            if not self._is_taken() and time.monotonic() - since_s >= self.patience_s:
                self.is_untaken = True
                break
            await asyncio.sleep(_LOOK_S)
        self.is_given_up = True
        self._give_up()

    def _waits_since_s(self) -> float:
        """Return when the call could last hope for a replica to take it soon."""
        now_s = time.monotonic()
        if self._vigil.is_cold(self._agent) and now_s - self._sent_s < COLD_PATIENCE_S:
            return now_s
        return self._vigil.moved_s(self._queue, self._sent_s)
