"""Files into rows: formats, every kind of error, what is skipped and counted, and the real files."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dmoa.engines.recorded import read_lines
from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.base import BENCHMARKS, RowError, hash_content
from dmoa.evaluation.data import Loaded, hash_files, load_rows, load_splits, parse_line
from dmoa.evaluation.records import SPLITS, Split
from tests.unit.evaluation.real_rows import REAL_ROWS
from tests.unit.evaluation.samples import row, write_lines, write_rows

# File of the folder -> rows, as the README beside the real rows states them.
SPLIT_FILES = {
    "mmlu": {"train": "dev", "adaptation": "validation", "test": "test"},
    "aqua_rat": {"train": "train", "adaptation": "validation", "test": "test"},
    "hotpotqa": {"train": "train", "adaptation": "train", "test": "validation"},
    "ddxplus": {"train": "train", "adaptation": "train", "test": "validation"},
}


def questions(*texts: str) -> list[dict[str, Any]]:
    return [row("gsm8k", question=text) for text in texts]


def texts(loaded: Loaded) -> list[str]:
    return [each.task.text.rpartition("Problem: ")[2] for each in loaded.rows]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_split_comes_from_the_file_that_the_table_says(name: str) -> None:
    expected = SPLIT_FILES.get(name, {"train": "train", "adaptation": "train", "test": "test"})
    assert {split: part.file for split, part in BENCHMARKS[name].slices.items()} == expected


@pytest.mark.parametrize("name", BENCHMARKS)
def test_one_row_of_every_benchmark_loads(name: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path, name, f"{BENCHMARKS[name].slices['test'].file}.jsonl", [row(name)])
    loaded = load_rows(name, "test", data_dir=tmp_path)
    (only,) = loaded.rows
    assert only.task.row_id == only.label.row_id == f"{name}/test/{hash_content({'text': only.task.text})[:16]}"
    assert only.task.benchmark == only.label.benchmark == name
    assert len(only.row_hash) == 64
    files = [path.name, *BENCHMARKS[name].definitions]
    assert loaded.sources == {
        f"{name}/{file}": hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() for file in files
    }
    assert (loaded.bad, loaded.num_duplicates) == ((), 0)


def test_gzip_and_plain_files_give_equal_rows(tmp_path: Path) -> None:
    rows = questions("Où est 1?", "b", "c")
    write_rows(tmp_path / "plain", "gsm8k", "test.jsonl", rows)
    write_rows(tmp_path / "packed", "gsm8k", "test.jsonl.gz", rows)
    plain, packed = (load_rows("gsm8k", "test", data_dir=tmp_path / folder) for folder in ("plain", "packed"))
    assert plain.rows == packed.rows
    assert texts(plain) == ["Où est 1?", "b", "c"]
    assert set(plain.sources) == {"gsm8k/test.jsonl"}
    assert set(packed.sources) == {"gsm8k/test.jsonl.gz"}


def test_one_file_is_divided_and_nothing_is_lost_or_twice(tmp_path: Path) -> None:
    write_rows(tmp_path, "gsm8k", "train.jsonl", questions(*map(str, range(2000))))
    parts = load_splits("gsm8k", ["train", "adaptation"], data_dir=tmp_path)
    numbers = {split: {int(text) for text in texts(loaded)} for split, loaded in parts.items()}
    assert numbers["train"] | numbers["adaptation"] == set(range(2000))
    assert not numbers["train"] & numbers["adaptation"]
    # 60 % of 2,000; five standard deviations are 110.
    assert 1090 <= len(numbers["train"]) <= 1310
    assert [load_rows("gsm8k", split, data_dir=tmp_path) for split in parts] == list(parts.values())


def test_families_stay_together(tmp_path: Path) -> None:
    metadata = row("ds1000")["metadata"]
    problems = [
        row(
            "ds1000", prompt=f"{origin} {variant}", metadata={**metadata, "perturbation_origin_id": origin, "problem_id": variant}
        )
        for origin in range(40)
        for variant in range(3)
    ]
    write_rows(tmp_path, "ds1000", "train.jsonl.gz", problems)
    for loaded in load_splits("ds1000", ["train", "adaptation"], data_dir=tmp_path).values():
        prompts = [each.label.gold["prompt"].split() for each in loaded.rows]
        assert prompts
        assert {(origin, variant) for origin, variant in prompts} == {
            (origin, str(variant)) for origin, _ in prompts for variant in range(3)
        }
    same_question = [
        row("multiarith", question=f"How many are {n}?", final_ans=str(answer)) for n in range(40) for answer in (1, 2)
    ]
    write_rows(tmp_path, "multiarith", "train.jsonl", same_question)
    for loaded in load_splits("multiarith", ["train", "adaptation"], data_dir=tmp_path).values():
        asked = [each.task.text for each in loaded.rows]
        assert len(asked) == 2 * len(set(asked)) > 0


def test_equal_rows_are_kept_once_and_counted(tmp_path: Path) -> None:
    rows = [*questions("one", "two", " one\n"), {**questions("two")[0], "answer": "#### 9"}]
    write_rows(tmp_path, "gsm8k", "test.jsonl", rows)
    loaded = load_rows("gsm8k", "test", data_dir=tmp_path)
    assert texts(loaded) == ["one", "two", "two"]
    assert loaded.num_duplicates == 1


def test_a_bad_row_stops_the_load_or_is_counted(tmp_path: Path) -> None:
    good = [json.dumps(fields) for fields in questions("a", "b")]
    lines: list[str | bytes] = [
        good[0],
        "",
        '{"question": "no gold", "answer": "twelve"}',
        '{"answer": "#### 1"}',
        "not json",
        "[1]",
        b'{"question": "\xff", "answer": "#### 1"}',
        '{"question": NaN, "answer": "#### 1"}',
        '{"question": "\\ud800", "answer": "#### 1"}',
        "[" * 100_000,
        good[1],
    ]
    write_lines(tmp_path / "gsm8k" / "test.jsonl", lines)
    with pytest.raises(ConfigError) as raised:
        load_rows("gsm8k", "test", data_dir=tmp_path)
    assert str(raised.value) == (
        "gsm8k/test.jsonl, line 3, field `answer`: saw 'twelve'; expected a worked solution that ends in `#### N`. "
        "Correct the row, or leave such rows out and count them with --skip-bad-rows."
    )
    loaded = load_rows("gsm8k", "test", data_dir=tmp_path, skip_bad_rows=True)
    assert texts(loaded) == ["a", "b"]
    assert [(bad.file, bad.line, bad.field) for bad in loaded.bad] == [
        ("gsm8k/test.jsonl", 3, "answer"),
        ("gsm8k/test.jsonl", 4, "question"),
        *(("gsm8k/test.jsonl", line, "(whole row)") for line in range(5, 11)),
    ]
    assert "saw nothing; there are ['answer']; expected this field" in loaded.bad[1].reason
    assert "NaN is not JSON" in loaded.bad[5].reason


@pytest.mark.parametrize("line", ['{"a": 1', '"text"', "17", "null", '{"a": Infinity}', '{"a": ' + "9" * 5000 + "}"])
def test_a_line_that_is_no_json_object_is_refused(line: str) -> None:
    with pytest.raises(RowError, match=r"field `\(whole row\)`: saw .*; expected one JSON object"):
        parse_line(line.encode())


@given(line=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(line=b"\xef\xbb\xbf{}")
def test_the_line_parser_gives_an_object_or_a_row_error(line: bytes) -> None:
    try:
        value: object = parse_line(line)
    except RowError:
        value = {}
    assert isinstance(value, dict)


@given(
    st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False), max_size=5)
)
def test_the_line_parser_reads_what_json_writes(fields: dict[str, Any]) -> None:
    assert parse_line(json.dumps(fields).encode()) == fields


def test_all_that_can_be_wrong_with_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*gsm8k; --data-dir must hold .* test.jsonl or test.jsonl.gz"):
        load_rows("gsm8k", "test", data_dir=tmp_path)
    write_rows(tmp_path, "gsm8k", "train.jsonl", questions("a"))
    with pytest.raises(ConfigError, match=r"neither test.jsonl nor test.jsonl.gz, which the rows for test .*holds train.jsonl"):
        load_rows("gsm8k", "test", data_dir=tmp_path)
    write_lines(tmp_path / "gsm8k" / "test.jsonl", [])
    with pytest.raises(ConfigError, match=r"gsm8k/test.jsonl holds no usable row \(0 bad ones\)"):
        load_rows("gsm8k", "test", data_dir=tmp_path)
    write_lines(tmp_path / "gsm8k" / "test.jsonl", ["x", "", "y"])
    with pytest.raises(ConfigError, match=r"no usable row \(2 bad ones\)"):
        load_rows("gsm8k", "test", data_dir=tmp_path, skip_bad_rows=True)
    write_rows(tmp_path, "gsm8k", "test.jsonl.gz", questions("a"))
    with pytest.raises(ConfigError, match="are both there"):
        load_rows("gsm8k", "test", data_dir=tmp_path)
    with pytest.raises(ConfigError, match="'gsm' is not known"):
        load_rows("gsm", "test", data_dir=tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").symlink_to("/proc/self/mem")  # a regular file whose first byte nobody can read
    with pytest.raises(ConfigError, match=r"gsm8k/test.jsonl: cannot be read: .*--data-dir"):
        load_rows("gsm8k", "test", data_dir=tmp_path)


def test_the_files_of_a_benchmark_are_hashed_as_its_rows_say(tmp_path: Path) -> None:
    write_rows(tmp_path, "ddxplus", "validation.jsonl", [row("ddxplus")])
    assert hash_files("ddxplus", tmp_path) == load_rows("ddxplus", "test", data_dir=tmp_path).sources
    assert hash_files("ddxplus", None) == hash_files("arith", tmp_path) == {}


def test_aqua_has_no_train_rows_unless_a_file_is_there(tmp_path: Path) -> None:
    write_rows(tmp_path, "aqua_rat", "validation.jsonl", [row("aqua_rat")])
    assert len(load_rows("aqua_rat", "adaptation", data_dir=tmp_path).rows) == 1
    with pytest.raises(ConfigError, match=r"neither train.jsonl nor .* rows for train come from"):
        load_rows("aqua_rat", "train", data_dir=tmp_path)
    write_rows(tmp_path, "aqua_rat", "train.jsonl", [row("aqua_rat")])
    assert len(load_rows("aqua_rat", "train", data_dir=tmp_path).rows) == 1


@pytest.mark.parametrize("damage", [slice(None, -9), slice(4, None)], ids=["cut short", "no header"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, damage: slice) -> None:
    path = write_rows(tmp_path, "gsm8k", "test.jsonl.gz", questions(*map(str, range(50))))
    path.write_bytes(path.read_bytes()[damage])
    with pytest.raises(ConfigError, match=r"test.jsonl.gz: cannot be read: .*copy it again"):
        load_rows("gsm8k", "test", data_dir=tmp_path)


def test_ddxplus_wants_its_definitions(tmp_path: Path) -> None:
    write_rows(tmp_path, "ddxplus", "validation.jsonl", [row("ddxplus")])
    (tmp_path / "ddxplus" / "release_conditions.json").unlink()
    with pytest.raises(ConfigError, match=r"release_conditions.json is missing; its rows are codes"):
        load_rows("ddxplus", "test", data_dir=tmp_path)


def test_lines_are_numbered_as_in_the_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["x", " ", "", "y"])
    assert list(read_lines(path)) == [(1, b"x\n"), (4, b"y\n")]


@pytest.mark.parametrize("name", REAL_ROWS)
def test_the_real_files_hold_what_their_readme_says(name: str, rows_dir: Path) -> None:
    per_file: dict[str, int] = {}
    ids: list[str] = []
    for split in SPLITS:
        file = BENCHMARKS[name].slices[split].file
        if file not in REAL_ROWS[name]:
            continue
        loaded = load_rows(name, split, data_dir=rows_dir)
        assert not loaded.bad
        per_file[file] = per_file.get(file, 0) + len(loaded.rows) + loaded.num_duplicates
        ids.extend(each.task.row_id for each in loaded.rows)
        assert len(loaded.rows) >= 16
        for source, digest in loaded.sources.items():
            assert digest == hashlib.sha256((rows_dir / source).read_bytes()).hexdigest()
            assert digest in (rows_dir / "README.md").read_text(encoding="utf-8")
    assert per_file == REAL_ROWS[name]
    assert len(set(ids)) == len(ids)


def test_no_real_prompt_holds_what_only_the_label_knows(rows_dir: Path) -> None:
    hidden: dict[str, tuple[Split, list[str]]] = {
        "gsm8k": ("test", ["answer"]),
        "aqua_rat": ("test", ["rationale"]),
        "humaneval": ("test", ["canonical_solution", "test"]),
        "ds1000": ("test", ["reference_code", "code_context"]),
        "ddxplus": ("test", ["DIFFERENTIAL_DIAGNOSIS"]),
    }
    for name, (split, fields) in hidden.items():
        prompts = "\n".join(each.task.text for each in load_rows(name, split, data_dir=rows_dir).rows)
        file = next((rows_dir / name).glob(f"{BENCHMARKS[name].slices[split].file}.jsonl*"))
        for _, line in read_lines(file):
            raw = parse_line(line)
            for field in fields:
                assert raw[field].strip() not in prompts or len(raw[field].strip()) < 12


def test_a_french_ddxplus_row_does_not_pass_for_an_english_one(rows_dir: Path, tmp_path: Path) -> None:
    english, french = rows_dir / "ddxplus", rows_dir / "ddxplus" / "original_fr"
    folder = tmp_path / "ddxplus"
    folder.mkdir()
    for path in (french / "validation.jsonl.gz", *english.glob("release_*.json")):
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"line 1, field `PATHOLOGY`: saw .*one of the 49 conditions.*French or English"):
        load_rows("ddxplus", "test", data_dir=tmp_path)


def test_the_french_release_loads_with_its_own_definitions(rows_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "ddxplus").symlink_to(rows_dir / "ddxplus" / "original_fr")
    french = load_rows("ddxplus", "test", data_dir=tmp_path)
    english = load_rows("ddxplus", "test", data_dir=rows_dir)
    assert len(french.rows) == len(english.rows) == 488
    for ours, theirs in zip(english.rows, french.rows, strict=True):
        probabilities = [[p for _, p in each.label.gold["differential"]] for each in (ours, theirs)]
        assert probabilities[0] == probabilities[1]
        # The same answers in the same order of age, sex and complaint, from two codings of one patient.
        assert ours.task.text.count("\n- ") == theirs.task.text.count("\n- ")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_line_without_end_is_refused(name: str, tmp_path: Path) -> None:
    """Of a sparse file, a device, or a few kilobytes that unpack to gigabytes."""
    path = tmp_path / name
    if name.endswith(".gz"):
        with gzip.open(path, "wb", 1) as file:
            for _ in range(80):
                file.write(bytes(1 << 20))
    else:
        with path.open("wb") as plain:
            plain.truncate(80 << 30)
    with pytest.raises(ConfigError, match="line 1: longer than 64 MiB; is it JSON Lines"):
        next(read_lines(path))
