"""Endpoint 3 of the study: does the hidden state remember (`relay`), and does it do no harm where it cannot help (`chain`)?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from study_endpoints import HOME
from study_material import MATRIX_SEED, POOL, Study, gate, pool, rollouts

from dmoa import checkpoint
from dmoa.cli.evaluation_session import run_evaluation
from dmoa.cli.rollout_queries import read_labels
from dmoa.cli.rollout_session import run_rollouts
from dmoa.config import Config
from dmoa.evaluation import options as evaluate_options
from dmoa.evaluation.hierarchical import hierarchical_bootstrap
from dmoa.evaluation.run_files import RunFolder
from dmoa.training import rollout_options
from dmoa.training.rollouts import read_manifest, read_table

KEPT, RESET = "default", "no-memory"
EPOCHS = 60
"""A memory takes more passes than a lookup: fixed beforehand, for both arms alike."""


def relay(study: Study, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the share of scored cards whose most probable agent is at home, with and without the hidden state."""
    settings = {**chosen, "epochs": EPOCHS, "patience": EPOCHS}
    shares: dict[str, list[float]] = {KEPT: [], RESET: []}
    for seed in range(study.seeds):
        source = rollouts(study, POOL, seed, suites=("relay",), queries=study.relay_queries)
        for name, found in shares.items():
            found.append(_relay_share(study, seed, name, _saved(study, seed, name, source, settings)))
    kept, reset = float(np.mean(shares[KEPT])), float(np.mean(shares[RESET]))
    return {
        "kept": kept,
        "reset": reset,
        "by_seed": shares,
        "settings": settings,
        "passed": kept >= 0.95 and abs(reset - 1 / 3) <= 0.05,
    }


def _saved(study: Study, seed: int, name: str, source: Path, settings: Mapping[str, Any]) -> Path:
    """Train a gate and return a folder with its checkpoint."""
    trained, record = gate(study, POOL, seed, name, source, settings)
    return checkpoint.save(study.out / "memory" / source.name / name, trained, record)


def _with_gate(folder: Path) -> Config:
    config = pool(POOL)
    return config.model_copy(update={"gate": config.gate.model_copy(update={"checkpoint": str(folder)})})


def _relay_share(study: Study, seed: int, name: str, trained: Path) -> float:
    """Run test rows of `relay` with a gate and return the share of scored steps that it sends home."""
    out, labels = study.out / "relay-test" / f"{name}-{seed}", study.out / "labels" / "relay-test" / f"{name}-{seed}"
    if not out.exists() or read_manifest(out).ended_unix_s is None:
        options = rollout_options.parse_options(
            {
                "benchmarks": "relay",
                "split": "test",
                "limit": study.relay_test,
                "seed": MATRIX_SEED,
                "out": out,
                "labels": labels,
                "epsilon": 1e-9,
                "call_cache": study.calls,
                "workers": study.workers,
                "track": "none",
            }
        )
        run_rollouts(options, _with_gate(trained), study.common, "jobs/study_gate.py")
    gold = {label.row_id: label.gold["suites"] for label in read_labels(labels)}
    first: dict[tuple[str, int], tuple[float, str]] = {}
    for row in read_table(out).select(("query_id", "step", "agent", "probability")).to_pylist():
        key = row["query_id"], row["step"]
        first[key] = max(first.get(key, (-1.0, "")), (row["probability"], row["agent"]))
    scored = [(gold[query][step], agent) for (query, step), (_, agent) in first.items() if gold[query][step] is not None]
    return float(np.mean([agent in HOME[suite] for suite, agent in scored]))


def chain(study: Study, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracy on `chain` with the hidden state and without it, on the same rows."""
    names = [f"{arm}-{seed}" for seed in range(study.seeds) for arm in (KEPT, RESET)]
    gates = {}
    for seed in range(study.seeds):
        source = rollouts(study, POOL, seed, suites=("chain",), queries=study.relay_queries)
        for arm in (KEPT, RESET):
            gates[f"{arm}-{seed}"] = _saved(study, seed, arm, source, {**chosen, "epochs": EPOCHS, "patience": EPOCHS})
    out = study.out / "chain-test"
    options = evaluate_options.parse_options(
        {
            "benchmarks": "chain",
            "policies": [f"dmoa:{name}" for name in names],
            "gates": gates,
            "limit": study.relay_test,
            "seed": MATRIX_SEED,
            "out": out,
            "resume": (out / "run.json").exists(),
            "call_cache": study.calls,
            "workers": study.workers,
            "track": "none",
        }
    )
    run_evaluation(options, pool(POOL), study.common, "jobs/study_gate.py", shows_result=False)
    values = {name: _values(RunFolder(out), f"dmoa:{name}") for name in names}
    difference_GR = np.stack([values[f"{KEPT}-{seed}"] - values[f"{RESET}-{seed}"] for seed in range(study.seeds)])
    compared = hierarchical_bootstrap(difference_GR[None])
    return {
        "kept": float(np.mean([values[f"{KEPT}-{seed}"].mean() for seed in range(study.seeds)])),
        "reset": float(np.mean([values[f"{RESET}-{seed}"].mean() for seed in range(study.seeds)])),
        "difference": compared.difference,
        "low": compared.low,
        "high": compared.high,
        "p": compared.p,
        "passed": compared.low >= -0.02,
    }


def _values(folder: RunFolder, policy: str) -> np.ndarray[Any, Any]:
    scores = {row.row_id: row.value for row in folder.read_scores("chain", policy)}
    return np.array([scores[task.row_id] for task in folder.read_tasks("chain")])
