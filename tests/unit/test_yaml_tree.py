"""YAML as people mean it: no number of another base, no date, no word turned into a truth value, no key twice; standard input."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dmoa.errors import ConfigError
from dmoa.reading import MAX_BYTES, read_bounded
from dmoa.yaml_tree import parse_yaml, read, set_value

READ_AS_WRITTEN = [
    ("yes", "yes"),
    ("No", "No"),
    ("on", "on"),
    ("OFF", "OFF"),
    ("=", "="),
    ("true", True),
    ("False", False),
    ("True or false", "True or false"),
    ("falsehood", "falsehood"),
    ("[true, trues]", [True, "trues"]),
    ("~", None),
    ("12", 12),
    ("-7", -7),
    ("0", 0),
    ("1_000", 1000),
    ("0x1F", 31),
    ("0.5", 0.5),
    ("007.5", 7.5),
    ("089", "089"),
    ("0o17", "0o17"),
    ("1e3", "1e3"),
    ('"010"', "010"),
    ("'1:30'", "1:30"),
    ("{no: 1, on: 2}", {"no": 1, "on": 2}),
    ("[yes, no]", ["yes", "no"]),
]


@pytest.mark.parametrize(("text", "value"), READ_AS_WRITTEN, ids=[text for text, _ in READ_AS_WRITTEN])
def test_what_is_read_is_what_is_written(text: str, value: object) -> None:
    found = parse_yaml(text, "pool.yaml")
    assert found == value
    assert type(found) is type(value)


REFUSED = [
    ("010", "as 8"),
    ("-012", "as -10"),
    ("00", "as 0"),
    ("0_7", "as 7"),
    ("0b11", "as 3"),
    ("1:30", "as 90"),
    ("+1:30", "as 90"),
    ("190:20:30", "as 685230"),
    ("1:30.5", "as 90.5"),
    ("!!int '010'", "as 8"),
    ("2001-01-01", "as a date"),
    ("2001-12-14 21:59:43", "as a date"),
]


@pytest.mark.parametrize(("text", "part"), REFUSED, ids=[text for text, _ in REFUSED])
def test_a_number_that_means_another_one_is_refused(text: str, part: str) -> None:
    for place, line in (("{}", 1), ("a: {}", 1), ("a:\n  - {}", 2), ("{}: a", 1)):
        with pytest.raises(ConfigError) as caught:
            parse_yaml(place.format(text), "pool.yaml")
        plain = text.removeprefix("!!int ").strip("'")
        assert str(caught.value).startswith(f"pool.yaml: line {line}: YAML 1.1 reads {plain} ")
        assert part in str(caught.value)
        assert "in quotes" in str(caught.value)


@pytest.mark.parametrize("text", ["!!bool maybe", "!!int ''", "!!float x", "!!timestamp x"])
def test_a_value_that_is_not_of_its_tag_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^pool.yaml: not valid YAML: .*; correct it$"):
        parse_yaml(f"a: {text}", "pool.yaml")


def test_an_override_is_read_alike() -> None:
    tree: dict[str, object] = {}
    set_value(tree, "name=off")
    assert tree == {"name": "off"}
    with pytest.raises(ConfigError, match=r"--set 'gate.seed=010': line 1: YAML 1.1 reads 010 as 8"):
        set_value(tree, "gate.seed=010")


DOUBLED = [
    ("a: 1\nb: 2\na: 3", 3, "'a'"),
    ("a:\n  b: 1\n  c: 2\n  b: 1\n", 4, "'b'"),
    ("- {k: 1, k: 1}", 1, "'k'"),
    ('a: 1\n"a": 2', 2, "'a'"),
    ("1: a\n1: b", 2, "'1'"),
    ("a: &x {k: 1, k: 2}\nb: *x", 1, "'k'"),
]


@pytest.mark.parametrize(("text", "line", "key"), DOUBLED, ids=range(len(DOUBLED)))
def test_a_key_that_stands_twice_is_refused(text: str, line: int, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "pool.yaml")
    assert str(caught.value) == f"pool.yaml: line {line}: the key {key} stands twice in one section; keep one of the two"


def test_a_key_beside_a_merge_replaces_what_that_brings() -> None:
    text = "base: &b {x: 1, y: 2}\nmore:\n  <<: *b\n  y: 3\n"
    assert parse_yaml(text, "pool.yaml")["more"] == {"x": 1, "y": 3}


def test_what_replaces_a_merged_key_may_itself_be_merged_further_up() -> None:
    text = "deep:\n  - a: &a {x: 1, y: 2}\n  - b: &b {<<: *a, y: 3}\nmore: {<<: *b, z: 4}\nmost: {<<: [*a, *b]}\n"
    tree = parse_yaml(text, "pool.yaml")
    assert (tree["deep"][1]["b"], tree["more"], tree["most"]) == ({"x": 1, "y": 3}, {"x": 1, "y": 3, "z": 4}, {"x": 1, "y": 2})


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "line 6: aliases make it more than 200000 values"),
        (BOMB.replace("[", "{k: [").replace("]", "]}"), "aliases make it more than 200000 values"),
        ("a: &a\n- *a\n", "line 1: a section holds itself by an alias"),
        ("a: &a\n  b: {c: *a}\n", "line 1: a section holds itself by an alias"),
        ("a: &a\n  <<: *a\n", "line 1: a section holds itself by an alias"),
        ("a:\n  " + "[" * 50_000, "line 2: more than 100 brackets within each other"),
        ("{a: " * 200, "line 1: more than 100 brackets within each other"),
        ("a: 1\nb: 0x" + "f" * 50_000, "line 2: a number of 50002 characters; write a shorter one"),
        ("a: 1" + ":59" * 5_000, "line 1: a number of 15001 characters; write a shorter one"),
    ],
    ids=[
        *("lists", "mappings", "itself", "itself deeper", "merged into itself"),
        *("brackets", "braces", "long number", "number of base 60"),
    ],
)
def test_aliases_that_grow_without_end_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"pool.yaml: .*{said}"):
        parse_yaml(text, "pool.yaml")


@pytest.mark.contract  # reading a hundred thousand of them takes two seconds
def test_more_names_and_values_than_a_pool_has_are_refused() -> None:
    said = "pool.yaml: line 50000: more than 100000 names and values, which no pool has"
    with pytest.raises(ConfigError, match=said):
        parse_yaml("".join(f"k{number}: 1\n" for number in range(50_001)), "pool.yaml")


def test_an_alias_used_often_is_fine() -> None:
    tree = parse_yaml("a: &a {x: [1, 2]}\nmore: [" + "*a, " * 1000 + "*a]", "pool.yaml")
    assert tree["more"] == [{"x": [1, 2]}] * 1001


def test_files_without_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is no regular file"):
        read("/dev/zero")
    (tmp_path / "large").write_bytes(b"a: " + b"x" * MAX_BYTES)
    with pytest.raises(OSError, match="larger than 4 MiB"):
        read(tmp_path / "large")


def test_standard_input_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Bytes(b"a" * (MAX_BYTES + 1)))
    with pytest.raises(OSError, match="larger than 4 MiB"):
        read("-")


def test_a_pipe_is_read_to_its_end_and_one_that_nobody_writes_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"a: 1\n")
        os.close(writer)
        assert read(f"/dev/fd/{reader}")[0] == "a: 1\n"
    finally:
        os.close(reader)
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match=r"a pipe, and did not end within 0\.05 s"):
            read_bounded(Path(f"/dev/fd/{reader}"), pipe_s=0.05)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("override", ["a." * 50_000 + "b=1", "name", "x" * 100_000, "name=[" + "x" * 100_000])
def test_a_long_override_is_refused_in_a_short_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        set_value({}, override)
    assert len(str(caught.value)) < 1000


class Bytes(io.TextIOWrapper):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin-1")


def test_standard_input_is_read_once_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Bytes("name: Jürgen".encode()))
    assert read("-") == ("name: Jürgen", "standard input")
    assert read("-") == ("name: Jürgen", "standard input")
    monkeypatch.setattr(sys, "stdin", Bytes(b"name: other"))
    assert read("-")[0] == "name: other"
    monkeypatch.setattr(sys, "stdin", Bytes(b"\xff"))
    with pytest.raises(UnicodeDecodeError):
        read("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OSError, match="closed"):
        read("-")


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("llms.qwen2.5-7b.gpus=2", {"qwen2.5-7b": {"gpus": 2}, "qwen2": {}}),
        ("llms.qwen2.5-7b.kwargs.a.b=1", {"qwen2.5-7b": {"kwargs": {"a": {"b": 1}}}, "qwen2": {}}),
        ("llms.qwen2.gpus=1", {"qwen2.5-7b": {}, "qwen2": {"gpus": 1}}),
        ("llms.qwen2.5-7b=3", {"qwen2.5-7b": 3, "qwen2": {}}),
        ("llms.qwen2.5-8b.gpus=1", {"qwen2.5-7b": {}, "qwen2": {"5-8b": {"gpus": 1}}}),
    ],
)
def test_a_name_with_dots_is_found(override: str, changed: dict[str, Any]) -> None:
    tree: dict[str, Any] = {"llms": {"qwen2.5-7b": {}, "qwen2": {}}}
    set_value(tree, override)
    assert tree == {"llms": changed}


def test_of_two_names_the_longer_one_is_meant() -> None:
    tree: dict[str, Any] = {"a": {"b": {"c": 1}, "b.c": 1, "b.c.d": {}}}
    set_value(tree, "a.b.c.d.e=2")
    set_value(tree, "a.b.c=3")
    assert tree == {"a": {"b": {"c": 1}, "b.c": 3, "b.c.d": {"e": 2}}}
