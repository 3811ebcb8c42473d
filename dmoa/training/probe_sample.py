"""From rollouts to what the probe looks at: the first step of every query that all agents answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmoa.core.features import Preset
from dmoa.errors import ConfigError
from dmoa.training.probe import ProbeSample

MIN_ROWS = 4
_COLUMNS = ("source", "context", "entropy_sum_nats", "entropy_tokens", "text", "status")


def sample_of(
    rollouts: pa.Table,
    agents: Sequence[str],
    preset: Preset,
    values: Mapping[tuple[str, str], float] | None = None,
) -> ProbeSample:
    """Return the sample of a table of rollouts; `values`: (query_id, agent) -> score, for queries with a known answer.

    Raises ConfigError where fewer than four queries were asked of every agent.
    """
    dense = dense_rows(rollouts, agents, _COLUMNS)
    if len(dense) < MIN_ROWS:
        raise ConfigError(
            f"probe: {len(dense)} queries were asked of every agent; {MIN_ROWS} are the least, some 30 say something; collect "
            "dense rollouts"
        )
    rows = list(dense.values())
    return ProbeSample(
        agents=tuple(agents),
        sources=tuple(str(row[0]["source"]) for row in rows),
        embedding_RD=np.array([_query_part(row[0]["context"], preset) for row in rows], dtype=np.float64),
        entropy_RA=np.array([[_entropy(cell) for cell in row] for row in rows]),
        texts=tuple(tuple(str(cell["text"]) for cell in row) for row in rows),
        value_RA=None
        if values is None
        else np.array([[values.get((query, name), np.nan) for name in agents] for query in dense]),
    )


def dense_rows(rollouts: pa.Table, agents: Sequence[str], columns: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return some columns of the first step of every query that all agents were asked: by query, its rows as the agents stand."""
    first = rollouts.filter(pc.equal(rollouts["step"], 0)).select(["query_id", "agent", *columns])
    by_query: dict[str, dict[str, dict[str, Any]]] = {}
    for row in first.to_pylist():
        by_query.setdefault(row["query_id"], {})[row["agent"]] = row
    complete = {query: rows for query, rows in by_query.items() if all(name in rows for name in agents)}
    return {query: [rows[name] for name in agents] for query, rows in complete.items()}


def _query_part(context: list[float], preset: Preset) -> list[float]:
    """Return the embedding of the query alone: at the first step nothing else is known."""
    return context if preset == "paper" else context[: len(context) // 2]


def _entropy(row: Mapping[str, Any]) -> float:
    tokens = int(row["entropy_tokens"])
    return float(row["entropy_sum_nats"]) / tokens if row["status"] == "ok" and tokens else float("nan")
