"""Queries of a collection: the user's own files, samples by seed, and sources that take turns."""

from __future__ import annotations

import gzip
import hashlib
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.errors import ConfigError
from dmoa.training.queries import read_queries, sample_queries, take_turns


def own(folder: Path, data: str | bytes) -> Path:
    path = folder / "mine.jsonl"
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def test_texts_and_objects_are_queries_each_once(tmp_path: Path) -> None:
    path = own(
        tmp_path, '{"query": "What is 2 + 2?", "answer": "4"}\n\nName a day.\r\n  What is 2 + 2?  \n"quoted" words\nünïcode'
    )
    found = read_queries(path)
    assert [query.text for query in found.queries] == ["What is 2 + 2?", "Name a day.", '"quoted" words', "ünïcode"]
    first = found.queries[0]
    assert first.query_id == "queries/" + hashlib.sha256(b"What is 2 + 2?").hexdigest()[:16]
    assert (first.source, first.split, first.stages, found.num_bad) == ("mine.jsonl", "train", (), 0)
    assert "4" not in first.model_dump_json().replace("2 + 2", "").replace(first.query_id, ""), (
        "a label beside a query is not read"
    )


BAD = [
    (b'{"query": "a', 'line 2: \'{"query": "a\' starts like JSON but does not parse'),
    (b'{"question": "a"}', "line 2: query is None"),
    (b'{"query": 7}', "line 2: query is 7"),
    (b'{"query": " "}', "line 2: query is ' '"),
    (b'{"query": "\\ud800"}', "line 2: 'utf-8' codec can't encode"),
    (b"\xff\xfe", "line 2: 'utf-8' codec can't decode"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_line_that_is_no_query_is_named_or_left_out(tmp_path: Path, line: bytes, message: str) -> None:
    path = own(tmp_path, b"good\n" + line + b"\n")
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_queries(path)
    assert 'a line is a text, or a JSON object such as {"query": ' in str(caught.value)
    found = read_queries(path, skip_bad_rows=True)
    assert ([query.text for query in found.queries], found.num_bad) == (["good"], 1)


def test_a_file_without_queries_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no query"):
        read_queries(own(tmp_path, "\n \n"))
    with pytest.raises(ConfigError, match="--queries: cannot read"):
        read_queries(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("limit", [1, 7, 39, 40, 41, 100])
def test_of_a_file_with_a_limit_the_sample_is_kept_and_no_more(tmp_path: Path, limit: int) -> None:
    texts = [f"What is {number} + 7?" for number in range(40)]
    path = own(tmp_path, "\n".join([*texts, "", *reversed(texts)]))
    whole = read_queries(path).queries
    assert [query.text for query in whole] == texts
    for seed in range(3):
        expected = sample_queries(whole, limit, seed, lambda query: query.query_id)
        assert list(read_queries(path, limit=limit, seed=seed).queries) == expected


@pytest.mark.contract
def test_a_long_file_with_a_limit_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    path = own(tmp_path, "".join(f'{{"query": "What is {number} + 7, and why?"}}\n' for number in range(30_000)))
    tracemalloc.start()
    try:
        found = read_queries(path, limit=5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.queries) == 5
    assert peak < path.stat().st_size / 2


def test_every_line_of_a_file_with_a_limit_is_checked(tmp_path: Path) -> None:
    path = own(tmp_path, "one\ntwo\n{broken\n")
    with pytest.raises(ConfigError, match="line 3: "):
        read_queries(path, limit=1)
    assert read_queries(path, limit=1, skip_bad_rows=True).num_bad == 1


def test_lines_end_as_in_any_text_file(tmp_path: Path) -> None:
    found = read_queries(own(tmp_path, "one\rtwo\r\n\r\nthree\x85\u2028same line\n"))
    assert [query.text for query in found.queries] == ["one", "two", "three\x85\u2028same line"]


def test_a_sample_hangs_on_the_seed_and_not_on_the_order() -> None:
    items = [f"q{number}" for number in range(100)]
    one = sample_queries(items, 10, 3, str)
    assert set(one) == set(sample_queries(items[::-1], 10, 3, str))
    assert set(one) != set(sample_queries(items, 10, 4, str))
    assert set(sample_queries(items, 5, 3, str)) < set(one), "a larger sample has the smaller one"
    assert sample_queries(items, None, 3, str) == items


@given(st.lists(st.integers(0, 40), max_size=5))
def test_sources_take_turns_in_proportion(sizes: list[int]) -> None:
    sources = [[(number, position) for position in range(size)] for number, size in enumerate(sizes)]
    mixed = list(take_turns(sources))
    assert sorted(mixed) == [item for source in sources for item in source]
    for number, size in enumerate(sizes):
        assert [item for item in mixed if item[0] == number] == sources[number], "each source keeps its order"
        for end in range(len(mixed) + 1):
            due = end * size / max(1, len(mixed))
            assert abs(sum(item[0] == number for item in mixed[:end]) - due) <= len(sizes)


def test_queries_of_recorded_replies_are_read_once_each_under_their_own_ids(tmp_path: Path) -> None:
    lines = [
        '{"query_id": "q1", "query": "What is 2 + 2?", "agent": "a", "text": "4"}',
        '{"query_id": "q1", "query": "What is 2 + 2?", "agent": "b", "text": "5"}',
        '{"query": "Name a day.", "agent": "a", "text": "Monday"}',
    ]
    expected = [("q1", "What is 2 + 2?"), ("queries/" + hashlib.sha256(b"Name a day.").hexdigest()[:16], "Name a day.")]
    folder = tmp_path / "replies"
    folder.mkdir()
    (folder / "r.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for path in (own(tmp_path, "\n".join(lines)), folder / "r.jsonl.gz", folder):
        assert [(query.query_id, query.text) for query in read_queries(path).queries] == expected
    twice = own(tmp_path, '{"query_id": "q", "query": "one"}\n{"query_id": "q", "query": "two"}')
    with pytest.raises(ConfigError, match="query_id 'q' names two texts; give each query an id of its own"):
        read_queries(twice)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"--queries: .*holds no file of replies"):
        read_queries(tmp_path / "empty")
