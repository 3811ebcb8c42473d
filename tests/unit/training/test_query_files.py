"""Files of a user's own queries: prompts, messages, CSV, and a field by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmoa.errors import ConfigError
from dmoa.training.outcomes import read_outcomes
from dmoa.training.queries import read_queries

LINES = """What is 1 + 1?
{"query": "a", "prompt": "not this"}
{"prompt": "b"}
{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}, {"role": "user", "content": "d"}]}
{"messages": [{"role": "user", "content": [{"type": "text", "text": "e"}, {"type": "text", "text": "f"}]}]}
"""


def texts(path: Path, field: str | None = None) -> list[str]:
    return [query.text for query in read_queries(path, field=field).queries]


def test_lines_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(LINES, encoding="utf-8")
    assert texts(path) == ["What is 1 + 1?", "a", "b", "d", "e\nf"]


def test_a_field_by_name(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"query": "a", "body": "b"}\n', encoding="utf-8")
    assert texts(path, "body") == ["b"]
    with pytest.raises(ConfigError, match="line 1: other is None; expected a text that is not blank"):
        texts(path, "other")


@pytest.mark.parametrize(
    ("content", "field", "found"),
    [
        ("text\nWhat is 1?\n", None, ["What is 1?"]),
        ('id,prompt\n1,"a, b\nc"\n2,d\n', None, ["a, b\nc", "d"]),
        ("\ufeffid,body\n1,a\n", "body", ["a"]),
    ],
)
def test_csv_with_one_column_or_a_known_one(content: str, field: str | None, found: list[str], tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(content, encoding="utf-8")
    assert texts(path, field) == found


def test_csv_without_the_column_says_so(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("id,body\n1,a\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="query is None; expected a text"):
        texts(path)


def test_a_byte_order_mark_is_no_part_of_the_first_line_and_a_number_is_an_id(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"query_id": 7, "query": "a"}\n{"query": "b"}\n', encoding="utf-8-sig")
    found = read_queries(path).queries
    assert [query.text for query in found] == ["a", "b"]
    assert found[0].query_id == "7"
    path.write_text('{"query_id": "7", "reward": 1}\n', encoding="utf-8-sig")
    assert read_outcomes(path)[0].query_id == "7"
    path.write_text("What is 1?\n", encoding="utf-8-sig")
    assert texts(path) == ["What is 1?"]


@pytest.mark.parametrize("messages", ["[]", '[{"role": "assistant", "content": "x"}]', '[{"role": "user"}]', "[1]"])
def test_messages_without_a_question_are_refused(messages: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(f'{{"messages": {messages}}}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="messages is None; expected a text"):
        texts(path)


def test_a_csv_row_of_more_values_than_names_is_refused_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text('query\nWhat is 1?\nWhich is largest, 1 or 2?\n"Which, 3 or 4?"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 3: 2 values, the header names 1; quote a text that holds commas"):
        texts(path)
    found = read_queries(path, skip_bad_rows=True)
    assert ([query.text for query in found.queries], found.num_bad) == (["What is 1?", "Which, 3 or 4?"], 1)
    path.write_text("query,lang\nWhich is larger, 3 or 4?,en\nShort\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2: 3 values, the header names 2"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("true", "query_id is True; expected a text or a whole number"),
        ("[1]", "query_id is \\[1\\]; expected"),
        ('"\\ud800"', "'utf-8' codec can't encode"),
    ],
)
def test_what_is_no_id_is_refused(name: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(f'{{"query": "a", "query_id": {name}}}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=f"line 1: {said}"):
        read_queries(path)
    path.write_text('{"query": "a", "query_id": null}\n{"query": "b", "query_id": ""}\n', encoding="utf-8")
    assert [query.query_id[:8] for query in read_queries(path).queries] == ["queries/"] * 2
