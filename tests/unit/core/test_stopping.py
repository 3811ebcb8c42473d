"""Every row of the plan's table of stops."""

from __future__ import annotations

import pytest

from dmoa.core.aggregate import select_contribution
from dmoa.core.scores import raw_score
from dmoa.core.stopping import budget_stop, rule_stop
from dmoa.types import AgentReply, EntropySum, StopReason, Verdict


def reply(agent: str, text: str, entropy: float | None = 0.5) -> AgentReply:
    sums = EntropySum() if entropy is None else EntropySum(sum_nats=2 * entropy, tokens=2)
    return AgentReply(agent=agent, status="ok", text=text, entropy=sums)


LOST = AgentReply(agent="lost", status="failed", error="gone")


def stop(replies: list[AgentReply], previous: str = "", theta: float | None = None) -> StopReason | None:
    return rule_stop(
        mode="select",
        verdict="rule",
        active_replies=replies,
        selection=select_contribution(replies),
        previous_summary=previous,
        theta=theta,
    )


@pytest.mark.parametrize(("verdict", "expected"), [("final", "summarizer"), ("continue", None), ("unparsable", None)])
def test_llm_mode_follows_the_verdict_alone(verdict: Verdict, expected: StopReason | None) -> None:
    replies = [reply("a", "7"), reply("b", "7")]
    selection = select_contribution(replies)
    reason = rule_stop(mode="llm", verdict=verdict, active_replies=replies, selection=selection, previous_summary="7", theta=9.0)
    assert reason == expected


def test_two_equal_answers_agree() -> None:
    assert stop([reply("a", "The answer is 1,200."), reply("b", "1200.0"), reply("c", "5")]) == "agreement"
    assert stop([reply("a", "7"), reply("b", "7")], theta=-100.0) == "agreement"


def test_different_answers_go_on_even_if_one_repeats_the_summary() -> None:
    assert stop([reply("a", "7"), reply("b", "8")], previous="7") is None
    assert stop([reply("a", "7"), reply("b", "8")], previous="7", theta=-9.0) is None


def test_one_agent_without_theta_stops_on_repeating_itself() -> None:
    assert stop([reply("a", "7")]) is None
    assert stop([reply("a", "7")], previous="8") is None
    assert stop([reply("a", "The answer is 7.")], previous="7") == "agreement"
    assert stop([reply("a", "7"), LOST], previous="7") == "agreement"


@pytest.mark.parametrize("previous", ["", "7", "8"])
def test_with_theta_a_sure_contribution_ends_the_query_at_once(previous: str) -> None:
    theta = raw_score(0.5)
    assert stop([reply("a", "7", 0.5)], previous=previous, theta=theta) == "sure"
    assert stop([reply("a", "7", 0.51)], previous=previous, theta=theta) is None
    assert stop([reply("a", "7", 0.9), reply("b", "8", 0.5)], previous=previous, theta=theta) == "sure"
    assert stop([reply("a", "7", 0.5), reply("b", "7", 0.5)], previous=previous, theta=theta) == "agreement"
    assert stop([reply("a", "7", None)], previous="7", theta=1e9) is None


def test_prose_without_an_answer_repeats_word_for_word() -> None:
    prose = "One thought,\nand then another"
    assert stop([reply("a", prose)], previous="One  thought, and\nthen another") == "agreement"
    assert stop([reply("a", prose)], previous="One thought,\nand then a third") is None


def test_the_question_says_whether_a_repetition_counts() -> None:
    one = [reply("a", "Answer: 'aB'")]
    for asked, expected in (("assert f('aB') == ??", None), ("What is it?", "agreement")):
        assert (
            rule_stop(
                mode="select",
                verdict="rule",
                active_replies=one,
                selection=select_contribution(one),
                previous_summary="Answer: 'ab'",
                asked=asked,
            )
            == expected
        )


def test_nobody_replied() -> None:
    assert stop([LOST], previous="7") is None
    assert stop([], previous="7") is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"step": 3}, "max_steps"),
        ({"step": 4}, "max_steps"),
        ({"tokens_used": 99, "budget_tokens": 100}, None),
        ({"tokens_used": 100, "budget_tokens": 100}, "budget_tokens"),
        ({"now": 9.9, "deadline": 10.0}, None),
        ({"now": 10.0, "deadline": 10.0}, "deadline"),
        ({"now": 11.0, "deadline": 10.0, "tokens_used": 5, "budget_tokens": 1, "step": 3}, "deadline"),
        ({"tokens_used": 5, "budget_tokens": 1, "step": 3}, "budget_tokens"),
    ],
)
def test_budgets(changes: dict[str, float], expected: StopReason | None) -> None:
    unspent = {"step": 2, "max_steps": 3, "tokens_used": 10**9, "budget_tokens": None, "now": 1e9, "deadline": None}
    assert budget_stop(**{**unspent, **changes}) == expected  # type: ignore[arg-type]  # mixed on purpose: a table
