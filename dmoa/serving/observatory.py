"""What the page of a server reads and does, over the actors of its app; implements `http.page.PageService`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ray.exceptions import RayError, RayTaskError

from dmoa.errors import CheckpointError, NoAgentError, RequestError
from dmoa.serving.router.client import RemoteRouter
from dmoa.serving.trace_list import AgentStatistics, TraceFilter, TracePage, TraceSummary
from dmoa.serving.what_if import DecidedStep, branch, by_gate, by_policy
from dmoa.swarm import Swarm
from dmoa.trace import Trace
from dmoa.types import Event, Query

AWAY = "the router is away; try again in a moment"
TRACES_AWAY = "the trace store is away; try again in a moment"


class Observatory:
    """The page's view of one app."""

    def __init__(self, *, traces: Any, router: RemoteRouter, actor: Any, swarm: Swarm) -> None:
        """`traces` and `actor` are the trace store's and the router's handles."""
        self._traces = traces
        self._router = router
        self._actor = actor
        self._swarm = swarm
        self._agents = swarm.config.agent_names

    async def status(self) -> dict[str, Any] | None:
        """Return the router's account of itself; None while it is away."""
        found = await self._router.status()
        return None if found is None else asdict(found)

    async def statistics(self, key_hash: str | None) -> list[AgentStatistics]:
        """Return what the agents did in the traces of a key."""
        try:
            return await self._traces.statistics.remote(self._agents, key_hash)
        except RayError:
            return []

    async def traces(self, wanted: TraceFilter, key_hash: str | None) -> TracePage:
        """Return a page of the traces of a key. Raises RequestError (503) while the store is away: it does not have none."""
        try:
            return await self._traces.listed.remote(wanted, key_hash)
        except RayError as error:
            raise RequestError(TRACES_AWAY, code="traces_away", status=503) from error

    async def gates(self) -> dict[str, Any]:
        """Return the current gate and the history. Raises NoAgentError while the router is away."""
        history, status = await self._ask("history"), await self._ask("status")
        return {"current": status.gate_version, "history": history}  # the last entry may be of an offer that was refused

    async def rollback(self, version: str | None, note: str) -> dict[str, Any]:
        """Make an earlier gate current again. Raises RequestError where there is none such."""
        return await self._ask("rollback", version, note)

    async def what_if(self, trace: Trace, *, gate_version: str | None, policy: str | None) -> list[DecidedStep]:
        """Decide every step of a trace again. Raises RequestError."""
        if gate_version is not None:
            return await by_gate(trace, self._router, gate_version)
        return await by_policy(trace, self._swarm, policy or "")

    def branch(
        self, trace: Trace, trace_id: str, *, step: int, policy: str | None, agents: tuple[str, ...]
    ) -> tuple[Query, AsyncGenerator[Event]]:
        """Return the query that goes on from before a step of a trace, and its events. Raises RequestError."""
        return branch(trace, self._swarm, trace_id, step=step, policy=policy, agents=agents)

    def failed(self, summary: TraceSummary, key_hash: str) -> None:
        """Keep the summary of a query that was not answered."""
        with suppress(RayError):
            self._traces.put_failed.remote(summary.model_dump_json(), key_hash)

    async def _ask(self, method: str, *arguments: object) -> Any:
        try:
            return await getattr(self._actor, method).remote(*arguments)
        except RayTaskError as error:
            if isinstance(error.cause, CheckpointError):
                raise RequestError(f"version: {error.cause}", param="version", code="unknown_version", status=404) from error
            raise
        except RayError as error:
            raise NoAgentError(AWAY) from error
