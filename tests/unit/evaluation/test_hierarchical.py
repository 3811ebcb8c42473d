"""Statistics over sets, seeds and rows, against plain cases and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from dmoa.evaluation.statistics import hierarchical_bootstrap, holm

RNG = np.random.default_rng(0)


def test_rows_alone_agree_with_scipy() -> None:
    difference_R = RNG.choice([-1.0, 0.0, 1.0], 400, p=[0.1, 0.6, 0.3])
    found = hierarchical_bootstrap(difference_R[None, None])
    reference = bootstrap((difference_R,), np.mean, method="percentile", n_resamples=9999, rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.01)
    assert found.difference == pytest.approx(difference_R.mean())
    assert found.p < 0.01


def test_one_lucky_seed_is_no_certain_effect() -> None:
    lucky_SGR = np.zeros((1, 5, 400))
    lucky_SGR[:, 0] = 1.0
    found = hierarchical_bootstrap(lucky_SGR, draws=4000)
    assert found.low == 0.0
    # No draw contains the lucky seed with probability (4/5)^5.
    assert found.p == pytest.approx(2 * 0.8**5, abs=0.03)
    assert hierarchical_bootstrap(np.full((1, 5, 400), 0.2), draws=100).low == pytest.approx(0.2)


def test_p_is_never_nought_and_never_above_one() -> None:
    assert hierarchical_bootstrap(np.ones((1, 2, 30)), draws=199).p == pytest.approx(2 / 200)
    assert hierarchical_bootstrap(-np.ones((1, 2, 30)), draws=199).p == pytest.approx(2 / 200)
    assert hierarchical_bootstrap(np.zeros((1, 2, 30)), draws=199).p == 1.0


def test_a_seed_repeats() -> None:
    difference_SGR = RNG.normal(0.1, 1, (2, 3, 50))
    assert hierarchical_bootstrap(difference_SGR, draws=200) == hierarchical_bootstrap(difference_SGR, draws=200)


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
