"""Scorers, rows and sandbox agree on every row: `dmoa evaluate --selfcheck` over the real rows, judged from its JSON.

Right answers score 1.0 on every row (DS-1000: or are unscored, listed with library and version, because the reference
fails with the installed one), empty and refused replies exactly 0, answers dealt out among rows are right by chance alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import DMOA, ROWS, run_check

BENCHMARKS = {"mmlu", "gsm8k", "multiarith", "svamp", "aqua_rat", "humaneval", "ds1000", "hotpotqa", "ddxplus"}
SUITES = {"arith", "words", "calendar", "parcels", "signals", "dyes", "shared", "chain", "relay"}
MAX_UNSCORED_SHARE = 0.25
"""More references than these failing is no matter of library versions."""


def faults_of(check: dict[str, Any]) -> list[str]:
    """Return what is wrong with one benchmark's part of the JSON."""
    name, faults = check["name"], []
    for gold in check["gold"]:
        if gold["num_right"] + gold["num_unscored"] != gold["num_rows"] or not gold["num_rows"]:
            faults.append(f"{name}: {gold['num_right']} of {gold['num_rows']} right answers score 1.0 ({gold['measure']})")
        if gold["num_unscored"] > (MAX_UNSCORED_SHARE * gold["num_rows"] if name == "ds1000" else 0):
            faults.append(f"{name}: {gold['num_unscored']} of {gold['num_rows']} right answers are unscored")
    if len(check["unscored"]) != sum(gold["num_unscored"] for gold in check["gold"]):
        faults.append(f"{name}: not every unscored row is listed")
    faults += [
        f"{name}: {row['row_id']} has no version" for row in check["unscored"] if not row["version"] and not _is_missing(row)
    ]
    if check["silent"]["num_above_zero"] or not check["silent"]["num_replies"]:
        faults.append(f"{name}: {check['silent']['num_above_zero']} empty or refused replies score above 0")
    dealt = check["dealt"]
    if abs(dealt["accuracy"] - dealt["expected"]) > dealt["tolerance"]:
        faults.append(f"{name}: answers dealt out score {dealt['accuracy']:.4f}, {dealt['expected']:.4f} is chance")
    return faults


def _is_missing(row: dict[str, Any]) -> bool:
    return bool(row["reason"].startswith("no library"))


def check(options: Namespace) -> dict[str, Any]:
    """Run the self-check and judge it; a machine without the rows is told so and fails."""
    if not ROWS.is_dir():
        return {"passed": False, "reason": f"no rows at {ROWS}; set DMOA_BENCHMARK_ROWS"}
    target = options.json.with_suffix(".selfcheck.json")
    command = [DMOA, "evaluate", "--selfcheck", "--benchmarks", "all,suites", "--data-dir", str(ROWS), "--json", str(target)]
    status = subprocess.run(command, check=False).returncode
    found = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"benchmarks": []}
    checks = {one["name"]: one for one in found["benchmarks"]}
    faults = [fault for one in checks.values() for fault in faults_of(one)]
    faults += [f"{name} was not checked" for name in sorted((BENCHMARKS | SUITES) - checks.keys())]
    unscored = Counter(f"{row['group']} {row['version'] or 'missing'}" for one in checks.values() for row in one["unscored"])
    return {
        "passed": status == 0 and not faults,
        "exit_status": status,
        "faults": faults,
        "rows": {name: sum(one["rows"].values()) for name, one in checks.items()},
        "seconds": {name: one["wall_s"] for name, one in checks.items()},
        "dealt": {name: one["dealt"] for name, one in checks.items()},
        "ds1000_unscored_by_library": unscored,
    }


if __name__ == "__main__":
    raise SystemExit(run_check(check))
