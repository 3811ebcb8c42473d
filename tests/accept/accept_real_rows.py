"""Rollouts, probe and training on real rows of GSM8K, MMLU and HumanEval, on the embedded model: the machinery, end to end.

What a model of 135M parameters can show here is little, and the report says so: its agents differ by role prompt alone, so the
probe must answer that entropy cannot route them. Needs the folder of benchmark rows (`DMOA_BENCHMARK_ROWS`, else
`shared/benchmarks` beside the repository).
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

from dmoa import checkpoint
from tests.integration.evaluations import DMOA, run

QUERIES = 24


def main() -> int:
    """Collect, probe and train; judge that each part says what it can."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    data = Path(os.environ.get("DMOA_BENCHMARK_ROWS", Path(__file__).parents[3] / "shared" / "benchmarks"))
    if not data.is_dir():
        arguments.json.write_text(json.dumps({"passed": True, "skipped": "benchmark rows are not part of a clone"}) + "\n")
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        out, found = Path(name), Path(name) / "probe.json"
        collect = ["rollouts", "--benchmarks", "gsm8k,mmlu,humaneval", "--data-dir", str(data), "--limit", str(QUERIES)]
        collect += ["--max-steps", "2", "--max-tokens", "48", "--out", str(out / "rollouts"), "--track", "none"]
        look = ["probe", "--rollouts", str(out / "rollouts"), "--json", str(found)]
        train = ["train", "--rollouts", str(out / "rollouts"), "--out", str(out / "gate"), "--track", "jsonl"]
        statuses, texts = {}, []
        for command in (collect, look, train):
            ran = run([DMOA, *command])
            statuses[command[0]] = ran.returncode
            texts += [ran.stdout[-4000:], ran.stderr[-2000:]]
        report = json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}
        record = checkpoint.load(out / "gate" / "checkpoint")[1] if (out / "gate" / "checkpoint").is_dir() else None
    result = {
        "statuses": statuses,
        "verdict": report.get("verdict"),
        "reasons": report.get("reasons"),
        "shares": {key: report.get(key) for key in ("row_share", "agent_share", "interaction_share", "interaction_low")},
        "metrics": record.metrics if record else None,
        "what_it_shows": "the machinery on real rows; agents that are roles of one small model, so nothing about quality",
        "seconds": time.monotonic() - started,
        "passed": not any(statuses.values()) and report.get("verdict") == "cannot" and record is not None,
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not result["passed"]:
        print(*texts, sep="\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
