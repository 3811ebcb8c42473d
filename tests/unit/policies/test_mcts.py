"""Tree search: which answer is mended next, by hand-computed UCT, and what each call sees."""

from __future__ import annotations

import pytest

from dmoa.policies.mcts import rating_of
from dmoa.testing import query
from dmoa.types import AgentCall, AgentReply
from tests.unit.policies.schedules import Says, check_cost, run, schedule_of


def rated(*ratings: str) -> Says:
    """What the rater says at each of its turns."""
    return lambda call: ratings[call.step // 2] if "Reply with one number" in call.messages[-1].content else None


async def test_the_better_branch_is_mended_and_the_best_answer_written_out() -> None:
    answer, calls = await run("mcts", rated("2", "8", "3", "9"))
    # Two children of the root, rated .2 and .8. Third: b, of mean .8. Fourth: a has .2 + 1.4 (ln 3 / 1) ** .5 = 1.67, b's branch
    # (.8 + .3) / 2 + 1.4 (ln 3 / 2) ** .5 = 1.59, so a is mended next; that answer, .9, is the best.
    answers = ["a.0", "b.2~1", "c.4~2 <- b.2~1", "d.6~3 <- a.0"]
    ratings = ["a.1 <- a.0", "a.3 <- b.2~1", "a.5 <- c.4~2", "a.7 <- d.6~3"]
    expected = [line for pair in zip(answers, ratings, strict=True) for line in pair]
    assert schedule_of(calls) == [*expected, "a.8 <- d.6~3"]
    assert answer.text.startswith("[a.8]")
    assert answer.stop_reason == "schedule"
    assert {call.sampling.temperature for call in calls if call.step % 2 == 0 and call.step < 8} == {0.7}


async def test_without_exploration_the_best_branch_alone_grows() -> None:
    _, calls = await run("mcts:exploration=0:rater=d:agents=a+b", rated("2", "8", "7", "6"))
    # After .8 and .7 below it the branch of b has a mean of .75; it has room for a second child.
    assert schedule_of(calls)[4:] == ["a.4~2 <- b.2~1", "d.5 <- a.4~2", "b.6~3 <- b.2~1", "d.7 <- b.6~3", "d.8 <- b.2~1"]


async def test_stand_ins_draw_words_of_their_own() -> None:
    """b stands in for a where all four first answers are asked the same, with a client's seed."""

    def says(call: AgentCall) -> str | AgentReply | None:
        return AgentReply(agent="a", status="failed", error="broken") if call.agent == "a" else sure(call)

    policy = "mcts:agents=a+b:rater=c:simulations=4:children=4"
    _, calls = await run(policy, says, query(max_steps=50, sampling={"seed": 7}))
    assert [call.sampling.seed for call in calls if call.agent == "b"] == [7, 8, 9, 10]


def test_ratings_are_read_from_words() -> None:
    words = {"7": 0.7, "I say 10 of 10.": 1.0, "8.5/10": 0.85, "none": 0.5, "100": 0.5, "11": 0.5, "0": 0.0}
    words |= {"On a scale from 0 to 10: 7": 0.7, "From 0-10 I give 9": 0.9, "0 or 10": 0.0}
    assert {text: rating_of(text) for text in words} == pytest.approx(words)


def sure(call: AgentCall) -> str | None:
    return rated(*["5"] * 8)(call)


@pytest.mark.parametrize("policy", ["mcts", "mcts:simulations=1", "mcts:simulations=6:children=3", "mcts:c:simulations=2"])
async def test_calls_and_tokens_are_those_of_the_formula(policy: str) -> None:
    await check_cost(policy, sure)
