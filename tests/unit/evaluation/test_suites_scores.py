"""Scores, chance levels and the ceiling of routers without memory on the built-in suites."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.evaluation.records import Label, Reply
from dmoa.evaluation.registry import SUITES
from dmoa.evaluation.suites.suite import find_answer
from tests.unit.evaluation.slow_solvers import suite_of

FIRST = {name: next(suite.generate("test", 1, 0)).label for name, suite in SUITES.items()}
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def label(answer: str) -> Label:
    return Label(row_id="arith/test/0", benchmark="arith", gold={"answer": answer})


def relay_label(*answers: str | None) -> Label:
    return Label(row_id="relay/test/0", benchmark="relay", gold={"answers": list(answers)})


@pytest.mark.parametrize("name", SUITES)
def test_gold_replies_score_one_and_empty_ones_zero(name: str) -> None:
    suite = SUITES[name]
    for difficulty in suite.difficulties:
        for row in suite.generate("test", 100, 2, difficulty):
            assert suite.score(row.label, suite.gold_reply(row.label)).value == 1.0, row
            empty = suite.score(row.label, Reply(text=""))
            assert (empty.value, empty.is_scored, empty.extracted) == (0.0, False, None)


@pytest.mark.parametrize("name", ["arith", "words", "calendar", "parcels", "signals", "dyes", "shared", "chain"])
def test_answers_of_other_rows_score_zero_unless_equal(name: str) -> None:
    suite = SUITES[name]
    rows = list(suite.generate("test", 200, 2))
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        is_equal = row.label.gold["answer"] == other.label.gold["answer"]
        assert suite.score(row.label, suite.gold_reply(other.label)).value == float(is_equal)


@pytest.mark.parametrize(
    ("gold", "text", "value"),
    [
        ("579", "Answer: 579", 1.0),
        ("579", "500 + 79 = 579.\n\n**Answer:** 579.", 1.0),
        ("1579", "Answer: 1,579", 1.0),
        ("579", "579", 1.0),
        ("579", "Answer: 578\nWait.\nAnswer: 579", 1.0),
        ("579", "Answer: 579\nAnswer: 578", 0.0),
        ("579", "It is not 579.\nAnswer: 5790", 0.0),
        ("579", "\\boxed{579}\nAnswer: 578", 0.0),
        ("apple, bee, cat", "Answer: Apple,  bee, cat.", 1.0),
        ("apple, bee, cat", "Answer: apple bee cat", 1.0),
        ("apple, bee, cat", "Answer: bee, apple, cat", 0.0),
        ("apple, bee, cat", "Answer: apple, bee", 0.0),
        ("bee", "Answer: *bee*", 1.0),
        ("bee", "Answer: beer", 0.0),
        ("2024-02-29", "Answer: 2024-02-29", 1.0),
        ("2024-02-29", "Answer: 2024-03-29", 0.0),
        ("Friday", "answer: friday", 1.0),
        ("Friday", "Answer: Thursday, Friday", 0.0),
    ],
)
def test_the_final_answer_decides(gold: str, text: str, value: float) -> None:
    score = SUITES["arith"].score(label(gold), Reply(text=text))
    assert (score.value, score.is_scored) == (value, True)
    assert score.extracted is not None


def test_relay_scores_the_share_of_steps() -> None:
    suite, gold = SUITES["relay"], relay_label(None, "579", "bee", "Friday")
    all_right = suite.score(gold, Reply(text="", step_texts=("Answer: none", "Answer: 579", "Answer: bee", "Answer: Friday")))
    assert (all_right.value, all_right.extracted) == (1.0, "579 | bee | friday")
    one = suite.score(gold, Reply(text="Answer: Friday", step_texts=("Answer: 579", "Answer: 579", "Answer: cow")))
    assert (one.value, one.is_scored, one.extracted) == (pytest.approx(1 / 3), True, "579 | cow | -")
    wrong = suite.score(gold, Reply(text="", step_texts=("", "Answer: 1", "", "")))
    assert (wrong.value, wrong.is_scored) == (0.0, True)
    unscored = suite.score(gold, Reply(text="Answer: Friday", step_texts=("Answer: 579",)))
    assert (unscored.value, unscored.is_scored) == (0.0, False)
    longer = suite.score(gold, Reply(text="", step_texts=("", "Answer: 579", "Answer: bee", "Answer: Friday", "Answer: 1")))
    assert longer.value == 1.0


@given(text=st.text(), steps=st.lists(st.text(), max_size=6))
def test_scorers_never_raise(text: str, steps: list[str]) -> None:
    for name, suite in SUITES.items():
        score = suite.score(FIRST[name], Reply(text=text, step_texts=tuple(steps)))
        assert score.value in (0.0, 1.0) or name == "relay"
        assert score.is_scored or score.value == 0.0


@given(before=st.text(), answer=st.integers(0, 10**9))
def test_the_last_answer_line_counts_whatever_comes_before(before: str, answer: int) -> None:
    assert find_answer(f"{before}\nAnswer: {answer}") == str(answer)


def test_replies_of_line_ends_are_read_in_bounded_time() -> None:
    started = time.process_time()
    assert find_answer("\n" * 20_000) is None
    assert find_answer("Answer: 5" + "\n \t" * 6_000) == "5"
    assert time.process_time() - started < 1.0


def guesses(text: str, gold: str, rng: random.Random) -> str | None:
    """Return a uniform guess among the answers that a question lists; None where it lists none."""
    listed = re.search(r"[a-z]+(?:, [a-z]+)+", text.split(" End with")[0])
    if text.endswith("a weekday."):
        return rng.choice(WEEKDAYS)
    if listed is None or text.endswith("a number."):
        return None
    words = listed.group().split(", ")
    return ", ".join(rng.sample(words, len(words))) if "commas" in text else rng.choice(words)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("name", "difficulty"),
    [
        ("arith", 1),
        ("words", 1),
        ("words", 4),
        ("calendar", 3),
        ("parcels", 1),
        ("signals", 2),
        ("dyes", 2),
        ("shared", 1),
        ("chain", 1),
    ],
)
def test_chance_is_what_guessing_gets(name: str, difficulty: int) -> None:
    suite, rng = SUITES[name], random.Random(0)
    by_group = defaultdict(list)
    for row in suite.generate("specialist", 4000, 8, difficulty):
        by_group[row.task.group].append(row)
    best = []
    for rows in by_group.values():
        half = len(rows) // 2
        commonest = Counter(row.label.gold["answer"] for row in rows[:half]).most_common(1)[0][0]
        constant = [suite.score(row.label, Reply(text=f"Answer: {commonest}")).value for row in rows[half:]]
        listed = [guesses(row.task.text, row.label.gold["answer"], rng) for row in rows]
        uniform = [
            suite.score(row.label, Reply(text=f"Answer: {guess}")).value if guess else 0.0
            for row, guess in zip(rows, listed, strict=True)
        ]
        best.append(max(sum(constant) / len(constant), sum(uniform) / len(uniform)))
    assert suite.chance(difficulty) == pytest.approx(sum(best) / len(best), abs=0.02)
    assert f"chance {100 * suite.chance(difficulty):.1f} %" in suite.describe(difficulty)


def test_chance_of_relay_is_the_mean_of_its_suites() -> None:
    assert SUITES["relay"].chance(2) == pytest.approx(sum(SUITES[name].chance() for name in ("arith", "words", "calendar")) / 3)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_no_router_without_memory_beats_one_third_on_relay(delay: int) -> None:
    """All maps from (step, newest card's suite) to a specialist, over all equally likely sequences of four cards."""
    suites, scored_steps = range(3), range(delay, 4)
    sequences = list(itertools.product(suites, repeat=4))
    tables = list(itertools.product(suites, repeat=len(suites)))
    # A specialist is right on its own suite alone; hits[step][table]: rows that a table routes right at a step.
    hits = [[sum(table[cards[t]] == cards[t - delay] for cards in sequences) for table in tables] for t in scored_steps]
    total = len(sequences) * len(scored_steps)
    same_at_every_step = [Fraction(sum(step[i] for step in hits), total) for i in range(len(tables))]
    own_at_every_step = [Fraction(sum(choice), total) for choice in itertools.product(*hits)]
    assert len(own_at_every_step) == len(tables) ** len(scored_steps)
    assert max(same_at_every_step) == max(own_at_every_step) == Fraction(1, 3)
    # A router that keeps the last d cards: at step t it asks for the suite it saw at t - d.
    num_right = 0
    for cards in sequences:
        memory: list[int] = []
        for t, newest in enumerate(cards):
            memory.append(newest)
            if t >= delay:
                num_right += memory[-1 - delay] == cards[t - delay]
    assert Fraction(num_right, total) == 1


@pytest.mark.parametrize("delay", [1, 2, 3])
@pytest.mark.contract
def test_generated_relays_tell_nothing_by_the_newest_card(delay: int) -> None:
    pairs: Counter[tuple[str, str]] = Counter()
    for row in SUITES["relay"].generate("gate", 1200, 1, delay):
        assert len({stage.part for stage in row.task.stages[:delay]}) == 1
        assert not any(stage.has_history for stage in row.task.stages)  # agents see the pending card alone
        for stage, pending in zip(row.task.stages, row.label.gold["suites"], strict=True):
            assert stage.observation is not None
            if pending is not None:
                pairs[suite_of(stage.observation), pending] += 1
    total = sum(pairs.values())
    newest = {pair[0] for pair in pairs}
    best = sum(max(pairs[seen, pending] for pending in newest) for seen in newest) / total
    assert len(pairs) == 9
    assert 1 / 3 <= best < 1 / 3 + 0.045
