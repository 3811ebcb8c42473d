"""The demo on five seeds, as a newcomer runs it: the story in four minutes and 120 lines, and a gate that learned what it should.

Each seed draws its own queries to learn from, questions and held-out rows. A seed passes where the demo ends with 0 and misses
none of its bars (`missed` in its JSON). Agents a step and share of tokens are bars of the study, in the mean over draws: so they
are here, and a seed that lies above them by itself says so (`above`).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check

SEEDS = range(5)
LIMIT_S = 240.0
"""After set-up, on two cores with nothing beside it."""
LIMIT_LINES = 120
"""Lines of stdout; progress, which a terminal shows in one line, goes to stderr."""
MEAN_BARS = {"agents": 1.3, "token_share": 0.2}
"""In the mean over seeds."""
IN_THE_MEAN = ("at most 1.3 agents", "at most 20 % of everybody's tokens")
"""How the demo names those bars where a run misses them."""


def run_demo(seed: int) -> dict[str, Any]:
    """Run `dmoa demo` with a seed and read what it left."""
    dmoa = str(Path(sys.executable).with_name("dmoa"))
    with tempfile.TemporaryDirectory() as out:
        result_path = Path(out) / "demo.json"
        started = time.monotonic()
        command = [dmoa, "demo", "--seed", str(seed), "--out", out, "--json", str(result_path)]
        demo = subprocess.run(command, check=False, capture_output=True, text=True)
        seconds = time.monotonic() - started
        found = json.loads(result_path.read_text(encoding="utf-8")) if result_path.exists() else {}
        wandb = list((Path(out) / "gate" / "wandb").glob("offline-run-*"))
        is_whole = (Path(out) / "evaluation" / "report.html").exists() and bool(wandb)
    lines = len(demo.stdout.splitlines())
    named = found.get("missed", ["no result"])
    missed = [one for one in named if not one.startswith(IN_THE_MEAN)]
    missed += [f"at most {LIMIT_S:.0f} s: {seconds:.0f}"] * (seconds > LIMIT_S)
    missed += [f"at most {LIMIT_LINES} lines: {lines}"] * (lines > LIMIT_LINES)
    missed += ["no library noise: Ray's words are on the terminal"] * ("(raylet)" in demo.stdout + demo.stderr)
    rows = {row["name"]: row for row in found.get("comparison", [])}
    own, dense = rows.get("trained gate", {}), rows.get("everybody once", {})
    seen = found.get("adaptation") or [{}]
    learnt, kept = (seen[-1].get(name, 0.0) - seen[0].get(name, 0.0) for name in ("skill", "others"))
    missed += [f"at least 50 points on the unseen skill: {100 * learnt:+.0f}"] * (learnt < 0.5)
    missed += [f"at most 10 points off the skills it knew: {100 * kept:+.0f}"] * (kept < -0.1)
    passed = demo.returncode == 0 and is_whole and not missed
    if not passed:
        print(demo.stdout[-3000:], demo.stderr[-1500:], sep="\n")
    return {
        "seed": seed,
        "status": demo.returncode,
        "seconds": seconds,
        "lines": lines,
        "accuracy": {name: row["accuracy"] for name, row in rows.items()},
        "agents": float(own.get("active", "nan")),
        "token_share": own.get("tokens_total", math.nan) / dense.get("tokens_total", math.nan),
        "unseen_skill_gained": learnt,
        "others_gained": kept,
        "above": [one for one in named if one.startswith(IN_THE_MEAN)],
        "has_report_and_wandb_run": is_whole,
        "missed": missed,
        "passed": passed,
    }


def check(options: Namespace) -> dict[str, Any]:
    """Run the demo on every seed."""
    runs = [run_demo(seed) for seed in SEEDS]
    mean = {name: sum(run[name] for run in runs) / len(runs) for name in MEAN_BARS}
    holds = all(mean[name] <= bar for name, bar in MEAN_BARS.items())
    return {"runs": runs, "mean": mean, "passed": holds and all(run["passed"] for run in runs)}


if __name__ == "__main__":
    raise SystemExit(run_check(check))
