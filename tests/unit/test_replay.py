"""Replay: traces of real runs are routed again, bit for bit, and whatever differs is named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local, fingerprint
from dmoa.checkpoint import describe_gate
from dmoa.config import Config
from dmoa.core.gate import Gate
from dmoa.errors import TraceError
from dmoa.protocols import AgentClient
from dmoa.replay import replay_routing
from dmoa.routing import LocalRouter, build_gate
from dmoa.swarm import Swarm
from dmoa.testing import gate_spec
from dmoa.trace import AnsweredQuery, Trace, TraceRoute, read_traces, write_traces
from dmoa.types import AgentCall, AgentReply, Answer, Limits, Query, TextDelta

AGENTS = tuple(f"agent-{letter}" for letter in "abcdefg")
NUM_TRACES = 20


def pool() -> Config:
    """Seven scripted agents; some give the same answer, so that queries end after different numbers of steps."""
    replies = {name: f"The answer is {i if i < 5 else 5}." for i, name in enumerate(AGENTS)}
    return Config.model_validate(
        {
            "name": "pool",
            "llms": {"tiny": {"model": "scripted:tiny", "engine": "scripted", "engine_kwargs": {"replies": replies}}},
            "agents": [{"name": name, "llm": "tiny", "profile": f"You are {name}."} for name in AGENTS],
            "gate": {"activation": {"mass": 0.6, "max_agents": 3}},
            "limits": {"max_steps": 4},
        }
    )


class FirstAlone:
    """An agent client: of a step's agents the first alone answers."""

    def __init__(self, agents: AgentClient) -> None:
        self._agents = agents
        self._begun: set[tuple[str, int]] = set()

    async def call(self, call: AgentCall) -> AgentReply:
        if (call.trace_id, call.step) in self._begun:
            await asyncio.Event().wait()
        self._begun.add((call.trace_id, call.step))
        return await self._agents.call(call)

    def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        return self._agents.stream(call)

    async def ping(self, agent: str) -> None:
        await self._agents.ping(agent)


async def traces_of(
    config: Config, gate: Gate, version: str, policy: str = "dmoa", *, cold: frozenset[str] = frozenset()
) -> list[Trace]:
    """Run queries of different texts and limits, some of them with an agent masked from the start or in the middle."""
    router = LocalRouter()
    router.cold = cold
    router.install(version, gate)
    agents, engines = build_local(config)
    quorum = config.limits.quorum
    swarm = Swarm(config, agents=FirstAlone(agents) if quorum else agents, router=router, encoder=HashEncoder())
    traces = []
    for number in range(NUM_TRACES):
        if number == 8:
            router.report_unavailable(AGENTS[2], "gone")
        if number == 15:
            router.restore(AGENTS[2])
        limits = Limits(max_steps=4, max_agents=1 if number % 5 == 0 else None, quorum=quorum)
        asked = Query(trace_id=f"t{number}", text=f"Question {number}?", limits=limits)
        events = [event async for event in swarm.ask(asked, policy)]
        assert isinstance(events[-1], Answer)
        traces.append(AnsweredQuery(query=asked, answer=events[-1], pool=config.name, fingerprint=fingerprint(config)).trace())
    for engine in engines:
        await engine.close()
    return traces


@pytest.fixture(scope="module")
def gate() -> Gate:
    return build_gate(pool().gate, AGENTS)


@pytest.fixture(scope="module")
def version(gate: Gate) -> str:
    return describe_gate(gate, fingerprint=fingerprint(pool())).version


@pytest.fixture
async def traces(gate: Gate, version: str, tmp_path: Path) -> list[Trace]:
    """Twenty traces, through a file."""
    return read_traces(write_traces(tmp_path / "traces.jsonl", await traces_of(pool(), gate, version)))


async def test_traces_of_real_runs_are_worth_replaying(traces: list[Trace]) -> None:
    assert len(traces) == NUM_TRACES
    assert len({len(trace.routes) for trace in traces}) > 1
    assert len({(tuple(route.ranking), route.k) for trace in traces for route in trace.routes}) > 10
    assert any(route.masked for trace in traces for route in trace.routes)
    assert len({tuple(route.hidden_H) for route in traces[0].routes}) == len(traces[0].routes)


async def test_replay_repeats_every_decision_together_and_one_by_one(traces: list[Trace], gate: Gate, version: str) -> None:
    together = replay_routing(traces, gate, version)
    reverse = replay_routing(traces[::-1], gate, version)[::-1]
    alone = [replay_routing([trace], gate, version)[0] for trace in traces]
    for results in (together, reverse, alone):
        assert [result.trace_id for result in results] == [trace.trace_id for trace in traces]
        assert [result.differences for result in results] == [()] * NUM_TRACES
        for trace, result in zip(traces, results, strict=True):
            assert len(result.decisions) == len(trace.routes)
            for route, decided in zip(trace.routes, result.decisions, strict=True):
                assert np.asarray(route.hidden_H, np.float32).tobytes() == decided.hidden_H.tobytes()
                assert np.asarray(route.probability_A, np.float32).tobytes() == decided.probability_A.tobytes()


async def test_who_was_cold_is_in_the_trace_and_changes_no_decision(gate: Gate, version: str) -> None:
    warm = await traces_of(pool(), gate, version)
    asleep = await traces_of(pool(), gate, version, cold=frozenset({AGENTS[0], AGENTS[4]}))
    for trace, other, result in zip(asleep, warm, replay_routing(asleep, gate, version), strict=True):
        assert result.differences == ()
        assert len(trace.routes) == len(other.routes)
        for route, before, decided in zip(trace.routes, other.routes, result.decisions, strict=True):
            assert (route.cold, before.cold, decided.cold) == ([AGENTS[0], AGENTS[4]], [], (AGENTS[0], AGENTS[4]))
            assert route.model_copy(update={"cold": []}) == before


async def test_steps_that_asked_more_agents_replay_and_say_what_they_were_judged_by() -> None:
    gate = build_gate(pool().gate, AGENTS)
    gate.spec = replace(gate.spec, mass=0.01, theta=-9.0)
    traces = await traces_of(pool(), gate, "v1")
    assert [result.differences for result in replay_routing(traces, gate, "v1")] == [()] * NUM_TRACES
    for trace in traces:
        for step, route in zip(trace.dmoa.steps, trace.routes, strict=True):
            assert (route.k, route.theta, route.limit) == (1, -9.0, route.max_agents or 3)
            asked = [agent.name for agent in step.agents if agent.status == "ok"]
            assert asked == [trace.agents[index] for index in route.ranking[: route.limit]]
            assert (step.k, {agent.explored for agent in step.agents}) == (route.limit, {False})
    changed = traces[1].model_copy(update={"routes": [traces[1].routes[0].model_copy(update={"theta": 1.0})]})
    assert replay_routing([changed], gate, "v1")[0].differences == ("step 0: theta was 1.0, is -9.0",)
    older = [trace.model_copy(update={"routes": [without_cascade(route) for route in trace.routes]}) for trace in traces]
    assert [result.differences for result in replay_routing(older, gate, "v1")] == [()] * NUM_TRACES


async def test_steps_that_a_quorum_ended_replay_and_say_who_was_passed_over(gate: Gate, version: str, tmp_path: Path) -> None:
    config = Config.model_validate(pool().model_dump() | {"limits": {"max_steps": 4, "quorum": 1}})
    traces = read_traces(write_traces(tmp_path / "traces.jsonl", await traces_of(config, gate, version)))
    assert [result.differences for result in replay_routing(traces, gate, version)] == [()] * NUM_TRACES
    assert {route.k for trace in traces for route in trace.routes} > {1, 3}
    for trace in traces:
        assert trace.query["limits"]["quorum"] == 1
        assert trace.dmoa.degraded == (any(route.k > 1 for route in trace.routes) or any(route.masked for route in trace.routes))
        for step, route in zip(trace.dmoa.steps, trace.routes, strict=True):
            first, *others = (trace.agents[index] for index in route.ranking[: route.k])
            status = {agent.name: agent.status for agent in step.agents if agent.status not in ("idle", "masked")}
            assert status == {first: "ok"} | dict.fromkeys(others, "late")


def without_cascade(route: TraceRoute) -> TraceRoute:
    """The route as a dmoa without a cascade would have written it."""
    return TraceRoute.model_validate(route.model_dump(exclude={"theta", "limit"}))


def nudged(values: list[float]) -> list[float]:
    """The values with the last one moved to the next float32."""
    return [*values[:-1], float(np.nextafter(np.float32(values[-1]), np.float32(2.0)))]


async def test_one_changed_float_is_found_and_named(traces: list[Trace], gate: Gate, version: str) -> None:
    for field in ("probability_A", "hidden_H"):
        step = traces[3].routes[0]
        changed = traces[3].model_copy(
            update={"routes": [step.model_copy(update={field: nudged(getattr(step, field))}), *traces[3].routes[1:]]}
        )
        results = replay_routing([traces[2], changed, traces[4]], gate, version)
        assert [len(result.differences) for result in results] == [0, 1, 0]
        assert results[1].differences[0].startswith(f"step 0: {field} was [")


async def test_another_input_gives_other_decisions_from_that_step_on(traces: list[Trace], gate: Gate, version: str) -> None:
    trace = max(traces, key=lambda trace: len(trace.routes))
    routes = list(trace.routes)
    routes[1] = routes[1].model_copy(update={"input_X": [-x for x in routes[1].input_X]})
    (result,) = replay_routing([trace.model_copy(update={"routes": routes})], gate, version)
    steps = {difference.partition(":")[0] for difference in result.differences}
    assert steps == {f"step {number}" for number in range(1, len(routes))}


async def test_a_trace_of_another_gate_is_refused(traces: list[Trace], gate: Gate) -> None:
    with pytest.raises(TraceError, match=r"trace t0: gate_version is untrained-\w+, the gate at hand is v9; give the pool"):
        replay_routing(traces, gate, "v9")


async def test_a_trace_of_another_pool_is_refused(traces: list[Trace], version: str) -> None:
    with pytest.raises(TraceError, match=r"trace t0: its agents are agent-a, .*; the gate has others"):
        replay_routing(traces, Gate(gate_spec(("x", "y"))), version)


async def test_a_trace_without_decisions_has_nothing_to_repeat(gate: Gate, version: str) -> None:
    traces = await traces_of(pool(), gate, version, policy="single")
    results = replay_routing(traces, gate, "any version")
    assert [(result.decisions, result.differences) for result in results] == [((), ())] * NUM_TRACES
    assert replay_routing([], gate, version) == []
