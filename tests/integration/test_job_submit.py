"""`ray job submit` of the real training job on a real head, from a shell of its own: followed, killed, and submitted again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from dmoa import checkpoint
from tests.integration.server import free_port
from tests.integration.trainings import curve, num_epochs
from tests.unit.training.gate_rollouts import domain_rows, pool, pool_yaml, write_rollouts

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
EPOCHS = 400
_TIMEOUT_S = 240.0
_START_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray head with its dashboard, which takes jobs."""

    url: str
    env: dict[str, str]

    @contextmanager
    def submit(self, config: Path) -> Iterator[subprocess.Popen[str]]:
        """Submit the job as the README says, and follow its log; at the end the follower is gone, whatever happened."""
        job = ["python", "jobs/train_gate.py", "--config", str(config)]
        command = [RAY, "job", "submit", "--address", self.url, "--working-dir", ".", "--", *job]
        with subprocess.Popen(
            command, cwd=config.parent / "code", env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as following:
            try:
                yield following
            finally:
                following.kill()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Start a head as an operator does, with tokens; everything that it started is ended with it."""
    for attempt in range(_START_ATTEMPTS):
        # Short, because Ray's sockets lie under it and their paths may have 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="dj", dir="/tmp"))
        found, running = _start(folder)
        try:
            # On a busy machine Ray gives up on its own processes too soon.
            if _is_ready(found, running, folder, must=attempt == _START_ATTEMPTS - 1):
                yield found
                return
        finally:
            _end(running)
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path) -> tuple[Head, subprocess.Popen[bytes]]:
    dashboard = free_port()
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    # As in a shell with the environment activated: the job's own `python` is then the one with dmoa's packages.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    (folder / "token").write_text("f" * 64)
    ports = ["--port", str(free_port()), "--dashboard-port", str(dashboard)]
    # The agent that starts jobs has a fixed port otherwise: of two Rays on one machine the second would take no job.
    ports += ["--dashboard-agent-listen-port", str(free_port())]
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", *ports, "--temp-dir", str(folder), "--num-cpus", "4"]
    with (folder / "head.log").open("wb") as log:
        running = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    return Head(f"http://127.0.0.1:{dashboard}", env), running


def _is_ready(head: Head, running: subprocess.Popen[bytes], folder: Path, *, must: bool) -> bool:
    """Wait until the head takes jobs; False where it ended instead, unless it must.

    Its dashboard answers, and lists jobs, well before the agent is there that starts them: only a job tells.
    """
    deadline, said = time.monotonic() + _TIMEOUT_S, ""
    while time.monotonic() < deadline and running.poll() is None:
        asked = [RAY, "job", "submit", "--address", head.url, "--no-wait", "--", "true"]
        asking = subprocess.run(asked, env=head.env, capture_output=True, text=True, check=False)
        if asking.returncode == 0:
            return True
        said = asking.stdout + asking.stderr
    assert not must, f"the head took no job: {said[-1500:]}\n{(folder / 'head.log').read_text()[-1500:]}"
    return False


def _end(running: subprocess.Popen[bytes]) -> None:
    """End the head and everything that it started, which is all in its session or below it."""
    try:
        tree = psutil.Process(running.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait(30)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The file of a training job on made-up rollouts, beside a copy of the code as a clone has it."""
    (tmp_path / "code").mkdir()
    for name in ("jobs", "dmoa"):
        ignore = shutil.ignore_patterns("__pycache__", "adapters")
        shutil.copytree(ROOT / name, tmp_path / "code" / name, ignore=ignore)
    write_rollouts(tmp_path / "rollouts", domain_rows(22, steps=2), pool())
    tree = yaml.safe_load(pool_yaml())
    tree["job"] = {
        "rollouts": [str(tmp_path / "rollouts")],
        "out": str(tmp_path / "run"),
        "epochs": EPOCHS,
        "patience": EPOCHS,
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


def test_a_job_is_killed_and_goes_on_where_it_stopped(head: Head, job: Path) -> None:
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
