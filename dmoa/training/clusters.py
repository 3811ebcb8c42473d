"""Routing without a gradient: k-means over query embeddings, and in each cluster the agent that was surest on average.

The rival that a trained gate must beat or tie, and what `dmoa probe` tries before anything is trained. Shape letters: R rows,
A agents, D embedding, C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import ClusterError, kmeans2, vq

Floats = npt.NDArray[np.float64]
_TRIES = 5
"""k-means is begun so often, and the tightest result is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRouter:
    """Cluster centres, and in each the agents from the surest to the least sure."""

    centres_CD: Floats
    ranking_CA: npt.NDArray[np.int64]

    def rank(self, embedding_RD: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Return each row's agents, surest first, [R, A] indices."""
        labels_R, _ = vq(np.asarray(embedding_RD, dtype=np.float64), self.centres_CD)
        ranking_RA: npt.NDArray[np.int64] = self.ranking_CA[labels_R]
        return ranking_RA


def fit_clusters(
    embedding_RD: npt.NDArray[np.floating], score_RA: npt.NDArray[np.floating], *, num_clusters: int, seed: int
) -> ClusterRouter:
    """Fit the router on dense rows; scores as in `core/scores`, lower is surer, NaN where an agent did not run.

    Source: ours.
    """
    points_RD = np.asarray(embedding_RD, dtype=np.float64)
    score_RA = np.asarray(score_RA, dtype=np.float64)
    centres_CD, labels_R = cluster(points_RD, num_clusters=num_clusters, seed=seed)
    means = [_mean(score_RA[labels_R == number]) for number in range(len(centres_CD))]
    ranking_CA = np.argsort(np.array(means), axis=1, kind="stable")
    return ClusterRouter(centres_CD=centres_CD, ranking_CA=ranking_CA)


def cluster(points_RD: Floats, *, num_clusters: int, seed: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return (centres [C, D], label of each row [R]); no cluster is empty, C is at most `num_clusters` and R."""
    rng = np.random.default_rng(seed)
    count = min(num_clusters, len(np.unique(points_RD, axis=0)))
    best: tuple[float, Floats, npt.NDArray[np.int64]] | None = None
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


def _mean(score_RA: Floats) -> Floats:
    """Mean score per agent, infinite for one that never ran."""
    known_RA = np.isfinite(score_RA)
    total_A = np.where(known_RA, score_RA, 0.0).sum(axis=0)
    count_A = known_RA.sum(axis=0)
    return np.where(count_A > 0, total_A / np.maximum(count_A, 1), np.inf)
