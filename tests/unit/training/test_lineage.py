"""What a training tells the tracker: under which id it runs, what it made, and what that was made from."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from dmoa.config import Config
from dmoa.testing import domain_rows, write_rollouts
from dmoa.testing import scripted_pool as pool
from dmoa.training.options import RolloutOptions, TrainOptions
from dmoa.training.rollouts import RolloutFolder, read_manifest
from dmoa.training.trainer import TrainContext, TrainResult, run_training
from dmoa.workflows.collect import track


def no_ray() -> AbstractContextManager[None]:
    raise AssertionError("a training in process starts no Ray")


def train(out: Path, config: Config, *rollouts: Path, **options: Any) -> TrainResult:
    values = {"workers": 0, "track": "jsonl", "rollouts": rollouts, "out": out, "epochs": 2, **options}
    around = TrainContext(open_ray=no_ray, say=lambda text: None, watch=lambda epoch, most: None)
    return run_training(TrainOptions.parse(values), config, around)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def artifacts_of(folder: Path, role: str) -> set[tuple[str, str, str]]:
    """Name, kind and path of what a run logged on one side of it."""
    found = [line for line in lines_of(folder) if line["op"] == "artifact" and line["role"] == role]
    return {(line["name"], line["kind"], line["path"]) for line in found}


def run_id(folder: Path) -> str:
    return str(json.loads((folder / "tracking.json").read_text())["run_id"])


def with_gate(config: Config, checkpoint: Path) -> dict[str, Any]:
    gate = config.gate.model_copy(update={"checkpoint": str(checkpoint)})
    return config.model_copy(update={"gate": gate}).model_dump(mode="json")


def test_a_run_names_what_it_came_of_as_the_run_did_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, folders = pool(), [Path("round-0") / "of all agents", tmp_path / "round-1" / "rollouts"]
    for number, folder in enumerate(folders):
        write_rollouts(folder, domain_rows(seed=number), config)
    first = train(Path("first"), config, folders[0])
    for folder in folders:
        manifest = read_manifest(folder)
        if folder == folders[1]:
            manifest = manifest.model_copy(update={"config": with_gate(config, first.checkpoint)})
        options = RolloutOptions.parse({"out": folder, "benchmarks": "arith", "limit": 1, "track": "jsonl"})
        track(manifest, RolloutFolder(options.out.absolute()), options)
    train(Path("second"), config, *folders, start_from=first.checkpoint)
    made = [artifacts_of(folder, "output") for folder in (*folders, Path("first"))]
    assert artifacts_of(Path("first"), "input") == made[0]
    assert artifacts_of(folders[1], "input") == made[2]
    assert artifacts_of(Path("second"), "input") == set.union(*made)
    names = {name for name, _, _ in set.union(*made)}
    assert names == {"rollouts-of-all-agents", "rollouts-rollouts", f"gate-{first.record.version}"}


def test_a_gate_that_is_gone_stops_no_tracking(tmp_path: Path) -> None:
    config = pool()
    folder = write_rollouts(tmp_path / "rollouts", domain_rows(), config)
    manifest = read_manifest(folder).model_copy(update={"config": with_gate(config, tmp_path / "gone")})
    options = RolloutOptions.parse({"out": folder, "benchmarks": "arith", "limit": 1, "track": "jsonl"})
    track(manifest, RolloutFolder(folder), options)
    assert artifacts_of(folder, "input") == set()
    assert {name for name, _, _ in artifacts_of(folder, "output")} == {"rollouts-rollouts"}


def test_a_collection_is_logged_again_only_where_it_has_grown(tmp_path: Path) -> None:
    config = pool()
    folder = write_rollouts(tmp_path / "rollouts", domain_rows(), config)
    manifest = read_manifest(folder)
    options = RolloutOptions.parse({"out": folder, "benchmarks": "arith", "limit": 1, "track": "jsonl"})
    track(manifest, RolloutFolder(folder), options)
    before = lines_of(folder)
    track(manifest, RolloutFolder(folder), options)
    assert lines_of(folder) == before
    more = manifest.counts.model_copy(update={"queries": manifest.counts.queries + 1})
    track(manifest.model_copy(update={"counts": more}), RolloutFolder(folder), options)
    assert len(lines_of(folder)) == 2 * len(before)


def test_a_training_joins_its_own_run_and_no_other(tmp_path: Path) -> None:
    """Every round of `jobs/train_rounds.py` lies in a folder of the same name; a state elsewhere may begin anew in one folder."""
    config = pool()
    rollouts = write_rollouts(tmp_path / "rollouts", domain_rows(), config)
    first, second = tmp_path / "round-0" / "gate", tmp_path / "round-1" / "gate"
    train(first, config, rollouts)
    train(second, config, rollouts)
    begun = run_id(first)
    assert "gate" not in (begun, run_id(second))
    assert begun != run_id(second)
    train(first, config, rollouts)
    assert run_id(first) == begun
    shutil.rmtree(first / "state")
    train(first, config, rollouts, lr=2e-3)
    assert run_id(first) != begun
    assert [line["step"] for line in lines_of(first) if line["op"] == "log" and line["step"]] == [1, 2]
