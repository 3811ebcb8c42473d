"""Entropy from listed log-probabilities: bounds by hand, around the exact value, and their sums."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.core.truncated_entropy import entropy_bounds, listed_entropy
from dmoa.types import EntropySum

LOG2 = math.log(2)


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -math.inf for p in probabilities]


def test_bounds_by_hand() -> None:
    # 1/2 and 1/4 are listed of ten tokens. One token has the missing 1/4, or eight share it, 1/32 each.
    bounds = entropy_bounds(logs(0.5, 0.25), 10)
    assert bounds is not None
    assert bounds.lower == pytest.approx(1.5 * LOG2)
    assert bounds.upper == pytest.approx(0.5 * LOG2 + 0.25 * 2 * LOG2 + 8 * (1 / 32) * 5 * LOG2)


@pytest.mark.parametrize(
    ("listed", "vocab_size", "lower", "upper"),
    [
        (logs(1.0), 10, 0.0, 0.0),
        (logs(0.5, 0.5), 10, LOG2, LOG2),
        (logs(0.25, 0.25, 0.25, 0.25), 4, 2 * LOG2, 2 * LOG2),
        (logs(0.5), 2, LOG2, LOG2),  # one token is left: it has the rest
        (logs(0.5), 3, LOG2, 1.5 * LOG2),
        (logs(1.0, 0.0), 10, 0.0, 0.0),
        ([0.0, -9999.0], 10, 0.0, 0.0),  # how some endpoints write a probability of nothing
        (logs(0.5, 0.25), 1, 1.5 * LOG2, 1.5 * LOG2),  # a vocabulary that was set too small
    ],
)
def test_edges(listed: list[float], vocab_size: int, lower: float, upper: float) -> None:
    assert entropy_bounds(listed, vocab_size) == pytest.approx((lower, upper))


@pytest.mark.parametrize("listed", [[], [math.nan], [0.0, math.nan], [0.5], logs(0.9, 0.2), logs(0.0, 0.0)])
def test_what_is_no_part_of_a_distribution_has_no_entropy(listed: list[float]) -> None:
    assert entropy_bounds(listed, 100) is None


def test_rounded_log_probabilities_may_add_up_to_a_little_more_than_one() -> None:
    assert entropy_bounds([-0.69, -0.69], 100) == pytest.approx((2 * math.exp(-0.69) * 0.69,) * 2)
    assert entropy_bounds([1e-6], 100) == (0.0, 0.0)


weights = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=60)


@given(weights=weights, num_listed=st.integers(1, 60))
def test_the_exact_entropy_lies_between_the_bounds(weights: list[float], num_listed: int) -> None:
    total = math.fsum(weights)
    full = sorted((weight / total for weight in weights), reverse=True)
    exact = -math.fsum(p * math.log(p) for p in full)
    bounds = entropy_bounds(logs(*full[:num_listed]), len(full))
    assert bounds is not None
    assert bounds.lower - 1e-9 <= exact <= bounds.upper + 1e-9


@given(weights=weights, share=st.floats(0.0, 1.0))
def test_listing_more_never_widens_the_bounds_and_listing_all_closes_them(weights: list[float], share: float) -> None:
    total = math.fsum(weights)
    full = sorted((weight / total for weight in weights), reverse=True)
    num_listed = 1 + round(share * (len(full) - 2))
    some, more, whole = (entropy_bounds(logs(*full[:n]), len(full)) for n in (num_listed, num_listed + 1, len(full)))
    assert some is not None
    assert more is not None
    assert whole is not None
    assert some.lower - 1e-9 <= more.lower
    assert more.upper <= some.upper + 1e-9
    assert whole.upper - whole.lower == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("broken", [[math.nan], [0.0, math.nan], [math.inf, 0.0]])
def test_one_broken_token_leaves_nothing_known_of_the_call(broken: list[float]) -> None:
    sums = sum((listed_entropy(listed, 100) for listed in ([0.0], broken, [0.0])), EntropySum())
    assert math.isnan(sums.sum_nats)
    assert math.isnan(sums.slack_nats)


def test_a_token_whose_list_is_no_distribution_is_left_out() -> None:
    sums = sum((listed_entropy(listed, 100) for listed in ([], [0.5], [0.0])), EntropySum())
    assert (sums.sum_nats, sums.tokens) == (0.0, 1)


def test_a_token_is_the_middle_of_its_bounds_and_how_far_it_may_be_off() -> None:
    # The missing half is one token, log 2 in all, or 8 even ones, log 2 + log(8) / 2.
    token = listed_entropy([math.log(0.5)], 9)
    assert (token.sum_nats, token.slack_nats) == (pytest.approx(1.75 * math.log(2)), pytest.approx(0.75 * math.log(2)))
    assert (token.sq_sum, token.tokens, token.kind) == (pytest.approx((1.75 * math.log(2)) ** 2), 1, "truncated")
