"""The suites' answers, confirmed by solvers that read the text alone."""

from __future__ import annotations

import pytest

from dmoa.evaluation.registry import SUITES
from tests.unit.evaluation.slow_solvers import has_carry, solve, solve_second, suite_of, terms_of, weekday_named

NUM_ROWS = 1000
"""Per suite, over its splits and difficulties."""

SKILLS = ("arith", "words", "calendar", "parcels", "signals", "dyes")
SINGLE = [(name, difficulty) for name in (*SKILLS, "shared") for difficulty in SUITES[name].difficulties]


@pytest.mark.parametrize(("name", "difficulty"), SINGLE)
@pytest.mark.parametrize("split", ["gate", "validation", "test"])
def test_a_slow_solver_confirms_the_answers(name: str, difficulty: int, split: str) -> None:
    limit = -(-NUM_ROWS // (3 * len(SUITES[name].difficulties)))
    for row in SUITES[name].generate(split, limit, 11, difficulty):
        assert solve(row.task.text, difficulty=difficulty) == row.label.gold["answer"], row.task.text
        assert row.task.text.count("End with a line `Answer: ...`") == 1


@pytest.mark.parametrize("difficulty", SUITES["chain"].difficulties)
@pytest.mark.parametrize("split", ["gate", "validation", "test"])
def test_a_slow_solver_confirms_chains_part_by_part(difficulty: int, split: str) -> None:
    for row in SUITES["chain"].generate(split, NUM_ROWS // 5, 12, difficulty):
        first, second = (stage.part for stage in row.task.stages)
        assert first is not None
        assert second is not None
        assert [stage.observation for stage in row.task.stages] == [None, None]
        pair = row.task.group.split("-")
        assert suite_of(first) == pair[0] != pair[1]
        result = solve(first)
        assert result == row.label.gold["first"]
        assert solve_second(second, result) == row.label.gold["answer"], (first, second)
        assert first.split(" End with")[0] in row.task.text
        assert second in row.task.text


@pytest.mark.parametrize(("difficulty", "delay"), [(1, 1), (2, 2), (3, 3), (4, 0)])
def test_a_slow_solver_confirms_relays_step_by_step(difficulty: int, delay: int) -> None:
    for row in SUITES["relay"].generate("test", NUM_ROWS // 3 + 1, 13, difficulty):
        cards = [stage.observation for stage in row.task.stages]
        parts = [stage.part for stage in row.task.stages]
        gold = row.label.gold
        assert gold["delay"] == delay
        assert len(cards) == 4
        assert len(set(parts[:delay])) == min(delay, 1)
        assert parts[delay:] == cards[: 4 - delay]
        assert gold["answers"] == [*[None] * delay, *[solve(card) for card in cards[: 4 - delay]]]
        assert gold["suites"] == [*[None] * delay, *[suite_of(card) for card in cards[: 4 - delay]]]


@pytest.mark.parametrize("name", ["arith", "shared"])
def test_groups_say_whether_digits_carry(name: str) -> None:
    for difficulty in SUITES[name].difficulties:
        for row in SUITES[name].generate("gate", 200, 3, difficulty):
            assert has_carry(terms_of(row.task.text)) == row.task.group.endswith("-with-carries"), row.task


def test_weekdays_that_questions_claim_are_true() -> None:
    rows = [row for difficulty in (1, 2, 3) for row in SUITES["calendar"].generate("test", 300, 4, difficulty)]
    claims = [claim for row in rows if (claim := weekday_named(row.task.text))]
    assert len(claims) > 100
    assert all(claimed == counted for claimed, counted in claims)


def test_answers_at_the_lowest_difficulty_are_short() -> None:
    for name in SKILLS:
        rows = SUITES[name].generate("test", 500, 5)
        # Ten characters of a date are the most tokens that a digit-by-digit tokenizer makes of one.
        assert all(len(answer) <= 10 or answer.count(",") == 2 for answer in (row.label.gold["answer"] for row in rows))
