"""Evaluation and rollouts keep an engine as full as P5 and P13 ask: `dmoa bench --only P5,P13`, as a user runs it."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import bench, run_check

RATIOS = ("P5", "P5.8", "P5.16", "P5.32", "P13", "P13.dense", "P13.epsilon")


def check(options: Namespace) -> dict[str, Any]:
    """Run the bench; judge the ratios."""
    found = bench(options, "P5,P13", *(["--rounds", str(options.rounds)] if options.rounds else []))
    results = {result["id"]: result for result in found.get("results", [])}
    missed = [name for name in RATIOS if name not in results or not results[name]["passed"]]
    return found | {"missed": missed, "passed": found["passed"] and not missed}


if __name__ == "__main__":
    raise SystemExit(run_check(check, {"--rounds": {"type": int}}))
