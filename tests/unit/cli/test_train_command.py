"""`dmoa train` and `jobs/train_gate.py` in process: what they print, and how bad input ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dmoa.cli.jobs import train_gate_job
from dmoa.config import load
from dmoa.storage import localized
from dmoa.testing import domain_rows, write_rollouts
from dmoa.testing import scripted_pool as made_up_pool
from dmoa.testing import scripted_pool_yaml as pool_yaml
from dmoa.workflows.console import Common
from dmoa.workflows.rounds import RoundsOptions, training_of
from dmoa.workflows.train import run_train
from tests.unit.cli.conftest import Invoke

pytestmark = pytest.mark.contract  # asks git for the revision, and trains

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pool and rollouts of it."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "pool.yaml").write_text(pool_yaml())
    write_rollouts(folder / "rollouts", domain_rows(), made_up_pool())
    return folder


def test_a_training_prints_its_checkpoint_and_tells_how_it_went(dmoa: Invoke, material: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = dmoa(
        "train",
        *("--config", material / "pool.yaml", "--rollouts", material / "rollouts", "--out", out),
        *("--workers", "0", "--track", "jsonl", "--epochs", "3", "--json", tmp_path / "result.json"),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split() == [str(out / "checkpoint")]
    assert "epoch 3 of 3" in result.stderr
    report = json.loads((tmp_path / "result.json").read_text())
    assert report == json.loads((out / "train.json").read_text())
    assert report["version"] in result.stderr
    assert len(report["epochs"]) == 3


def test_a_gate_that_learned_is_not_called_arbitrary(dmoa: Invoke, material: Path, tmp_path: Path) -> None:
    result = dmoa(
        "train",
        *("--config", material / "pool.yaml", "--rollouts", material / "rollouts", "--out", tmp_path / "run"),
        *("--workers", "0", "--track", "none", "--epochs", "30", "--lr", "0.003", "--json", tmp_path / "result.json"),
    )
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["ranking"] == "better than chance"
    assert 0.5 < report["metrics"]["pairwise_low"] <= report["metrics"]["pairwise"] <= report["metrics"]["pairwise_high"]
    assert "chance" not in result.stderr


def test_a_gate_that_ranks_no_better_than_chance_is_told_in_red(dmoa: Invoke, tmp_path: Path) -> None:
    """Who is sure is drawn by lot for every query: there is nothing to learn."""
    rng = np.random.default_rng(4)
    rows = [
        {**row, "entropy_sum_nats": 8 * nats, "entropy_sq_sum": 8 * nats**2}
        for row in domain_rows(40)
        for nats in [float(rng.uniform(0.1, 1.5))]
    ]
    (tmp_path / "pool.yaml").write_text(pool_yaml())
    write_rollouts(tmp_path / "rollouts", rows, made_up_pool())
    arguments = ("train", "--config", tmp_path / "pool.yaml", "--rollouts", tmp_path / "rollouts", "--out", tmp_path / "run")
    result = dmoa(
        *arguments, *("--workers", "0", "--track", "jsonl", "--epochs", "3", "--json", tmp_path / "result.json"), color=True
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["ranking"] == "no better than chance"
    assert report["metrics"]["pairwise_low"] <= 0.5
    (line,) = [line for line in result.stderr.splitlines() if "no better than chance" in line]
    assert line.startswith("\x1b[31mdmoa: the gate ranks no better than chance: ")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("held/pairwise_low" in line.get("metrics", {}) for line in logged)


def test_an_agent_that_never_answered_is_named(dmoa: Invoke, tmp_path: Path) -> None:
    lost = {"status": "failed", "entropy_tokens": 0, "entropy_sum_nats": 0.0, "entropy_sq_sum": 0.0, "text": ""}
    rows = [{**row, **lost} if row["agent"] == "two" else row for row in domain_rows()]
    (tmp_path / "pool.yaml").write_text(pool_yaml())
    write_rollouts(tmp_path / "rollouts", rows, made_up_pool())
    arguments = ("train", "--config", tmp_path / "pool.yaml", "--rollouts", tmp_path / "rollouts", "--out", tmp_path / "run")
    result = dmoa(*arguments, *("--workers", "0", "--track", "none", "--epochs", "2", "-q"))
    assert result.exit_code == 0, result.stderr
    assert "dmoa: two never answered with an entropy in these rollouts: the gate learns nothing about it" in result.stderr


def test_rollouts_and_run_may_lie_at_a_uri(dmoa: Invoke, material: Path, tmp_path: Path) -> None:
    place = (tmp_path / "far" / "run").as_uri()
    arguments = (
        *("--config", material / "pool.yaml", "--rollouts", (material / "rollouts").as_uri(), "--out", place),
        *("--workers", "0", "--track", "jsonl", "--epochs", "3"),
    )
    first = dmoa("train", *arguments)
    assert first.exit_code == 0, first.stderr
    assert first.stdout.split() == [f"{place}/checkpoint"]
    there = tmp_path / "far" / "run"
    assert {path.name for path in there.iterdir()} >= {"checkpoint", "state", "train.json", "metrics.jsonl"}
    trained_on = json.loads((there / "checkpoint" / "gate.json").read_text())["trained_on"]
    assert [folder["folder"] for folder in trained_on["folders"]] == [(material / "rollouts").as_uri()]
    kept = json.loads((there / "train.json").read_text())["options"]
    assert (kept["rollouts"], kept["out"]) == ([(material / "rollouts").as_uri()], place)
    again = dmoa("train", *arguments)
    assert again.exit_code == 0, again.stderr
    assert "already trained" in again.stderr
    gone = dmoa("train", *arguments[:2], "--rollouts", f"{place}-nowhere", *arguments[4:])
    assert gone.exit_code == 2
    assert f"rollouts is '{place}-nowhere'; nothing lies there" in gone.stderr


def test_a_round_in_a_local_copy_keeps_its_state_at_the_uri(material: Path, tmp_path: Path) -> None:
    """Workers on other machines reach the URI, and no copy."""
    there = tmp_path / "far"
    options = RoundsOptions.parse({"out": there.as_uri(), "rollouts": {}, "train": {"workers": 0, "track": "none", "epochs": 2}})
    with localized(options, lambda text: None, writes=("out",)) as here:
        out = here.out / "round-0" / "gate"
        wanted = training_of(here, load(material / "pool.yaml"), [material / "rollouts"], out)
        run_train(wanted, load(material / "pool.yaml"), Common(verbosity=-1), "")
        assert not (out / "state").exists()
        assert (there / "round-0" / "gate" / "state" / "state.safetensors").is_file()
    assert (there / "round-0" / "gate" / "checkpoint" / "gate.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", "many"), "workers is 'many'; expected a valid integer or 'auto'"),
        (("--workers", "-1"), "workers is '-1'; expected a number greater than or equal to 0 or 'auto'"),
        (("--holdout", "1.5"), "holdout is 1.5"),
        (("--loss", "squared"), "loss is 'squared'"),
        (("--preset", "huge"), "preset is 'huge'"),
        (("--workers", "0", "--start-from", "nowhere"), "checkpoint '"),
        (("--workers", "0", "--rollouts", "nowhere"), "name a folder that `dmoa rollouts` wrote"),
        (("--workers", "0", "--gpu"), "train: gpu is set, workers is 0, and torch finds no GPU"),
        (("--seed", "9" * 23), "seed is " + "9" * 23 + "; expected a number less than"),
        (("--set", "gate.seed=" + "9" * 23), "gate.seed is " + "9" * 23 + "; expected a number less than"),
    ],
)
def test_bad_input_is_one_message(arguments: tuple[str, ...], message: str, dmoa: Invoke, material: Path, tmp_path: Path) -> None:
    base = ("--config", material / "pool.yaml", "--rollouts", material / "rollouts", "--out", tmp_path / "run")
    result = dmoa("train", *base, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_the_job_trains_as_the_command_does(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(pool_yaml())
    tree["job"] = {"rollouts": [str(material / "rollouts")], "out": str(tmp_path / "run"), "workers": 0, "track": "none"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(sys, "argv", ["jobs/train_gate.py", "--config", str(tmp_path / "job.yaml"), "--set", "job.epochs=2"])
    with pytest.raises(SystemExit) as ended:
        train_gate_job()
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "run" / "checkpoint")]


def test_the_shipped_job_file_names_options_that_there_are() -> None:
    from dmoa.training.options import TrainOptions

    options = TrainOptions.parse(yaml.safe_load((ROOT / "jobs" / "train_gate.yaml").read_text())["job"])
    assert options.workers == "auto"
    assert (options.epochs, options.batch_queries) == (10, 4)
