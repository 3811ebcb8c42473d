"""All nine benchmarks and the suites on the embedded model, within an hour on two cores: the run, its table, its report.

Needs the folder of benchmark rows (`DMOA_BENCHMARK_ROWS`, else `shared/benchmarks` beside the repository).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.integration.evaluations import command, run

LIMIT_S = 3600.0
ROWS = 8
BENCHMARKS, POLICIES = 15, 2


def main() -> int:
    """Run the evaluation of the issue and judge what it leaves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=None, help="keep the run in this folder")
    arguments = parser.parse_args()
    data = Path(os.environ.get("DMOA_BENCHMARK_ROWS", Path(__file__).parents[3] / "shared" / "benchmarks"))
    if not data.is_dir():
        arguments.json.write_text(json.dumps({"passed": True, "skipped": "benchmark rows are not part of a clone"}) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as name:
        out = arguments.out or Path(name) / "run"
        options = ["--benchmarks", "all,suites", "--policies", "dmoa,single", "--data-dir", str(data), "--limit", str(ROWS)]
        started = time.monotonic()
        done = run([*command(out, *options), "--budget", "cpu"])
        seconds = time.monotonic() - started
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
        and all(row["n"] == ROWS for row in rows)
        and result["failed"] == 0
        and result["report_plots"] > 0
    )
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(done.stdout[-6000:])
    if not result["passed"]:
        print(done.stderr[-3000:])
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
