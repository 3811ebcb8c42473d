"""What the study is computed from: answer matrices, rollouts, and gates of every configuration; all of it resumable."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from study_endpoints import LIAR, SINGLE, Material

from dmoa import checkpoint
from dmoa.agents.pool import build_encoder, load_pool
from dmoa.checkpoint import Checkpoint
from dmoa.cli.evaluation_session import run_evaluation
from dmoa.cli.options import Common
from dmoa.cli.rollout_queries import read_labels
from dmoa.cli.rollout_session import run_rollouts
from dmoa.config import Config
from dmoa.core.gate import Gate
from dmoa.core.scores import SCORE_OFFSET_NATS
from dmoa.evaluation import options as evaluate_options
from dmoa.evaluation.matrix import AnswerMatrix, matrix_policies, read_matrix
from dmoa.evaluation.records import Reply
from dmoa.evaluation.run_files import RunFolder
from dmoa.evaluation.suites.table import SUITES
from dmoa.training import rollout_options
from dmoa.training.ablations import train_ablation, write_changed
from dmoa.training.clusters import ClusterRouter, fit_clusters
from dmoa.training.options import parse_options
from dmoa.training.probe_sample import sample_of
from dmoa.training.rollouts import read_manifest, read_table
from dmoa.training.trainer import Surroundings, run_training

POOL, CONSTANT, WRONG = "specialists", "specialists-liar-constant", "specialists-liar-wrong"
MATRIX_SUITES = (*SINGLE, "shared")
CLUSTERS = 8
MATRIX_SEED = 7
"""Of the matrices' rows: not the seeds that the demo and the specialists' cards have looked at."""
ROLLOUT_SEED = 100
"""Seeds of rollouts begin here, far from those of the matrices."""
AROUND = Surroundings(open_ray=nullcontext, say=lambda text: None, watch=lambda epoch, most: None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Settings of the study, from its YAML file."""

    out: Path
    test_rows: int = 1000
    validation_rows: int = 300
    seeds: int = 5
    queries: int = 80
    relay_queries: int = 60
    relay_test: int = 100
    workers: int = 2
    """Answering actors, each with an engine of its own."""
    common: Common

    @property
    def calls(self) -> Path:
        """Cache of greedy calls: the same question to the same agent is paid for once."""
        return self.out / "calls"


def pool(name: str) -> Config:
    """Return a packaged pool that answers in one step."""
    config = load_pool(name)
    return config.model_copy(update={"limits": config.limits.model_copy(update={"max_steps": 1})})


def everyone() -> Config:
    """Return the pool of all agents, liars included: one matrix serves every pool."""
    config = pool(POOL)
    names = {agent.name for agent in config.agents}
    liars = [agent for other in (CONSTANT, WRONG) for agent in pool(other).agents if agent.name not in names]
    return config.model_copy(update={"name": "specialists-all", "agents": (*config.agents, *liars)})


def matrices(study: Study, split: str) -> dict[str, AnswerMatrix]:
    """Answer all rows of a split with every agent alone, or go on, and return the matrices by suite."""
    config, out = everyone(), study.out / split
    options = evaluate_options.parse_options(
        {
            "benchmarks": MATRIX_SUITES,
            "policies": matrix_policies(config.agent_names),
            "split": split,
            "limit": study.test_rows if split == "test" else study.validation_rows,
            "seed": MATRIX_SEED,
            "out": out,
            "resume": (out / "run.json").exists(),
            "call_cache": study.calls,
            "workers": study.workers,
            "track": "none",
        }
    )
    if not (out / "evaluation.json").exists():
        run_evaluation(options, config, study.common, "jobs/study_gate.py", shows_result=False)
    return {name: read_matrix(RunFolder(out), name, config.agent_names) for name in MATRIX_SUITES}


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
    """Collect dense rollouts of a pool, or take those that are there; their labels lie apart, for the upper bound alone."""
    key = "-".join(suites) if tuple(suites) != SINGLE else "main"
    out = study.out / "rollouts" / name / f"{key}-{seed}"
    if out.exists() and read_manifest(out).ended_unix_s is not None:
        return out
    options = rollout_options.parse_options(
        {
            "benchmarks": ",".join(suites),
            "split": "gate",
            "limit": queries or study.queries,
            "seed": ROLLOUT_SEED + seed,
            "out": out,
            "labels": study.out / "labels" / name / f"{key}-{seed}",
            "call_cache": study.calls,
            "workers": study.workers,
            "track": "none",
        }
    )
    run_rollouts(options, pool(name), study.common, "jobs/study_gate.py")
    return out


def gate(study: Study, name: str, seed: int, ablation: str, source: Path, settings: Mapping[str, Any]) -> tuple[Gate, Checkpoint]:
    """Train one gate, or take the one that is there."""
    key = "_".join(f"{option}-{value}" for option, value in sorted(settings.items())) or "plain"
    out = study.out / "gates" / name / source.name / key
    return checkpoint.load(train_ablation(ablation, source, out, pool(name), AROUND, {**settings, "seed": seed}))


def clusters(source: Path, name: str, seed: int) -> ClusterRouter:
    """Fit k-means + surest agent on rollouts."""
    sample = sample_of(read_table(source), pool(name).agent_names, "default")
    score_RA = np.log(sample.entropy_RA + SCORE_OFFSET_NATS)
    return fit_clusters(sample.embedding_RD, score_RA, num_clusters=CLUSTERS, seed=seed)


def material(
    study: Study,
    name: str,
    gates: Iterable[Gate],
    found: Mapping[str, Mapping[str, AnswerMatrix]],
    embedded: Mapping[str, np.ndarray[Any, Any]],
) -> Material:
    """Put together what the endpoints of one configuration on one pool are computed from; `found` by split and suite."""
    agents = pool(name).agent_names
    sources = [rollouts(study, name, seed) for seed in range(study.seeds)]
    return Material(
        validation={suite: matrix.only(agents) for suite, matrix in found["validation"].items()},
        test={suite: matrix.only(agents) for suite, matrix in found["test"].items()},
        embedding=embedded,
        gates=list(gates),
        clusters=[clusters(source, name, seed) for seed, source in enumerate(sources)],
    )


def labelled_gate(study: Study, seed: int, settings: Mapping[str, Any]) -> Gate:
    """Train a gate on correctness in place of entropy: an upper bound, with labels, and nowhere but here."""
    source = rollouts(study, POOL, seed)
    labels = {label.row_id: label for label in read_labels(study.out / "labels" / POOL / source.name)}

    def judged(table: pa.Table, _: int) -> pa.Table:
        rows = table.to_pylist()
        for row in rows:
            value = SUITES[row["source"]].score(labels[row["query_id"]], Reply(text=row["text"])).value
            nats = 0.02 if value == 1.0 else 1.0
            row |= {"entropy_sum_nats": nats * row["entropy_tokens"], "entropy_sq_sum": nats**2 * row["entropy_tokens"]}
        return pa.Table.from_pylist(rows, schema=table.schema)

    copy = study.out / "gates" / POOL / source.name / "labelled-rollouts"
    write_changed(source, copy, judged, seed=seed)
    out = study.out / "gates" / POOL / source.name / "labelled"
    options = parse_options({**settings, "rollouts": copy, "out": out, "seed": seed, "workers": 0, "track": "none"})
    return checkpoint.load(run_training(options, pool(POOL), AROUND).checkpoint)[0]


def sent_to(gates: Sequence[Gate], embedded: Mapping[str, np.ndarray[Any, Any]], agent: str = LIAR) -> float:
    """Return the share of rows whose most probable agent is the one named, over all gates and the single-domain suites."""
    from dmoa.evaluation.matrix_routers import gate_choices

    firsts = [choice.ranking[0] for g in gates for suite in SINGLE for choice in gate_choices(g, embedded[suite])]
    return float(np.mean([first == gates[0].spec.agents.index(agent) for first in firsts]))
