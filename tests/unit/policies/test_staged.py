"""Policies that know no stages, over queries that have some: each stage is asked as their first step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmoa.errors import RequestError
from dmoa.policies.options import ask
from dmoa.policies.registry import POLICIES, PolicyContext, can_do_stages, policy
from dmoa.testing import query
from dmoa.types import Activation, AgentCall, AgentReply, QueryState, Stage, StepPlan, Stop
from dmoa.workflows.evaluate import check_stages, expand_policies
from tests.unit.policies.schedules import run, schedule_of


async def test_a_policy_of_a_file_is_asked_at_every_stage() -> None:
    """It plans its own end, after its first step, and knows nothing of stages."""

    @policy("once", "Asks all once.")
    class Once:
        name = "once"

        def __init__(self, context: PolicyContext) -> None:
            pass

        async def next_step(self, state: QueryState) -> StepPlan | Stop:
            return Stop(reason="single") if state.steps else StepPlan(activations=ask("ab"), fold="pass", ends_with="single")

    asked = replace(query(), stages=(Stage(part="one?"), Stage(part="two?", has_history=False)))
    try:
        answer, calls = await run("once", asked=asked)
    finally:
        del POLICIES["once"]
    assert (answer.stop_reason, len(answer.steps), len(calls)) == ("stages", 2, 4)


@pytest.mark.parametrize("name", ["twice", "capacity_aware:inner=twice"])
async def test_samples_of_a_policy_of_a_file_are_calls_of_their_own_and_it_is_told_of_the_end(name: str) -> None:
    @policy("twice", "Asks one agent twice.")
    class Twice:
        name = "twice"

        def __init__(self, context: PolicyContext) -> None:
            pass

        async def next_step(self, state: QueryState) -> StepPlan | Stop:
            return StepPlan(activations=(Activation(agent="a"), Activation(agent="a")), fold="vote", ends_with="single")

        def ended(self, state: QueryState) -> str:
            return f"ended after {len(state.steps[0].replies)}"

    try:
        answer, calls = await run(name, asked=query(sampling={"seed": 7}))
    finally:
        del POLICIES["twice"]
    assert answer.text == "ended after 2"
    assert [(call.call_id[-3:], call.sampling.seed) for call in calls] == [("0/a", 7), ("a~1", 8)]


@pytest.mark.parametrize("name", ["selector", "symbolic", "group_chat", "capacity_aware:inner=group_chat"])
async def test_a_policy_that_only_names_who_answers_does_no_stages(name: str) -> None:
    assert not can_do_stages(name)
    with pytest.raises(RequestError, match="writes no answer at its first step, and a query with stages asks each stage as that"):
        await run(name, asked=replace(query(), stages=(Stage(part="one?"),)))
    check_stages((name, "dmoa"), ("arith",))
    with pytest.raises(RequestError, match=f"--policies: {name} cannot answer chain, whose stages"):
        check_stages((name, "dmoa"), ("arith", "chain"))


def test_all_other_policies_of_ours_do_stages() -> None:
    assert {name for name in POLICIES.builtin if not can_do_stages(name)} == {"selector", "symbolic", "group_chat"}
    assert set(POLICIES.builtin) - set(expand_policies(("all",), None, ("relay",))) >= {"selector", "symbolic", "group_chat"}
    assert "selector" in expand_policies(("all",), None, ("arith",))


@pytest.mark.parametrize("name", ["escalate", "refine", "mcts"])
async def test_who_stands_in_at_a_stage_sees_what_the_lost_one_saw(name: str) -> None:
    def says(call: AgentCall) -> AgentReply | None:
        return AgentReply(agent="a", status="failed", error="x") if (call.agent, call.step) == ("a", 1) else None

    _, calls = await run(name, says, replace(query(), stages=(Stage(part="one?"), Stage(part="two?"))))
    assert schedule_of(calls) == ["a.0", "a.1 <- a.0", "b.1 <- a.0"]
