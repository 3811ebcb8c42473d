"""How many rows a shard has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.dataflow import SHARDS_UNDER_WAY, actor_options, bounded, shard_rows


@pytest.mark.parametrize(
    ("tasks", "policies", "count", "places", "rows"),
    [
        (1000, 1, 1, 16, 8),  # 4 shards under way hold 2 x 16 rows
        (1000, 2, 1, 16, 4),  # each row is two queries
        (10, 1, 1, 16, 3),  # few rows: all 4 shards at once
        (10, 1, 8, 16, 1),
        (1, 1, 1, 1, 1),
        (100_000, 1, 1, 16, 200),  # 500 shards at most
        (100_000, 1, 1000, 1, 7),  # but so many that every worker has four times what it works on
    ],
)
def test_shards_fill_the_places_and_arebounded(tasks: int, policies: int, count: int, places: int, rows: int) -> None:
    assert shard_rows(tasks, policies, num_actors=count, places=places) == rows


@given(st.integers(1, 10**6), st.integers(1, 300), st.integers(0, 64))
def test_the_number_of_shards_is_bounded_whatever_the_rows(num_rows: int, hands: int, wanted: int) -> None:
    rows = bounded(wanted, num_rows, hands)
    assert rows >= max(1, wanted)
    assert -(-num_rows // rows) <= max(500, 4 * hands)


def test_an_actor_is_sent_no_more_shards_than_it_works_on() -> None:
    """Ray Data sends them to whichever actor is up: what the first one holds beyond, a second one lacks a moment later."""
    compute = actor_options(count=2, num_gpus=0.0, env={})["compute"]
    assert compute.max_tasks_in_flight_per_actor == compute.max_concurrent_calls_per_actor == SHARDS_UNDER_WAY
