"""Scorers, rows and sandbox agree on every row: `dmoa evaluate --selfcheck` over the real rows, judged from its JSON.

Right answers score 1.0 on every row (DS-1000: or are unscored, listed with library and version, because the reference
fails with the installed one), empty and refused replies exactly 0, answers dealt out among rows are right by chance alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
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


def main() -> int:
    """Run the self-check and judge it; a machine without the rows is told so and fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows = Path(os.environ.get("DMOA_BENCHMARK_ROWS", ROOT.parent / "shared" / "benchmarks"))
    if not rows.is_dir():
        options.json.write_text(json.dumps({"passed": False, "reason": f"no rows at {rows}; set DMOA_BENCHMARK_ROWS"}) + "\n")
        print(f"no rows at {rows}; set DMOA_BENCHMARK_ROWS")
        return 1
    dmoa = str(Path(sys.executable).with_name("dmoa"))
    target = options.json.with_suffix(".selfcheck.json")
    command = [dmoa, "evaluate", "--selfcheck", "--benchmarks", "all,suites", "--data-dir", str(rows), "--json", str(target)]
    status = subprocess.run(command, check=False).returncode
    found = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"benchmarks": []}
    checks = {check["name"]: check for check in found["benchmarks"]}
    faults = [fault for check in checks.values() for fault in faults_of(check)]
    faults += [f"{name} was not checked" for name in sorted((BENCHMARKS | SUITES) - checks.keys())]
    unscored: dict[str, int] = {}
    for row in [row for check in checks.values() for row in check["unscored"]]:
        library = f"{row['group']} {row['version'] or 'missing'}"
        unscored[library] = unscored.get(library, 0) + 1
    result = {
        "passed": status == 0 and not faults,
        "exit_status": status,
        "faults": faults,
        "rows": {name: sum(check["rows"].values()) for name, check in checks.items()},
        "seconds": {name: check["wall_s"] for name, check in checks.items()},
        "dealt": {name: check["dealt"] for name, check in checks.items()},
        "ds1000_unscored_by_library": unscored,
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(*faults, sep="\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
