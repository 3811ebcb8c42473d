"""The router by clusters of queries (`KMeansRouter`), the gate's rival, and the sample of dense first steps it is fitted on.

The probe looks at the same sample; the study and the ablations compare gates with the router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.cluster.vq import ClusterError, kmeans2, vq

from dmoa.core.features import Preset
from dmoa.core.scores import Array, BoolArray, IntArray, known_mean, scores
from dmoa.core.sequential import AGENT_PRICE
from dmoa.errors import ConfigError
from dmoa.types import Price, TokenUsage

MIN_ROWS = 4
_PROBE_COLUMNS = (
    "source", "context", "entropy_sum_nats", "entropy_tokens", "text", "status", "finish_reason", "prompt_tokens",
    "completion_tokens",
)  # fmt: skip

_TRIES = 5
"""k-means is begun so often, and the tightest result is kept."""

_RIVAL_COLUMNS = ("entropy_sum_nats", "entropy_tokens", "finish_reason", "status")


def sample_of(
    rollouts: pa.Table,
    agents: Sequence[str],
    preset: Preset,
    values: Mapping[tuple[str, str], float] | None = None,
    outcomes: Mapping[tuple[str, str], float] | None = None,
    prices: Mapping[str, Price] | None = None,
    agent_price: float = AGENT_PRICE,
    asked: Mapping[str, str] | None = None,
) -> ProbeSample:
    """Return the sample of a table of rollouts; `values`: (query_id, agent) -> score, for queries with a known answer.

    `outcomes`: the same of what the user knows (`training/outcomes`). `prices`: of the tokens of agents, where they are known.
    `agent_price`: as `gate.agent_price`. `asked`: the text of each query, by its query_id, which tells the form of its answers.

    Raises ConfigError where fewer than four queries were asked of every agent.
    """
    dense = dense_rows(rollouts, agents, _PROBE_COLUMNS)
    if len(dense) < MIN_ROWS:
        raise ConfigError(
            f"probe: {len(dense)} queries were asked of every agent; {MIN_ROWS} are the least, some 30 say something; collect "
            "dense rollouts"
        )
    rows = list(dense.values())

    def cells(of: Callable[[dict[str, Any]], float]) -> np.ndarray[Any, Any]:
        return np.array([[of(cell) for cell in row] for row in rows])

    def known(given: Mapping[tuple[str, str], float] | None) -> Array | None:
        return None if given is None else np.array([[given.get((query, name), np.nan) for name in agents] for query in dense])

    return ProbeSample(
        agents=tuple(agents),
        sources=tuple(str(row[0]["source"]) for row in rows),
        embedding_RD=np.array([_query_part(row[0]["context"], preset) for row in rows], dtype=np.float64),
        entropy_RA=cells(_entropy),
        texts=tuple(tuple(str(cell["text"]) for cell in row) for row in rows),
        value_RA=known(values),
        heard_RA=cells(lambda cell: cell["status"] == "ok"),
        cut_RA=cells(lambda cell: cell["finish_reason"] == "length"),
        asked=None if asked is None else tuple(asked.get(query, "") for query in dense),
        tokens_RA=cells(_tokens),
        price_RA=cells(lambda cell: _price(cell, prices.get(cell["agent"]))) if prices else None,
        outcome_RA=known(outcomes),
        agent_price=agent_price,
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


def _tokens(row: Mapping[str, Any]) -> float:
    return float(row["prompt_tokens"] + row["completion_tokens"]) if row["status"] == "ok" else float("nan")


def _price(row: Mapping[str, Any], price: Price | None) -> float:
    if price is None or row["status"] != "ok":
        return float("nan")
    return price.of(TokenUsage(prompt_tokens=row["prompt_tokens"], completion_tokens=row["completion_tokens"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSample:
    """A dense sample."""

    agents: tuple[str, ...]
    sources: tuple[str, ...]
    """[R] benchmark or file of each row."""
    embedding_RD: npt.NDArray[np.floating]
    entropy_RA: Array
    """Mean entropy in nats per token; NaN where an agent gave nothing."""
    texts: tuple[tuple[str, ...], ...]
    """[R][A]"""
    value_RA: Array | None = None
    """Score of each reply, 0..1; NaN in rows without a known answer."""
    heard_RA: BoolArray | None = None
    """Whether each agent contributed; None: all did."""
    cut_RA: BoolArray | None = None
    """Whether each reply was cut off, and so holds no answer; None: none was."""
    asked: tuple[str, ...] | None = None
    """[R] text of each query, which tells the form of its answers; None: not known."""
    tokens_RA: Array | None = None
    """Prompt and completion tokens of each reply; NaN where there is none. None: not known."""
    price_RA: Array | None = None
    """What each reply cost; NaN where its agent has no price, or gave nothing. None: no agent has a price."""
    outcome_RA: Array | None = None
    """Rewards that the user handed over, 0..1; NaN where there are none. None: there are none at all."""
    agent_price: float = AGENT_PRICE
    """What one more agent must be worth (`gate.agent_price`)."""

    @property
    def replied(self) -> BoolArray:
        """Return which agents contributed."""
        return np.ones(self.entropy_RA.shape, dtype=np.bool_) if self.heard_RA is None else self.heard_RA


@dataclass(frozen=True, slots=True, kw_only=True)
class KMeansRouter:
    """Cluster centres, and in each the agents from the surest to the least sure."""

    centres_CD: Array
    ranking_CA: IntArray

    def rank(self, embedding_RD: npt.NDArray[np.floating]) -> IntArray:
        """Return each row's agents, surest first, [R, A] indices."""
        labels_R, _ = vq(np.asarray(embedding_RD, dtype=np.float64), self.centres_CD)
        ranking_RA: IntArray = self.ranking_CA[labels_R]
        return ranking_RA


def fit_clusters(
    embedding_RD: npt.NDArray[np.floating], score_RA: npt.NDArray[np.floating], *, num_clusters: int, seed: int
) -> KMeansRouter:
    """Fit the router on dense rows; scores as in `core/scores`, lower is surer, NaN where an agent did not run.

    Source: ours.
    """
    points_RD = np.asarray(embedding_RD, dtype=np.float64)
    score_RA = np.asarray(score_RA, dtype=np.float64)
    centres_CD, labels_R = cluster(points_RD, num_clusters=num_clusters, seed=seed)
    means = [known_mean(score_RA[labels_R == number]) for number in range(len(centres_CD))]
    ranking_CA = np.argsort(np.array(means), axis=1, kind="stable")  # an agent that never ran comes last
    return KMeansRouter(centres_CD=centres_CD, ranking_CA=ranking_CA)


def cluster(points_RD: Array, *, num_clusters: int, seed: int) -> tuple[Array, IntArray]:
    """Return (centres [C, D], label of each row [R]); no cluster is empty, C is at most `num_clusters` and R."""
    rng = np.random.default_rng(seed)
    count = min(num_clusters, len(np.unique(points_RD, axis=0)))
    best: tuple[float, Array, IntArray] | None = None
    while best is None:
        for _ in range(_TRIES):
            try:
                centres_CD, labels_R = kmeans2(points_RD, count, minit="++", rng=rng, missing="raise")
            except ClusterError:  # a cluster lost all its rows
                continue
            spread = float(((points_RD - centres_CD[labels_R]) ** 2).sum())
            if best is None or spread < best[0]:
                best = spread, centres_CD, labels_R
        count -= 1
    return best[1], best[2]


def fit_rival(rollouts: pa.Table, agents: Sequence[str], preset: Preset, *, num_clusters: int, seed: int) -> KMeansRouter:
    """Fit the rival on a table of rollouts; `preset`: of the collection.

    Raises ConfigError where fewer than four queries were asked of every agent.
    """
    sample = sample_of(rollouts, agents, preset)
    return fit_clusters(sample.embedding_RD, training_scores(rollouts, agents), num_clusters=num_clusters, seed=seed)


def training_scores(rollouts: pa.Table, agents: Sequence[str]) -> Array:
    """Return the raw scores [R, A] of the rows of `sample_of`, cut replies behind all others; NaN where nothing was generated."""
    cell_RA3 = [
        [
            (cell["entropy_sum_nats"], cell["entropy_tokens"] if cell["status"] == "ok" else 0, cell["finish_reason"] == "length")
            for cell in row
        ]
        for row in dense_rows(rollouts, agents, _RIVAL_COLUMNS).values()
    ]
    sum_RA, tokens_RA, cut_RA = np.moveaxis(np.array(cell_RA3, dtype=np.float64), 2, 0)
    return scores(sum_RA, tokens_RA, None, cut_RA > 0)
