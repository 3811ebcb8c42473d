"""Agents that say the same to every query: found from replies alone, and only where the queries have different answers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.core.scores import MIN_ROWS, constant_agents, reply_key, same_reply_shares


def keys(*columns: str) -> np.ndarray:  # type: ignore[type-arg]
    """Replies of a letter each, a string per agent."""
    return np.array([[reply_key(letter) for letter in row] for row in zip(*columns, strict=True)])


def test_a_reply_is_known_by_its_text_without_blanks_around_it() -> None:
    assert reply_key(" 42\n") == reply_key("42") != reply_key("4 2")
    assert reply_key(None) == reply_key("")
    assert 0 <= reply_key("a longer reply") < 2**32


def test_the_share_is_that_of_the_commonest_reply_among_those_that_were_given() -> None:
    replies = keys("aaaaaaaabb", "abcdefghij", "xxxxxxxxxx")
    is_known = np.ones(replies.shape, dtype=np.bool_)
    assert same_reply_shares(replies, is_known).tolist() == [0.8, 0.1, 1.0]
    is_known[0, 2] = False  # nine replies are too few to judge by
    found = same_reply_shares(replies, is_known)
    assert found[:2].tolist() == [0.8, 0.1]
    assert np.isnan(found[2])


@given(st.lists(st.text(alphabet="ab ", max_size=2), min_size=MIN_ROWS, max_size=40))
def test_the_share_is_that_of_a_plain_count(texts: list[str]) -> None:
    column = np.array([[reply_key(text)] for text in texts])
    expected = max(Counter(text.strip() for text in texts).values()) / len(texts)
    assert same_reply_shares(column, np.ones(column.shape, dtype=np.bool_))[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1.0, 0.1, 0.2], [True, False, False]),
        ([0.9, 0.5, 0.5], [True, False, False]),
        ([0.89, 0.1, 0.2], [False, False, False]),
        # Nearly every query has the same answer: honest agents repeat themselves.
        ([1.0, 0.95, 0.9], [False, False, False]),
        ([1.0, 0.1, 0.6], [True, False, False]),
        ([1.0, 0.1, 0.6, 0.6], [False, False, False, False]),
        # Two liars among five do not excuse each other.
        ([1.0, 1.0, 0.1, 0.2, 0.3], [True, True, False, False, False]),
        ([1.0], [False]),
        ([1.0, float("nan")], [False, False]),
        ([1.0, float("nan"), 0.2], [True, False, False]),
        ([], []),
    ],
)
def test_constant_is_who_repeats_itself_where_half_of_the_others_do_not(shares: list[float], expected: list[bool]) -> None:
    assert constant_agents(np.array(shares)).tolist() == expected
