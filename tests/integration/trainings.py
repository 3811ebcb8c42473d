"""Starts `dmoa train` as a user does, kills its workers or the whole, and reads what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from dmoa.training.state import StateStore, TrainProgress
from tests.integration.head import environment

DMOA = str(Path(sys.executable).with_name("dmoa"))
_TIMEOUT_S = 900.0


def command(folder: Path, out: Path, *more: str) -> list[str]:
    """The command of a training on FOLDER/rollouts for the pool FOLDER/pool.yaml."""
    paths = ["--config", str(folder / "pool.yaml"), "--rollouts", str(folder / "rollouts"), "--out", str(out)]
    return [DMOA, "train", *paths, "--track", "jsonl", *more]


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, env=environment())


@dataclass
class Running:
    """A training under way."""

    process: subprocess.Popen[bytes]
    out: Path
    log: Path

    def is_over(self) -> bool:
        """Whether it ended by itself."""
        return self.process.poll() is not None

    def wait_for(self, is_time: Callable[[], bool]) -> None:
        """Wait; fails where the training ends before, or it takes too long."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not is_time():
            assert not self.is_over(), f"ended too soon:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def kill_worker(self) -> int:
        """Kill (SIGKILL) one of its Ray Train workers, and return the epochs that were kept by then."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = _workers()
            return bool(found)

        self.wait_for(is_there)
        found[-1].kill()
        return num_epochs(self.out)

    def kill(self) -> None:
        """Kill (SIGKILL) the command itself, and nothing else: what it started must end by itself."""
        started = {*psutil.Process(self.process.pid).children(recursive=True), *_workers()}
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(started, timeout=120)
        assert not alive, alive

    def end(self) -> int:
        """Wait for its end and return its exit status."""
        return self.process.wait(_TIMEOUT_S)


def _workers() -> list[psutil.Process]:
    """The workers of Ray Train on this machine: of a head that is joined they are no children of the command."""
    return [process for process in psutil.process_iter() if _is_worker(process)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("RayTrainWorker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def start(arguments: Sequence[str], out: Path, log: Path) -> Running:
    """Start a training."""
    with log.open("ab") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file, env=environment(), start_new_session=True)
    return Running(process, out, log)


def progress(out: Path) -> TrainProgress:
    """How far a training is."""
    return StateStore(str(out / "state")).read_progress() or TrainProgress(identity={})


def num_epochs(out: Path) -> int:
    """How many epochs a training has kept."""
    return len(progress(out).epochs)


def curve(out: Path) -> list[dict[str, Any]]:
    """The epochs of a finished training, without the time that they took."""
    report = json.loads((out / "train.json").read_text(encoding="utf-8"))
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in report["epochs"]]


def kept_weights(out: Path) -> dict[str, torch.Tensor]:
    """The last weights of a training, in the dtype that was trained."""
    tensors = load_file(out / "state" / "state.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weights/")}


def greatest_difference(first: Path, second: Path) -> float:
    """The greatest difference between two trainings' last weights."""
    one, other = kept_weights(first), kept_weights(second)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
