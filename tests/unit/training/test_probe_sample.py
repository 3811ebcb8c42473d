"""From a table of rollouts to the probe's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dmoa.errors import ConfigError
from dmoa.training.cluster_router import sample_of
from dmoa.types import Price


def table(queries: int = 4, **changes: Any) -> pa.Table:
    rows = [
        {
            "query_id": f"q{n}",
            "step": step,
            "agent": agent,
            "source": "sums",
            "context": [float(n), 1.0, 9.0, 9.0],
            "entropy_sum_nats": float(n + 1) * (1 if agent == "a" else 2),
            "entropy_tokens": 2,
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "text": f"{agent}{n}",
            "status": "ok",
            "finish_reason": "stop",
        }
        | changes
        for n in range(queries)
        for step in (0, 1)
        for agent in ("b", "a")
    ]
    return pa.Table.from_pylist(rows)


def test_the_first_step_of_every_query_counts() -> None:
    sample = sample_of(table(), ("a", "b"), "default", {("q1", "a"): 1.0, ("q1", "b"): 0.0})
    assert sample.entropy_RA.tolist() == [[0.5, 1.0], [1.0, 2.0], [1.5, 3.0], [2.0, 4.0]]
    assert sample.embedding_RD.tolist() == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]
    assert (sample.texts[2], sample.sources[2]) == (("a2", "b2"), "sums")
    assert sample.value_RA is not None
    assert sample.value_RA[1].tolist() == [1.0, 0.0]
    assert np.isnan(sample.value_RA[[0, 2, 3]]).all()
    assert sample_of(table(), ("a", "b"), "paper").embedding_RD.shape == (4, 4)


def test_what_replies_cost() -> None:
    """Five prompt and two completion tokens at 2 and 10 a million; b has no price."""
    sample = sample_of(table(), ("a", "b"), "default", prices={"a": Price(prompt_per_1m=2.0, completion_per_1m=10.0)})
    assert sample.price_RA is not None
    assert sample.price_RA[:, 0].tolist() == [30e-6] * 4
    assert np.isnan(sample.price_RA[:, 1]).all()
    assert sample_of(table(), ("a", "b"), "default").price_RA is None


def test_what_was_asked_and_what_was_cut_off() -> None:
    sample = sample_of(table(finish_reason="length"), ("a", "b"), "default", asked={"q0": "1 + 1?", "q2": "2 + 2?"})
    assert sample.asked == ("1 + 1?", "", "2 + 2?", "")
    assert sample.cut_RA is not None
    assert sample.cut_RA.all()
    assert sample_of(table(), ("a", "b"), "default").asked is None


def test_a_lost_reply_has_no_entropy() -> None:
    assert np.isnan(sample_of(table(status="failed"), ("a", "b"), "default").entropy_RA).all()
    assert np.isnan(sample_of(table(entropy_tokens=0), ("a", "b"), "default").entropy_RA).all()


def test_queries_that_some_agent_was_not_asked_are_left_out() -> None:
    with pytest.raises(ConfigError, match="0 queries were asked of every agent"):
        sample_of(table(), ("a", "b", "c"), "default")
    with pytest.raises(ConfigError, match="3 queries were asked of every agent"):
        sample_of(table(3), ("a", "b"), "default")
