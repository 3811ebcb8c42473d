"""The gate's training by 0, 1, 2 and 4 workers, broken by three killed workers and a killed driver, and beside shuffled labels.

Judged: in float64 every number of workers gives the same weights within 1e-6 on the same global batches; the broken training
ends, and its curve equals that of an unbroken one from the first epoch to the last; labels beside the rollouts change no bit.
Made-up rollouts: what is learned from them says nothing about any model.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from dmoa.testing import domain_rows, write_rollouts
from dmoa.testing import scripted_pool as pool
from dmoa.testing import scripted_pool_yaml as pool_yaml
from tests.accept.checks import run_check
from tests.integration.trainings import command, curve, greatest_difference, num_epochs, run, start

WORKERS = (0, 1, 2, 4)
WEIGHTS_BAR = 1e-6
EPOCHS = 400
KILL_WORKER_AT = (0.1, 0.3, 0.5)
KILL_DRIVER_AT = 0.7
"""Shares of the epochs."""


def material(folder: Path) -> None:
    """Write a pool, rollouts of 80 queries of three steps, and labels beside them."""
    (folder / "pool.yaml").write_text(pool_yaml(), encoding="utf-8")
    write_rollouts(folder / "rollouts", domain_rows(80, steps=3), pool(), files=5)


def done(arguments: list[str]) -> float:
    """Run a command to its end, which must be a good one, and return its seconds."""
    started = time.monotonic()
    ran = run(arguments)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return time.monotonic() - started


def by_workers(folder: Path) -> dict[str, Any]:
    """Train by every number of workers, in float64, by the few-shot preset."""
    seconds = {n: done(command(folder, folder / f"w{n}", "--workers", str(n), "--dtype", "float64")) for n in WORKERS}
    pairs = {f"{a} and {b}": greatest_difference(folder / f"w{a}", folder / f"w{b}") for a, b in combinations(WORKERS, 2)}
    updates = {n: sum(epoch["updates"] for epoch in curve(folder / f"w{n}")) for n in WORKERS}
    return {
        "greatest_difference": pairs,
        "updates": updates,
        "seconds": {n: round(value, 1) for n, value in seconds.items()},
        "bar": WEIGHTS_BAR,
        "passed": max(pairs.values()) <= WEIGHTS_BAR and len(set(updates.values())) == 1,
    }


def broken(folder: Path) -> dict[str, Any]:
    """Train by two workers, unbroken and broken, and compare the curves."""
    options = ("--workers", "2", "--epochs", str(EPOCHS), "--patience", str(EPOCHS), "--seed", "3")
    done(command(folder, folder / "unbroken", *options))
    out, log = folder / "broken", folder / "log"
    arguments = command(folder, out, *options)
    running = start(arguments, out, log)
    workers_killed_after = []
    for share in KILL_WORKER_AT:
        running.wait_for(lambda share=share: num_epochs(out) >= share * EPOCHS)  # type: ignore[misc]
        workers_killed_after.append(running.kill_worker())
        kept = workers_killed_after[-1]
        running.wait_for(lambda kept=kept: num_epochs(out) >= kept + 2)  # type: ignore[misc]
    running.wait_for(lambda: num_epochs(out) >= KILL_DRIVER_AT * EPOCHS)
    running.kill()
    driver_killed_after = num_epochs(out)
    done(arguments)
    one, other = curve(folder / "unbroken"), curve(out)
    return {
        "epochs": EPOCHS,
        "workers_killed_after": workers_killed_after,
        "driver_killed_after": driver_killed_after,
        "is_curve_equal": one == other,
        "greatest_weight_difference": greatest_difference(folder / "unbroken", out),
        "passed": one == other and driver_killed_after < EPOCHS and max(workers_killed_after) < driver_killed_after,
    }


def labels(folder: Path) -> dict[str, Any]:
    """Train twice, with right and with shuffled labels lying beside the rollouts and in a folder of their own."""
    queries = sorted({row["query_id"] for row in domain_rows(80, steps=3)})
    order = np.random.default_rng(0).permutation(len(queries))
    versions = []
    for name, dealt in (("right", queries), ("shuffled", [queries[i] for i in order])):
        lines = "\n".join(json.dumps({"query_id": query, "label": label}) for query, label in zip(queries, dealt, strict=True))
        for place in (folder / "rollouts" / "labels.jsonl", folder / "labels" / "made-up.jsonl"):
            place.parent.mkdir(exist_ok=True)
            place.write_text(lines, encoding="utf-8")
        done(command(folder, folder / f"labels-{name}", "--workers", "0"))
        versions.append(json.loads((folder / f"labels-{name}" / "train.json").read_text(encoding="utf-8"))["version"])
    return {"versions": versions, "passed": versions[0] == versions[1]}


def check(options: Namespace) -> dict[str, Any]:
    """Run the three checks."""
    checks = {"workers": by_workers, "broken": broken, "labels": labels}
    material(options.scratch)
    found = {name: run_it(options.scratch) for name, run_it in checks.items() if options.only in (None, name)}
    return {**found, "passed": all(one["passed"] for one in found.values())}


if __name__ == "__main__":
    raise SystemExit(run_check(check, {"--only": {"choices": ("workers", "broken", "labels")}}))
