"""The single policy: one agent, one step."""

from __future__ import annotations

from dmoa.policies.baselines import SinglePolicy
from dmoa.testing import query, state_of
from dmoa.types import StepPlan, StepRecord, Stop, SummarizerRecord


async def test_one_agent_is_asked_once_and_the_others_stand_in() -> None:
    policy = SinglePolicy(agent="b", stand_ins=("a", "b", "c"))
    plan = await policy.next_step(state_of(query()))
    assert isinstance(plan, StepPlan)
    assert [activation.agent for activation in plan.activations] == ["b"]
    assert [activation.agent for activation in plan.reserves] == ["a", "c"]
    assert (plan.fold, plan.ends_with, plan.mass, plan.decision, plan.route) == ("pass", "single", 1.0, None, None)


async def test_after_a_step_it_stops() -> None:
    record = SummarizerRecord(mode="select", verdict="rule")
    step = StepRecord(step=0, replies=(), active=(), summary="19", summarizer=record)
    assert await SinglePolicy(agent="b").next_step(state_of(query(), steps=(step,))) == Stop(reason="single")
