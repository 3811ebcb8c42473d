"""Cells of shards: packed small, read back as they were."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.dataflow import Line, LinesSource, offsets, pack_lines, read_cells

TEXTS = ["first", "", "ünïcode", '{"a": "b\\n"}', "last"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Two files with the same texts, the second backwards; returns where lines begin, by path."""
    found = {}
    for name, texts in (("one", TEXTS), ("two", TEXTS[::-1])):
        path = tmp_path_factory.mktemp("lines") / name
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        found[str(path)] = [offset for offset, _ in offsets(path)]
    return found


@given(data=st.data())
def test_packed_cells_are_read_back(files: dict[str, list[int]], data: st.DataObject) -> None:
    one, two = files
    wanted = data.draw(st.lists(st.tuples(st.sampled_from([one, two, "value"]), st.sampled_from([*TEXTS, one]))))
    cells, texts = [], []
    for kind, text in wanted:
        if kind == "value" or text == one:
            cells.append(text)
        else:
            number = (TEXTS if kind == one else TEXTS[::-1]).index(text)
            cells.append(Line(kind, files[kind][number]))
        texts.append(text)
    assert read_cells(pickle.loads(pickle.dumps(pack_lines(cells)))) == texts


def test_a_torn_last_line_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "torn"
    path.write_bytes(b"whole\ntorn")
    assert list(offsets(path)) == [(0, b"whole\n")]


def test_a_source_has_one_task_per_shard_with_rows_in_order(files: dict[str, list[int]]) -> None:
    one, two = files
    items = [(Line(one, a), Line(two, b)) for a, b in zip(files[one], files[two], strict=True)]
    source = LinesSource(("left", "right"), items, 2)
    tasks = source.get_read_tasks(1)
    assert (source.num_shards, len(tasks)) == (3, 3)
    tables = [table for task in tasks for table in task()]
    assert [table.num_rows for table in tables] == [2, 2, 1]
    assert [text for table in tables for text in table["left"].to_pylist()] == TEXTS
    assert [text for table in tables for text in table["right"].to_pylist()] == TEXTS[::-1]


def test_a_shard_takes_little_to_describe() -> None:
    small, large = (
        len(pickle.dumps(pack_lines([Line("/a/long/path/to/a/file", 10**9 + i) for i in range(n)]))) for n in (100, 1100)
    )
    assert (large - small) / 1000 <= 16.0
