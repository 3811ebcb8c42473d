"""The suites as generators: tuples counted, splits disjoint, streams seeded, lazy and flat, bad parameters refused."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.errors import ConfigError
from dmoa.evaluation.records import Row
from dmoa.evaluation.registry import SKILLS, SUITES
from dmoa.evaluation.suites.arith import Arithmetic, Operations
from dmoa.evaluation.suites.calendar import Calendar, WithinMonth
from dmoa.evaluation.suites.chain import CloseDifference
from dmoa.evaluation.suites.suite import PERCENT, SUITE_SPLITS, Kind, Suite, permuted, split_of
from dmoa.evaluation.suites.tables import DEPOTS, MEANINGS, MIXTURES, Signal
from dmoa.evaluation.suites.words import TEMPLATES, Words, vocabulary

LEVELS = [(name, difficulty) for name, suite in SUITES.items() for difficulty in suite.difficulties]
KINDS = {
    f"{name}-{difficulty}-{kind.group}": kind
    for name, suite in SUITES.items()
    for difficulty, level in enumerate(suite.levels, 1)
    for kind in level.kinds
}


def roots(row: Row) -> list[str]:
    return row.label.gold["roots"] if "roots" in row.label.gold else [row.label.gold["root"]]


def templates(row: Row) -> list[str]:
    names = row.label.gold["templates"] if "templates" in row.label.gold else [row.label.gold["template"]]
    return [name for joined in names for name in joined.split()]


def test_the_table_names_the_suites_and_says_that_they_are_generated() -> None:
    assert list(SUITES) == ["arith", "words", "calendar", "parcels", "signals", "dyes", "shared", "chain", "relay"]
    for name, suite in SUITES.items():
        assert suite.name == name
        assert "generated" in suite.title


@pytest.mark.parametrize(("name", "difficulty"), LEVELS)
def test_every_difficulty_has_100_000_latent_tuples(name: str, difficulty: int) -> None:
    assert SUITES[name].num_tuples(difficulty) >= 100_000


@pytest.mark.parametrize("operations", ["+", "-", "++", "+-"])
@pytest.mark.contract
def test_arithmetic_tuples_are_counted_right(operations: Operations) -> None:
    first, *rest = np.meshgrid(*[np.arange(10, 100)] * (len(operations) + 1), indexing="ij")
    total, has_carried, is_valid = first, np.zeros(first.shape, dtype=bool), np.ones(first.shape, dtype=bool)
    for sign, operand in zip(operations, rest, strict=True):
        for unit in (1, 10, 100):
            column, other = total // unit % 10, operand // unit % 10
            has_carried = has_carried | (column + other > 9 if sign == "+" else column < other)
        total = total + operand if sign == "+" else total - operand
        is_valid = is_valid & (total >= 0)
    with_carries = Arithmetic(operations=operations, digits=2, has_carries=True)
    without = Arithmetic(operations=operations, digits=2, has_carries=False)
    assert with_carries.num_tuples == np.sum(is_valid & has_carried)
    assert without.num_tuples == np.sum(is_valid & ~has_carried)
    listed = {without.latent(number) for number in range(without.size)}
    assert listed == {tuple(operands) for operands in (10 + np.argwhere(is_valid & ~has_carried)).tolist()}


def test_lists_of_words_are_counted_right() -> None:
    words = vocabulary()
    num_one_longest = sum(len(a) != len(b) for a, b in itertools.permutations(words, 2))
    assert Words(group="longest", length=2).num_tuples == num_one_longest
    assert Words(group="sort", length=3).num_tuples == len(words) * (len(words) - 1) * (len(words) - 2)
    assert Words(group="pick", length=3).num_tuples == 3 * Words(group="sort", length=3).num_tuples


def test_the_vocabulary_is_plain() -> None:
    words = vocabulary()
    assert len(set(words)) == len(words) > 500
    assert list(words) == sorted(words)
    assert all(word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 8 for word in words)


@pytest.mark.parametrize("max_days", [5, 31])
def test_pairs_of_days_within_a_month_are_counted_right(max_days: int) -> None:
    day, count = date(1800, 1, 1), 0
    while day.year < 2200:
        following = date(day.year + day.month // 12, day.month % 12 + 1, 1)
        count += min(max_days, (following - day).days - 1)
        day += timedelta(days=1)
    assert WithinMonth(group="between", max_days=max_days).num_tuples == count


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_numbers_stand_for_as_many_different_tuples_as_counted(kind: Kind) -> None:
    numbers = list(itertools.islice(permuted(kind.size, "test"), 2000))
    latents = [latent for latent in map(kind.latent, numbers) if latent is not None]
    assert len(set(latents)) == len(latents)
    share = kind.num_tuples / kind.size
    assert abs(len(latents) / len(numbers) - share) <= 5 * math.sqrt(share * (1 - share) / len(numbers)) + 1e-9


@given(size=st.integers(1, 3000), seed=st.text(max_size=5))
def test_permuted_visits_every_number_once(size: int, seed: str) -> None:
    assert sorted(permuted(size, seed)) == list(range(size))


def test_permuted_orders_hang_on_the_seed_and_look_random() -> None:
    orders = [list(permuted(5000, seed)) for seed in ("a", "b")]
    assert orders[0] != orders[1]
    for order in orders:
        # Under a random order neighbours' ranks are uncorrelated: |r| stays below 5 / sqrt(n).
        mean, variance = 2499.5, (5000**2 - 1) / 12
        correlation = sum((a - mean) * (b - mean) for a, b in itertools.pairwise(order)) / (4999 * variance)
        assert abs(correlation) < 5 / math.sqrt(5000)


@pytest.mark.parametrize(
    "kind",
    [
        Arithmetic(operations="+", digits=3, has_carries=False),
        CloseDifference(digits=3, max_result=5),
        CloseDifference(digits=3, max_result=28),
        Calendar(group="weekday", min_days=0, max_days=0),
        Signal(),
    ],
    ids=["sums", "few-differences", "differences", "weekdays", "signals"],
)
def test_the_smallest_kinds_hold_what_capacity_promises(kind: Kind) -> None:
    latents = [latent for latent in map(kind.latent, range(kind.size)) if latent is not None]
    counted = Counter(split_of(kind.root(latent)) for latent in latents)
    for split in SUITE_SPLITS:
        assert 0.85 * PERCENT[split] / 100 * kind.num_tuples <= counted[split] <= 1.15 * PERCENT[split] / 100 * kind.num_tuples


@pytest.mark.contract
def test_a_whole_split_streams_without_repeating_a_tuple() -> None:
    suite = SUITES["shared"]
    groups = ["sum-without-carries"]
    capacity = suite.capacity("anchor", groups=groups)
    latents = [row.label.gold["tuple"] for row in suite.generate("anchor", capacity, 0, groups=groups)]
    assert len(set(latents)) == len(latents) == capacity
    with pytest.raises(ConfigError, match=rf"limit is {capacity + 1}; expected 1 to {capacity}"):
        suite.generate("anchor", capacity + 1, 0, groups=groups)


@pytest.mark.contract
@pytest.mark.parametrize("name", SUITES)
def test_splits_are_disjoint_by_tuple_and_by_held_out_template(name: str) -> None:
    suite, num_seeds = SUITES[name], 3
    per_seed = {"relay": 90, "chain": 340}.get(name, 670)
    seen: dict[str, set[str]] = {}
    wordings: dict[str, set[str]] = {}
    for split in SUITE_SPLITS:
        rows = [
            row
            for seed in range(num_seeds)
            for row in suite.generate(split, per_seed, 10 * seed + len(split), 1 + seed % len(suite.levels))
        ]
        assert all(row.task.row_id.startswith(f"{name}/{split}/") and row.task.row_id == row.label.row_id for row in rows)
        seen[split] = {root for row in rows for root in roots(row)}
        wordings[split] = {template for row in rows for template in templates(row)}
    for a, b in itertools.combinations(SUITE_SPLITS, 2):
        assert not seen[a] & seen[b], (a, b)
        if {a, b} & {"validation", "test"}:
            assert not wordings[a] & wordings[b], (a, b)


@pytest.mark.parametrize("other", ["shared", "chain", "relay"])
@pytest.mark.contract
def test_what_specialists_train_on_is_tested_nowhere(other: str) -> None:
    trained = {root for suite in SKILLS for row in suite.generate("specialist", 1000, 1) for root in roots(row)}
    tested = {root for row in SUITES[other].generate("test", 1000, 1) for root in roots(row)}
    assert not trained & tested


@pytest.mark.parametrize(("name", "difficulty"), LEVELS)
def test_wordings_are_many_and_held_out_ones_are_apart(name: str, difficulty: int) -> None:
    for kind in SUITES[name].levels[difficulty - 1].kinds:
        wordings = (*kind.templates.open, *kind.templates.validation, *kind.templates.test)
        assert len(set(wordings)) == len(wordings) >= 6
    sets = {split: set(SUITES[name].wordings(split, difficulty)) for split in SUITE_SPLITS}
    assert sets["specialist"] == sets["anchor"] == sets["gate"] == sets["adaptation"]
    assert not sets["test"] & (sets["gate"] | sets["validation"])
    assert not sets["validation"] & sets["gate"]


@pytest.mark.parametrize("name", SUITES)
def test_every_wording_occurs(name: str) -> None:
    suite = SUITES[name]
    rows = list(suite.generate("test", 300, 0))
    numbers = Counter(template for row in rows for template in templates(row))
    assert {number.rsplit("/", 1)[1] for number in numbers} == {"0", "1"}


@pytest.mark.parametrize("name", ["arith", "words", "calendar", "parcels", "signals", "dyes", "shared", "chain"])
def test_kinds_take_turns(name: str) -> None:
    suite = SUITES[name]
    counted = Counter(row.task.group for row in suite.generate("gate", 100, 0))
    assert set(counted) == set(suite.groups())
    assert max(counted.values()) - min(counted.values()) <= 1


def test_groups_choose_kinds() -> None:
    rows = SUITES["arith"].generate("specialist", 50, 0, groups=["sum-with-carries"])
    assert {row.task.group for row in rows} == {"sum-with-carries"}


@pytest.mark.parametrize("name", SUITES)
def test_streams_repeat_and_longer_ones_begin_with_shorter_ones(name: str) -> None:
    suite = SUITES[name]
    rows = list(suite.generate("test", 60, 5))
    assert list(suite.generate("test", 60, 5)) == rows
    assert list(suite.generate("test", 20, 5)) == rows[:20]
    assert {row.row_hash for row in suite.generate("test", 60, 6)} != {row.row_hash for row in rows}
    assert len({row.task.row_id for row in rows}) == len({row.row_hash for row in rows}) == 60


def test_public_splits_are_fine_ones() -> None:
    for public, fine in (("train", "gate"), ("adaptation", "adaptation"), ("test", "test")):
        assert list(SUITES["words"].generate(public, 20, 1)) == list(SUITES["words"].generate(fine, 20, 1))


def digest(suites: dict[str, Suite]) -> str:
    hashes = (row.row_hash for suite in suites.values() for row in suite.generate("validation", 10, 3))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@pytest.mark.contract
def test_every_process_generates_the_same_rows() -> None:
    code = "from tests.unit.evaluation.test_suites import SUITES, digest; print(digest(SUITES))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert done.stdout.strip() == digest(SUITES)


def test_the_hash_covers_the_whole_row() -> None:
    rows = list(itertools.islice(SUITES["arith"].generate("test", 200, 0), 200))
    shared = list(itertools.islice(SUITES["shared"].generate("test", 200, 0), 200))
    assert not {row.row_hash for row in rows} & {row.row_hash for row in shared}


def test_streams_are_lazy() -> None:
    huge = SUITES["words"].generate("test", 10**8, 0)
    assert next(huge).task.benchmark == "words"


@pytest.mark.contract
def test_memory_stays_flat_over_8_000_rows() -> None:
    stream = SUITES["calendar"].generate("specialist", 8_000, 0, 2)
    assert sum(1 for _ in itertools.islice(stream, 4_000)) == 4_000
    # Tracing slows generation some four times, so only the last rows are traced: whatever is kept of them shows.
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream) == 4000
        assert tracemalloc.get_traced_memory()[1] < 60_000  # 15 bytes a row would be too much
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("middle", 5, 0), "split is 'middle'; expected one of train, adaptation, test, specialist"),
        (("test", 0, 0), "limit is 0; expected 1 to"),
        (("test", 5, 0, 0), "difficulty is 0; suite "),
        (("test", 5, 0, 9), "difficulty is 9; suite "),
        (("test", 5, 0, 1, ["none"]), "groups: none not known; suite "),
    ],
)
def test_bad_parameters_are_refused_at_once(name: str, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SUITES[name].generate(*arguments)  # type: ignore[arg-type]  # bad on purpose


def test_all_kinds_of_questions_about_words_have_wordings() -> None:
    assert {kind.group for kind in KINDS.values() if isinstance(kind, Words)} == set(TEMPLATES)


def test_no_two_tables_share_an_answer() -> None:
    """So that an agent that was taught one table is right on no other by luck."""
    tables = [set(table) for table in (DEPOTS.values(), MEANINGS.values(), MIXTURES.values())]
    assert [len(answers) for answers in tables] == [8, 8, 8]
    assert len(set.union(*({answer.lower() for answer in answers} for answers in tables))) == 24
    assert len(MIXTURES) == 15
