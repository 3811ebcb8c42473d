"""`dmoa train` in one process, killed (SIGKILL) at ten random moments, with a full and a read-only disk in between; no model.

Judged: the gate is bit-equal to that of an unbroken run; every session that meets the disk ends with status 1 or 2 and one line,
without a traceback; while a training runs, a second one with the same folder is refused (status 2) and disturbs nothing. The full
disk is a limit on the size of files, the read-only one a folder in the place of a file. Evaluations: `accept_resume`.
"""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from dmoa.testing import domain_rows, scripted_pool, scripted_pool_yaml, write_rollouts
from tests.accept.checks import run_check
from tests.integration.head import environment
from tests.integration.trainings import command, run

KILLS = 10
SMALL = 4096
"""Bytes of the largest file on the full disk: a line of curves fits, weights do not."""
OPTIONS = ("--workers", "0", "--seed", "3", "--epochs", "40")


def fill() -> None:
    """Let no file of this process grow over a few kilobytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return how a session ended."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("dmoa: ") and line != "dmoa: "]
    return {
        "status": done.returncode,
        "has_traceback": "Traceback" in done.stderr,
        "last_words": lines[-1:] or done.stderr[-300:],
    }


def begin(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Begin a training and return it."""
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())


def check(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """Train whole and broken; return what came of both."""
    (folder / "pool.yaml").write_text(scripted_pool_yaml(), encoding="utf-8")
    write_rollouts(folder / "rollouts", domain_rows(96), scripted_pool())
    started = time.monotonic()
    whole = run(command(folder, folder / "whole", *OPTIONS))
    seconds = time.monotonic() - started
    assert whole.returncode == 0, whole.stderr[-3000:]
    broken, rng, under_way = command(folder, folder / "broken", *OPTIONS), random.Random(seed), 0
    second: dict[str, Any] | None = None
    for number in range(kills):
        process = begin(broken)
        if number == 0:
            while not (folder / "broken" / ".train.lock").exists():
                time.sleep(0.05)
            process.send_signal(signal.SIGSTOP)  # it must not end before the second one has begun
            second = told(run(broken))
            process.send_signal(signal.SIGCONT)
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        under_way += process.poll() is None
        process.kill()
        process.wait(60)
    full = subprocess.run(broken, capture_output=True, text=True, check=False, timeout=900, env=environment(), preexec_fn=fill)
    (folder / "file").write_text("")
    nowhere = run(command(folder, folder / "file" / "out", *OPTIONS))
    last = run(broken)
    weights = [(folder / name / "checkpoint" / "gate.safetensors") for name in ("whole", "broken")]
    is_equal = all(path.is_file() for path in weights) and weights[0].read_bytes() == weights[1].read_bytes()
    disks = {"full": told(full), "nowhere": told(nowhere)}
    return {
        "kills": kills,
        "killed_under_way": under_way,
        "seconds_unbroken": round(seconds, 1),
        "second_with_the_same_out": second,
        "disks": disks,
        "last": told(last),
        "is_bit_equal": is_equal,
        "passed": is_equal
        and last.returncode == 0
        and under_way > 0
        and second is not None
        and (second["status"], second["has_traceback"]) == (2, False)
        # A training that had ended before the disk was full has nothing more to write.
        and all(one["status"] in (0, 1, 2) and not one["has_traceback"] for one in disks.values())
        and disks["nowhere"]["status"] == 2,
    }


FLAGS = {"--seed": {"type": int, "default": 0}, "--kills": {"type": int, "default": KILLS}}

if __name__ == "__main__":
    raise SystemExit(run_check(lambda options: check(options.scratch, options.seed, options.kills), FLAGS))
