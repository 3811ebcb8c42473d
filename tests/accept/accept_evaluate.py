"""All nine benchmarks and the suites on the embedded model, within an hour on two cores: the run, its table, its report.

Needs the folder of benchmark rows (`DMOA_BENCHMARK_ROWS`, else `shared/benchmarks` beside the repository).
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import ROWS, run_check
from tests.integration.evaluations import command, run

LIMIT_S = 3600.0
LIMIT = 8
BENCHMARKS, POLICIES = 15, 2


def check(options: Namespace) -> dict[str, Any]:
    """Run the evaluation of the issue and judge what it leaves."""
    if not ROWS.is_dir():
        return {"passed": True, "skipped": "benchmark rows are not part of a clone"}
    out = options.out or options.scratch / "run"
    flags = ["--benchmarks", "all,suites", "--policies", "dmoa,single", "--data-dir", str(ROWS), "--limit", str(LIMIT)]
    started = time.monotonic()
    done = run([*command(out, *flags), "--budget", "cpu"])
    seconds = time.monotonic() - started
    print(done.stdout[-6000:], done.stderr[-3000:])
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8")) if done.returncode == 0 else {"rows": []}
    report = (out / "report.html").read_text(encoding="utf-8") if done.returncode == 0 else ""
    rows = evaluation["rows"]
    result = {
        "seconds": round(seconds, 1),
        "limit_s": LIMIT_S,
        "rows": rows,
        "failed": sum(row["failed"] for row in rows),
        "report_bytes": len(report),
        "report_plots": report.count("<svg"),
    }
    result["passed"] = (
        done.returncode == 0
        and seconds <= LIMIT_S
        and len(rows) == BENCHMARKS * POLICIES
        and all(row["n"] == LIMIT for row in rows)
        and result["failed"] == 0
        and result["report_plots"] > 0
    )
    return result


if __name__ == "__main__":
    raise SystemExit(run_check(check, {"--out": {"type": Path, "help": "keep the run in this folder"}}))
