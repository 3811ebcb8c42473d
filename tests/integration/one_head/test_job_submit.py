"""`ray job submit` of the real training job on a real head, from a shell of its own: followed, killed, and submitted again."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

from dmoa import checkpoint
from dmoa.testing import domain_rows, write_rollouts
from dmoa.testing import scripted_pool as pool
from dmoa.testing import scripted_pool_yaml as pool_yaml
from tests.integration.head import Head
from tests.integration.trainings import curve, num_epochs

ROOT = Path(__file__).parents[3]
EPOCHS = 200
_TIMEOUT_S = 240.0


def job_file(tmp_path: Path, epochs: int) -> Path:
    """The file of a training job on made-up rollouts, beside a copy of the code as a clone has it."""
    (tmp_path / "code").mkdir()
    for name in ("jobs", "dmoa"):
        ignore = shutil.ignore_patterns("__pycache__", "adapters")
        shutil.copytree(ROOT / name, tmp_path / "code" / name, ignore=ignore)
    write_rollouts(tmp_path / "rollouts", domain_rows(22, steps=2), pool())
    tree = yaml.safe_load(pool_yaml())
    tree["job"] = {
        "rollouts": [(tmp_path / "rollouts").as_uri()],  # as they would lie at s3://
        "out": (tmp_path / "run").as_uri(),
        "epochs": epochs,
        "patience": epochs,
        "workers": 1,
        "track": "jsonl",
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def _driver(config: Path) -> psutil.Process | None:
    """The job's own process, wherever the head started it."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "jobs/train_gate.py" in words and str(config) in words and "submit" not in words and "python" in Path(words[0]).name:
            return process
    return None


def test_a_job_runs_to_its_end_and_its_log_is_followed(head: Head, tmp_path: Path) -> None:
    job = job_file(tmp_path, 2)
    with head.submit(job) as submitted:
        log, _ = submitted.communicate(timeout=_TIMEOUT_S)
        assert submitted.returncode == 0, log
    assert "succeeded" in log
    gate, _ = checkpoint.load(job.parent / "run" / "checkpoint")
    assert gate.spec.agents == pool().agent_names
    assert [epoch["epoch"] for epoch in curve(job.parent / "run")] == [1, 2]


@pytest.mark.accept
def test_a_job_is_killed_and_goes_on_where_it_stopped(head: Head, tmp_path: Path) -> None:
    job = job_file(tmp_path, EPOCHS)
    out = job.parent / "run"
    deadline = time.monotonic() + _TIMEOUT_S
    with head.submit(job) as first:
        while num_epochs(out) < 3:
            assert first.poll() is None, first.stdout.read() if first.stdout else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        driver = _driver(job)
        assert driver is not None
        driver.send_signal(signal.SIGKILL)
        log, _ = first.communicate(timeout=_TIMEOUT_S)
        assert first.returncode != 0, log
    before = num_epochs(out)
    assert 3 <= before < EPOCHS
    assert not (out / "checkpoint").exists()

    with head.submit(job) as second:
        log, _ = second.communicate(timeout=_TIMEOUT_S)
        assert second.returncode == 0, log
    assert "going on after epoch" in log, "the log is followed"
    assert "succeeded" in log
    gate, record = checkpoint.load(out / "checkpoint")
    assert gate.spec.agents == pool().agent_names
    assert record.trained_on is not None
    assert [epoch["epoch"] for epoch in curve(out)] == list(range(1, EPOCHS + 1))
    assert json.loads((out / "train.json").read_text())["workers"] == 1
