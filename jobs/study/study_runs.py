"""What the study asks and trains: its settings, the answer matrices, rollouts, gates, and the intervals of its endpoints.

Whatever is done is kept in the study's folder and found there again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmoa import checkpoint
from dmoa.agents.pool import build_encoder, load_pool
from dmoa.checkpoint import Checkpoint
from dmoa.config import Config
from dmoa.core.gate import Gate
from dmoa.errors import DmoaError
from dmoa.evaluation.answer_matrix import (
    AnswerMatrix,
    matrix_policies,
    read_matrix,
)
from dmoa.evaluation.records import EvaluateOptions
from dmoa.evaluation.registry import SKILLS
from dmoa.evaluation.run_folder import RunFolder
from dmoa.evaluation.statistics import Comparison, compare_crossed
from dmoa.training.ablations import train_ablation
from dmoa.training.cluster_router import KMeansRouter, fit_rival
from dmoa.training.options import RolloutOptions
from dmoa.training.rollouts import Manifest, read_manifest, read_table
from dmoa.training.trainer import TrainContext
from dmoa.workflows.collect import run_rollouts
from dmoa.workflows.console import Common
from dmoa.workflows.evaluate import run_evaluation

COMMAND = "jobs/study/study.py"
POOL, CONSTANT, WRONG = "specialists", "specialists-liar-constant", "specialists-liar-wrong"
SINGLE = tuple(suite.name for suite in SKILLS)
HOME = {name: (name,) for name in SINGLE}
MARGIN = 0.02
"""What may be lost where nothing must be lost (non-inferiority)."""
CLUSTERS = 8
"""Of the rival, k-means + surest agent."""
ROLLOUT_SEED = 100
"""Seeds of rollouts begin here, far from those of the matrices."""
SHUFFLE_SEEDS = 100
"""Training seeds of one gate seed's shuffles lie so far apart."""
Values = np.ndarray[Any, Any]
Matrices = Mapping[str, AnswerMatrix]
"""By suite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Settings of the study, from its YAML file."""

    out: Path
    seed: int = 7
    """Of the matrices' rows."""
    test_rows: int = 1000
    validation_rows: int = 300
    seeds: int = 5
    shuffles: int = 20
    """Gates per seed that are trained on entropies shuffled within rows."""
    queries: int = 80
    relay_queries: int = 60
    relay_test: int = 300
    chain_test: int = 500
    only_memory: bool = False
    """Judge endpoint 3 alone."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Options of `dmoa train` for every gate."""
    workers: int = 2
    """Answering actors, each with an engine of its own."""
    common: Common

    @property
    def calls(self) -> Path:
        """Cache of greedy calls: the same question to the same agent is paid for once."""
        return self.out / "calls"


def pool(name: str) -> Config:
    """Return a packaged pool that answers in one step."""
    return load_pool(name).changed("limits", max_steps=1)


def everyone() -> Config:
    """Return the pool of all agents, liars included: one matrix serves every pool."""
    config = pool(POOL)
    names = {agent.name for agent in config.agents}
    liars = [agent for other in (CONSTANT, WRONG) for agent in pool(other).agents if agent.name not in names]
    return config.model_copy(update={"name": "specialists-all", "agents": (*config.agents, *liars)})


def evaluated(study: Study, out: Path, config: Config, values: Mapping[str, Any]) -> RunFolder:
    """Run an evaluation, or go on with it; failed rows are run once more, and those that fail again are told."""
    shared = {"seed": study.seed, "out": out, "call_cache": study.calls, "workers": study.workers, "track": "none"}

    def run(**more: Any) -> int:
        options = EvaluateOptions.parse({**shared, **values, **more})
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
        "benchmarks": SINGLE,
        "policies": matrix_policies(config.agent_names),
        "split": split,
        "limit": study.test_rows if split == "test" else study.validation_rows,
    }
    folder = evaluated(study, study.out / split, config, values)
    return {name: read_matrix(folder, name, config.agent_names) for name in SINGLE}


def blank_replies(found: Matrices) -> dict[str, int]:
    """Return per agent how many replies hold no text, over all suites."""
    agents = next(iter(found.values())).agents
    rows = [row for matrix in found.values() for row in matrix.replies]
    return {agent: sum(not row[index].text.strip() for row in rows) for index, agent in enumerate(agents)}


def embeddings(study: Study, split: str, found: Matrices) -> dict[str, Values]:
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


def rollouts(study: Study, name: str, seed: int, *, suites: Sequence[str] = SINGLE, difficulty: int = 1) -> Path:
    """Collect dense rollouts of a pool, or take those that are there; their labels lie apart."""
    key = "-".join(suites) if tuple(suites) != SINGLE else "main"
    key += f"-{seed}" if difficulty == 1 else f"-{difficulty}-{seed}"
    out = study.out / "rollouts" / name / key
    settled = out / "settled"  # gates are trained on it: nothing may be added any more
    if not settled.exists():
        values = {
            "benchmarks": ",".join(suites),
            "split": "gate",
            "difficulty": difficulty,
            "limit": study.queries if tuple(suites) == SINGLE else study.relay_queries,
            "seed": ROLLOUT_SEED + seed,
            "labels": study.out / "labels" / name / key,
        }
        collected(study, out, pool(name), values)
        settled.touch()
    return out


def collected(study: Study, out: Path, config: Config, values: Mapping[str, Any]) -> Manifest:
    """Collect rollouts, or go on with them; failed queries are asked once more, and those that fail again are told."""
    shared = {"out": out, "call_cache": study.calls, "workers": study.workers, "track": "none"}
    options = RolloutOptions.parse({**shared, **values})
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


def gate(
    study: Study, seed: int, ablation: str, source: Path, options: Mapping[str, Any], *, name: str = POOL, shuffle: int = 0
) -> tuple[Path, Gate, Checkpoint]:
    """Train one gate, or take the one that is there, and return its checkpoint's folder and what it holds.

    `shuffle` counts gates of one seed, each with a dealing out of its own.
    """
    key = "_".join(f"{option}-{value}" for option, value in sorted({**options, "shuffle": shuffle}.items()))
    out = study.out / "gates" / name / source.name / key
    seeded = {**options, "seed": seed + SHUFFLE_SEEDS * shuffle}
    folder = train_ablation(ablation, source, out, pool(name), TrainContext(), seeded)
    return folder, *checkpoint.load(folder)


def gates(study: Study, name: str, ablation: str = "default", shuffles: int = 1, **options: Any) -> list[Gate]:
    """Return the gates of all seeds, `shuffles` of each; `options` over those of the study."""
    sources = [rollouts(study, name, seed) for seed in range(study.seeds)]
    return [
        gate(study, seed, ablation, source, {**study.train, **options}, name=name, shuffle=shuffle)[1]
        for seed, source in enumerate(sources)
        for shuffle in range(shuffles)
    ]


def clusters(source: Path, name: str, seed: int) -> KMeansRouter:
    """Fit k-means + surest agent on rollouts, by the raw scores that a gate is trained on: cut replies are the least sure."""
    return fit_rival(read_table(source), pool(name).agent_names, "default", num_clusters=CLUSTERS, seed=seed)


def plain(found: Comparison) -> dict[str, Any]:
    return {"difference": found.difference, "low": found.low, "high": found.high, "p": found.p, "test": found.test}


def spread(value_GR: Values) -> dict[str, float]:
    """Return a mean over gates and rows and its 95 % interval."""
    found = compare_crossed(np.asarray(value_GR, dtype=np.float64)[None])
    return {"value": found.difference, "low": found.low, "high": found.high}


def not_worse(difference_GR: Values) -> dict[str, Any]:
    """Return a difference with its interval, and whether it is worse than the margin; p is that of the bar itself."""
    found = compare_crossed(difference_GR[None])
    p = compare_crossed(difference_GR[None] + MARGIN).p
    passed = found.low >= -MARGIN
    return {**plain(found), "p": p, "p_of": f"the difference against -{MARGIN}, the margin", "passed": passed}
