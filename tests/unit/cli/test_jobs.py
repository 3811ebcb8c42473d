"""The entry points of `jobs/`: bad input is one message and exit status 2, never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dmoa.agents.pool import load_pool
from dmoa.cli.jobs import evaluate_job, read_job
from dmoa.testing import scripted_pool_yaml
from dmoa.workflows.console import Common
from dmoa.workflows.evaluate import check_policies

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["evaluate", "collect_rollouts", "train_gate", "train_rounds", "adapt"])
def test_the_shipped_jobs_use_the_pool_that_knows_their_suites(name: str) -> None:
    """The default pool is right on hardly any row of the generated suites; `specialists` was trained on other rows of them."""
    config, job = read_job(Common(config=ROOT / "jobs" / f"{name}.yaml"))
    assert config.name == "specialists"
    check_policies(tuple(job.get("policies", ())), config)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", ["--nonsense"], "No such option"),
        ("", [], "--config: missing"),
        ("name: x", ["--config", "job.yaml"], "job: missing"),
        ("job: {benchmarks: [arith]}", ["--config", "job.yaml"], "job.out: missing"),
        ("job: {benchmarks: [arith], out: o}", ["--config", "job.yaml", "--set", "job.limit=0"], "limit is 0"),
        ("pool: {name: x}\njob: {}", ["--config", "job.yaml"], "job.yaml: pool is {'name': 'x'}; expected the name"),
        ("pool: [x]\njob: {}", ["--config", "job.yaml"], "job.yaml: pool is ['x']; expected the name of a packaged"),
        ("pool: specialists\ngate: {hiden: 3}\njob: {}", ["--config", "job.yaml"], "job.yaml: with its own gate: "),
        ("job: {benchmarks: [arith], out: o}", ["--config", "job.yaml", "--set", "job.benchmarks=[nope]"], "nope not known"),
        ("job: {benchmarks: [arith], out: o}", ["--config", "job.yaml", "--set", "job.policies=[nope]"], "'nope' is not known"),
    ],
)
def test_bad_input_is_one_message(
    text: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate_job()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_submitted_job_says_that_its_own_folder_does_not_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    own.mkdir(parents=True)
    said = {}
    for place in (own, tmp_path):
        monkeypatch.chdir(place)
        for out in ("out/x", "s3://bucket/x", "/data/x"):
            (place / "job.yaml").write_text(f"job: {{out: {out}}}")
            read_job(Common(config=Path("job.yaml")))
            said[place, out] = capsys.readouterr().err
    assert "job.out is 'out/x', in the copy of a folder that Ray made" in said.pop((own, "out/x"))
    assert set(said.values()) == {""}


def test_sections_beside_a_named_pool_change_it(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("pool: specialists\ngate: {checkpoint: DIR, activation: {mass: 0.5}}\njob: {out: o}\n")
    changed, job = read_job(Common(config=path, overrides=("gate.activation.mass=0.6", "job.out=other")))
    plain = load_pool("specialists")
    activation = plain.gate.activation.model_copy(update={"mass": 0.6})
    gate = plain.gate.model_copy(update={"checkpoint": "DIR", "activation": activation})
    assert changed == plain.model_copy(update={"gate": gate})
    assert job == {"out": "other"}


def test_another_pool_can_be_set_for_a_job(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("pool: specialists\njob: {out: o}\n")
    (tmp_path / "mine.yaml").write_text(scripted_pool_yaml())
    config, _ = read_job(Common(config=path, overrides=(f"pool={tmp_path}/mine.yaml", "limits.max_steps=2")))
    assert (config.name, config.limits.max_steps) == ("made-up", 2)
