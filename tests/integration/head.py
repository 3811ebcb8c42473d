"""A Ray head with its dashboard, started as an operator does, with tokens; and what joins it in the tests.

Commands that start a Ray of their own take a third longer than those that join one, so most tests of commands share a head.
"""

from __future__ import annotations

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

from dmoa.serving.launch import PROXY_FLAGS, free_port

RAY = str(Path(sys.executable).with_name("ray"))
NUM_CPUS = 8
_TIMEOUT_S = 240.0
_START_ATTEMPTS = 3
_joined: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray head that takes jobs."""

    url: str
    """Of its dashboard."""
    address: str
    """HOST:PORT for RAY_ADDRESS."""
    env: dict[str, str]
    """The environment of a shell in which it is known, without RAY_ADDRESS."""

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


def environment() -> dict[str, str]:
    """Return this process's environment with the head to join that the tests share, if any; else without a Ray to join."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | _joined


@contextmanager
def joined(head: Head) -> Iterator[None]:
    """Have commands that tests start join this head."""
    _joined.update({name: head.env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")} | {"RAY_ADDRESS": head.address})
    try:
        yield
    finally:
        _joined.clear()


@contextmanager
def alone() -> Iterator[None]:
    """Have commands that tests start know of no head for a while."""
    kept = dict(_joined)
    _joined.clear()
    try:
        yield
    finally:
        _joined.update(kept)


@contextmanager
def running_head() -> Iterator[Head]:
    """Start a head; everything that it started is ended with it."""
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
    dashboard, port = free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    env |= PROXY_FLAGS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    # As in a shell with the environment activated: the job's own `python` is then the one with dmoa's packages.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    (folder / "token").write_text("f" * 64)
    ports = ["--port", str(port), "--dashboard-port", str(dashboard)]
    # The agent that starts jobs has a fixed port otherwise: of two Rays on one machine the second would take no job.
    ports += ["--dashboard-agent-listen-port", str(free_port())]
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        *ports,
        "--temp-dir",
        str(folder),
        "--num-cpus",
        str(NUM_CPUS),
    ]
    with (folder / "head.log").open("wb") as log:
        running = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    return Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", env), running


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
