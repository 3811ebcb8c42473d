"""Mixtures of agents: who is asked in which step, and whose words each sees, against the papers' descriptions."""

from __future__ import annotations

import pytest

from dmoa.policies.layers import chosen
from dmoa.policies.registry import build_policy
from dmoa.testing import FakeAgents, Hang, Lose, Say, answer_of, orchestrator_of, query
from dmoa.types import AgentCall
from tests.unit.policies.schedules import POOL, check_cost, context_of, run, schedule_of

LAYER = ["a.0", "b.0", "c.0", "d.0"]
SEEN = "<- a.0 b.0 c.0 d.0"


async def test_moa_asks_all_in_every_layer_and_one_at_last() -> None:
    answer, calls = await run("moa")
    seconds = [f"{name}.1 {SEEN}" for name in "abcd"]
    assert schedule_of(calls) == [*LAYER, *seconds, "a.2 <- a.1 b.1 c.1 d.1"]
    assert answer.text.startswith("[a.2]")
    assert answer.stop_reason == "schedule"


async def test_moa_of_two_layers_with_a_named_aggregator_over_some_agents() -> None:
    _, calls = await run("moa:layers=2:agents=b+c:aggregator=d")
    assert schedule_of(calls) == ["b.0", "c.0", "d.1 <- b.0 c.0"]


async def test_aggregators_see_no_names() -> None:
    _, calls = await run("moa:layers=2")
    prompt = calls[-1].messages[-1].content
    assert "Contribution of" not in prompt
    assert "You are b" not in prompt


async def test_self_moa_samples_one_agent_and_aggregates() -> None:
    _, calls = await run("self_moa:b:k=3")
    assert schedule_of(calls) == ["b.0", "b.0~1", "b.0~2", "b.1 <- b.0 b.0~1 b.0~2"]
    assert [call.sampling.temperature for call in calls] == [0.7, 0.7, 0.7, 0.0]
    assert len({call.call_id for call in calls}) == 4


async def test_self_moa_seq_slides_a_window_that_begins_with_the_last_aggregate() -> None:
    _, calls = await run("self_moa_seq:k=6:window=3")
    samples = ["a.0", *(f"a.0~{number}" for number in range(1, 6))]
    windows = ["a.1 <- a.0 a.0~1 a.0~2", "a.2 <- a.1 a.0~3 a.0~4", "a.3 <- a.2 a.0~5"]
    assert schedule_of(calls) == [*samples, *windows]


def judged(call: AgentCall) -> str | None:
    """A judge likes answers 3 and 1; a moderator goes on."""
    prompt = call.messages[-1].content
    return "3, then 1" if "numbers of the best" in prompt else "GO" if "Reply STOP" in prompt else None


async def test_smoa_lets_the_judges_choice_through_and_goes_on_until_its_layers_are_done() -> None:
    _, calls = await run("smoa", judged)
    seconds = [f"{name}.2 <- c.0 a.0" for name in "abcd"]
    judging = [f"a.1 {SEEN}", f"a.1~1 {SEEN}"]
    assert schedule_of(calls) == [*LAYER, *judging, *seconds, "a.3 <- a.2 b.2 c.2 d.2", "a.4 <- c.2 a.2"]


async def test_smoa_ends_where_the_moderator_says_stop() -> None:
    _, calls = await run("smoa", lambda call: "STOP" if "Reply STOP" in call.messages[-1].content else judged(call))
    assert schedule_of(calls)[-1] == "a.2 <- c.0 a.0"
    assert len(calls) == 4 + 2 + 1


def test_a_judge_that_names_nothing_lets_the_first_through() -> None:
    assert chosen("none of them", ("x", "y", "z"), 2) == ("x", "y")
    assert chosen("3 and 3 and 9 and 1", ("x", "y", "z"), 2) == ("z", "x")


@pytest.mark.parametrize(
    "words",
    ["3,1", "[3] [1]", "The best 2 answers are 3 and 1.", "3 (it says 2.5, or 12,200, or 2024), then 1.", "Top 2: #3, #1"],
)
def test_a_judge_names_answers_and_not_how_many_it_was_asked_for_nor_what_they_say(words: str) -> None:
    assert chosen(words, ("x", "y", "z"), 2) == ("z", "x")


async def test_fusion_asks_a_panel_and_its_judge_sees_all_of_it_in_an_order_of_the_querys_own() -> None:
    _, calls = await run("fusion:judge=d")
    assert [line.split()[0] for line in schedule_of(calls)] == ["a.0", "b.0", "c.0", "d.1"]
    assert sorted(schedule_of(calls)[-1].split()[2:]) == ["a.0", "b.0", "c.0"]


async def test_a_quorum_is_enough_and_a_lost_agents_place_is_taken_by_the_next() -> None:
    fates = {"a": Hang(), "b": Lose(), "c": Say(text="Answer: 19"), "d": Say(text="Answer: 20")}
    agents = FakeAgents(fates | {"a": (Hang(), Say(text="Answer: 19"))})
    loop = orchestrator_of(agents, POOL, places={name: name for name in POOL})
    policy = build_policy("fusion", context_of("fusion:panel=3:quorum=2"))
    answer = await answer_of(loop, query(max_steps=5), policy)
    assert [call.agent for call in agents.calls] == ["a", "b", "c", "d", "a"]
    assert agents.cancelled == ["a"]
    assert [(reply.agent, reply.status) for reply in answer.steps[0].replies] == [
        ("b", "failed"), ("d", "ok"), ("c", "ok"), ("a", "late"),
    ]  # fmt: skip
    assert answer.degraded


@pytest.mark.parametrize(
    "policy",
    [
        "moa", "moa:layers=2", "moa:layers=4:agents=a+b", "self_moa", "self_moa:k=2", "self_moa_seq", "self_moa_seq:k=5:window=2",
        "smoa", "smoa:layers=1", "smoa:layers=3:keep=1", "fusion", "fusion:panel=9",
    ],
)  # fmt: skip
async def test_calls_and_tokens_are_those_of_the_formula(policy: str) -> None:
    await check_cost(policy, judged)
