"""Policies of one step that choose: chain of thought, samples, votes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmoa.testing import query
from dmoa.types import AgentCall, Stage
from tests.unit.policies.schedules import Says, check_cost, mark_of, run, schedule_of


async def test_cot_tells_one_agent_to_think() -> None:
    answer, calls = await run("cot:c")
    assert schedule_of(calls) == ["c.0"]
    assert "step by step" in calls[0].messages[-1].content
    assert answer.stop_reason == "schedule"


def by_sample(*words: str) -> dict[str, str]:
    return {f"a.0{f'~{number}' if number else ''}": text for number, text in enumerate(words)}


def saying(words: dict[str, str]) -> Says:
    return lambda call: words[mark_of(call)]


async def test_self_consistency_takes_the_answer_of_most_samples() -> None:
    words = by_sample("Answer: 18", "So it is 19.\nAnswer: 19", "Answer: 20", "Answer: 19", "Answer: 21")
    answer, calls = await run("self_consistency", saying(words))
    assert schedule_of(calls) == list(words)
    assert answer.text.endswith("Answer: 19")
    assert {call.sampling.temperature for call in calls} == {0.7}


async def test_a_seed_of_the_client_gives_every_sample_its_own() -> None:
    _, calls = await run("self_consistency:k=3", asked=query(sampling={"seed": 10}))
    assert [call.sampling.seed for call in calls] == [10, 11, 12]


async def test_best_of_n_takes_the_surest_sample_though_others_agree() -> None:
    words = by_sample("Answer: 18", "Answer: 18", "Answer: 19")
    answer, calls = await run("best_of_n:k=3", saying(words), nats={"a.0~2": 0.1})
    assert len(calls) == 3
    assert answer.text == "Answer: 19"


async def test_majority_asks_k_and_takes_the_answer_of_most() -> None:
    def says(call: AgentCall) -> str:
        return "Answer: 18" if call.agent == "a" else "Answer: 19"

    answer, calls = await run("majority_k:drawn=false", says, nats={"a.0": 0.01})
    assert schedule_of(calls) == ["a.0", "b.0", "c.0"]
    assert answer.text == "Answer: 19"
    read = "".join(message.content for call in calls for message in call.messages)
    assert "Answer: 1" not in read  # a voter reads the query, never another's answer


async def test_majority_draws_its_voters_by_the_querys_id() -> None:
    voters = set()
    for number in range(12):
        _, calls = await run("majority_k:k=2", asked=replace(query(), trace_id=f"q{number}"))
        voters |= {call.agent for call in calls}
    assert voters == {"a", "b", "c", "d"}


async def test_a_query_with_stages_asks_as_at_the_first_step_at_every_stage() -> None:
    asked = replace(query(), stages=(Stage(part="one?"), Stage(part="two?", has_history=False)))
    for policy in ("moa", "cot", "self_consistency"):
        answer, calls = await run(policy, asked=asked)
        assert answer.stop_reason == "stages"
        assert {(call.step, call.messages[-1].content.split("\n")[0]) for call in calls} == {(0, "one?"), (1, "two?")}


@pytest.mark.parametrize(
    "policy", ["cot", "self_consistency", "self_consistency:k=2", "best_of_n:k=3", "majority_k", "majority_k:k=9"]
)
async def test_calls_and_tokens_are_those_of_the_formula(policy: str) -> None:
    await check_cost(policy)
