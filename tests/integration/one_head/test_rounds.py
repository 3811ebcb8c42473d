"""On-policy rounds as a job, on scripted agents: each collects with the gate before it and trains on all rollouts so far."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from dmoa import checkpoint
from dmoa.errors import ConfigError
from dmoa.training.rollouts import read_manifest, read_table
from dmoa.workflows.rounds import RoundsOptions
from tests.integration.evaluations import SCRIPTED, run

ROOT = Path(__file__).parents[3]


@pytest.mark.accept
def test_two_rounds_and_the_same_job_again(tmp_path: Path) -> None:
    tree = yaml.safe_load(SCRIPTED)
    tree["job"] = {
        "out": str(tmp_path / "out"),
        "rounds": 2,
        "rollouts": {"benchmarks": ["arith", "words"], "limit": 12, "epsilon": 0.5, "track": "none"},
        "train": {"epochs": 3, "workers": 0, "track": "jsonl"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [sys.executable, str(ROOT / "jobs" / "train_rounds.py"), "--config", str(tmp_path / "job.yaml")]
    ran = run([*command, "--json", str(tmp_path / "result.json")], cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    first, second = (tmp_path / "out" / f"round-{number}" for number in range(2))
    gates = [checkpoint.load(folder / "gate" / "checkpoint")[1] for folder in (first, second)]
    manifests = [read_manifest(folder / "rollouts") for folder in (first, second)]
    assert [(manifest.round, manifest.mode) for manifest in manifests] == [(0, "dense"), (1, "epsilon")]
    assert manifests[1].gate_version == gates[0].version == gates[1].parent
    assert set(read_table(second / "rollouts")["gate_version"].to_pylist()) == {gates[0].version}
    assert gates[1].trained_on is not None
    assert len(gates[1].trained_on["folders"]) == 2
    assert json.loads((tmp_path / "result.json").read_text())["version"] == gates[1].version

    again = run(command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already trained") == 2
    assert checkpoint.load(second / "gate" / "checkpoint")[1] == gates[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollouts": {}}, "job: out: missing"),
        ({"out": "o", "rollouts": {}, "rounds": 0}, "rounds"),
        ({"out": "o", "rollouts": {"out": "x"}}, "job.rollouts: out: every round sets it itself"),
        ({"out": "o", "rollouts": {}, "train": {"start_from": "x"}}, "job.train: start_from: every round"),
    ],
)
def test_bad_options_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RoundsOptions.parse(values)
    assert message in str(caught.value)
