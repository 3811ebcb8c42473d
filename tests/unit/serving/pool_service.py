"""A scripted pool behind the whole HTTP front, in this process: real step loop, real gate, real trace store, real page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from dmoa.agents.pool import build_encoder, build_local, build_pool_gate, fingerprint
from dmoa.config import Config, LimitsConfig
from dmoa.routing import LocalRouter
from dmoa.serving.actors import pack_record
from dmoa.serving.trace_list import AgentStatistics, TraceSummary
from dmoa.serving.traces import TraceStore
from dmoa.serving.what_if import DecidedStep, branch, by_gate, by_policy
from dmoa.swarm import Swarm
from dmoa.testing import FakeEncoder, fixed_gate
from dmoa.trace import AnsweredQuery, Trace
from dmoa.types import Event, Query
from tests.unit.serving.fake_service import FakePage, FakeService


class PoolPage(FakePage):
    """Implements `PageService` over a swarm in this process; its gates are two, `v1` and `v2`."""

    def __init__(self, swarm: Swarm) -> None:
        super().__init__()
        self.swarm = swarm
        self.store = TraceStore(swarm.config.router)
        self.tasks: set[asyncio.Task[None]] = set()

    async def status(self) -> dict[str, Any] | None:
        return {"gate_version": self.history[-1]["version"], "pool": self.swarm.config.name, "decisions": 1, "score": "raw"}

    async def statistics(self, key_hash: str | None) -> list[AgentStatistics]:
        return await self.store.statistics(self.swarm.config.agent_names, key_hash)

    async def what_if(self, trace: Trace, *, gate_version: str | None, policy: str | None) -> list[DecidedStep]:
        if gate_version is not None:
            return await by_gate(trace, self.swarm.router, gate_version)
        return await by_policy(trace, self.swarm, policy or "")

    def branch(
        self, trace: Trace, trace_id: str, *, step: int, policy: str | None, agents: tuple[str, ...]
    ) -> tuple[Query, AsyncGenerator[Event]]:
        return branch(trace, self.swarm, trace_id, step=step, policy=policy, agents=agents)

    def failed(self, summary: TraceSummary, key_hash: str) -> None:
        self.later(self.store.put_failed(summary.model_dump_json(), key_hash))

    def later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class PoolService(FakeService):
    """Implements `SwarmService` over `PoolPage`'s swarm."""

    page: PoolPage

    def __init__(self, swarm: Swarm) -> None:
        super().__init__()
        self.page = PoolPage(swarm)
        self.pool, self.agents, self.policies = swarm.config.name, swarm.config.agent_names, swarm.policies
        self.limits: LimitsConfig = swarm.config.limits
        self.states = dict.fromkeys(self.agents, "up")

    async def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        async for event in self.page.swarm.ask(query, policy, agent):
            yield event

    async def trace(self, trace_id: str, key_hash: str | None) -> dict[str, Any] | None:
        await asyncio.gather(*self.page.tasks)
        return json.loads(await self.page.store.get(trace_id, key_hash) or "null")

    def record(self, answered: AnsweredQuery, key_hash: str) -> None:
        kept = replace(answered, pool=self.pool, fingerprint=fingerprint(self.page.swarm.config))
        self.page.later(self.page.store.put_all([(pack_record(kept), key_hash)]))


def pool_service(config: Config, probabilities: Mapping[str, Mapping[str, float]] | None = None) -> PoolService:
    """A service of a pool; `probabilities`: gates by version that give the same ones whatever they read, the last one current.

    Without them the pool's own untrained gate, and its real encoder.
    """
    agents, engines = build_local(config)
    router = LocalRouter()
    if probabilities is None:
        gate, record = build_pool_gate(config)
        router.install(record.version, gate)
    for version, shares in (probabilities or {}).items():
        router.install(version, fixed_gate(shares, max_agents=2))
    encoder = build_encoder(config) if probabilities is None else FakeEncoder()
    return PoolService(Swarm(config, agents=agents, router=router, encoder=encoder, engines=engines))
