"""A pool put together: the same swarm that is served, here over scripted agents."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local, build_pool_gate
from dmoa.config import Config, LlmConfig
from dmoa.errors import RequestError
from dmoa.routing import LocalRouter
from dmoa.swarm import AsksFirst, Swarm, abilities_of, limits_for
from dmoa.testing import FakeAgents, Lose, Say, Schedule, answer_of, asks, orchestrator_of, query
from dmoa.types import Answer, Limits, Query, QueryState, StepRecord, TextDelta


def pool(placement: str = "shared", **changes: Any) -> Config:
    replies = {"adder": "The answer is 19.", "sorter": "19", "summarizer": "FINAL\nIt is 19."}
    options = {"replies": replies}
    return Config.model_validate(
        {
            "name": "pool",
            "llms": {"tiny": {"model": "scripted:x", "engine": "scripted", "placement": placement, "engine_kwargs": options}},
            "agents": [
                {"name": "adder", "llm": "tiny", "profile": "Adds.", "tools": ["calculator"], "sampling": {"max_tokens": 9}},
                {"name": "sorter", "llm": "tiny", "profile": "Sorts."},
            ],
            "gate": {"hidden": 8, "activation": {"mass": 1.0, "max_agents": 2}},
        }
        | changes
    )


def swarm_of(config: Config, agents: Any = None) -> Swarm:
    gate, record = build_pool_gate(config)
    router = LocalRouter()
    router.install(record.version, gate)
    return Swarm(config, agents=agents or build_local(config)[0], router=router, encoder=HashEncoder())


async def answer(swarm: Swarm, policy: str = "dmoa", agent: str | None = None) -> tuple[Answer, list[Any]]:
    events = [event async for event in swarm.ask(Query(trace_id="t", text="12 + 7?"), policy, agent)]
    assert isinstance(events[-1], Answer)
    return events[-1], events


async def test_a_selecting_pool_ends_in_agreement() -> None:
    answered, events = await answer(swarm_of(pool()))
    assert (answered.text, answered.stop_reason, answered.policy, len(answered.steps)) in [
        ("The answer is 19.", "agreement", "dmoa", 1),
        ("19", "agreement", "dmoa", 1),
    ]
    assert set(answered.steps[0].active) == {"adder", "sorter"}
    assert answered.gate_trained is False
    assert answered.steps[0].mass == pytest.approx(1.0)
    assert [type(event) for event in events] == [StepRecord, Answer]


async def test_a_writing_pool_ends_with_its_summarizer() -> None:
    answered, events = await answer(swarm_of(pool(summarizer={"mode": "llm", "llm": "tiny"})))
    assert (answered.text, answered.stop_reason) == ("It is 19.", "summarizer")
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "It is 19."


async def test_one_agent_can_be_asked_by_name() -> None:
    answered, _ = await answer(swarm_of(pool()), "single", "sorter")
    assert (answered.text, answered.stop_reason, answered.gate_version) == ("19", "single", None)
    assert [reply.agent for reply in answered.steps[0].replies] == ["sorter"]


def test_an_unknown_policy_is_refused_at_once() -> None:
    swarm = swarm_of(pool())
    assert swarm.policies[:5] == ("dmoa", "single", "dense", "random", "selector")
    with pytest.raises(RequestError, match="policy: 'vote' is not known"):
        swarm.ask(Query(trace_id="t", text="12 + 7?"), "vote")


async def test_agents_are_asked_with_their_own_profile_tools_and_sampling() -> None:
    agents = FakeAgents({"adder": Say(text="19"), "sorter": Say(text="19")})
    await answer(swarm_of(pool(), agents))
    calls = {call.agent: call for call in agents.calls}
    adder, sorter = (calls[name].messages[-1].content for name in ("adder", "sorter"))
    assert "Adds. To calculate, write <calculator>" in adder
    assert adder.count("<calculator>") == 1
    assert sorter.endswith("Sorts.")
    assert [calls[name].sampling.max_tokens for name in ("adder", "sorter")] == [9, 96]


@pytest.mark.parametrize(("placement", "asked"), [("shared", ["adder", "adder"]), ("dedicated", ["adder", "sorter"])])
async def test_agents_of_a_shared_llm_die_together(placement: str, asked: list[str]) -> None:
    agents = FakeAgents({"adder": (Lose(), Say(text="19")), "sorter": Say(text="19")})
    answered, _ = await answer(swarm_of(pool(placement), agents), "single")
    assert [call.agent for call in agents.calls] == asked
    assert answered.degraded


@pytest.mark.parametrize(("slack", "reason"), [(1e-6, "sure"), (-1e-6, "max_steps")])
async def test_theta_decides_whether_a_lone_agent_is_sure_enough(slack: float, reason: str) -> None:
    config = pool(agents=[{"name": "adder", "llm": "tiny", "profile": "Adds."}], limits={"max_steps": 3})
    gate, _ = build_pool_gate(config)
    gate.spec = replace(gate.spec, theta=math.log(0.5 + 1e-3) + slack)
    router = LocalRouter()
    router.install("v1", gate)
    agents = FakeAgents({"adder": Say(text="19", nats=0.5)})
    swarm = Swarm(config, agents=agents, router=router, encoder=HashEncoder())
    events = [event async for event in swarm.ask(Query(trace_id="t", text="12 + 7?", limits=limits_for(config)))]
    assert isinstance(events[-1], Answer)
    assert events[-1].stop_reason == reason


@pytest.mark.parametrize(("theta", "counts"), [(0.0, [1, 1]), (-9.0, [2, 2]), (None, [1, 1])])
async def test_a_newly_installed_version_brings_its_own_theta_and_running_queries_keep_theirs(
    theta: float | None, counts: list[int]
) -> None:
    config = pool(gate={"hidden": 8, "activation": {"rule": "top_mass", "mass": 0.01, "max_agents": 2}}, limits={"max_steps": 2})
    gate, _ = build_pool_gate(config)
    gate.spec = replace(gate.spec, theta=theta)
    router = LocalRouter()
    router.install("v1", gate)
    agents = FakeAgents({"adder": Say(text="1", nats=0.5), "sorter": Say(text="2", nats=0.6)})
    swarm = Swarm(config, agents=agents, router=router, encoder=HashEncoder())
    seen = []
    async for event in swarm.ask(Query(trace_id="t", text="12 + 7?", limits=Limits(max_steps=2))):
        if isinstance(event, StepRecord):
            seen.append(len(event.active))
            other, _ = build_pool_gate(config)
            other.spec = replace(other.spec, theta=0.0 if theta == -9.0 else -9.0)
            router.install("v2", other)
    assert seen[:1] == counts[:1]
    assert seen == counts[: len(seen)]
    assert isinstance(event, Answer)
    assert event.gate_version == "v1"
    answered, _ = await answer(swarm)
    assert answered.gate_version == "v2"
    assert len(answered.steps[0].active) == (1 if theta == -9.0 else 2)


LIMITS = [
    (None, Limits(max_steps=4, budget_tokens=100, deadline_s=None)),
    (Limits(max_steps=2), Limits(max_steps=2, budget_tokens=100)),
    (Limits(max_steps=9, budget_tokens=500, deadline_s=3.0), Limits(max_steps=4, budget_tokens=100, deadline_s=3.0)),
    (Limits(max_steps=4, budget_tokens=50, max_agents=1), Limits(max_steps=4, budget_tokens=50, max_agents=1)),
    (Limits(max_steps=4, max_agents=9), Limits(max_steps=4, budget_tokens=100, max_agents=2)),
]


@pytest.mark.parametrize(("asked", "expected"), LIMITS, ids=range(len(LIMITS)))
def test_a_query_may_only_lower_the_pools_limits(asked: Limits | None, expected: Limits) -> None:
    assert limits_for(pool(limits={"max_steps": 4, "budget_tokens": 100}), asked) == expected
    with_quorum = pool(limits={"max_steps": 4, "budget_tokens": 100, "quorum": 2, "hedge_after_ms": 300})
    assert limits_for(with_quorum, asked) == replace(expected, quorum=2, hedge_after_ms=300.0)


def test_abilities_are_the_engines_and_those_of_its_options() -> None:
    plain, parsed = (
        LlmConfig(model="embedded:smollm2-135m", engine="vllm", engine_kwargs=kwargs)
        for kwargs in ({}, {"tool_parser": "hermes"})
    )
    assert abilities_of(parsed) - abilities_of(plain) == {"tools"}
    assert {"schema", "tool_prompt", "logprobs"} <= abilities_of(plain)


async def test_a_branch_ends_as_its_policy_does() -> None:
    class Search(Schedule):
        def ended(self, state: QueryState) -> str:
            return state.steps[0].summary

    agents = FakeAgents({"a": Say(text="It is 19."), "b": Say(text="It is 20.")})
    branched = AsksFirst(Search(asks("a", fold="pass")), ("b",), 1)
    answer = await answer_of(orchestrator_of(agents, "ab"), query(max_steps=2), branched)
    assert ([step.summary for step in answer.steps], answer.text) == (["It is 19.", "It is 20."], "It is 19.")
