"""Commands that a signal ends in the middle: one line that says how to go on, nothing left running, and no other Ray joined."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dmoa.testing import domain_rows, write_rollouts
from dmoa.testing import scripted_pool as pool
from dmoa.testing import scripted_pool_yaml as pool_yaml
from tests.integration.evaluations import DMOA, num_answers, scripted_pool
from tests.integration.head import environment
from tests.integration.trainings import num_epochs

pytestmark = pytest.mark.accept
_TIMEOUT_S = 600.0


@pytest.fixture
def logs() -> Iterator[Path]:
    """The folder of temporary files; short, because Ray's sockets lie under it and their paths may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="dl", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def ended(
    arguments: list[str], is_time: Callable[[], bool], number: signal.Signals, tmp_path: Path, logs: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command, send the signal to its process group when it is time, as a terminal does, and wait for its end."""
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    env = environment() | {"TMPDIR": str(logs)}
    deadline = time.monotonic() + _TIMEOUT_S
    with out.open("w") as out_file, err.open("w") as err_file:
        process = subprocess.Popen(arguments, stdout=out_file, stderr=err_file, env=env, start_new_session=True)
        try:
            while not is_time():
                assert process.poll() is None, err.read_text()
                assert time.monotonic() < deadline, err.read_text()
                time.sleep(0.05)
            os.killpg(process.pid, number)
            process.wait(deadline - time.monotonic())
            while _group(process.pid):
                assert time.monotonic() < deadline, _group(process.pid)
                time.sleep(0.05)
        finally:
            for left in _group(process.pid):
                left.kill()
            process.wait()
    return subprocess.CompletedProcess(arguments, process.returncode, out.read_text(), err.read_text())


def _group(number: int) -> list[psutil.Process]:
    """The processes of a group that have not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def check(ran: subprocess.CompletedProcess[str], status: int, closing: str, folder: Path) -> None:
    """Check what a user sees, and that the command spoke to one Ray alone."""
    assert ran.returncode == status, ran.stderr
    assert ran.stdout == ""
    lines = ran.stderr.splitlines()
    assert all(line.startswith("dmoa: ") for line in lines), ran.stderr
    assert lines[-1] == closing
    logs = [path.read_text() for path in folder.glob("dmoa-*.log")]
    assert all(log.count("Started a local Ray") + log.count("Connecting to existing Ray") <= 1 for log in logs), logs
    assert not any("SIGTERM handler is not set" in log for log in logs), "Ray was started in a thread"


@pytest.mark.usefixtures("own_ray")
def test_ctrl_c_ends_a_collection_on_a_ray_of_its_own(tmp_path: Path, logs: Path) -> None:
    out = tmp_path / "run"
    arguments = [DMOA, "rollouts", "--config", str(scripted_pool(tmp_path)), "--benchmarks", "arith", "--limit", "5000"]
    arguments += ["--out", str(out), "--track", "none"]
    ran = ended(arguments, lambda: any(out.glob("rollouts/*.parquet")), signal.SIGINT, tmp_path, logs)
    check(ran, 130, f"dmoa: interrupted; the same command with --out {out} goes on from here", logs)


@pytest.mark.parametrize(("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_ends_an_evaluation_on_a_ray_that_it_joined(
    number: signal.Signals, status: int, word: str, tmp_path: Path, logs: Path
) -> None:
    out = tmp_path / "run"
    arguments = [DMOA, "evaluate", "--config", str(scripted_pool(tmp_path)), "--benchmarks", "arith", "--limit", "5000"]
    arguments += ["--policies", "single", "--out", str(out), "--track", "none"]
    ran = ended(arguments, lambda: num_answers(out) > 0, number, tmp_path, logs)
    check(ran, status, f"dmoa: {word}; the same command with --out {out} --resume goes on from here", logs)


def test_ctrl_c_ends_a_training_on_ray_train(tmp_path: Path, logs: Path) -> None:
    (tmp_path / "pool.yaml").write_text(pool_yaml())
    write_rollouts(tmp_path / "rollouts", domain_rows(22, steps=2), pool())
    out = tmp_path / "run"
    arguments = [
        DMOA,
        "train",
        "--config",
        str(tmp_path / "pool.yaml"),
        "--rollouts",
        str(tmp_path / "rollouts"),
        "--out",
        str(out),
    ]
    arguments += ["--out", str(out), "--track", "jsonl", "--epochs", "100000", "--patience", "100000", "--workers", "2"]
    ran = ended(arguments, lambda: num_epochs(out) >= 2, signal.SIGINT, tmp_path, logs)
    check(ran, 130, f"dmoa: interrupted; the same command goes on from the last state that is kept in {out}", logs)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if line["op"] == "log"} >= {1, 2}, "what was learned is logged"
