"""Exact token entropy against float64, and the streaming sums against the whole list."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.core.entropy import token_entropy
from dmoa.core.scores import raw_score


def entropy_float64(logits_BV: torch.Tensor) -> torch.Tensor:
    """Return -sum p log p of every row in float64, 0 log 0 = 0."""
    p_BV = torch.softmax(logits_BV.double(), dim=1)
    return torch.special.entr(p_BV).sum(dim=1)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0, 60.0])
@pytest.mark.parametrize("shift", [0.0, 500.0])
def test_equals_float64_over_a_whole_vocabulary(dtype: torch.dtype, scale: float, shift: float) -> None:
    logits_BV = (randn(3, 49152) * scale + shift).to(dtype)
    entropy_B = token_entropy(logits_BV)
    assert entropy_B.dtype == torch.float32
    torch.testing.assert_close(entropy_B.double(), entropy_float64(logits_BV), atol=2e-5, rtol=2e-6)


def test_uniform_is_the_logarithm_of_the_vocabulary() -> None:
    assert token_entropy(torch.full((1, 49152), -3.25)).item() == pytest.approx(math.log(49152), abs=1e-5)


def test_two_tokens_by_hand() -> None:
    """p = (3/4, 1/4): H = ln 4 - 3/4 ln 3 = 0.562335."""
    logits_BV = torch.tensor([[math.log(3.0), 0.0], [1000 + math.log(3.0), 1000.0]])
    assert token_entropy(logits_BV).tolist() == pytest.approx([0.562335, 0.562335], abs=1e-4)


def test_peaked_is_zero_and_never_below() -> None:
    logits_BV = torch.zeros(2, 1000)
    logits_BV[0, 3] = 300.0
    logits_BV[1, 3] = 60.0
    entropies = token_entropy(logits_BV).tolist()
    assert entropies == pytest.approx([0.0, 0.0], abs=1e-12)
    assert min(entropies) >= 0.0


def test_excluded_tokens_do_not_count() -> None:
    logits_BV = randn(4, 100)
    excluded_BV = torch.cat([logits_BV, torch.full((4, 50), -math.inf)], dim=1)
    torch.testing.assert_close(token_entropy(excluded_BV), token_entropy(logits_BV))
    only_BV = torch.full((1, 10), -math.inf)
    only_BV[0, 4] = 2.0
    assert token_entropy(only_BV).tolist() == [0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_of_what_is_not_a_distribution_nothing_is_known_and_other_rows_are_left_alone(bad: float) -> None:
    logits_BV = randn(2, 64)
    expected = token_entropy(logits_BV)[1].item()
    logits_BV[0] = bad
    found = token_entropy(logits_BV).tolist()
    assert math.isnan(found[0])
    assert found[1] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_logit_is_enough_to_know_nothing(bad: float, dtype: torch.dtype) -> None:
    logits_BV = randn(1, 64).to(dtype)
    logits_BV[0, 7] = bad
    assert math.isnan(token_entropy(logits_BV).item())


def test_logits_stay_as_they_are_and_no_rows_give_no_entropies() -> None:
    logits_BV = randn(2, 64)
    kept_BV = logits_BV.clone()
    token_entropy(logits_BV)
    assert torch.equal(logits_BV, kept_BV)
    assert token_entropy(logits_BV[:0]).shape == (0,)


def test_a_row_does_not_depend_on_the_others_or_on_threads() -> None:
    logits_BV = randn(5, 5000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole_B = token_entropy(logits_BV)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([token_entropy(row_V[None]) for row_V in logits_BV]), whole_B)


@settings(derandomize=True)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30), st.floats(-100, 100, width=32))
def test_bounds_order_and_shift(values: list[float], shift: float) -> None:
    logits_BV = torch.tensor([values])
    entropy = token_entropy(logits_BV).item()
    assert 0.0 <= entropy <= math.log(len(values)) + 1e-5
    assert token_entropy(logits_BV.flip(1)).item() == pytest.approx(entropy, abs=1e-5)
    assert token_entropy(logits_BV.double() + shift).item() == pytest.approx(entropy, abs=1e-3)


def test_raw_score_by_hand() -> None:
    assert raw_score(0.0) == pytest.approx(-6.907755)
    assert raw_score(0.999) == pytest.approx(0.0)
    assert raw_score(0.1) < raw_score(0.2)
