"""An evaluation that is killed (SIGKILL) five times at random moments, on scripted agents and on the embedded model.

Judged: no row is lost or counted twice, what was written before a kill stands, the table of the scripted run equals that of
an unbroken one, and at least 99 % of the embedded model's replies do. The scripted agents' numbers mean nothing else.
"""

from __future__ import annotations

import random
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check
from tests.integration.evaluations import after, command, kill_and_resume, rows_of, run, scripted_pool, table_of

KILLS = 5
EQUAL_BAR = 0.99


@dataclass(frozen=True, slots=True)
class Check:
    """What became of one broken run beside an unbroken one."""

    rows: int
    kills: int
    """How often the run was under way when it was killed."""
    lost: int
    """Rows of the unbroken run that the broken one lacks."""
    is_prefix_kept: bool
    equal_replies: float
    is_table_equal: bool
    seconds_unbroken: float


def resumed(folder: Path, options: list[str], seed: int) -> Check:
    """Run an evaluation whole, then broken: each kill falls anywhere in the first third of the time that the whole one took.

    So early that every session still has work left when it is killed.
    """
    started = time.monotonic()
    whole = run(command(folder / "whole", *options))
    seconds = time.monotonic() - started
    assert whole.returncode == 0, whole.stderr[-3000:]
    rng = random.Random(seed)
    moments = [after(rng.uniform(0.0, seconds / 3)) for _ in range(KILLS)]
    out = folder / "broken"
    broken = kill_and_resume(command(out, *options), out, moments, folder / "log")
    assert broken.ran.returncode == 0, broken.ran.stderr[-3000:]
    expected, found = rows_of(folder / "whole"), rows_of(out)
    same = sum(row["text"] == found.get(key, {}).get("text") for key, row in expected.items())
    return Check(
        rows=len(expected),
        kills=broken.kills,
        lost=len(expected.keys() - found.keys()),
        is_prefix_kept=broken.is_prefix_kept,
        equal_replies=same / len(expected),
        is_table_equal=table_of(out) == table_of(folder / "whole"),
        seconds_unbroken=seconds,
    )


def check(options: Namespace) -> dict[str, Any]:
    """Check both kinds of agents."""
    policies = ["--policies", "dmoa,single"]
    folders = {name: options.scratch / name for name in ("scripted", "real")}
    for folder in folders.values():
        folder.mkdir()
    pool = str(scripted_pool(options.scratch))
    flags = ["--config", pool, "--benchmarks", "arith,calendar,words", "--limit", "300", "--concurrency", "6", *policies]
    scripted = resumed(folders["scripted"], flags, options.seed)
    flags = ["--benchmarks", "arith,calendar", "--limit", "12", "--budget", "cpu", *policies]
    real = resumed(folders["real"], flags, options.seed + 1)
    passed = (
        all(one.lost == 0 and one.is_prefix_kept for one in (scripted, real))
        and scripted.is_table_equal
        and real.equal_replies >= EQUAL_BAR
    )
    return {"scripted": asdict(scripted), "embedded": asdict(real), "equal_bar": EQUAL_BAR, "passed": passed}


if __name__ == "__main__":
    raise SystemExit(run_check(check, {"--seed": {"type": int, "default": 1}}))
