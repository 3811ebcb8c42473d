"""The writer of rollouts: whole parts, every query once, and nothing left of what a killed session had begun."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
import pytest
from filelock import FileLock, Timeout

from dmoa.training.collect import PART_BYTES, Collected, RolloutWriter
from dmoa.training.rollouts import part_paths, read_part
from tests.unit.training.rollout_samples import rows

LONG_S = 3600.0


def collected(*numbers: int) -> list[Collected]:
    return [Collected(query_id=f"arith/gate/{number:04}", table=rows(number)) for number in numbers]


def on_disk(root: Path) -> list[list[str]]:
    """The queries of every part, in order."""
    return [list(dict.fromkeys(read_part(path)["query_id"].to_pylist())) for path in part_paths(root)]


def test_queries_leave_in_parts_and_at_the_end(tmp_path: Path) -> None:
    writer = RolloutWriter(str(tmp_path), first_pause_s=LONG_S)
    writer.take(collected(1, 2))
    writer.take(collected(3))
    assert on_disk(tmp_path) == [], "it is not time for a part yet"
    assert writer.counts() == {"rows": 3, "failed": 0, "tokens": 3 * 2 * 4}
    assert writer.flush() == []
    assert on_disk(tmp_path) == [["arith/gate/0001", "arith/gate/0002", "arith/gate/0003"]]
    assert read_part(part_paths(tmp_path)[0]).equals(pa.concat_tables([rows(1), rows(2), rows(3)]))
    writer.flush()
    assert len(on_disk(tmp_path)) == 1, "nothing waits: no empty part"


def test_a_part_is_written_after_its_pause_without_another_query(tmp_path: Path) -> None:
    writer = RolloutWriter(str(tmp_path), first_pause_s=0.05)
    writer.take(collected(1))
    deadline = time.monotonic() + 30.0
    while not on_disk(tmp_path):
        assert time.monotonic() < deadline
        writer.counts()
    assert on_disk(tmp_path) == [["arith/gate/0001"]]


@pytest.mark.contract
def test_a_part_is_written_as_soon_as_it_is_large(tmp_path: Path) -> None:
    writer = RolloutWriter(str(tmp_path), first_pause_s=LONG_S)
    large = pa.concat_tables([rows(1)] * (PART_BYTES // rows(1).nbytes + 1))
    writer.take([Collected(query_id="large", table=large)])
    assert len(part_paths(tmp_path)) == 1


def test_a_shard_that_runs_twice_is_written_once(tmp_path: Path) -> None:
    writer = RolloutWriter(str(tmp_path), first_pause_s=LONG_S)
    writer.take(collected(1, 2))
    writer.take(collected(1, 2, 3))
    writer.flush()
    assert on_disk(tmp_path) == [["arith/gate/0001", "arith/gate/0002", "arith/gate/0003"]]
    assert writer.counts()["rows"] == 3


def test_failed_queries_are_counted_and_named_and_leave_no_rows(tmp_path: Path) -> None:
    writer = RolloutWriter(str(tmp_path), first_pause_s=LONG_S)
    writer.take([*collected(1), *(Collected(query_id=f"q{i}", error="NoAgentError: none") for i in range(30))])
    assert writer.counts() == {"rows": 31, "failed": 30, "tokens": 8}
    assert writer.flush() == [f"q{i}: NoAgentError: none" for i in range(10, 30)], "the newest twenty"
    assert on_disk(tmp_path) == [["arith/gate/0001"]]


def test_the_next_session_goes_on_with_the_numbers_and_clears_drafts(tmp_path: Path) -> None:
    first = RolloutWriter(str(tmp_path), first_pause_s=LONG_S)
    for number in (1, 2):
        first.take(collected(number))
        first.flush()
    del first
    draft = tmp_path / "rollouts" / ".part-000002.parquet.0a1b2c3d.draft"
    draft.write_bytes(b"half a par")
    (tmp_path / "rollouts" / "mine.parquet").write_bytes((tmp_path / "rollouts" / "part-000000.parquet").read_bytes())
    second = RolloutWriter(str(tmp_path), first_pause_s=LONG_S)
    second.take(collected(3))
    second.flush()
    assert not draft.exists()
    assert sorted(path.name for path in part_paths(tmp_path)) == ["mine.parquet", *(f"part-{i:06d}.parquet" for i in range(3))]


def test_there_is_one_writer_at_a_time(tmp_path: Path) -> None:
    writer = RolloutWriter(str(tmp_path))
    writer.ready()
    with pytest.raises(Timeout):
        FileLock(tmp_path / ".writing.lock").acquire(timeout=0)
