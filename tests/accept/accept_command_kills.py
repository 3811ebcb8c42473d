"""`evaluate`, `rollouts`, `train` and `adapt`, each killed (SIGKILL) at ten random moments, on *scripted agents* or none.

In between the disk is full, and then read-only: a tmpfs in a mount namespace of this check's own (root, or a kernel that lets
users have one). Judged for each command: what it leaves at last is what an unbroken run leaves, times aside; a session that meets
the disk ends with status 1 or 2 and a line, without a traceback; while one runs, a second with the same folder is refused.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from dmoa.testing import domain_rows, scripted_pool, scripted_pool_yaml, write_rollouts
from dmoa.training.rollouts import read_table
from tests.accept.checks import DMOA, run_check
from tests.integration import evaluations
from tests.integration.head import environment

KILLS, PATIENCE_S = 10, 900.0
DISK = "64m"
MARK = "DMOA_OWN_MOUNTS"


@dataclass(frozen=True)
class Command:
    """One command under test."""

    arguments: Callable[[Path, Path], list[str]]
    """Of a folder with its inputs, and of its `--out`."""
    result: Callable[[Path], Any]
    """What it left, without times."""
    lock: str
    """A file of its `--out` that is there once it holds the folder."""
    more: tuple[str, ...] = ()
    """For a session that goes on."""


def _train(folder: Path, out: Path) -> list[str]:
    paths = ["--config", str(folder / "pool.yaml"), "--rollouts", str(folder / "rollouts"), "--out", str(out)]
    return [DMOA, "train", *paths, "--track", "jsonl", "--workers", "0", "--seed", "3", "--epochs", "40"]


def _evaluate(folder: Path, out: Path) -> list[str]:
    rows = ["--benchmarks", "arith,calendar", "--limit", "200", "--concurrency", "6", "--policies", "dmoa,single"]
    return evaluations.command(out, "--config", str(folder / "scripted.yaml"), *rows)


def _rollouts(folder: Path, out: Path) -> list[str]:
    rows = ["--benchmarks", "arith:2,relay:1", "--limit", "300"]
    return [DMOA, "rollouts", "--config", str(folder / "scripted.yaml"), "--out", str(out), "--track", "none", *rows]


def _adapt(folder: Path, out: Path) -> list[str]:
    rows = ["--benchmark", "arith", "--queries", "20", "--limit", "60", "--workers", "0", "--zero-shot", "--track", "none"]
    return [DMOA, "adapt", "--config", str(folder / "scripted.yaml"), "--out", str(out), *rows]


def _collected(out: Path) -> list[dict[str, Any]]:
    table = read_table(out).drop_columns(["latency_ms"])
    return list(table.sort_by([(name, "ascending") for name in ("query_id", "step", "agent")]).to_pylist())


def _adapted(out: Path) -> dict[str, Any]:
    report = json.loads((out / "adapt.json").read_text(encoding="utf-8"))
    return {name: report[name] for name in ("starts", "rows", "updates", "stream")}


COMMANDS = {
    "train": Command(_train, lambda out: (out / "checkpoint" / "gate.safetensors").read_bytes(), ".train.lock"),
    "evaluate": Command(_evaluate, evaluations.table_of, ".lock", ("--resume",)),
    "rollouts": Command(_rollouts, _collected, ".lock"),
    "adapt": Command(_adapt, _adapted, ".adapt.lock"),
}


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return how a session ended."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("dmoa: ") and line != "dmoa: "]
    return {
        "status": done.returncode,
        "has_traceback": "Traceback" in done.stderr or any(' File "' in line for line in lines[-1:]),
        "last_words": lines[-1:] or done.stderr[-300:],
    }


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=environment())


def mount(*arguments: str) -> None:
    """Mount something in this namespace."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def on_full_disk(disk: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a session on a disk without room."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    try:
        return told(run(arguments))
    finally:
        filler.unlink()


def on_read_only_disk(disk: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a session on a disk that cannot be written."""
    mount("-o", "remount,ro", str(disk))
    try:
        return told(run(arguments))
    finally:
        mount("-o", "remount,rw", str(disk))


def beside_itself(process: subprocess.Popen[bytes], lock: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a second session while the first holds the folder."""
    until = time.monotonic() + PATIENCE_S
    while not lock.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)  # it must not end before the second one has begun
    try:
        return told(run(arguments))
    finally:
        process.send_signal(signal.SIGCONT)


def check(command: Command, folder: Path, disk: Path, seed: int, kills: int) -> dict[str, Any]:
    """Run a command whole and broken; return what came of both."""
    started = time.monotonic()
    whole = run(command.arguments(folder, folder / "whole"))
    seconds = time.monotonic() - started
    assert whole.returncode == 0, whole.stderr[-3000:]
    out, rng, under_way = disk / "broken", random.Random(seed), 0
    broken = [*command.arguments(folder, out), *command.more]
    found: dict[str, Any] = {}
    for number in range(3 * kills):
        began = time.monotonic()
        with (folder / "words").open("wb") as words:
            process = subprocess.Popen(broken, stdout=subprocess.DEVNULL, stderr=words, env=environment())
        if number == 0:
            found["second"] = beside_itself(process, out / command.lock, broken)
        try:
            process.wait(rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(60)
            under_way += 1
        else:
            if process.returncode:
                said = (folder / "words").read_text(encoding="utf-8", errors="replace")
                found["ended_by_itself"] = told(subprocess.CompletedProcess(broken, process.returncode, "", said))
                break
            # It was quicker than the whole one: once more from the beginning.
            seconds = min(seconds, time.monotonic() - began)
            shutil.rmtree(out)
            continue
        if under_way == max(1, kills // 3):
            found["full"] = on_full_disk(disk, broken)
        if under_way == max(1, 2 * kills // 3):
            found["read_only"] = on_read_only_disk(disk, broken)
        if under_way == kills:
            break
    last = run(broken)
    is_equal = last.returncode == 0 and command.result(out) == command.result(folder / "whole")
    sessions = [found[name] for name in ("full", "read_only") if name in found]
    return found | {
        "kills": under_way,
        "seconds_unbroken": round(seconds, 1),
        "last": told(last),
        "is_equal": is_equal,
        "passed": is_equal
        and under_way == kills
        and (found["second"]["status"], found["second"]["has_traceback"]) == (2, False)
        # A run that had ended before has nothing more to write.
        and all(one["status"] in (0, 1, 2) and not one["has_traceback"] for one in sessions),
    }


def check_all(folder: Path, names: list[str], seed: int, kills: int) -> dict[str, Any]:
    """Check commands, each on a disk of its own."""
    result: dict[str, Any] = {"agents": "scripted: no figure speaks of a model"}
    for name in names:
        place = folder / name
        disk = place / "disk"
        disk.mkdir(parents=True)
        (place / "pool.yaml").write_text(scripted_pool_yaml(), encoding="utf-8")
        evaluations.scripted_pool(place)
        write_rollouts(place / "rollouts", domain_rows(96), scripted_pool())
        mount("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk))
        try:
            result[name] = check(COMMANDS[name], place, disk, seed, kills)
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
        print(name, json.dumps(result[name]), flush=True)
    return result | {"passed": {name: result[name]["passed"] for name in names}}


def with_own_mounts() -> None:
    """Begin this program again in a mount namespace of its own."""
    if MARK not in os.environ:
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        environ = os.environ | {MARK: "1"}
        os.execvpe("unshare", ["unshare", "--mount", "--propagation", "private", *user, sys.executable, *sys.argv], environ)


FLAGS = {
    "--seed": {"type": int, "default": 0},
    "--kills": {"type": int, "default": KILLS},
    "--only": {"nargs": "+", "choices": list(COMMANDS), "default": list(COMMANDS)},
}

if __name__ == "__main__":
    with_own_mounts()
    raise SystemExit(run_check(lambda options: check_all(options.scratch, options.only, options.seed, options.kills), FLAGS))
