"""The answering stage of rollouts, run by Ray Data: a swarm per actor, kept full, every query answered with exploration.

Where a swarm comes from is put together in `cli`; the stage knows the protocol alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyarrow as pa

from dmoa.config import Config
from dmoa.core.features import Preset
from dmoa.dataflow import AdmissionControl, BackgroundLoop, BatchedWriter
from dmoa.policies.exploring import ExploringPolicy
from dmoa.policies.registry import PolicyContext, build_policy
from dmoa.swarm import Swarm
from dmoa.training.rollout_records import RolloutQuery, table_of
from dmoa.training.rollout_writer import Collected
from dmoa.types import Answer, Limits, Query
from dmoa.validation import redact_text


class Collector(Protocol):
    """A swarm that answers with exploration."""

    async def collect(self, query: Query) -> Answer:
        """Answer one query, its steps with decisions and inputs of the gate. Raises DmoaError."""
        ...


class SwarmCollector:
    """A swarm of this process; implements `Collector`."""

    def __init__(self, swarm: Swarm, epsilon: float | None) -> None:
        """`epsilon` as in `ExploringPolicy`."""
        self._swarm = swarm
        self._epsilon = epsilon

    async def collect(self, query: Query) -> Answer:
        """Answer one query. Raises DmoaError."""
        swarm = self._swarm
        inner = build_policy("dmoa", PolicyContext(config=swarm.config, router=swarm.router, encoder=swarm.encoder))
        policy = ExploringPolicy(inner, epsilon=self._epsilon, budget_tokens=swarm.config.limits.budget_tokens)
        async with aclosing(swarm.follow(query, policy)) as events:
            async for event in events:
                if isinstance(event, Answer):
                    answer = event
        return answer


def width(config: Config, epsilon: float | None) -> int:
    """Return the agent calls that one query may have under way."""
    everyone = len(config.agents)
    return everyone if epsilon is None else min(config.gate.activation.max_agents + 1, everyone)


OpenCollector = Callable[[], Collector]
"""Builds a collector where it is to work, which may be another process: it pickles, what it builds need not. May block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutAsking:
    """How every query of a collection is asked."""

    seed: int
    round: int
    limits: Limits
    """Budgets of a query; one with more stages than steps allowed still runs all its stages."""
    preset: Preset
    fingerprint: str
    """Of the pool."""


def query_of(asked: RolloutQuery, asking: RolloutAsking) -> Query:
    """Return the query to be asked; its id, and with it sampling and exploration, depends on query, seed and round alone."""
    digest = hashlib.sha256(f"{asked.query_id}\0{asking.seed}\0{asking.round}".encode()).hexdigest()
    limits = replace(asking.limits, max_steps=max(asking.limits.max_steps, len(asked.stages)))
    return Query(trace_id=digest[:32], text=asked.text, limits=limits, stages=asked.stages, is_streamed=False)


class CollectStage:
    """Answers the queries of a shard and hands their rows to the writer."""

    def __init__(self, open_collector: OpenCollector, asking: RolloutAsking, writer: Any, places: int, width: int) -> None:
        """Build the swarm. `places`: agent calls that may be under way; `width`: how many one query may take."""
        self._asking = asking
        self._width = width
        self._room = AdmissionControl(places)
        self._outbox: BatchedWriter[Collected] = BatchedWriter(writer.take.remote)
        self._collector = open_collector()
        self._loop = BackgroundLoop()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answer a shard; returns how many queries that were. Called from several threads at once."""
        return pa.table({"queries": [self._loop.run_all(self._queries(block))]})

    def _queries(self, block: pa.Table) -> Iterator[Coroutine[Any, Any, None]]:
        for line in block["query"].to_pylist():
            yield self._query(RolloutQuery.model_validate_json(line))

    async def _query(self, asked: RolloutQuery) -> None:
        taken = await self._room.enter(self._width)
        try:
            answer = await self._collector.collect(query_of(asked, self._asking))
        except Exception as error:  # agents are called here: a query that fails is counted with its error, and asked again later
            collected = Collected(query_id=asked.query_id, error=redact_text(f"{type(error).__name__}: {error}"))
        else:
            asking = self._asking
            table = table_of(asked, answer, preset=asking.preset, seed=asking.seed, fingerprint=asking.fingerprint)
            collected = Collected(query_id=asked.query_id, table=table)
        finally:
            self._room.leave(taken)
        await self._outbox.put(collected)
