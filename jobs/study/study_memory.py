"""Endpoint 3 of the study: what the gate's hidden state is worth on `relay`, and what it costs where nothing is to be kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from study_runs import HOME, POOL, Study, Values, collected, evaluated, gate, not_worse, pool, rollouts, spread

from dmoa.errors import DmoaError
from dmoa.evaluation.run_folder import RunFolder
from dmoa.evaluation.statistics import compare_crossed
from dmoa.training.rollouts import read_table
from dmoa.workflows.collect import read_labels

MEMORY_EPOCHS = 60
"""A memory takes more passes than a lookup: fixed beforehand, for both arms alike."""
KEPT, RESET = "default", "no-memory"
ARMS = (KEPT, RESET)
INFORMATIVE = 0.1
"""Accuracy above which a control can show a loss of two points."""
AT_ONCE = 4
"""Difficulty of `relay` at which agents see the card that the gate reads."""
VERSION_CHARS = 12


def memory(study: Study) -> dict[str, Any]:
    """Return endpoint 3, all suites together: its p is the largest of theirs. What is not informative counts for nothing."""
    parts = {"relay": relay(study), "at once": control(study, "relay", study.relay_test, AT_ONCE)}
    parts["chain"] = control(study, "chain", study.chain_test)
    counted = [part for part in parts.values() if part.get("informative", True)]
    return {
        **parts,
        "p": max(part["p"] for part in counted),
        "p_of": "the largest p of those that are informative",
        "passed": all(part["passed"] for part in counted),
    }


def relay(study: Study) -> dict[str, Any]:
    """Return the share of scored cards whose most probable agent is at home, with and without the hidden state."""
    trained = _trained(study, "relay")
    hits = {arm: np.stack([_relay_hits(study, seed, arm, *trained[arm][seed]) for seed in range(study.seeds)]) for arm in ARMS}
    return judge_relay(hits[KEPT], hits[RESET])


def judge_relay(kept_GR: Values, reset_GR: Values) -> dict[str, Any]:
    """Judge whether cards were sent home, [G, scored cards] with the hidden state and without it."""
    kept, reset = spread(kept_GR), spread(reset_GR)
    compared = compare_crossed((kept_GR * 1.0 - reset_GR)[None])
    return {
        "kept": kept["value"],
        "reset": reset["value"],
        "by_seed": {KEPT: kept_GR.mean(axis=1).tolist(), RESET: reset_GR.mean(axis=1).tolist()},
        "cards": kept_GR.shape[1],
        "difference": compared.difference,
        "low": compared.low,
        "high": compared.high,
        "p": compared.p,
        "p_of": "share with the state less share without, against 0",
        "intervals": {"kept": kept, "reset": reset},
        "passed": kept["value"] >= 0.95 and abs(reset["value"] - 1 / 3) <= 0.05,
    }


def _trained(study: Study, suite: str, difficulty: int = 1) -> dict[str, list[tuple[Path, str]]]:
    """Train both arms on a suite and return, by arm and seed, the checkpoint's folder and the gate's version."""
    options = {**study.train, "epochs": MEMORY_EPOCHS, "patience": MEMORY_EPOCHS}
    found: dict[str, list[tuple[Path, str]]] = {arm: [] for arm in ARMS}
    for seed in range(study.seeds):
        source = rollouts(study, POOL, seed, suites=(suite,), difficulty=difficulty)
        for arm in ARMS:
            folder, _, record = gate(study, seed, arm, source, options)
            found[arm].append((folder, record.version))
    return found


def _relay_hits(study: Study, seed: int, arm: str, trained: Path, version: str) -> Values:
    """Run test rows of `relay` with a gate and return, card by scored card, whether it was sent home."""
    name = f"{arm}-{seed}-{version[:VERSION_CHARS]}"
    out, labels = study.out / "relay-test" / name, study.out / "labels" / "relay-test" / name
    config = pool(POOL).changed("gate", checkpoint=str(trained))
    # epsilon: next to nobody is asked only to learn from.
    asked = {"benchmarks": "relay", "split": "test", "limit": study.relay_test, "seed": study.seed, "epsilon": 1e-9}
    collected(study, out, config, {**asked, "labels": labels})
    gold = {label.row_id: label.gold["suites"] for label in read_labels(labels)}
    first: dict[tuple[str, int], tuple[float, str]] = {}
    for row in read_table(out).select(("query_id", "step", "agent", "probability")).to_pylist():
        key = row["query_id"], row["step"]
        first[key] = max(first.get(key, (-1.0, "")), (row["probability"], row["agent"]))
    scored = [(query, step, suite) for query in sorted(gold) for step, suite in enumerate(gold[query]) if suite is not None]
    missing = {query for query, step, _ in scored if (query, step) not in first}
    if missing:
        raise DmoaError(f"relay: {len(missing)} of {len(gold)} rows in {str(out)!r} lack a scored step; run the command again")
    return np.array([first[query, step][1] in HOME[suite] for query, step, suite in scored])


def control(study: Study, suite: str, rows: int, difficulty: int = 1) -> dict[str, Any]:
    """Return the accuracy on a suite that asks for no memory with the hidden state and without it, on the same rows."""
    trained = _trained(study, suite, difficulty)
    gates = {f"{arm}-{seed}": trained[arm][seed] for seed in range(study.seeds) for arm in ARMS}
    versions = hashlib.sha256(" ".join(version for _, version in gates.values()).encode()).hexdigest()
    values = {
        "benchmarks": suite,
        "difficulty": difficulty,
        "policies": [f"dmoa:{name}" for name in gates],
        "gates": {name: folder for name, (folder, _) in gates.items()},
        "limit": rows,
    }
    folder = evaluated(study, study.out / f"{suite}-test" / versions[:VERSION_CHARS], pool(POOL), values)
    by_arm = {arm: np.stack([_values(folder, suite, f"dmoa:{arm}-{seed}") for seed in range(study.seeds)]) for arm in ARMS}
    return judge_control(by_arm[KEPT], by_arm[RESET])


def judge_control(kept_GR: Values, reset_GR: Values) -> dict[str, Any]:
    """Judge scores [G, R] with the hidden state and without it; at the floor, a pass says nothing."""
    kept, reset = float(kept_GR.mean()), float(reset_GR.mean())
    informative = max(kept, reset) > INFORMATIVE
    return {
        "kept": kept,
        "reset": reset,
        "rows": kept_GR.shape[1],
        "rows_right": {KEPT: kept_GR.sum(axis=1).tolist(), RESET: reset_GR.sum(axis=1).tolist()},
        "discordant_rows": (kept_GR != reset_GR).sum(axis=1).tolist(),
        "informative": informative,
        "reading": f"{'' if informative else 'not '}informative: one must be right on more than {INFORMATIVE:.0%} of the rows",
        **not_worse(kept_GR - reset_GR),
    }


def _values(folder: RunFolder, suite: str, policy: str) -> Values:
    scores = {row.row_id: row.value for row in folder.read_scores(suite, policy)}
    return np.array([scores[task.row_id] for task in folder.read_tasks(suite)])
