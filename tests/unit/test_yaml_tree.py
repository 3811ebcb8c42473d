"""YAML as people mean it: no number of another base, no date, no word turned into a truth value, no key twice; standard input."""

from __future__ import annotations

import io
import sys

import pytest

from dmoa.errors import ConfigError
from dmoa.yaml_tree import parse_yaml, read, set_value

READ_AS_WRITTEN = [
    ("yes", "yes"),
    ("No", "No"),
    ("on", "on"),
    ("OFF", "OFF"),
    ("=", "="),
    ("true", True),
    ("False", False),
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
