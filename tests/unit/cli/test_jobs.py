"""The entry points of `jobs/`: bad input is one message and exit status 2, never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dmoa.cli.jobs import evaluate_job, read_job
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
