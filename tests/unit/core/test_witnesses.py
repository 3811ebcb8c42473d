"""What witnesses tell of each other: how unsure agents usually are on queries like one."""

from __future__ import annotations

import numpy as np
import pytest

from dmoa.core.witnesses import Witnesses, usual_doubts, witnesses_of
from dmoa.errors import ConfigError

NAN = np.nan


def of_doubts(doubt_RA: list[list[float]] | np.ndarray, embedding_RD: list[list[float]] | np.ndarray | None) -> Witnesses:
    """Every agent has an answer of its own."""
    doubts = np.array(doubt_RA)
    return Witnesses(
        answer_RA=np.tile(np.arange(doubts.shape[1]), (len(doubts), 1)),
        doubt_RA=doubts,
        length_RA=np.full(doubts.shape, 20.0),
        outcome_RA=np.full(doubts.shape, NAN),
        embedding_RD=None if embedding_RD is None else np.array(embedding_RD),
    )


def test_usual_doubts_are_means_over_the_nearest_queries() -> None:
    """Sixteen queries: each and its two nearest."""
    place = [[float(n)] for n in (0, 1, 3, 10, 11, 13, 20, 21, 23, 30, 31, 33, 40, 41, 43, 60)]
    doubts = [[float(n), -1.0 if n % 3 == 0 else NAN] for n in range(16)]
    found = usual_doubts(of_doubts(doubts, place))
    assert found[:3, 0].tolist() == [1.0, 1.0, 1.0]  # 0, 1, 2
    assert found[15, 0] == 14.0  # 13, 14, 15
    assert found[:, 1] == pytest.approx(np.full(16, -1.0))  # unknown ones are left out
    silent = usual_doubts(of_doubts([[0.0, NAN]] * 16, place))
    assert np.isnan(silent[:, 1]).all()


def test_without_embeddings_or_with_few_queries_doubts_stay_as_they_are() -> None:
    few, blind = of_doubts([[1.0, 2.0]] * 7, [[float(n)] for n in range(7)]), of_doubts([[1.0, NAN]] * 20, None)
    assert usual_doubts(few) is few.doubt_RA
    assert usual_doubts(blind) is blind.doubt_RA


def test_entropies_that_cannot_be_count_as_unknown_and_rows_that_differ_are_refused() -> None:
    found = witnesses_of([["1", "2", "3", "4"]], entropies=[[0.0, -0.5, np.inf, NAN]])
    assert np.isfinite(found.doubt_RA).tolist() == [[True, False, False, False]]
    with pytest.raises(ConfigError, match=r"witnesses: rows of \[1, 2\] replies; expected as many as agents in each"):
        witnesses_of([["1"], ["1", "2"]])
