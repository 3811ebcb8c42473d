"""Statistics over sets, seeds and rows, against plain cases and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t, ttest_1samp

from dmoa.evaluation.statistics import compare_crossed, holm

RNG = np.random.default_rng(0)


def test_rows_alone_agree_with_student() -> None:
    difference_R = RNG.choice([-1.0, 0.0, 1.0], 400, p=[0.1, 0.6, 0.3])
    found = compare_crossed(difference_R[None, None])
    reference = ttest_1samp(difference_R, 0.0)
    ends = reference.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=1e-9)
    assert found.difference == pytest.approx(difference_R.mean())
    assert found.p == pytest.approx(reference.pvalue, rel=1e-9)


def test_few_seeds_cover_what_is_promised() -> None:
    """300 times five seeds of an effect of 0: 95 % of the intervals hold it (a percentile bootstrap held it in 84 to 88)."""
    rng = np.random.default_rng(5)
    effect_G = rng.normal(0.0, 0.1, (300, 1, 5, 1))
    found = [compare_crossed(effect + np.zeros((1, 5, 3))) for effect in effect_G]
    covered = sum(one.low <= 0.0 <= one.high for one in found) / len(found)
    assert 0.92 <= covered <= 0.98
    assert sum(one.p < 0.05 for one in found) / len(found) <= 0.08


def test_one_lucky_seed_is_no_certain_effect() -> None:
    lucky_SGR = np.zeros((1, 5, 400))
    lucky_SGR[:, 0] = 1.0
    found = compare_crossed(lucky_SGR)
    # Seeds 1, 0, 0, 0, 0: mean .2, standard error .2, so t is 1 with 4 degrees of freedom.
    assert found.low < 0.0
    assert found.p == pytest.approx(2 * t.sf(1.0, 4))


def test_differences_all_alike_leave_a_width() -> None:
    found = compare_crossed(np.full((1, 5, 400), -0.02))
    half = 1.96**2 / (400 + 1.96**2)
    assert (found.low, found.high) == pytest.approx((-0.02 - half, -0.02 + half), rel=1e-3)
    assert 0.0 < found.p < 0.05
    assert compare_crossed(np.full((1, 5, 400), -0.005)).p > 0.05
    assert compare_crossed(np.zeros((1, 2, 30))).p == 1.0


def test_seeds_and_rows_that_both_spread_cover_what_is_promised() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(400):
        found = compare_crossed(
            rng.normal(0.0, 0.1, (1, 5, 1)) + rng.normal(0.0, 1.0, (1, 1, 60)) + rng.normal(0, 0.3, (1, 5, 60))
        )
        covered += found.low <= 0.0 <= found.high
    assert 0.93 <= covered / 400 <= 0.985


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= 1.0 for p, q in zip(p_values, adjusted, strict=True))
    for i, p in enumerate(p_values):
        for j, q in enumerate(p_values):
            if p <= q:
                assert adjusted[i] <= adjusted[j]
