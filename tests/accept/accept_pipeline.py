"""Evaluation and rollouts keep an engine as full as P5 and P13 ask: `dmoa bench --only P5,P13`, as a user runs it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RATIOS = ("P5", "P5.8", "P5.16", "P5.32", "P13", "P13.dense", "P13.epsilon")


def main() -> int:
    """Run the bench; the exit status is 1 if a ratio is missing or misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=None)
    options = parser.parse_args()
    dmoa = Path(sys.executable).with_name("dmoa")
    rounds = ["--rounds", str(options.rounds)] if options.rounds else []
    done = subprocess.run([str(dmoa), "bench", "--only", "P5,P13", "--json", str(options.json), *rounds], check=False)
    if not options.json.exists():
        return 1
    results = {result["id"]: result for result in json.loads(options.json.read_text(encoding="utf-8"))["results"]}
    missed = [name for name in RATIOS if name not in results or not results[name]["passed"]]
    for name in missed:
        print(f"{name}: {results[name]['value'] if name in results else 'not measured'}")
    return 1 if missed or done.returncode else 0


if __name__ == "__main__":
    raise SystemExit(main())
