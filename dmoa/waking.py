"""Starting replicas of cold agents: in the background, and for queries that wait for one.

`asking` decides who is woken and who waits; here one ping per place does it, however many queries want the place. A ping
that waits in a queue is also what keeps an autoscaler from giving up the replica before it is there.
"""

from __future__ import annotations

import asyncio
import logging

from dmoa.errors import AgentUnavailableError
from dmoa.protocols import AgentClient
from dmoa.redaction import redact_text

_LOG = logging.getLogger("dmoa.waking")
COLD_PATIENCE_S = 600.0
"""How long a replica may take to start; a large model's takes minutes. After that its agent counts as dead."""


class Waker:
    """Has replicas started by pinging agents without one."""

    def __init__(self, agents: AgentClient) -> None:
        self._agents = agents
        self._waking: dict[str, asyncio.Task[None]] = {}

    def wake(self, place: str, agent: str) -> asyncio.Task[None]:
        """Have a replica started at the place of `agent`; returns at once the task that ends when it answers."""
        found = self._waking.get(place)
        if found is None:
            found = asyncio.get_running_loop().create_task(self._ping(agent))
            self._waking[place] = found
            found.add_done_callback(lambda task: self._over(place, task))
        return found

    async def is_up(self, place: str, agent: str, *, within_s: float | None) -> bool:
        """Wait until the place of `agent` answers; False if it does not in time (None: no limit), and then it goes on starting.

        Raises AgentUnavailableError where it cannot start, AgentOverloadedError where its queue is full.
        """
        task = self.wake(place, agent)
        done, _ = await asyncio.wait((task,), timeout=within_s)
        if done:
            task.result()
        return bool(done)

    async def _ping(self, agent: str) -> None:
        try:
            async with asyncio.timeout(COLD_PATIENCE_S):
                await self._agents.ping(agent)
        except TimeoutError:
            raise AgentUnavailableError(f"agent {agent!r}: no replica of it started within {COLD_PATIENCE_S:.0f} s") from None

    def _over(self, place: str, task: asyncio.Task[None]) -> None:
        del self._waking[place]
        if not task.cancelled() and task.exception() is not None:
            _LOG.warning("%s was not woken: %s", place, redact_text(str(task.exception())))
