"""What a command must not destroy: files that it reads, and folders that it did not make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dmoa.cli.demo import begin_anew
from dmoa.errors import ConfigError
from dmoa.training.options import ExportOptions, ImportOptions, RolloutOptions


def test_a_demo_removes_nothing_that_no_demo_made(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    kept = tmp_path / "gate" / "train.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    result = dmoa("demo", "--config", pool, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"--out is {str(tmp_path)!r}; it holds gate" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["gate"], "and leaves nothing of its own"
    assert kept.exists()


def test_a_demo_begins_anew_in_a_folder_of_its_own(tmp_path: Path) -> None:
    begin_anew(tmp_path / "out")
    (tmp_path / "out" / "rollouts").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    begin_anew(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".demo", "mine.txt"}


def test_a_demo_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(ConfigError, match="--out: cannot write"):
        begin_anew(tmp_path / "out")


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (ExportOptions, {"format": "sft", "traces": "in", "out": "in"}, "out is 'in', which is read"),
        (ExportOptions, {"format": "dpo", "traces": "in", "out": "link"}, "out is 'link', which is read"),
        (ExportOptions, {"format": "dpo", "traces": "d/../in", "out": "in"}, "out is 'in', which is read"),
        (ImportOptions, {"logs": "in.jsonl", "out": "link.jsonl"}, "out is 'link.jsonl', which is read"),
        (ImportOptions, {"logs": "in", "out": "o.jsonl", "pool": "link"}, "pool is 'link', which is read"),
        (ImportOptions, {"logs": "in", "out": "o.jsonl", "pool": "d/../o.jsonl"}, "pool is 'd/../o.jsonl', as out is"),
        (RolloutOptions, {"queries": "d/queries.jsonl", "out": "d"}, "queries names queries.jsonl of out, which is written"),
        (RolloutOptions, {"benchmarks": "arith", "labels": "e/labels", "out": "d"}, "labels is 'e/labels', inside out"),
    ],
)
def test_a_file_that_is_read_is_not_written(
    record: Any, values: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`link` and `e` are links to `in` and `d`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "e").symlink_to("d")
    for end in ("", ".jsonl"):
        (tmp_path / f"in{end}").write_text("{}")
        (tmp_path / f"link{end}").symlink_to(f"in{end}")
    with pytest.raises(ConfigError, match=message):
        record.parse(values)


def test_traces_survive_an_export_over_them(dmoa: Any, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps({}))
    assert dmoa("export", "--format", "sft", "--traces", path, "--out", path).exit_code == 2
    assert path.read_text() == "{}"
