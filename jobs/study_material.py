"""What agents are asked for in the study: answer matrices, embeddings of their rows, and rollouts; all of it resumable."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_endpoints import SINGLE
from study_settings import COMMAND, MATRIX_SEED, MATRIX_SUITES, POOL, ROLLOUT_SEED, Study, everyone, pool

from dmoa.agents.pool import build_encoder
from dmoa.config import Config
from dmoa.errors import DmoaError
from dmoa.evaluation import records as evaluate_options
from dmoa.evaluation.answer_matrix import AnswerMatrix, matrix_policies, read_matrix
from dmoa.evaluation.run_folder import RunFolder
from dmoa.training import options as rollout_options
from dmoa.training.rollouts import Manifest, read_manifest
from dmoa.workflows.collect import run_rollouts
from dmoa.workflows.evaluate import run_evaluation


def evaluated(study: Study, out: Path, config: Config, values: Mapping[str, Any]) -> RunFolder:
    """Run an evaluation, or go on with it; failed rows are run once more, and those that fail again are told."""
    shared = {"seed": MATRIX_SEED, "out": out, "call_cache": study.calls, "workers": study.workers, "track": "none"}

    def run(**more: Any) -> int:
        options = evaluate_options.EvaluateOptions.parse({**shared, **values, **more})
        return sum(row.failed for row in run_evaluation(options, config, study.common, COMMAND, shows_result=False).rows)

    if (out / "evaluation.json").exists():
        return RunFolder(out)
    if run(resume=(out / "run.json").exists()) and (left := run(resume=True, retry_failed=True)):
        study.common.say(f"{left} rows of {out} failed twice and count as answers of nothing")
    return RunFolder(out)


def matrices(study: Study, split: str) -> dict[str, AnswerMatrix]:
    """Answer all rows of a split with every agent alone, or go on, and return the matrices by suite."""
    config = everyone()
    values = {
        "benchmarks": MATRIX_SUITES,
        "policies": matrix_policies(config.agent_names),
        "split": split,
        "limit": study.test_rows if split == "test" else study.validation_rows,
    }
    folder = evaluated(study, study.out / split, config, values)
    return {name: read_matrix(folder, name, config.agent_names) for name in MATRIX_SUITES}


def answered(study: Study, out: str, config: Config, suites: Sequence[str], *, rows: int, seed: int) -> dict[str, AnswerMatrix]:
    """Answer test rows of a later test with every agent of a pool alone, or go on, and return the matrices by suite."""
    policies = matrix_policies(config.agent_names)
    values = {"benchmarks": suites, "policies": policies, "split": "test", "limit": rows, "seed": seed}
    folder = evaluated(study, study.out / out, config, values)
    return {name: read_matrix(folder, name, config.agent_names) for name in suites}


def blank_replies(found: Mapping[str, AnswerMatrix]) -> dict[str, int]:
    """Return per agent how many replies hold no text, over all suites."""
    agents = next(iter(found.values())).agents
    rows = [row for matrix in found.values() for row in matrix.replies]
    return {agent: sum(not row[index].text.strip() for row in rows) for index, agent in enumerate(agents)}


def embeddings(study: Study, split: str, found: Mapping[str, AnswerMatrix]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the embeddings of all rows by suite, computed once."""
    path = study.out / split / "embeddings.npz"
    if not path.exists():
        encoder = build_encoder(pool(POOL))
        arrays = {
            name: np.stack(list(asyncio.run(encoder.embed([task.text for task in matrix.tasks]))))
            for name, matrix in found.items()
        }
        with path.with_suffix(".part").open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        path.with_suffix(".part").replace(path)
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in found}


def rollouts(study: Study, name: str, seed: int, *, suites: Sequence[str] = SINGLE, queries: int | None = None) -> Path:
    """Collect dense rollouts of a pool, or take those that are there; their labels lie apart."""
    key = "-".join(suites) if tuple(suites) != SINGLE else "main"
    out = study.out / "rollouts" / name / f"{key}-{seed}"
    settled = out / "settled"  # gates are trained on it: nothing may be added any more
    if not settled.exists():
        values = {
            "benchmarks": ",".join(suites),
            "split": "gate",
            "limit": queries or study.queries,
            "seed": ROLLOUT_SEED + seed,
            "labels": study.out / "labels" / name / f"{key}-{seed}",
        }
        collected(study, out, pool(name), values)
        settled.touch()
    return out


def collected(study: Study, out: Path, config: Config, values: Mapping[str, Any]) -> Manifest:
    """Collect rollouts, or go on with them; failed queries are asked once more, and those that fail again are told."""
    shared = {"out": out, "call_cache": study.calls, "workers": study.workers, "track": "none"}
    options = rollout_options.RolloutOptions.parse({**shared, **values})
    manifest = run_rollouts(options, config, study.common, COMMAND)
    if manifest.counts.failed:
        try:
            run_rollouts(options, config, study.common, COMMAND)
        except DmoaError:
            # A collection that was ended anew asked all that was left, and all of it failed again.
            if read_manifest(out).ended_unix_s == manifest.ended_unix_s:
                raise
        manifest = read_manifest(out)
    if manifest.counts.failed:
        study.common.say(f"{manifest.counts.failed} queries of {out} failed twice and are left out")
    return manifest
