"""What the HTTP app needs of a swarm: one protocol, implemented by the Ray ingress and by in-memory services.

The app of `serving/http/routes` is built over this and nothing else, so that the whole HTTP contract runs without Ray.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from dmoa.config import LimitsConfig
from dmoa.protocols import SwarmClient
from dmoa.serving.feedback_buffer import KeptOutcome, Said
from dmoa.serving.trace_list import AgentStatistics, TraceFilter, TracePage, TraceSummary
from dmoa.serving.what_if import DecidedStep
from dmoa.trace import AnsweredQuery, Trace
from dmoa.types import Event, Query


class PageService(Protocol):
    """What the page needs of a pool beside `SwarmService`."""

    async def status(self) -> dict[str, Any] | None:
        """Return the router's account of itself; None while it is away."""

    async def statistics(self, key_hash: str | None) -> list[AgentStatistics]:
        """Return what the agents did in the traces of a key; None: of all keys."""

    async def traces(self, wanted: TraceFilter, key_hash: str | None) -> TracePage:
        """Return a page of the traces of a key; None: of all keys. Raises DmoaError while they are away."""

    async def gates(self) -> dict[str, Any]:
        """Return the current gate and the history. Raises DmoaError while the router is away."""

    async def rollback(self, version: str | None, note: str) -> dict[str, Any]:
        """Make an earlier gate current again. Raises RequestError where there is none such."""

    async def what_if(self, trace: Trace, *, gate_version: str | None, policy: str | None) -> list[DecidedStep]:
        """Decide every step of a trace again, by another gate version or policy; asks no agent. Raises RequestError."""

    def branch(
        self, trace: Trace, trace_id: str, *, step: int, policy: str | None, agents: tuple[str, ...]
    ) -> tuple[Query, AsyncGenerator[Event]]:
        """Return the query `trace_id` that goes on from before a step of a trace, and its events. Raises RequestError."""

    def failed(self, summary: TraceSummary, key_hash: str) -> None:
        """Keep the summary of a query that was not answered; returns at once and never raises."""


class SwarmService(SwarmClient, Protocol):
    """One pool that answers queries, and tells of itself."""

    pool: str
    """The pool's name: the model name that clients use."""
    agents: tuple[str, ...]
    """Names of the agents, in the pool's order."""
    policies: tuple[str, ...]
    """Names of the policies; the first one answers where a client names none. `single` is among them."""
    limits: LimitsConfig
    """The pool's limits; a client may only lower them."""
    abilities: frozenset[str]
    """What at least one engine of the pool can do beyond plain replies, as `EngineEntry.abilities` names it."""

    @property
    def page(self) -> PageService:
        """What the server's page reads and does."""

    async def ready(self) -> dict[str, str]:
        """Return agent -> "up", "cold" (scaled to zero, and started when it is asked), or the reason why it is neither."""

    async def metrics(self) -> str:
        """Return the router's aggregate in the Prometheus text format."""

    async def trace(self, trace_id: str, key_hash: str | None) -> dict[str, Any] | None:
        """Return the trace of a query that the same key made, without a key (an admin) anybody's; None if there is none."""

    def record(self, answered: AnsweredQuery, key_hash: str) -> None:
        """Keep the trace of an answered query, or no more than that there was one; returns at once and never raises."""

    async def judge(self, outcome: KeptOutcome, key_hash: str) -> Said:
        """Keep what the key that made a query says of it, and say whether that was new.

        Raises RequestError: 404 where no query of this key has the trace id, 429 for too many, 503 where they cannot be kept.
        """
