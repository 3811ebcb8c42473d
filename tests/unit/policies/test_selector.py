"""The selector: one names, the named one answers."""

from __future__ import annotations

import pytest

from dmoa.policies.baselines import SelectorPolicy, named
from dmoa.testing import query, state_of
from dmoa.types import AgentReply, StepPlan, StepRecord, Stop, SummarizerRecord

PROFILES = {"base": "General help.", "math": "Sums.", "math-inspector": "Checks sums."}
POLICY = SelectorPolicy(chooser="base", profiles=PROFILES)


def said(text: str) -> StepRecord:
    replies = (AgentReply(agent="base", status="ok", text=text),)
    return StepRecord(
        step=0, replies=replies, active=("base",), summary="", summarizer=SummarizerRecord(mode="select", verdict="rule")
    )


async def test_the_chooser_reads_every_profile() -> None:
    plan = await POLICY.next_step(state_of(query()))
    assert isinstance(plan, StepPlan)
    (asked,) = plan.activations
    assert asked.agent == "base"
    assert all(f"{name}: {profile}" in asked.instruction for name, profile in PROFILES.items())
    assert (plan.fold, plan.ends_with) == ("keep", None)


@pytest.mark.parametrize(
    ("text", "agent"), [("I would ask math.", "math"), ("Math-Inspector", "math-inspector"), ("who knows", "base")]
)
async def test_the_named_agent_answers_alone_and_last(text: str, agent: str) -> None:
    plan = await POLICY.next_step(state_of(query(), steps=(said(text),)))
    assert isinstance(plan, StepPlan)
    (asked,) = plan.activations
    assert (asked.agent, asked.history, plan.ends_with) == (agent, (), "single")
    assert agent not in [activation.agent for activation in plan.reserves]
    assert await POLICY.next_step(state_of(query(), steps=(said(text), said("19")))) == Stop(reason="single")


def test_the_first_whole_name_counts() -> None:
    agents = tuple(PROFILES)
    assert named("not mathematics but math-inspector, or math", agents) == "math-inspector"
    assert named("math, then base", agents) == "math"
    assert named("maths baseline", agents) is None
