"""Real rows that are not there: a reason to skip, and in CI an error, file by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.evaluation.real_rows import REAL_ROWS, find_rows, missing_files


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Every file, empty; some rows compressed."""
    folder = tmp_path / "shared" / "benchmarks"
    for name in missing_files(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "gsm8k" / "train.jsonl").rename(folder / "gsm8k" / "train.jsonl.gz")
    return tmp_path / "shared"


def test_with_all_files_nothing_is_missing(shared: Path) -> None:
    assert find_rows({"CI": "1"}, shared) == (shared / "benchmarks", "", False)
    assert sum(map(len, REAL_ROWS.values())) == len(list(shared.rglob("*.jsonl*"))) - 1 == 19


@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "ddxplus/release_evidences.json", "README.md"])
def test_a_file_that_is_missing_is_named_and_wrong_in_ci_alone(shared: Path, name: str) -> None:
    (shared / "benchmarks" / name).unlink()
    for environment, is_wrong in (({}, False), ({"CI": "true"}, True)):
        found = find_rows(environment, shared)
        assert (f"lacks {name};" in found[1], found[2]) == (True, is_wrong)


def test_a_clone_without_data_beside_it_skips_in_ci_too(tmp_path: Path) -> None:
    _, lacks, is_wrong = find_rows({"CI": "1"}, tmp_path / "shared")
    assert "gsm8k/train.jsonl" in lacks
    assert not is_wrong
