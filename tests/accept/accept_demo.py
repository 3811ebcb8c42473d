"""The demo, as a newcomer runs it: the whole story within twelve minutes, with traces that replay and a gate that learned.

One untrained gate is a single draw of random weights: how the trained one stands to the mean of twenty, first steps both, is
written down beside what is judged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_S = 720.0
UNTRAINED = "untrained gates, first step (mean of 20)"


def main() -> int:
    """Run `dmoa demo` and read what it left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    dmoa = str(Path(sys.executable).with_name("dmoa"))
    with tempfile.TemporaryDirectory() as out:
        started = time.monotonic()
        result_path = Path(out) / "demo.json"
        command = [dmoa, "demo", "--out", out, "--json", str(result_path)]
        demo = subprocess.run(command, check=False, capture_output=True, text=True)
        seconds = time.monotonic() - started
        found = json.loads(result_path.read_text(encoding="utf-8")) if result_path.exists() else {"comparison": []}
        wandb = list((Path(out) / "gate" / "wandb").glob("offline-run-*"))
        report = Path(out) / "evaluation" / "report.html"
        is_whole = report.exists() and bool(wandb)
    accuracy = {row["name"]: row["accuracy"] or 0.0 for row in found["comparison"]}
    gained = accuracy.get("trained gate", 0.0) - accuracy.get("untrained gate", 0.0)
    gained_over_mean = accuracy.get("trained gate, first step", 0.0) - accuracy.get(UNTRAINED, 1.0)
    passed = demo.returncode == 0 and seconds <= LIMIT_S and is_whole and gained > 0
    result = {
        "seconds": seconds,
        "limit_s": LIMIT_S,
        "accuracy": accuracy,
        "gained_over_untrained": gained,
        "gained_over_the_mean_untrained_one": gained_over_mean,
        "has_report_and_wandb_run": is_whole,
        "passed": passed,
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not passed:
        print(demo.stdout[-3000:], demo.stderr[-3000:], sep="\n")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
