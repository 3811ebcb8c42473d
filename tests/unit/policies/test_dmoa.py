"""The DMoA policy: what the gate reads at every step, and how its decision becomes a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from dmoa.policies.dmoa import DmoaPolicy
from dmoa.testing import DIM, FakeEncoder, Say, decision, embedding, fixed_gate, query, router_of, said, state_of
from dmoa.types import AgentReply, Limits, Query, QueryState, RouteDecision, RouteRequest, StepPlan, StepRecord, SummarizerRecord

P = {"a": 0.6, "b": 0.3, "c": 0.1}


class Spy:
    """Implements `Router`: remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[RouteRequest] = []
        self._router = router_of(fixed_gate(P))

    async def route(self, request: RouteRequest) -> RouteDecision:
        self.requests.append(request)
        return await self._router.route(request)

    def report_unavailable(self, agent: str, reason: str, masked_s: float = 0.0) -> None:
        raise AssertionError("a policy reports nothing")


def policy_of(router: Spy, encoder: FakeEncoder | None = None, preset: Literal["default", "paper"] = "default") -> DmoaPolicy:
    return DmoaPolicy(router=router, encoder=encoder or FakeEncoder(), preset=preset)


async def planned(policy: DmoaPolicy, state: QueryState) -> StepPlan:
    plan = await policy.next_step(state)
    assert isinstance(plan, StepPlan)
    return plan


def after(step: StepRecord, asked: Query | None = None, tokens_used: int = 0) -> QueryState:
    """The state after one step."""
    return state_of(asked or query(max_steps=8), steps=(step,), tokens_used=tokens_used)


def step_of(*replies: AgentReply, active: str = "ab") -> StepRecord:
    hidden_H = np.asarray([0.25, -0.5, 1.0], np.float32)
    return StepRecord(
        step=0,
        replies=replies,
        active=tuple(active),
        summary="It is 18.",
        summarizer=SummarizerRecord(mode="select", verdict="rule"),
        decision=decision(P, 2, hidden_H=hidden_H, gate_version="v1", max_agents=4),
        route=RouteRequest(input_X=np.zeros(1, np.float32)),
    )


A, B = said("a", Say(text="It is 18.", nats=0.5)), said("b", Say(text="It is 19.", nats=1.0))


async def test_the_first_step_reads_the_query_alone() -> None:
    router = Spy()
    await planned(policy_of(router), state_of(query("Why?")))
    (request,) = router.requests
    np.testing.assert_array_equal(request.input_X, np.concatenate([embedding("Why?"), np.zeros(DIM + 4, np.float32)]))
    assert (request.hidden_H, request.gate_version, request.max_agents, request.unavailable) == (None, None, None, ())


async def test_a_later_step_reads_query_summary_and_feedback_and_goes_on_from_the_hidden_state() -> None:
    router = Spy()
    late = AgentReply(agent="c", status="late")
    await planned(policy_of(router), after(step_of(A, B, late), query("Why?", max_steps=8, max_agents=2)))
    (request,) = router.requests
    # Entropies 0.5 and 1.0: mean 0.75, spread 0.25; 2 of K = 4 were active; 1 of 8 steps is used.
    expected = np.concatenate([embedding("Why?"), embedding("It is 18."), np.asarray([0.75, 0.25, 0.5, 0.125], np.float32)])
    np.testing.assert_array_equal(request.input_X, expected)
    assert request.input_X.dtype == np.float32
    assert request.hidden_H is not None
    assert request.hidden_H.tolist() == [0.25, -0.5, 1.0]
    assert (request.gate_version, request.max_agents, request.unavailable) == ("v1", 2, ())


@pytest.mark.parametrize(
    ("limits", "tokens_used", "share"),
    [
        (Limits(max_steps=8, budget_tokens=100), 40, 0.4),  # tokens are further on than steps
        (Limits(max_steps=8, budget_tokens=100), 5, 0.125),
        (Limits(max_steps=8, budget_tokens=100), 250, 1.0),
        (Limits(max_steps=1), 0, 1.0),
    ],
)
async def test_the_share_of_the_budget_is_the_larger_of_steps_and_tokens(limits: Limits, tokens_used: int, share: float) -> None:
    router = Spy()
    await planned(policy_of(router), after(step_of(A), Query(trace_id="t", text="Why?", limits=limits), tokens_used))
    assert router.requests[0].input_X[-1] == np.float32(share)


async def test_only_active_agents_with_tokens_give_feedback() -> None:
    router = Spy()
    silent = AgentReply(agent="c", status="ok", text="x")
    await planned(policy_of(router), after(step_of(A, B, silent, active="ac")))
    assert router.requests[0].input_X[-4:].tolist() == [0.5, 0.0, 0.5, 0.125]


async def test_the_share_of_active_agents_is_taken_of_the_gate_versions_own_k() -> None:
    router = Spy()
    step = step_of(A, B)
    assert step.decision is not None
    for most, share in ((2, 1.0), (8, 0.25)):
        await planned(policy_of(router), after(replace(step, decision=replace(step.decision, max_agents=most))))
        assert router.requests[-1].input_X[-2] == np.float32(share)
    plan = await planned(policy_of(router), state_of(query()))
    assert plan.decision is not None
    assert plan.decision.max_agents == 4  # K of the fake gate


async def test_explored_agents_give_no_feedback_and_are_not_left_out_when_they_fail() -> None:
    router = Spy()
    seen = []
    for extra in ((), (said("c", Say(text="x", nats=2.0)),), (AgentReply(agent="c", status="failed"),)):
        step = replace(step_of(A, B, *extra), explored=tuple((reply.agent, 0.2) for reply in extra))
        await planned(policy_of(router), after(step))
        seen.append((router.requests[-1].input_X.tolist(), router.requests[-1].unavailable))
    assert seen[0] == seen[1] == seen[2]


async def test_the_paper_preset_reads_one_embedding_of_both() -> None:
    router, encoder = Spy(), FakeEncoder()
    router._router = router_of(fixed_gate(P, preset="paper"))
    policy = policy_of(router, encoder, "paper")
    await planned(policy, state_of(query("Why?")))
    await planned(policy, after(step_of(A, B), query("Why?")))
    assert encoder.texts == [["Why?"], ["Why?\n\nIt is 18."]]
    assert [request.input_X.tolist() for request in router.requests] == [
        embedding("Why?").tolist(),
        embedding("Why?\n\nIt is 18.").tolist(),
    ]


async def test_agents_that_failed_are_left_out_of_the_next_step() -> None:
    router = Spy()
    failed, late = AgentReply(agent="b", status="failed"), AgentReply(agent="c", status="late")
    plan = await planned(policy_of(router), after(step_of(A, failed, late, active="a")))
    assert router.requests[0].unavailable == ("b",)
    assert [activation.agent for activation in (*plan.activations, *plan.reserves)] == ["a", "c"]


async def test_nobody_is_left_out_when_everybody_failed() -> None:
    router = Spy()
    failures = [AgentReply(agent=name, status="failed") for name in "abc"]
    await planned(policy_of(router), after(step_of(*failures, active="")))
    assert router.requests[0].unavailable == ()


async def test_a_decision_becomes_activations_and_reserves_in_order_of_probability() -> None:
    router = Spy()
    plan = await planned(policy_of(router), state_of(query()))
    assert [(x.agent, round(x.probability, 6)) for x in plan.activations] == [("a", 0.6), ("b", 0.3)]
    assert [(x.agent, round(x.probability, 6)) for x in plan.reserves] == [("c", 0.1)]
    assert plan.mass == pytest.approx(0.9)
    assert (plan.fold, plan.ends_with) == ("summarizer", None)
    assert plan.route is router.requests[0]
    assert plan.decision is not None
    assert plan.decision.k == 2
