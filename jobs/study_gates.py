"""The study's gates, the rival by clusters, and what is read off them; trained once, and found again by their settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from study_endpoints import Material
from study_material import rollouts
from study_settings import CLUSTERS, POOL, WRONG, Study, pool

from dmoa import checkpoint
from dmoa.checkpoint import Checkpoint
from dmoa.core.gate import Gate
from dmoa.evaluation.answer_matrix import AnswerMatrix, gate_choices
from dmoa.evaluation.records import Reply
from dmoa.evaluation.registry import SUITES
from dmoa.training.ablations import train_ablation, write_changed
from dmoa.training.cluster_router import KMeansRouter, fit_rival, sample_of
from dmoa.training.options import TrainOptions
from dmoa.training.probe import probe_pool
from dmoa.training.rollouts import read_table
from dmoa.training.trainer import TrainContext, run_training
from dmoa.workflows.collect import read_labels

AROUND = TrainContext(open_ray=nullcontext, say=lambda text: None, watch=lambda epoch, most: None)
SAME_REPLY = 0.8
"""Share of rows with one and the same reply from which an agent counts as one that reads no question."""
SHUFFLE_SEEDS = 100
"""Training seeds of one gate seed's shuffles lie so far apart."""


def key_of(settings: Mapping[str, Any]) -> str:
    """Return the name of a folder for what is made with some settings."""
    return "_".join(f"{option}-{value}" for option, value in sorted(settings.items())) or "plain"


def gate(
    study: Study, name: str, seed: int, ablation: str, source: Path, settings: Mapping[str, Any], shuffle: int = 0
) -> tuple[Gate, Checkpoint]:
    """Train one gate, or take the one that is there; `shuffle` counts gates of one seed, each with a dealing out of its own.

    Constant agents are discounted only where the settings say so: the first two tests did not know of it.
    """
    key = key_of({**settings, "shuffle": shuffle} if shuffle else settings)
    out = study.out / "gates" / name / source.name / key
    options = {"discount_constant": False, **settings, "seed": seed + SHUFFLE_SEEDS * shuffle}
    return checkpoint.load(train_ablation(ablation, source, out, pool(name), AROUND, options))


def gates(study: Study, name: str, settings: Mapping[str, Any], ablation: str = "default", shuffles: int = 1) -> list[Gate]:
    """Return the gates of all seeds, `shuffles` of each."""
    sources = [rollouts(study, name, seed) for seed in range(study.seeds)]
    return [
        gate(study, name, seed, ablation, source, settings, shuffle)[0]
        for seed, source in enumerate(sources)
        for shuffle in range(shuffles)
    ]


def clusters(source: Path, name: str, seed: int) -> KMeansRouter:
    """Fit k-means + surest agent on rollouts, by the raw scores that a gate is trained on: cut replies are the least sure."""
    return fit_rival(read_table(source), pool(name).agent_names, "default", num_clusters=CLUSTERS, seed=seed)


def material(
    study: Study,
    name: str,
    gates: Iterable[Gate],
    found: Mapping[str, Mapping[str, AnswerMatrix]],
    embedded: Mapping[str, np.ndarray[Any, Any]],
    *,
    cascades: bool = True,
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
        cascades=cascades,
    )


def judged(study: Study, name: str, source: Path, table: pa.Table) -> dict[tuple[str, str], float]:
    """Return the score of every reply of single-step rollouts, by query and agent; opens their labels."""
    labels = {label.row_id: label for label in read_labels(study.out / "labels" / name / source.name)}
    return {
        (row["query_id"], row["agent"]): SUITES[row["source"]].score(labels[row["query_id"]], Reply(text=row["text"])).value
        for row in table.select(("query_id", "source", "agent", "text")).to_pylist()
    }


def labelled_gate(study: Study, seed: int, settings: Mapping[str, Any]) -> Gate:
    """Train a gate on correctness in place of entropy: an upper bound, with labels, and nowhere but here.

    The score is raw: anchors of made-up entropies mean nothing to the replies' own.
    """
    source = rollouts(study, POOL, seed)
    settings = {**settings, "score": "raw"}

    def by_value(table: pa.Table, _: int) -> pa.Table:
        rows, value_of = table.to_pylist(), judged(study, POOL, source, table)
        for row in rows:
            nats = 0.02 if value_of[row["query_id"], row["agent"]] == 1.0 else 1.0
            row |= {"entropy_sum_nats": nats * row["entropy_tokens"], "entropy_sq_sum": nats**2 * row["entropy_tokens"]}
        return pa.Table.from_pylist(rows, schema=table.schema)

    copy = study.out / "gates" / POOL / source.name / "labelled-rollouts"
    write_changed(source, copy, by_value, seed=seed)
    out = study.out / "gates" / POOL / source.name / key_of(settings) / "labelled"
    options = TrainOptions.parse({**settings, "rollouts": copy, "out": out, "seed": seed, "workers": 0, "track": "none"})
    return checkpoint.load(run_training(options, pool(POOL), AROUND).checkpoint)[0]


def sure_and_wrong(study: Study) -> dict[str, list[str]]:
    """Return whom `dmoa probe --known-answers` names in the pool with `liar-wrong`, and on which suites.

    The training queries of all seeds are the known rows, each once; nobody is asked anew.
    """
    agents, tables = pool(WRONG).agent_names, []
    values: dict[tuple[str, str], float] = {}
    for seed in range(study.seeds):
        source = rollouts(study, WRONG, seed)
        table = read_table(source)
        known = {query for query, _ in values}
        table = table.filter(pa.array([query not in known for query in table["query_id"].to_pylist()]))
        values |= judged(study, WRONG, source, table)
        tables.append(table)
    known_sample = sample_of(pa.concat_tables(tables), agents, "default", values)
    report = probe_pool(sample_of(tables[0], agents, "default"), known=known_sample)
    return {finding.agent: finding.sure_and_wrong for finding in report.agents if finding.sure_and_wrong}


def constant_agents(found: Mapping[str, AnswerMatrix], agents: Sequence[str]) -> list[str]:
    """Return the agents that give one and the same reply to four rows of five, over all suites; read from replies alone."""
    matrices = [matrix.only(agents) for matrix in found.values()]
    texts = [[row[index].text.strip() for matrix in matrices for row in matrix.replies] for index in range(len(agents))]
    commonest = [Counter(those).most_common(1)[0][1] / len(those) for those in texts]
    return [agent for agent, share in zip(agents, commonest, strict=True) if share >= SAME_REPLY]


def sent_to(gates: Sequence[Gate], embedded: Mapping[str, np.ndarray[Any, Any]], agents: Sequence[str]) -> float:
    """Return the share of rows whose most probable agent is one of those named, over all gates and suites."""
    named = {gates[0].spec.agents.index(agent) for agent in agents}
    return float(
        np.mean([choice.ranking[0] in named for g in gates for rows in embedded.values() for choice in gate_choices(g, rows)])
    )
