"""Intervals and paired tests against formulas, enumeration, published values and an independent bootstrap."""

from __future__ import annotations

import itertools
import math
import random
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dmoa.evaluation.statistics import (
    FLIPS,
    MCNEMAR,
    SIGN_FLIP,
    compare_policies,
    interval,
    mcnemar,
    newcombe,
    sign_flip_p,
    wilson,
)
from tests.examples import examples

Z = 1.959963984540054


def wilson_by_formula(correct: int, n: int) -> tuple[float, float]:
    p = correct / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


# Wilson


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 8), (8, 8), (3, 8), (50, 100), (99_999, 100_000)])
def test_wilson_is_its_formula(correct: int, n: int) -> None:
    found = wilson(correct, n)
    assert (found.low, found.high) == pytest.approx(wilson_by_formula(correct, n), abs=1e-12)
    assert found.value == correct / n


def test_wilson_has_the_published_value() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I: 81 of 263.
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


def test_no_rows_say_nothing() -> None:
    found = interval([])
    assert (found.value, found.low, found.high) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_all_alike_is_no_certainty(score: float) -> None:
    found = interval([score] * 8)
    assert found.method == "wilson"
    assert found.value == score
    assert found.high - found.low > 0.3


# Student


def test_fractions_have_students_interval() -> None:
    scores = [0.0, 0.25, 0.5, 1.0, 1.0, 0.1, 0.9, 0.4] * 5
    found = interval(scores)
    reference = stats.ttest_1samp(scores, 0.0).confidence_interval(0.95)
    assert found.method == "student"
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(scores), reference.low, reference.high), abs=1e-9)


def test_students_interval_stays_within_the_scores() -> None:
    found = interval([0.0, 0.0, 0.9])
    assert (found.low, found.high) == (0.0, 1.0)


def test_one_value_many_times_leaves_a_width() -> None:
    few, many = interval([0.75] * 5), interval([0.75] * 500)
    # Wilson's upper end for none of five: z^2 / (5 + z^2).
    assert few.high - few.value == pytest.approx(0.25)  # cut at 1
    assert few.value - few.low == pytest.approx(Z**2 / (5 + Z**2))
    assert 0.0 < many.high - many.low < 0.02


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.01, math.inf])
def test_what_is_not_a_score_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 2 are outside"):
        interval([0.5, bad])
    with pytest.raises(ValueError, match="outside"):
        compare_policies([0.5, 1.0], [bad, 0.0])


def test_one_fraction_says_nothing_of_the_spread() -> None:
    found = interval([0.4])
    assert (found.value, found.low, found.high) == (0.4, 0.0, 1.0)


@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=1, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=examples(30))
def test_the_order_of_rows_does_not_matter(scores: list[float], order: random.Random) -> None:
    shuffled = order.sample(scores, len(scores))
    assert interval(scores) == interval(shuffled)
    found = interval(scores)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0


# McNemar


def mcnemar_by_enumeration(only_a: int, only_b: int) -> float:
    n = only_a + only_b
    mass = [comb(n, k) / 2**n for k in range(n + 1)]
    return sum(m for m in mass if m <= mass[only_a] * (1 + 1e-9))


@pytest.mark.parametrize(("only_a", "only_b"), list(itertools.product(range(0, 12, 3), range(0, 12, 2))))
def test_mcnemar_sums_what_is_no_likelier(only_a: int, only_b: int) -> None:
    found = mcnemar(both=5, only_a=only_a, only_b=only_b, n=5 + only_a + only_b + 4)
    assert found.p == pytest.approx(mcnemar_by_enumeration(only_a, only_b), abs=1e-12)
    assert found.difference == pytest.approx((only_a - only_b) / found.n)


def test_mcnemar_by_hand() -> None:
    # Six rows that only a has right, none that only b has: 2 x (1/2)^6.
    found = compare_policies([1] * 6 + [1, 0], [0] * 6 + [1, 0])
    assert (found.n, found.difference, found.p, found.test) == (8, 0.75, pytest.approx(0.03125), MCNEMAR)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_no_row_that_tells_them_apart(score: float) -> None:
    found = compare_policies([score] * 9, [score] * 9)
    assert (found.difference, found.p) == (0.0, 1.0)
    assert -0.4 < found.low < 0.0 < found.high < 0.4


def test_no_rows_of_both() -> None:
    found = compare_policies([], [])
    assert (found.n, found.difference, found.low, found.high, found.p) == (0, 0.0, -1.0, 1.0, 1.0)


def test_one_row_of_both() -> None:
    found = compare_policies([1.0], [0.0])
    assert (found.difference, found.p) == (1.0, 1.0)
    assert found.low < 0.0
    assert found.high == 1.0


def test_different_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of a and 2 of b"):
        compare_policies([1.0], [0.0, 1.0])


# Newcombe's interval of a difference


@pytest.mark.parametrize(
    ("both", "only_a", "only_b", "neither", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 2635-2650, table II, method 10.
        (36, 12, 2, 0, 0.0569, 0.3404),
        (36, 14, 0, 0, 0.1528, 0.4167),
    ],
)
def test_newcombe_has_the_published_values(both: int, only_a: int, only_b: int, neither: int, low: float, high: float) -> None:
    found = newcombe(both=both, only_a=only_a, only_b=only_b, n=both + only_a + only_b + neither)
    assert (round(found[0], 4), round(found[1], 4)) == (low, high)


def test_newcombe_covers_the_truth_by_enumeration() -> None:
    # Probabilities of both, only a, only b, neither; every table of 14 rows, weighted by its probability.
    p = (0.4, 0.25, 0.1, 0.25)
    n, covered = 14, 0.0
    for both, only_a, only_b in itertools.product(range(n + 1), repeat=3):
        neither = n - both - only_a - only_b
        if neither >= 0:
            ways = math.factorial(n) // math.prod(map(math.factorial, (both, only_a, only_b, neither)))
            low, high = newcombe(both=both, only_a=only_a, only_b=only_b, n=n)
            if low <= p[1] - p[2] <= high:
                covered += ways * p[0] ** both * p[1] ** only_a * p[2] ** only_b * p[3] ** neither
    assert 0.93 < covered < 0.99


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=examples(60))
def test_swapping_the_policies_mirrors_the_comparison(pairs: list[tuple[bool, bool]]) -> None:
    a, b = [float(x) for x, _ in pairs], [float(y) for _, y in pairs]
    one, other = compare_policies(a, b), compare_policies(b, a)
    assert one.p == pytest.approx(other.p)
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
    assert one.low <= one.difference + 1e-12
    assert one.difference <= one.high + 1e-12


# Sign flips


def test_five_rows_cannot_be_more_certain_than_their_signs() -> None:
    found = compare_policies([0.75] * 5, [0.5] * 5)
    # All five differ by the same sign: 2 / 2^5.
    assert found.p == pytest.approx(0.0625)
    assert (found.difference, found.test) == (pytest.approx(0.25), SIGN_FLIP)
    assert found.low < 0.0 < 0.25 < found.high


def test_fractions_are_compared_on_pairs() -> None:
    base = [0.1 * (i % 8) for i in range(40)]
    found = compare_policies([x + 0.2 for x in base], base)
    # Every pair differs by the same 0.2, so pairing leaves little spread, although the scores themselves vary widely.
    assert found.difference == pytest.approx(0.2)
    assert found.high - found.low < 0.2
    assert found.p == pytest.approx(1 / (FLIPS + 1))


def test_fractions_without_a_difference() -> None:
    found = compare_policies([0.5, 0.25, 0.0, 1.0] * 5, [0.25, 0.5, 1.0, 0.0] * 5)
    assert found.difference == 0.0
    assert found.p == 1.0
    assert found.low < 0.0 < found.high
    same = compare_policies([0.5, 0.2], [0.5, 0.2])
    assert (same.difference, same.p) == (0.0, 1.0)
    assert same.low < 0.0 < same.high


@pytest.mark.parametrize("count", [3, 8, 12, 14])
def test_p_is_that_of_all_signs(count: int) -> None:
    drawn = random.Random(count)
    differences = [round(drawn.random() - 0.35, 2) for _ in range(count)]
    seen = abs(sum(differences))
    flips = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in itertools.product((1, -1), repeat=count)
    ]
    exact = sum(value >= seen - 1e-9 for value in flips) / len(flips)
    assert sign_flip_p(np.asarray(differences)) == pytest.approx(exact)


def test_drawn_flips_are_near_all_of_them() -> None:
    drawn = np.random.default_rng(1)
    difference_N = np.round(drawn.normal(0.1, 0.3, 40), 1)
    reference = stats.permutation_test(
        (difference_N,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(2)
    ).pvalue
    assert sign_flip_p(difference_N) == pytest.approx(reference, abs=0.02)
    assert sign_flip_p(difference_N[::-1]) == sign_flip_p(difference_N) == sign_flip_p(-difference_N)


def test_one_fractional_pair_says_nothing() -> None:
    found = compare_policies([0.5], [0.0])
    assert (found.n, found.difference, found.low, found.high, found.p) == (1, 0.5, -1.0, 1.0, 1.0)
