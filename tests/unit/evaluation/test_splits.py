"""Disjoint splits: what occurs twice leaves the side that learns, and is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmoa.errors import ConfigError
from dmoa.evaluation.data import drop_overlaps, load_disjoint, load_splits
from dmoa.evaluation.records import SPLITS
from dmoa.evaluation.suites.suite import make_row
from tests.unit.evaluation.real_rows import REAL_ROWS
from tests.unit.evaluation.samples import row, write_rows


def write_mmlu(folder: Path, dev: list[str], validation: list[str], test: list[str], *, last_answer: int = 2) -> None:
    for file, questions in (("dev", dev), ("validation", validation), ("test", test)):
        write_rows(folder, "mmlu", f"{file}.jsonl", [row("mmlu", question=question) for question in questions])
    write_rows(folder, "mmlu", "test.jsonl", [row("mmlu", question=q, answer=last_answer if q == test[-1] else 2) for q in test])


def test_the_test_side_keeps_what_occurs_twice(tmp_path: Path) -> None:
    write_mmlu(
        tmp_path,
        dev=["a", "in test", "in both", "in adaptation"],
        validation=["b", "in adaptation", "in both"],
        test=["c", "in  test", "in both"],
    )
    disjoint = load_disjoint("mmlu", data_dir=tmp_path)
    kept = {
        split: [each.task.text.split("Question: ")[1].split("\n")[0] for each in loaded.rows]
        for split, loaded in disjoint.splits.items()
    }
    assert kept == {"train": ["a"], "adaptation": ["b", "in adaptation"], "test": ["c", "in  test", "in both"]}
    assert list(disjoint.splits) == list(SPLITS)
    assert sorted((row_id.split("/")[1], kept_in) for row_id, kept_in in disjoint.dropped.items()) == [
        ("adaptation", "test"),
        ("train", "adaptation"),
        ("train", "test"),
        ("train", "test"),
    ]


def test_an_equal_question_with_another_label_is_dropped_too(tmp_path: Path) -> None:
    write_mmlu(tmp_path, dev=["a", "x"], validation=["b"], test=["c", "x"], last_answer=0)
    disjoint = load_disjoint("mmlu", data_dir=tmp_path)
    ((row_id, kept_in),) = disjoint.dropped.items()
    assert (row_id.split("/")[1], kept_in) == ("train", "test")


def test_the_same_question_in_other_letters_is_the_same_row(tmp_path: Path) -> None:
    write_mmlu(tmp_path, dev=["a", "Which  CAFÉ?"], validation=["b"], test=["c", "which cafe\u0301?"])
    ((row_id, kept_in),) = load_disjoint("mmlu", data_dir=tmp_path).dropped.items()
    assert (row_id.split("/")[1], kept_in) == ("train", "test")


def test_ids_are_of_the_question_alone(tmp_path: Path) -> None:
    """Else the id of a row is a hash that tells a short gold answer to whoever tries all answers."""
    ids = []
    for answer in (0, 1):
        folder = tmp_path / str(answer)
        questions = [row("mmlu", question="Left?", answer=answer), *(row("mmlu", question="And now?", answer=n) for n in (1, 2))]
        write_rows(folder, "mmlu", "test.jsonl", questions)
        rows = load_splits("mmlu", ["test"], data_dir=folder)["test"].rows
        ids.append([each.task.row_id for each in rows])
        assert len({each.row_hash for each in rows}) == len(set(ids[-1])) == 3
    assert ids[0] == ids[1]
    assert ids[0][2] == f"{ids[0][1]}-2"
    two = [make_row("arith", "test", "What is 1 + 1?", "sum", {"answer": gold}).task.row_id for gold in ("2", "3")]
    assert two[0] == two[1]


def test_a_row_of_two_splits_stays_in_the_one_that_is_asked(tmp_path: Path) -> None:
    write_mmlu(tmp_path, dev=["a", "x"], validation=["b"], test=["c", "x"])
    loaded = load_splits("mmlu", SPLITS, data_dir=tmp_path)
    clean, dropped = drop_overlaps(loaded)
    assert {split: len(part.rows) for split, part in clean.items()} == {"train": 1, "adaptation": 1, "test": 2}
    hashes = [each.row_hash for part in clean.values() for each in part.rows]
    assert len(set(hashes)) == len(hashes)
    assert len(dropped) == 1


def test_absent_files_leave_their_splits_out_unless_required(tmp_path: Path) -> None:
    write_rows(tmp_path, "gsm8k", "test.jsonl", [row("gsm8k")])
    assert list(load_disjoint("gsm8k", data_dir=tmp_path).splits) == ["test"]
    with pytest.raises(
        ConfigError, match=r"neither train.jsonl nor train.jsonl.gz, which the rows for train, adaptation come from"
    ):
        load_disjoint("gsm8k", data_dir=tmp_path, required=("train", "test"))


def test_a_required_split_without_rows_is_an_error(tmp_path: Path) -> None:
    write_rows(tmp_path, "gsm8k", "test.jsonl", [row("gsm8k")])
    write_rows(tmp_path, "gsm8k", "train.jsonl", [row("gsm8k")])
    with pytest.raises(ConfigError, match=r"gsm8k: no rows for (train|adaptation) in gsm8k/train.jsonl"):
        load_disjoint("gsm8k", data_dir=tmp_path, required=("train", "adaptation", "test"))


def test_bad_rows_are_skipped_where_that_is_asked_for(tmp_path: Path) -> None:
    write_rows(tmp_path, "gsm8k", "test.jsonl", [row("gsm8k"), row("gsm8k", answer="none")])
    with pytest.raises(ConfigError, match="line 2"):
        load_disjoint("gsm8k", data_dir=tmp_path)
    assert len(load_disjoint("gsm8k", data_dir=tmp_path, skip_bad_rows=True).splits["test"].bad) == 1


@pytest.mark.parametrize("name", REAL_ROWS)
def test_the_real_rows_are_disjoint_as_they_are(name: str, rows_dir: Path) -> None:
    disjoint = load_disjoint(name, data_dir=rows_dir)
    assert not disjoint.dropped
    hashes = [each.row_hash for loaded in disjoint.splits.values() for each in loaded.rows]
    assert len(set(hashes)) == len(hashes)
    assert set(disjoint.splits) == ({"adaptation", "test"} if name == "aqua_rat" else set(SPLITS))
