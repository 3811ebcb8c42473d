"""Exploration: who is asked beside the active agents, with which propensity, and that it changes nothing of the query itself."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dmoa.policies.dmoa import DmoaPolicy
from dmoa.policies.exploring import ExploringPolicy, unexplored
from dmoa.testing import (
    FakeAgents,
    FakeEncoder,
    Fate,
    Say,
    Schedule,
    answer_of,
    asks,
    fixed_gate,
    orchestrator_of,
    query,
    router_of,
    state_of,
)
from dmoa.types import Answer, Limits, Query, StepPlan, Stop

P = {"a": 0.5, "b": 0.2, "c": 0.15, "d": 0.1, "e": 0.05}
SAYINGS: dict[str, Fate] = {
    "a": [Say(text="It is 18.", nats=0.9), Say(text="It is 20.", nats=0.7), Say(text="It is 21.", nats=0.8)],  # type: ignore[dict-item]
    "b": [Say(text="It is 19.", nats=0.5), Say(text="It is 22.", nats=1.1)],  # type: ignore[dict-item]
    "c": Say(text="I am sure.", nats=0.01, tokens=40),
    "d": Say(text="So am I.", nats=0.02, tokens=40),
    "e": Say(text="Nobody asks me.", nats=0.03, tokens=40),
}


async def drawn(epsilon: float | None, trace_id: str, plan: StepPlan) -> dict[str, float]:
    """Who is explored in the first step of a query, with propensities."""
    policy = ExploringPolicy(Schedule(plan), epsilon=epsilon)
    found = await policy.next_step(state_of(Query(trace_id=trace_id, text="?")))
    assert isinstance(found, StepPlan)
    assert (found.activations, found.reserves) == (plan.activations, plan.reserves)
    return {activation.agent: activation.propensity for activation in found.explored}


async def test_dense_asks_all_others_for_certain() -> None:
    assert await drawn(None, "t", asks("a", "b", reserves=["c", "d", "e"])) == {"c": 1.0, "d": 1.0, "e": 1.0}
    assert await drawn(None, "t", asks("a")) == {}


@pytest.mark.parametrize("epsilon", [0.2, 0.7, 1.0])
async def test_epsilon_asks_one_other_as_often_as_it_says_and_each_alike(epsilon: float) -> None:
    plan, number = asks("a", reserves=["b", "c", "d", "e"]), 4000
    counts: Counter[str] = Counter()
    for i in range(number):
        found = await drawn(epsilon, f"query-{i}", plan)
        assert len(found) <= 1
        assert set(found.values()) <= {epsilon / 4}
        counts.update(list(found))
    for name, chance in {**dict.fromkeys("bcde", epsilon / 4), "": epsilon}.items():
        seen = counts[name] if name else counts.total()
        four_sigma = 4 * math.sqrt(number * chance * (1 - chance))
        assert abs(seen - number * chance) <= four_sigma, (name, seen)


async def test_the_draw_repeats_and_differs_from_step_to_step() -> None:
    plan = asks("a", reserves=["b", "c", "d", "e"])
    assert await drawn(0.5, "t7", plan) == await drawn(0.5, "t7", plan)
    policy = ExploringPolicy(Schedule(plan), epsilon=1.0)
    orchestrator = orchestrator_of(FakeAgents(SAYINGS), list(P))
    steps = (await answer_of(orchestrator, query(max_steps=12), policy)).steps
    assert len({step.explored[0][0] for step in steps}) > 1


async def test_a_query_may_say_how_often_itself() -> None:
    plan = asks("a", reserves=["b", "c"])
    asked = replace(query(), epsilon=1.0)
    found = await ExploringPolicy(Schedule(plan), epsilon=None).next_step(state_of(asked))
    assert isinstance(found, StepPlan)
    assert [activation.propensity for activation in found.explored] == [0.5]


async def test_a_policy_that_stops_is_not_held_up() -> None:
    policy = ExploringPolicy(Schedule(Stop(reason="single")), epsilon=None)
    assert await policy.next_step(state_of(query())) == Stop(reason="single")


async def run(epsilon: float | str | None, *, budget: int | None = None, **gate: Any) -> Answer:
    """Answer one query by DMoA's policy, explored as `epsilon` says; "none": without exploration."""
    router, agents = router_of(fixed_gate(P, mass=0.6, **gate)), FakeAgents(SAYINGS)
    inner = DmoaPolicy(router=router, encoder=FakeEncoder(), preset="default")
    orchestrator = orchestrator_of(agents, list(P), router=router)
    if isinstance(epsilon, str):
        return await answer_of(orchestrator, query(max_steps=6, budget_tokens=budget), inner)
    policy = ExploringPolicy(inner, epsilon=epsilon, budget_tokens=budget)
    return await answer_of(orchestrator, query(max_steps=6), policy)


@pytest.mark.parametrize("epsilon", [None, 1.0, 0.5])
@pytest.mark.parametrize("budget", [None, 60])
@pytest.mark.parametrize("gate", [{}, {"cascade": True, "theta": math.log(0.3)}])
async def test_states_answers_and_endings_are_those_of_a_run_without_exploration(
    epsilon: float | None, budget: int | None, gate: dict[str, Any]
) -> None:
    plain, explored = await run("none", budget=budget, **gate), await run(epsilon, budget=budget, **gate)
    assert (explored.text, explored.stop_reason, len(explored.steps)) == (plain.text, plain.stop_reason, len(plain.steps))
    assert any(step.explored for step in explored.steps) or gate
    assert any("c" in step.active for step in plain.steps) == bool(gate), "the cascade asks one more"
    for with_, without in zip(explored.steps, plain.steps, strict=True):
        assert with_.route is not None
        assert without.route is not None
        assert np.array_equal(with_.route.input_X, without.route.input_X)
        assert (with_.active, with_.summary) == (without.active, without.summary)
        names = {name for name, _ in with_.explored}
        assert not names & set(with_.active)
        kept = [reply.agent for reply in with_.replies if reply.agent not in names]
        assert kept == [reply.agent for reply in without.replies]
    if epsilon is None:
        assert all({reply.agent for reply in step.replies} == set(P) for step in explored.steps), "dense: everybody ran"


async def test_a_budget_stops_by_the_tokens_of_active_agents_alone() -> None:
    assert (await run("none", budget=60)).stop_reason == "budget_tokens"
    answer = await run(None, budget=60)
    assert answer.stop_reason == "budget_tokens"
    everyone = sum(reply.usage.total for reply in answer.steps[0].replies)
    assert everyone > 60, "with the explorers' tokens the first step alone would have used it up"
    assert len(answer.steps) == 3


async def test_a_state_without_its_explorers_is_as_if_nobody_had_been_explored() -> None:
    plain, explored = await run("none"), await run(None)
    used = sum(reply.usage.total for step in explored.steps for reply in step.replies)
    asked = Query(trace_id="t1", text="?", limits=Limits())
    state = unexplored(state_of(asked, steps=explored.steps, tokens_used=used))
    assert state.tokens_used == sum(reply.usage.total for step in plain.steps for reply in step.replies)
    assert [[reply.agent for reply in step.replies] for step in state.steps] == [
        [reply.agent for reply in step.replies] for step in plain.steps
    ]
    assert all(step.explored == () for step in state.steps)


async def test_the_gate_reads_the_querys_own_budget_where_it_is_lower_than_the_pools() -> None:
    inner = Schedule(asks("a"))
    await ExploringPolicy(inner, epsilon=None, budget_tokens=5000).next_step(state_of(query(budget_tokens=500)))
    await ExploringPolicy(inner, epsilon=None, budget_tokens=5000).next_step(state_of(query()))
    assert [state.query.limits.budget_tokens for state in inner.states] == [500, 5000]
