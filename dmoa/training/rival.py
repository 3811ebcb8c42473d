"""The rival that a trained gate must beat or tie: k-means over embeddings, and the surest agent of each cluster.

One fit for `dmoa evaluate --ablations` and for the study under `jobs/`, by the raw scores that a gate is trained on: a reply
that was cut off counts as less sure than every finished one. Left out, the rival would be weaker than it is. Shape letters:
R rows, A agents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dmoa.core.features import Preset
from dmoa.core.scores import scores
from dmoa.training.clusters import ClusterRouter, Floats, fit_clusters
from dmoa.training.probe_sample import dense_rows, sample_of

_COLUMNS = ("entropy_sum_nats", "entropy_tokens", "finish_reason", "status")


def fit_rival(rollouts: pa.Table, agents: Sequence[str], preset: Preset, *, num_clusters: int, seed: int) -> ClusterRouter:
    """Fit the rival on a table of rollouts; `preset`: of the collection.

    Raises ConfigError where fewer than four queries were asked of every agent.
    """
    sample = sample_of(rollouts, agents, preset)
    return fit_clusters(sample.embedding_RD, training_scores(rollouts, agents), num_clusters=num_clusters, seed=seed)


def training_scores(rollouts: pa.Table, agents: Sequence[str]) -> Floats:
    """Return the raw scores [R, A] of the rows of `sample_of`, cut replies behind all others; NaN where nothing was generated."""
    cell_RA3 = [
        [
            (cell["entropy_sum_nats"], cell["entropy_tokens"] if cell["status"] == "ok" else 0, cell["finish_reason"] == "length")
            for cell in row
        ]
        for row in dense_rows(rollouts, agents, _COLUMNS).values()
    ]
    sum_RA, tokens_RA, cut_RA = np.moveaxis(np.array(cell_RA3, dtype=np.float64), 2, 0)
    return scores(sum_RA, tokens_RA, None, cut_RA > 0)
