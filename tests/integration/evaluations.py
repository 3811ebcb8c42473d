"""Starts `dmoa evaluate` as a user does, kills it, and reads what it left."""

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

from typer.testing import CliRunner

from dmoa.cli.main import app
from tests.integration.head import environment

DMOA = str(Path(sys.executable).with_name("dmoa"))
_TIMEOUT_S = 4000.0
SCRIPTED = """
name: scripted
llms:
  s:
    model: "scripted:echo"
    engine: scripted
    engine_kwargs: {delay_ms: 20, replies: {one: "Answer: Monday", two: "Answer: 7"}}
agents:
  - {name: one, llm: s, profile: Says Monday.}
  - {name: two, llm: s, profile: Says seven.}
  - {name: three, llm: s, profile: Echoes.}
limits: {max_steps: 2}
"""
"""Scripted agents: their numbers say nothing about any model."""


def scripted_pool(folder: Path) -> Path:
    """Write the scripted pool and return its path."""
    path = folder / "scripted.yaml"
    path.write_text(SCRIPTED, encoding="utf-8")
    return path


def command(out: Path, *more: str) -> list[str]:
    """Return the command of an evaluation into a folder; W&B is left out."""
    return [DMOA, "evaluate", "--out", str(out), "--track", "jsonl", *more]


def run(arguments: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    env = environment()
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, env=env, cwd=cwd)


def run_here(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which is sooner done; for commands that end before they would join a Ray."""
    ended = CliRunner().invoke(app, list(arguments[1:]))
    return subprocess.CompletedProcess(arguments, ended.exit_code, ended.stdout, ended.stderr)


def run_and_kill(arguments: Sequence[str], is_time: Callable[[], bool], log: Path) -> bool:
    """Run a command and kill it (SIGKILL) at the given time; returns whether it was still running then."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file, env=environment(), start_new_session=True)
        deadline = time.monotonic() + _TIMEOUT_S
        while process.poll() is None and not is_time():
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-3000:]
            time.sleep(0.02)
        was_running = process.poll() is None
        if was_running:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    return was_running


def whole_lines(out: Path) -> dict[str, bytes]:
    """Return the whole lines of every answers file, by name."""
    found = {}
    for path in sorted((out / "answers").glob("*.jsonl")):
        data = path.read_bytes()
        found[path.name] = data[: data.rfind(b"\n") + 1]
    return found


def num_answers(out: Path) -> int:
    """Return how many rows have been answered."""
    return sum(data.count(b"\n") for data in whole_lines(out).values()) if (out / "answers").is_dir() else 0


def rows_of(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return every answered row by (row_id, policy). Fails if one is there twice."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for data in whole_lines(out).values():
        for line in data.splitlines():
            row = json.loads(line)
            key = (row["row_id"], row["policy"])
            assert key not in rows, f"{key} was counted twice"
            rows[key] = row
    return rows


def table_of(out: Path) -> dict[str, Any]:
    """Return the result of a run without what differs from run to run: times."""
    result = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    return {"rows": [_timeless(row) for row in result["rows"]], "paired": result["paired"]}


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("wall_")}


@dataclass(frozen=True)
class Resumed:
    """What became of a run that was killed several times."""

    kills: int
    """How often it was still running when it was killed."""
    is_prefix_kept: bool
    """Whether every line written before a kill stands unchanged at the end."""
    ran: subprocess.CompletedProcess[str]


def kill_and_resume(arguments: Sequence[str], out: Path, moments: Sequence[Callable[[], bool]], log: Path) -> Resumed:
    """Start a run, kill it at each of the moments, resuming in between, and let it end."""
    snapshots: list[dict[str, bytes]] = []
    kills = 0
    for moment in moments:
        kills += run_and_kill([*arguments, "--resume"], moment, log)
        snapshots.append(whole_lines(out) if (out / "answers").is_dir() else {})
    ran = run([*arguments, "--resume"])
    final = whole_lines(out) if ran.returncode == 0 else {}
    kept = all(final.get(name, b"").startswith(data) for snapshot in snapshots for name, data in snapshot.items())
    return Resumed(kills=kills, is_prefix_kept=kept, ran=ran)


def after(seconds: float) -> Callable[[], bool]:
    """Return a moment: so many seconds after it is first asked for."""
    started: list[float] = []

    def is_time() -> bool:
        if not started:
            started.append(time.monotonic())
        return time.monotonic() - started[0] >= seconds

    return is_time


def once_answered(out: Path, rows: int) -> Callable[[], bool]:
    """Return a moment: when so many rows have been answered."""
    return lambda: num_answers(out) >= rows
