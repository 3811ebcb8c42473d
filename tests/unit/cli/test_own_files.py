"""What a command must not destroy: files that it reads, and folders that it did not make."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dmoa.cli.demo import begin_anew
from dmoa.errors import CheckpointError, ConfigError
from dmoa.training.options import ExportOptions, ImportOptions, RolloutOptions, TrainOptions
from dmoa.training.trainer import TrainContext, run_training
from dmoa.workflows.console import Common


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
        (
            ExportOptions,
            {"format": "sft", "run": "d", "out": "d/run.json"},
            "out is 'd/run.json', a file that lies in run, which is read",
        ),
        (
            ExportOptions,
            {"format": "sft", "run": "d", "out": "e/run.json"},
            "out is 'e/run.json', a file that lies in run, which is read",
        ),
        (ImportOptions, {"logs": "in.jsonl", "out": "link.jsonl"}, "out is 'link.jsonl', which is read"),
        (ImportOptions, {"logs": "in", "out": "o.jsonl", "pool": "link"}, "pool is 'link', which is read"),
        (ImportOptions, {"logs": "in", "out": "o.jsonl", "pool": "d/../o.jsonl"}, "pool is 'd/../o.jsonl', as out is"),
        (TrainOptions, {"rollouts": "d,e", "out": "o"}, "rollouts names 'e' twice"),
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
    (tmp_path / "d" / "run.json").write_text("{}")
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


def test_json_takes_the_place_of_nothing_that_a_command_reads_or_writes(dmoa: Any, pool: Path, tmp_path: Path) -> None:
    path, link = tmp_path / "pool.yaml", tmp_path / "link"
    path.write_text(pool.read_text())
    link.symlink_to(path)
    for arguments in (
        ("run", "Hi", "--config", path, "--json", link),
        ("run", "--replay", path, "--json", path),
        ("export", "--format", "sft", "--traces", path, "--out", tmp_path / "o", "--json", path),
        ("export", "--format", "sft", "--traces", path, "--out", tmp_path / "o", "--json", tmp_path / "o"),
        ("rollouts", "--queries", path, "--out", tmp_path / "r", "--json", path),
    ):
        result = dmoa(*arguments)
        assert result.exit_code == 2
        assert "which another option names too; name another file" in result.stderr
    assert path.read_text() == pool.read_text()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["link", "pool.yaml"]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "told.json", tmp_path / "link"
    link.symlink_to(path)
    Common(json_path=path).write_json({"a": 1})

    def no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_room)
        with pytest.raises(ConfigError, match="--json: cannot write"):
            Common(json_path=path).write_json({"a": 3})
    assert json.loads(path.read_text()) == {"a": 1}
    Common(json_path=link).write_json({"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}, "through a link"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["link", "told.json"]


def test_json_that_cannot_be_written_is_refused_before_the_work(dmoa: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = dmoa("models", "list", "--json", tmp_path / "file" / "new" / "told.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--json: cannot write" in result.stderr
    assert f"{str(tmp_path / 'file')!r} is no folder that can be written to" in result.stderr


def test_json_may_go_to_a_pipe(dmoa: Any, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert dmoa("models", "list", "--json", path).exit_code == 0
    assert json.loads(os.read(reader, 1 << 16))["models"]
    os.close(reader)
    assert path.is_fifo(), "and it stays one"


def test_make_clean_leaves_what_commands_wrote() -> None:
    makefile = (Path(__file__).parents[3] / "Makefile").read_text(encoding="utf-8")
    words = makefile.partition("\nclean:\n")[2].split("\n\n")[0].split()
    assert {"$(VENV)", "out/tests", "out/accept"} <= set(words)
    assert not {"out", "out/"} & set(words)


def test_training_refuses_a_folder_whose_checkpoint_is_another_ones(pool: Path, tmp_path: Path) -> None:
    """Such as the weights of a language model, which would be lost when the gate takes their place."""
    kept = tmp_path / "checkpoint" / "model.safetensors"
    kept.parent.mkdir()
    kept.write_text("x")
    options = TrainOptions.parse({"rollouts": "r", "out": tmp_path, "workers": 0, "track": "none"})
    with pytest.raises(CheckpointError, match=r"checkpoint' holds model.safetensors, and a checkpoint is to take its place"):
        run_training(options, Common(config=pool).load(), TrainContext())
    assert kept.exists()
