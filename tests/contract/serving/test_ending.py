"""Ending on a signal while the main thread is stuck in C, as it is in Ray's: in real processes, without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dmoa.serving.ending import own_process_groups

SCRIPT = """
import ctypes, signal, subprocess, sys, threading
from dmoa.serving.ending import Ending
stuck = ctypes.CDLL(None).sleep  # Python's handlers do not run while it sleeps, and it is called again after a signal

def hang():
    while stuck(1000):
        pass

with Ending(lambda text: print(text, file=sys.stderr, flush=True), limit_s=1.0) as ending:
    # The signal reaches the child too, which may say so before it is ended.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], **quiet)
    print(child.pid, flush=True)
    if sys.argv[1] == "starting":
        ctypes.CDLL(None).signal(signal.SIGTERM, None)  # as Ray's C++ puts a handler of its own there
        print("up", flush=True)
        hang()
    try:
        ending.ready(3)
        print("up", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("stopping", flush=True)
        if sys.argv[1] == "hangs":
            hang()
        child.kill()
        child.wait()
print("ended", flush=True)
"""


@contextmanager
def running(*words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A command that is `starting`, or that `stops` or `hangs` once it is told to end; and the process that it started."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        child = int(process.stdout.readline())
        assert process.stdout.readline() == "up\n"
        yield process, child
    finally:
        process.kill()
        process.communicate()


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if is_dead(pid):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_it_is_ready_it_ends_at_once_and_takes_its_children_along(number: signal.Signals) -> None:
    with running("starting") as (process, child):
        # The watching thread takes the handlers back within a moment of Ray's own ones.
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if handles(process.pid, number):
                os.killpg(process.pid, number)
                break
            time.sleep(0.02)
        assert process.wait(30) == 1
        assert process.communicate()[1] == "interrupted before it was ready\n"
        assert is_gone(child)


ORPHAN = """
import subprocess, sys
sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
print(subprocess.Popen(sleeper, start_new_session=True, stdout=subprocess.DEVNULL).pid)
"""


def test_what_its_children_left_behind_ends_too() -> None:
    """As agents of Ray whose node manager was killed: they are nobody's children, and in a session of their own."""
    asked = "int(subprocess.check_output([sys.executable, '-c', sys.argv[2]]))"
    script = SCRIPT.replace("print(child.pid", f"print({asked}")
    process = subprocess.Popen([sys.executable, "-c", script, "starting", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    orphan = int(process.stdout.readline())
    try:
        assert process.stdout.readline() == "up\n"
        assert not is_dead(orphan)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 1
        assert is_gone(orphan)
    finally:
        process.kill()
        process.communicate()


def is_dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def handles(pid: int, number: int) -> bool:
    """Say whether a process has a handler of its own for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_once_it_is_ready_it_ends_in_its_own_way(number: signal.Signals) -> None:
    with running("stops") as (process, child):
        process.send_signal(number)
        process.send_signal(number)  # as `timeout` does: to its child and to the group
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "stopping\nended\n", "")
        assert is_gone(child)


def test_what_takes_too_long_is_cut_short() -> None:
    with running("hangs") as (process, child):
        started = time.monotonic()
        process.terminate()
        assert process.wait(30) == 3
        assert time.monotonic() - started >= 0.9
        assert is_gone(child)


def test_a_group_of_its_own_is_for_what_starts_meanwhile() -> None:
    def group() -> int:
        code = "import os; print(os.getpgid(0), os.getpid())"
        # Ray gives its processes a function to call first, and only then is the fork Python's own.
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=os.getpid)
        found, pid = map(int, done.stdout.split())
        return found if found != pid else 0

    with own_process_groups():
        assert group() == 0
    assert group() == os.getpgid(0)
