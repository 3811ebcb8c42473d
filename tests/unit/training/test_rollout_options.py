"""The options of a collection: sources with weights, what excludes what, and how the limit is shared out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.errors import ConfigError
from dmoa.training.options import RolloutOptions, share_out
from dmoa.types import Limits


def sources(value: Any) -> list[tuple[str, float]]:
    options = RolloutOptions.parse({"out": "o", "limit": 9, "benchmarks": value})
    return [(source.name, source.weight) for source in options.benchmarks]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("arith:2,words", [("arith", 2.0), ("words", 1.0)]),
        (["arith:0.5", "words:1e1"], [("arith", 0.5), ("words", 10.0)]),
        ([{"name": "arith", "weight": 3}], [("arith", 3.0)]),
        ("C:/data/mine.txt", [("C:/data/mine.txt", 1.0)]),
        (" arith : 2 ", [("arith", 2.0)]),
    ],
)
def test_sources_have_weights(value: Any, expected: list[tuple[str, float]]) -> None:
    assert sources(value) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "benchmarks, queries: both are empty; name benchmarks, or a file of queries"),
        ({"benchmarks": "arith:0", "limit": 3}, "benchmarks.0.weight is 0.0"),
        ({"benchmarks": "arith:nan", "limit": 3}, "benchmarks.0.weight is nan"),
        ({"benchmarks": "arith:1e308,words:1e308", "limit": 3}, "benchmarks.0.weight is 1e+308"),
        ({"benchmarks": "arith:2,words"}, "weights share out limit, which is not given; add --limit N"),
        ({"benchmarks": "arith", "epsilon": 0}, "epsilon is 0"),
        ({"benchmarks": "arith", "epsilon": 1.5}, "epsilon is 1.5"),
        ({"benchmarks": "arith", "epsilon": 0.2, "dense": True}, "epsilon is 0.2, and dense is set"),
        ({"benchmarks": "arith", "limit": 0}, "limit is 0"),
        ({"benchmarks": "arith", "labels": "o/labels"}, "labels is 'o/labels', inside out"),
        ({"benchmarks": "arith", "labels": "o"}, "inside out"),
        ({"benchmarks": "arith", "mood": 1}, "mood: unknown key (value 1); expected one of benchmarks, queries"),
    ],
)
def test_bad_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        RolloutOptions.parse({"out": "o", **values})


def test_limits_are_the_pools_lowered_without_deadline_and_budget() -> None:
    pool = Limits(max_steps=4, max_agents=2, budget_tokens=100, deadline_s=1.0)
    options = RolloutOptions.parse({"out": "o", "benchmarks": "arith", "max_steps": 9, "max_tokens": 32})
    assert options.limits(pool) == Limits(max_steps=4, max_agents=2, max_tokens=32)
    assert RolloutOptions.parse({"out": "o", "benchmarks": "arith", "max_steps": 2}).limits(pool).max_steps == 2


def test_where_and_how_fast_is_no_part_of_what_is_asked() -> None:
    base = {"benchmarks": "arith:2,words", "limit": 30, "queries": ["mine.txt:0.5"]}
    one = RolloutOptions.parse({"out": "a", **base}).sample()
    two = RolloutOptions.parse({"out": "b", "workers": 3, "concurrency": 2, "call_cache": "c", "track": "none", **base}).sample()
    assert one == two
    assert (one["benchmarks"], one["queries"]) == (["arith:2", "words:1"], ["mine.txt:0.5"])
    assert RolloutOptions.parse({"out": Path("a"), **base, "difficulty": 2}).sample() != one


@pytest.mark.parametrize(
    ("limit", "weights", "available", "expected"),
    [
        (30, [2, 1], [None, None], [20, 10]),
        (10, [1, 1, 1], [None, None, None], [4, 3, 3]),
        (30, [2, 1], [5, None], [5, 25]),  # what the first cannot give, the second does
        (30, [2, 1], [5, 7], [5, 7]),
        (30, [1, 1, 2], [3, None, None], [3, 9, 18]),
        (1, [1, 5], [None, None], [0, 1]),
        (4, [1, 1], [0, None], [0, 4]),
    ],
)
def test_the_limit_is_shared_out_by_weight(
    limit: int, weights: list[float], available: list[int | None], expected: list[int]
) -> None:
    assert share_out(limit, weights, available) == expected


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0.01, 100), st.none() | st.integers(0, 300)), min_size=1, max_size=6),
)
def test_shares_add_up_and_keep_to_weights_where_there_is_enough(limit: int, found: list[tuple[float, int | None]]) -> None:
    weights, available = [weight for weight, _ in found], [size for _, size in found]
    quotas = share_out(limit, weights, available)
    assert all(0 <= quota <= (limit if size is None else size) for quota, size in zip(quotas, available, strict=True))
    assert sum(quotas) == min(limit, sum(limit if size is None else size for size in available))
    open_ = [i for i, size in enumerate(available) if size is None or quotas[i] < size]
    for i in open_:
        for j in open_:
            assert abs(quotas[i] / weights[i] - quotas[j] / weights[j]) <= 1 / weights[i] + 1 / weights[j] + 1e-6
