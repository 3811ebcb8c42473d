"""The layout of the gate's input and the feedback features."""

from __future__ import annotations

import numpy as np
import pytest

from dmoa.core.features import FEEDBACK_FEATURES, feedback, gate_input

QUERY_D = np.array([1, 2, 3], dtype=np.float32)
SUMMARY_D = np.array([4, 5, 6], dtype=np.float32)
FEEDBACK_F = np.array([7, 8, 9, 10], dtype=np.float32)


def test_default_input_is_query_summary_feedback() -> None:
    input_X = gate_input("default", QUERY_D, SUMMARY_D, FEEDBACK_F)
    assert input_X.dtype == np.float32
    assert input_X.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_missing_summary_and_feedback_are_zeros() -> None:
    assert gate_input("default", QUERY_D).tolist() == [1, 2, 3] + [0] * (3 + FEEDBACK_FEATURES)


def test_paper_input_is_the_one_embedding() -> None:
    assert gate_input("paper", QUERY_D, SUMMARY_D, FEEDBACK_F).tolist() == [1, 2, 3]


def test_input_is_a_copy() -> None:
    source_D = QUERY_D.copy()
    input_X = gate_input("paper", source_D)
    source_D[0] = 99
    assert input_X[0] == 1


def test_feedback_by_hand() -> None:
    """Entropies 1 and 3: mean 2, population deviation 1; two of four agents; a quarter of the budget."""
    feedback_F = feedback([1.0, 3.0], 2, 4, 0.25)
    assert feedback_F.dtype == np.float32
    assert feedback_F.tolist() == [2.0, 1.0, 0.5, 0.25]


def test_feedback_before_the_first_step_is_zero() -> None:
    assert feedback([], 0, 4, 0.0).tolist() == [0, 0, 0, 0]


def test_feedback_when_nobody_replied() -> None:
    assert feedback([], 2, 4, 0.5).tolist() == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize(("share", "expected"), [(-1.0, 0.0), (0.5, 0.5), (1.7, 1.0)])
def test_budget_share_is_clipped(share: float, expected: float) -> None:
    assert feedback([1.0], 1, 4, share)[3] == expected
