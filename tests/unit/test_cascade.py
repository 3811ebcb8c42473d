"""Unsure steps ask more agents, and explored agents are asked beside a step without a say in it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.core.aggregate import anchors_of, doubt
from dmoa.core.scores import CUT_PENALTY
from dmoa.orchestrator import advance
from dmoa.policies.dmoa import DmoaPolicy
from dmoa.step_calls import should_escalate
from dmoa.testing import (
    Fail,
    FakeAgents,
    FakeEncoder,
    Fate,
    Hang,
    Lose,
    Refuse,
    Say,
    Schedule,
    answer_of,
    asks,
    decision,
    events_of,
    fixed_gate,
    orchestrator_of,
    query,
    router_of,
    said,
    state_of,
)
from dmoa.trace import AnsweredQuery, reply_dmoa
from dmoa.types import Activation, AgentReply, StepPlan, StepRecord

NAMES = "abcd"
P = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
THETA = math.log(0.3 + 1e-3)
"""A reply of 0.3 nats per token is just sure."""


def plan_of(k: int = 1, *, explored: Sequence[str] = (), **fitted: Any) -> StepPlan:
    """The plan of a gate that fitted theta; every agent is ranked, K is 4."""
    found = decision(P, k, **({"theta": THETA, "limit": 4} | fitted))
    ranked = [Activation(agent=found.agents[i], probability=P[found.agents[i]]) for i in found.ranking]
    return StepPlan(
        activations=tuple(ranked[:k]),
        reserves=tuple(ranked[k:]),
        explored=tuple(Activation(agent=name, probability=P[name], propensity=0.25) for name in explored),
        mass=found.mass,
        decision=found,
    )


async def step_of(plan: StepPlan, fates: dict[str, Fate | Sequence[Fate]], **limits: Any) -> tuple[StepRecord, FakeAgents]:
    """Run one step; return its record and the agents."""
    agents = FakeAgents(fates)
    answer = await answer_of(orchestrator_of(agents, NAMES), query(**({"max_steps": 1} | limits)), Schedule(plan))
    return answer.steps[0], agents


def unsure(*texts: str) -> dict[str, Fate | Sequence[Fate]]:
    """Agents that answer with 0.9 nats per token."""
    return {name: Say(text=text, nats=0.9) for name, text in zip(NAMES, texts, strict=False)}


@pytest.mark.parametrize(
    ("sure", "k", "active"),
    [("a", 1, "a"), ("b", 1, "ab"), ("c", 1, "abc"), ("d", 1, "abcd"), ("", 1, "abcd"), ("b", 2, "ab"), ("d", 2, "abcd")],
)
async def test_a_step_asks_one_more_until_somebody_is_sure(sure: str, k: int, active: str) -> None:
    fates = unsure("1", "2", "3", "4")
    if sure:
        fates[sure] = Say(text="9", nats=0.3)
    step, agents = await step_of(plan_of(k), fates)
    assert step.active == tuple(active)
    assert [call.agent for call in agents.calls] == list(active)  # nobody is asked twice, and in the gate's order
    assert step.summary == ("9" if sure else "1")  # the surest, of equals the most probable
    assert step.mass == pytest.approx(sum(P[name] for name in active))
    assert {call.call_id for call in agents.calls} == {f"t1/0/{name}" for name in active}


@pytest.mark.parametrize(("limit", "active"), [(1, "a"), (2, "ab"), (3, "abc"), (9, "abcd")])
async def test_the_limit_of_the_decision_ends_the_cascade(limit: int, active: str) -> None:
    step, _ = await step_of(plan_of(limit=limit), unsure("1", "2", "3", "4"))
    assert step.active == tuple(active)


async def test_nothing_is_added_without_theta_or_where_the_first_reply_passes() -> None:
    step, _ = await step_of(plan_of(theta=None), unsure("1", "2", "3", "4"))
    assert step.active == ("a",)
    step, _ = await step_of(replace(plan_of(), fold="pass"), unsure("1", "2", "3", "4"))
    assert step.active == ("a",)
    step, _ = await step_of(replace(plan_of(), decision=None), unsure("1", "2", "3", "4"))
    assert step.active == ("a",)


async def test_an_anchored_score_is_compared_with_theta() -> None:
    sure = decision(P, 1, theta=THETA, limit=4, anchors=(math.log(0.901 / 0.301), 0.0, 0.0, 0.0))
    step, _ = await step_of(replace(plan_of(), decision=sure), unsure("1", "2", "3", "4"))
    assert step.active == ("a",)
    other = replace(sure, anchors=(-4.0, 3.0, 0.0, 0.0))
    fates = unsure("1", "2", "3", "4") | {"a": Say(text="1", nats=0.01)}
    step, _ = await step_of(replace(plan_of(), decision=other), fates)
    assert step.active == ("a", "b")  # raw, a would have been sure; anchored, b is
    assert step.summary == "2"


@pytest.mark.parametrize("first", [Say(text=" \n", nats=0.01), Say(text="1", nats=0.01, finish_reason="length")])
async def test_blank_and_cut_replies_are_not_sure(first: Say) -> None:
    step, _ = await step_of(plan_of(), unsure("1", "2", "3", "4") | {"a": first, "b": Say(text="2", nats=0.2)})
    assert step.active == ("a", "b")
    assert step.summary == "2"


@pytest.mark.parametrize("lost", [Fail(), Refuse()])
async def test_lost_agents_take_no_place_of_the_limit_and_are_replaced_in_the_cascade_too(lost: Fate) -> None:
    step, agents = await step_of(plan_of(limit=2), unsure("1", "2", "3", "4") | {"b": lost})
    assert step.active == ("a", "c")
    assert [call.agent for call in agents.calls] == ["a", "b", "c"]
    assert [reply.agent for reply in step.replies] == ["a", "b", "c"]


async def test_agents_in_a_dead_place_are_passed_over() -> None:
    agents = FakeAgents(unsure("1", "2", "3", "4") | {"b": Lose()})
    orchestrator = orchestrator_of(agents, NAMES, places={"a": "x", "b": "y", "c": "y", "d": "z"})
    answer = await answer_of(orchestrator, query(max_steps=1), Schedule(plan_of(limit=2)))
    assert answer.steps[0].active == ("a", "d")


async def test_the_budgets_end_the_cascade() -> None:
    fates = unsure("1", "2", "3", "4")  # 14 tokens a reply
    for budget, active in ((14, "a"), (15, "ab"), (28, "ab"), (29, "abc")):
        step, agents = await step_of(plan_of(), fates, budget_tokens=budget)
        assert step.active == tuple(active)
        assert [call.sampling.max_tokens for call in agents.calls] == [max(1, budget - 14 * i) for i in range(len(active))]
    fates["b"] = Hang()
    step, agents = await step_of(plan_of(), fates, deadline_s=0.2)
    assert (step.active, [reply.status for reply in step.replies]) == (("a",), ["ok", "late"])


async def test_theta_is_that_of_the_step() -> None:
    agents = FakeAgents(unsure("1", "2", "3", "4"))
    policy = Schedule(plan_of(limit=2), plan_of(theta=9.0), plan_of(theta=None))
    answer = await answer_of(orchestrator_of(agents, NAMES), query(max_steps=3), policy)
    assert [step.active for step in answer.steps[:2]] == [("a", "b"), ("a",)]
    assert answer.stop_reason == "sure"  # under the second step's theta it was sure


@given(
    nats=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=4),
    theta=st.floats(-8.0, 2.0),
    limit=st.integers(1, 5),
    cut=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_more_is_wanted_exactly_while_nobody_is_sure_and_there_is_room(
    nats: list[float], theta: float, limit: int, cut: list[bool]
) -> None:
    replies = [
        said(name, Say(text="x", nats=value, finish_reason="length" if is_cut else "stop"))
        for name, value, is_cut in zip(NAMES, nats, cut, strict=False)
    ]
    fitted = decision(P, 1, theta=theta, limit=limit)
    scores = [math.log(reply.entropy.sum_nats / 4 + 1e-3) + 20.0 * is_cut for reply, is_cut in zip(replies, cut, strict=False)]
    assert should_escalate(fitted, replies) == (min(scores) > theta and len(replies) < limit)


def test_doubt_orders_finished_before_cut_before_unknown() -> None:
    anchors = anchors_of(decision(P, 1, anchors=(-7.0, 2.0, 0.0, 0.0)))
    finished = said("a", Say(text="x", nats=10.0))
    cut = said("b", Say(text="x", nats=0.0, finish_reason="length"))
    unknown = AgentReply(agent="c", status="ok", text="x")
    assert doubt(finished, anchors) == pytest.approx(math.log(10.001) + 7.0)
    assert doubt(cut, anchors) == pytest.approx(math.log(0.001) - 2.0 + CUT_PENALTY)
    assert doubt(finished, anchors) < doubt(cut, anchors) < doubt(unknown, anchors) == math.inf
    assert doubt(finished) == pytest.approx(math.log(10.001))


async def test_explored_agents_are_recorded_and_counted_and_have_no_say() -> None:
    fates = unsure("1", "2", "3", "4") | {"d": Say(text="9", nats=0.01, tokens=6)}
    step, agents = await step_of(plan_of(theta=None, explored="cd"), fates)
    assert (step.active, step.summary, step.mass) == (("a",), "1", pytest.approx(0.4))
    assert step.explored == (("c", 0.25), ("d", 0.25))
    assert [reply.agent for reply in step.replies] == ["a", "c", "d"]
    assert {call.call_id for call in agents.calls} == {"t1/0/a", "t1/0/c", "t1/0/d"}
    state = advance(state_of(query()), step)
    assert state.tokens_used == (10 + 4) + (10 + 4) + (10 + 6)


async def test_explored_agents_agree_with_nobody_and_make_no_step_sure() -> None:
    sure = Say(text="19", nats=0.01)
    agents = FakeAgents({"a": Say(text="19", nats=0.9), "b": Say(text="18", nats=0.9), "c": sure, "d": sure})
    asked = query(max_steps=1)
    answer = await answer_of(orchestrator_of(agents, NAMES), asked, Schedule(plan_of(limit=2, explored="cd")))
    assert (answer.stop_reason, answer.steps[0].active) == ("max_steps", ("a", "b"))
    assert answer.steps[0].summary == "19"


async def test_a_reserve_that_is_needed_while_explored_is_asked_once_and_counts() -> None:
    step, agents = await step_of(plan_of(limit=2, explored="bcd"), unsure("1", "2", "3", "4"))
    assert (step.active, step.explored) == (("a", "b"), (("c", 0.25), ("d", 0.25)))  # by the cascade
    assert sorted(call.agent for call in agents.calls) == list(NAMES)
    step, agents = await step_of(plan_of(theta=None, explored="bcd"), unsure("1", "2", "3", "4") | {"a": Fail()})
    assert (step.active, step.explored) == (("b",), (("c", 0.25), ("d", 0.25)))  # as a stand-in
    assert sorted(call.agent for call in agents.calls) == list(NAMES)
    assert [reply.agent for reply in step.replies] == ["a", "b", "c", "d"]


async def test_lost_explored_agents_are_recorded_and_neither_replaced_nor_degrading() -> None:
    router = router_of(fixed_gate(P))
    agents = FakeAgents({"a": Say(text="1"), "b": Lose(error="node lost"), "c": Fail(), "d": Say(text="4")})
    places = {name: f"place-{name}" for name in NAMES}
    orchestrator = orchestrator_of(agents, NAMES, router=router, places=places)
    answer = await answer_of(orchestrator, query(max_steps=1), Schedule(plan_of(theta=None, explored="bc")))
    assert [(reply.agent, reply.status) for reply in answer.steps[0].replies] == [("a", "ok"), ("b", "failed"), ("c", "failed")]
    assert (answer.degraded, agents.calls_of("d")) == (False, [])
    assert router.masked == {"b"}  # a dead place is reported all the same


async def test_the_deadline_holds_for_explored_agents() -> None:
    fates = unsure("1", "2", "3", "4") | {"c": Hang()}
    started = time.monotonic()
    step, agents = await step_of(plan_of(theta=None, explored="c"), fates, deadline_s=0.2)
    assert time.monotonic() - started < 30
    assert [(reply.agent, reply.status) for reply in step.replies] == [("a", "ok"), ("c", "late")]
    assert (step.summary, agents.cancelled) == ("1", ["c"])


async def test_an_explored_agent_cannot_rescue_a_step_that_it_does_not_stand_in_for() -> None:
    plan = replace(plan_of(theta=None, explored="c"), reserves=())
    agents = FakeAgents({"a": (Say(text="1"), Fail()), "c": Say(text="3")})
    answer = await answer_of(orchestrator_of(agents, NAMES), query(), Schedule(plan))
    assert (answer.stop_reason, answer.text, answer.steps[1].active) == ("no_agent", "1", ())


async def test_closing_a_query_cancels_its_explored_calls() -> None:
    agents = FakeAgents({"a": Say(text="1"), "c": Hang(), "d": Hang()})
    reader = asyncio.create_task(events_of(orchestrator_of(agents, NAMES), query(), Schedule(plan_of(theta=None, explored="cd"))))
    await agents.until_waiting("c", "d")
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert sorted(agents.cancelled) == ["c", "d"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_unexpected_error_ends_everything_that_is_under_way() -> None:
    agents = FakeAgents({"c": Hang(), "d": Say(text="4")})  # a is unknown to the client
    with pytest.raises(KeyError):
        await events_of(orchestrator_of(agents, NAMES), query(), Schedule(plan_of(theta=None, explored="cd")))
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_next_context_comes_from_active_agents_alone() -> None:
    class Exploring(DmoaPolicy):
        """Explores `c` beside whatever the gate says."""

        explored: tuple[Activation, ...] = ()

        async def next_step(self, state):  # type: ignore[no-untyped-def]  # as DmoaPolicy.next_step
            plan = await super().next_step(state)
            return replace(plan, explored=self.explored)

    inputs = []
    for explored in ((), (Activation(agent="c", propensity=0.5),)):
        policy = Exploring(router=router_of(fixed_gate(P, mass=0.6)), encoder=FakeEncoder(), preset="default")
        policy.explored = explored
        fates = {"a": Say(text="1"), "b": Say(text="2", nats=0.7), "c": Fail(), "d": Say(text="4")}
        answer = await answer_of(orchestrator_of(FakeAgents(fates), NAMES), query(max_steps=3), policy)
        assert all(step.active == ("a", "b") for step in answer.steps)
        inputs.append([step.route.input_X.tolist() for step in answer.steps if step.route])
        assert all(step.route is not None and step.route.unavailable == () for step in answer.steps)
    assert inputs[0] == inputs[1]


async def test_reply_and_trace_tell_explored_agents_apart() -> None:
    plan = plan_of(limit=2, explored="dc")
    plan = replace(plan, route=None)
    agents = FakeAgents(unsure("1", "2", "3", "4"))
    asked = query(max_steps=1)
    answer = await answer_of(orchestrator_of(agents, NAMES), asked, Schedule(plan))
    (step,) = reply_dmoa(answer).steps
    assert [(agent.name, agent.status, agent.explored) for agent in step.agents] == [
        ("a", "ok", False),
        ("b", "ok", False),
        ("d", "ok", True),
        ("c", "ok", True),
    ]
    assert (step.k, step.mass) == (2, pytest.approx(0.7))
    assert [agent.text for agent in AnsweredQuery(query=asked, answer=answer).trace().dmoa.steps[0].agents] == list("1243")


async def test_a_plan_of_another_policy_may_explore_too() -> None:
    plan = replace(asks("a", "b"), explored=(Activation(agent="c"),))
    step, _ = await step_of(plan, {"a": Say(text="19"), "b": Say(text="19"), "c": Say(text="7")})
    assert (step.active, step.explored) == (("a", "b"), (("c", 1.0),))
