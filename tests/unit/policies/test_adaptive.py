"""Policies that spend by how sure agents are."""

from __future__ import annotations

import pytest

from tests.unit.policies.schedules import check_cost, run, schedule_of


async def test_escalate_ends_at_the_first_sure_answer_and_shows_nobody_the_others() -> None:
    answer, calls = await run("escalate:nats=0.3", nats={"a.0": 0.31, "b.1": 0.3})
    assert schedule_of(calls) == ["a.0", "b.1"]
    assert (answer.stop_reason, answer.text[:5]) == ("sure", "[b.1]")


async def test_escalate_takes_the_last_agents_answer_where_none_is_sure() -> None:
    answer, calls = await run("escalate:agents=d+b")
    assert schedule_of(calls) == ["d.0", "b.1"]
    assert (answer.stop_reason, answer.text[:5]) == ("schedule", "[b.1]")


async def test_opinions_are_as_long_as_the_gate_thinks_of_agents_and_the_surest_writes_the_answer() -> None:
    answer, calls = await run("elastic:least=20", nats={"b.0": 0.2})
    assert schedule_of(calls) == ["d.0", "c.0", "b.0", "a.0", "b.1 <- d.0 c.0 b.0 a.0"]
    # Probabilities .4, .3, .2, .1 of an agent's 50 tokens (the pool's own limit is 96), 20 at least; all 50 for the last.
    assert [call.sampling.max_tokens for call in calls] == [50, 50, 48, 24, 50]
    assert answer.text.startswith("[b.1]")
    assert answer.steps[0].decision is not None
    assert answer.steps[0].mass == pytest.approx(1.0)


async def test_those_with_most_of_the_skills_that_a_recruiter_names_answer_and_it_aggregates() -> None:
    # Without tags an agent's skill is its name.
    answer, calls = await run("symbolic:k=2:recruiter=b", lambda call: "D, then c." if call.step == 0 else None)
    assert schedule_of(calls) == ["b.0", "c.1", "d.1", "b.2 <- c.1 d.1"]
    assert "Skills: a, b, c, d." in calls[0].messages[-1].content
    assert answer.text.startswith("[b.2]")


async def test_where_no_skill_is_named_the_first_agents_are_recruited() -> None:
    _, calls = await run("symbolic:k=2", lambda call: "none" if call.step == 0 else None)
    assert [call.agent for call in calls] == ["a", "a", "b", "a"]


@pytest.mark.parametrize("policy", ["escalate", "elastic", "elastic:agents=b+c"])
async def test_calls_and_tokens_are_those_of_the_formula(policy: str) -> None:
    await check_cost(policy)


@pytest.mark.parametrize("policy", ["symbolic", "symbolic:k=9"])
async def test_a_recruiters_short_word_is_one_call_of_the_formula(policy: str) -> None:
    await check_cost(policy, lambda call: "none" if call.step == 0 else None)
