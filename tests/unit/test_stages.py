"""Queries whose steps are set beforehand: what gate and agents read at each, and that nothing ends them early."""

from __future__ import annotations

from dataclasses import replace

from dmoa.policies.baselines import SinglePolicy
from dmoa.policies.dmoa import DmoaPolicy
from dmoa.testing import FakeAgents, FakeEncoder, Say, answer_of, asks, fixed_gate, orchestrator_of, query, router_of
from dmoa.testing import Schedule as Planned
from dmoa.types import Query, Stage

STAGES = (
    Stage(observation="card one", part="Wait.", has_history=False),
    Stage(observation="card two", part="Do card one.", has_history=False),
    Stage(part="Double it."),
)


def staged(**limits: int) -> Query:
    return replace(query("The whole task.", **limits), stages=STAGES)


async def test_agents_see_the_part_and_history_only_where_a_stage_has_it() -> None:
    agents = FakeAgents({"a": (Say(text="none"), Say(text="21"), Say(text="42"))})
    answer = await answer_of(orchestrator_of(agents, "a"), staged(), Planned(asks("a")))
    prompts = [call.messages[-1].content for call in agents.calls]
    assert [prompt.split("\n\n")[0] for prompt in prompts] == ["Wait.", "Do card one.", "Double it."]
    assert "Work so far" not in prompts[1]
    assert "Work so far, step 1:\nnone\n\nWork so far, step 2:\n21" in prompts[2]
    assert (answer.text, answer.stop_reason, answer.finish_reason) == ("42", "stages", "stop")


async def test_no_rule_ends_a_staged_query_early() -> None:
    agents = FakeAgents({"a": Say(text="19"), "b": Say(text="19")})
    agreed = await answer_of(orchestrator_of(agents, "ab"), replace(staged(), stages=()), Planned(asks("a", "b")))
    answer = await answer_of(orchestrator_of(agents, "ab"), staged(), Planned(asks("a", "b")))
    assert (agreed.stop_reason, len(agreed.steps)) == ("agreement", 1)
    assert (answer.stop_reason, len(answer.steps)) == ("stages", 3)


async def test_budgets_still_end_it() -> None:
    answer = await answer_of(orchestrator_of(FakeAgents({"a": Say(text="19")}), "a"), staged(max_steps=2), Planned(asks("a")))
    assert (answer.stop_reason, answer.finish_reason, len(answer.steps)) == ("max_steps", "stop", 2)


async def test_the_gate_reads_the_observation_in_place_of_the_summary() -> None:
    encoder = FakeEncoder()
    policy = DmoaPolicy(router=router_of(fixed_gate({"a": 1.0})), encoder=encoder, preset="default")
    await answer_of(orchestrator_of(FakeAgents({"a": Say(text="19")}), "a"), staged(), policy)
    assert encoder.texts == [["The whole task.", "card one"], ["The whole task.", "card two"], ["The whole task.", "19"]]


async def test_a_single_agent_is_asked_at_every_stage() -> None:
    agents = FakeAgents({"a": (Say(text="none"), Say(text="21"), Say(text="42"))})
    answer = await answer_of(orchestrator_of(agents, "a"), staged(), SinglePolicy(agent="a"))
    assert [step.summary for step in answer.steps] == ["none", "21", "42"]
