"""Rollouts, probe and training on real rows of GSM8K, MMLU and HumanEval, on the embedded model: the machinery, end to end.

What a model of 135M parameters can show here is little, and the result says so, with what the trained gate, the untrained one and
the agents alone get right. Judged is that every part runs and says what it found; the verdict of the probe is reported. Needs
the folder of benchmark rows (`DMOA_BENCHMARK_ROWS`, else `shared/benchmarks` beside the repository).
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from dmoa import checkpoint
from tests.accept.checks import DMOA, ROWS, run_check
from tests.integration.evaluations import run

QUERIES = 24
TEST_ROWS = 8
BENCHMARKS = "gsm8k,mmlu,humaneval"

WHAT_IT_SHOWS = (
    "It shows that rollouts, probe, training and evaluation work on real rows, and that a gate learns who is sure (`pairwise`, "
    "on queries that were held back). It cannot show that routing by sureness gives better answers: the agents are roles of one "
    "model of 135M parameters, which hardly ever solves GSM8K or HumanEval, and guesses on MMLU, so no agent knows more than "
    "another. Differences between the accuracies are noise at so few rows."
)


def shown(evaluation: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the accuracies by benchmark and policy."""
    found: dict[str, dict[str, float]] = {}
    for row in evaluation["rows"]:
        found.setdefault(row["benchmark"], {})[row["policy"]] = row["accuracy"]
    return found


def check(options: Namespace) -> dict[str, Any]:
    """Collect, probe and train; judge that each part says what it can."""
    if not ROWS.is_dir():
        return {"passed": True, "skipped": "benchmark rows are not part of a clone"}
    started = time.monotonic()
    out, found, measured = options.scratch, options.scratch / "probe.json", options.scratch / "evaluation.json"
    collect = ["rollouts", "--benchmarks", BENCHMARKS, "--data-dir", str(ROWS), "--limit", str(QUERIES)]
    collect += ["--max-steps", "2", "--max-tokens", "48", "--out", str(out / "rollouts"), "--track", "none"]
    look = ["probe", "--rollouts", str(out / "rollouts"), "--json", str(found)]
    train = ["train", "--rollouts", str(out / "rollouts"), "--out", str(out / "gate"), "--track", "jsonl"]
    measure = ["evaluate", "--benchmarks", BENCHMARKS, "--data-dir", str(ROWS), "--limit", str(TEST_ROWS), "--budget", "cpu"]
    measure += ["--policies", "dmoa,dmoa:trained,single", "--gates", f"trained={out / 'gate' / 'checkpoint'}"]
    measure += ["--out", str(out / "evaluation"), "--track", "none", "--json", str(measured)]
    statuses = {}
    for command in (collect, look, train, measure):
        ran = run([DMOA, *command])
        statuses[command[0]] = ran.returncode
        if ran.returncode:
            print(ran.stdout[-4000:], ran.stderr[-2000:])
    report = json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}
    evaluation = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else {"rows": []}
    record = checkpoint.load(out / "gate" / "checkpoint")[1] if (out / "gate" / "checkpoint").is_dir() else None
    return {
        "statuses": statuses,
        "verdict": report.get("verdict"),
        "reasons": report.get("reasons"),
        "shares": {key: report.get(key) for key in ("row_share", "agent_share", "interaction_share", "interaction_low")},
        "metrics": record.metrics if record else None,
        "accuracy": shown(evaluation),
        "what_it_shows": WHAT_IT_SHOWS,
        "seconds": time.monotonic() - started,
        "passed": not any(statuses.values()) and bool(report.get("verdict")) and record is not None and bool(evaluation["rows"]),
    }


if __name__ == "__main__":
    raise SystemExit(run_check(check))
