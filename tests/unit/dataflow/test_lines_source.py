"""Tables of lines: small, read back as they were."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.dataflow import Item, Line, line_table, read_lines
from dmoa.reading import offsets

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
def test_lines_are_read_back(files: dict[str, list[int]], data: st.DataObject) -> None:
    one, two = files
    cell = st.one_of(
        st.sampled_from([*TEXTS, one]).map(lambda text: (text, text)),
        st.sampled_from(range(len(TEXTS))).map(lambda n: (Line(one, files[one][n]), TEXTS[n])),
        st.sampled_from(range(len(TEXTS))).map(lambda n: (Line(two, files[two][n]), TEXTS[::-1][n])),
    )
    rows = data.draw(st.lists(st.tuples(cell, cell)))
    items: list[Item] = [(left[0], right[0]) for left, right in rows]
    table = read_lines(pickle.loads(pickle.dumps(line_table(("left", "right"), items))))
    assert table.column_names == ["left", "right"]
    assert table["left"].to_pylist() == [left[1] for left, _ in rows]
    assert table["right"].to_pylist() == [right[1] for _, right in rows]


def test_a_torn_last_line_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "torn"
    path.write_bytes(b"whole\ntorn")
    assert list(offsets(path)) == [(0, b"whole\n")]


def test_a_shard_takes_little_to_describe() -> None:
    small, large = (
        len(pickle.dumps(line_table(("line",), [(Line("/a/long/path/to/a/file", 10**9 + i),) for i in range(n)])))
        for n in (100, 1100)
    )
    assert (large - small) / 1000 <= 16.0
