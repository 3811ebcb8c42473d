"""Attacks on learning while serving: what fourteen of them do to a gate that learns guarded, unguarded, and not at all.

A pool whose truth is known, in process (`tests/streams`); the guarded arm is the long-lived job's intake and update, without the
router's guards, which would refuse more. Judged: on clean held-out rows the guarded gate is at most 3 points below the frozen
one, in the mean of three seeds and by no more than 5 in any. What the unguarded one does stands beside it, unjudged; one number
of it shows that the attacks bite.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check
from tests.attacks import ATTACKS, attacked

SEEDS = (0, 1, 2)
BAR, BAR_OF_ONE = 0.03, 0.05
"""Points of accuracy, as shares."""


def check(options: Namespace) -> dict[str, Any]:
    """Run all attacks, and print how each ends."""
    rows = []
    for attack in ATTACKS:
        results = [attacked(attack, seed) for seed in SEEDS]
        arms = {name: [getattr(one, name) for one in results] for name in ("frozen", "guarded", "unguarded")}
        falls = np.subtract(arms["frozen"], arms["guarded"])
        row = {
            "attack": attack.name,
            **{name: {"mean": float(np.mean(values)), "seeds": values} for name, values in arms.items()},
            "falls": float(falls.mean()),
            "passed": bool(falls.mean() <= BAR and falls.max() <= BAR_OF_ONE),
            "guards_said": results[0].said,
        }
        rows.append(row)
        means = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in arms.items())
        print(f"{'passed' if row['passed'] else 'FAILED'}  {attack.name}: {means}", flush=True)
    worst = max(float(np.mean(row["frozen"]["seeds"]) - np.mean(row["unguarded"]["seeds"])) for row in rows)
    passed = all(row["passed"] for row in rows) and worst > 10 * BAR
    return {"passed": passed, "bar": BAR, "seeds": SEEDS, "rows": rows, "worst_unguarded": worst}


if __name__ == "__main__":
    raise SystemExit(run_check(check))
