"""How sure a reply is, as one number: the score that theta, the cascade and the ranking loss compare.

The lower, the surer. `raw` is the logarithm of the mean predictive entropy; `anchored` takes off what the agent gives on
average over an anchor set. Buffers and rollouts keep sums and counts only; everything here is derived from them, again
for every gate version. `core/losses` and `core/calibration` read the results. Never a per-agent z-score: it cancels competence.

Shape letters: A agents in the pool, D embedding; in this file alone S any leading dimensions (steps, rows, both), R
rows of a sample, U the different ones among them, C clusters.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from dmoa.errors import ConfigError

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
Numbers = npt.NDArray[Any]
"""An array of any numbers; results are float64."""

SCORE_OFFSET_NATS = 1e-3
"""Keeps the logarithm finite for replies without any uncertainty."""
CUT_PENALTY = 20.0
"""Added to the score of a reply that was cut off. Entropies lie between 0 and log V < 13 nats, so anchored scores of two
finished replies are less than 19 apart: a cut one is less sure than every finished one, whatever the agents."""
CONSTANT_PENALTY = CUT_PENALTY
"""Taken off the anchor of an agent that says the same to every query, so that all its scores are as much higher."""
MIN_PROBABILITY = 1e-3
"""Probabilities of being right closer than this to 0 or 1 count as this close: no model knows better."""
HALF_WEIGHT_TOKENS = 4
"""Tokens at which a reply has half a say."""
MAX_INVERSE_PROPENSITY = 20.0
"""Clips 1 / propensity: a stated bias against variance without bound."""
MIN_ETA = 1e-3
"""Floor of eta, for samples in which most pairs tie."""
_CLUSTERINGS = 16
"""Clusterings that anchors are averaged over. On 34 rows in 8 clusters, by one alone, what a gate learnt hung on where k-means
began: 75 to 90 % of answers right over four seeds; averaged, 83 to 85 %."""
_MAX_ROUNDS = 100
"""Rounds of k-means; it settles after some ten."""

CONSTANT_SHARE = 0.9
"""Share of its replies that are one and the same, from which an agent counts as constant, ..."""
USUAL_SHARE = 0.5
"""... where for half of the other agents that share is at most this: the queries do have different answers."""
MIN_ROWS = 10
"""Replies of an agent that its judgement takes."""


def raw_score(entropy_nats: float) -> float:
    """Return s = log(PE + 1e-3) of a mean entropy in nats per token; lower is surer. Source: ours (paper ranks PE itself)."""
    return math.log(entropy_nats + SCORE_OFFSET_NATS)


def score(entropy_nats: float, anchor: float | None, *, is_cut: bool = False) -> float:
    """Return the score of one reply: raw, or anchored where the agent's anchor is given.

    `is_cut`: the reply ended by length, and counts as less sure than every finished one. Source: ours.
    """
    return raw_score(entropy_nats) - (anchor or 0.0) + (CUT_PENALTY if is_cut else 0.0)


def scores(
    sum_SA: Numbers, tokens_SA: Numbers, anchors_A: Numbers | tuple[float, ...] | None = None, is_cut_SA: BoolArray | None = None
) -> Array:
    """Return the score of every reply [.., A] float64 from entropy sums in nats; NaN where there are no tokens.

    The same numbers as `score`, over arrays. Anchors and eta are fitted on scores without `is_cut_SA`.
    """
    tokens = np.asarray(tokens_SA, dtype=np.float64)
    mean = np.divide(sum_SA, tokens, out=np.full(tokens.shape, np.nan), where=tokens > 0)
    score_SA: Array = np.log(mean + SCORE_OFFSET_NATS)
    if anchors_A is not None:
        score_SA -= np.asarray(anchors_A, dtype=np.float64)
    if is_cut_SA is not None:
        score_SA += CUT_PENALTY * is_cut_SA
    return score_SA


def posterior_scores(right_SA: Numbers | float) -> Array:
    """Return the score of a probability of being right [..]: its log odds, negated, at most some 7 either way; NaN stays NaN."""
    right = np.clip(np.asarray(right_SA, dtype=np.float64), MIN_PROBABILITY, 1.0 - MIN_PROBABILITY)
    score_SA: Array = np.log1p(-right) - np.log(right)
    return score_SA


def reply_weights(tokens_SA: Numbers, propensity_SA: Numbers) -> Array:
    """Return the say of every reply [.., A]: n / (n + 4), times 1 / propensity clipped at 20; 0 without tokens.

    A pair of replies has the product of theirs. Source: ours.
    """
    tokens = np.asarray(tokens_SA, dtype=np.float64)
    weight_SA: Array = tokens / (tokens + HALF_WEIGHT_TOKENS) / clipped_propensity(propensity_SA)
    return weight_SA


def clipped_propensity(propensity_SA: Numbers) -> Array:
    """Return propensities of which none is below 1 / 20 [..]."""
    return np.maximum(np.asarray(propensity_SA, dtype=np.float64), 1.0 / MAX_INVERSE_PROPENSITY)


def reply_noise(sum_SA: Numbers, sq_sum_SA: Numbers, tokens_SA: Numbers, slack_SA: Numbers | None = None) -> Array:
    """Return the variance of every reply's score [.., A]: v / n of its mean entropy PE, over (PE + 1e-3)^2; 0 without tokens.

    Scores are logarithms, so the noise of a mean entropy reaches them divided by it (delta method). v is the population
    variance of the token entropies, from their sum and sum of squares. `slack_SA`: how far a truncated sum may lie off, in
    nats; its mean counts as one standard deviation more, infinite where the slack is. Zeros change no bit. Source: ours.
    """
    tokens = np.maximum(np.asarray(tokens_SA, dtype=np.float64), 1.0)
    mean = np.asarray(sum_SA, dtype=np.float64) / tokens
    variance = np.maximum(np.asarray(sq_sum_SA, dtype=np.float64) / tokens - mean * mean, 0.0)
    noise_SA: Array = variance / tokens / (mean + SCORE_OFFSET_NATS) ** 2
    if slack_SA is not None:
        noise_SA += (np.asarray(slack_SA, dtype=np.float64) / tokens / (mean + SCORE_OFFSET_NATS)) ** 2
    return noise_SA


def fit_eta(score_RA: Array) -> float:
    """Return eta, the scale of the soft loss: the median of |s_a - s_b| over all pairs of agents of all rows.

    `score_RA` are held-back dense rows, NaN where an agent gave nothing; the floor is `MIN_ETA`. Raises ConfigError where
    no row holds two scores. Source: ours.
    """
    first, second = np.triu_indices(score_RA.shape[-1], k=1)
    gaps = np.abs(score_RA[:, first] - score_RA[:, second])
    gaps = gaps[np.isfinite(gaps)]
    if not len(gaps):
        raise ConfigError(
            f"eta: {len(score_RA)} held-back rows hold no pair of scores; at least one row with two agents is needed; "
            "collect dense rollouts"
        )
    return max(float(np.median(gaps)), MIN_ETA)


def fit_anchors(
    raw_RA: Array, embedding_RD: Numbers, *, num_clusters: int, seed: int, num_clusterings: int = _CLUSTERINGS
) -> tuple[float, ...]:
    """Return per agent the mean raw score over the anchor set, in which every cluster of embeddings weighs the same.

    `raw_RA` are raw scores of dense rows (NaN where an agent gave nothing), `embedding_RD` what the rows are clustered by
    (k-means over the different embeddings; fewer clusters where there are fewer of those). An agent's clusters without
    a score are left out of its mean. The result is the average over `num_clusterings`, each from its own start. Deterministic
    in the seed, whatever the order of the rows up to rounding. Raises ConfigError for an empty sample and for an agent
    without any score. Source: ours.
    """
    if not len(raw_RA) or num_clusters < 1:
        raise ConfigError(f"anchor set: {len(raw_RA)} rows, {num_clusters} clusters; at least one of each is needed")
    unheard = np.flatnonzero(~np.isfinite(raw_RA).any(axis=0)).tolist()
    if unheard:
        raise ConfigError(f"anchor set: agents {unheard} (by place in the pool) have no score in any row; ask them densely")
    distinct_UD, row_R = np.unique(np.asarray(embedding_RD, dtype=np.float64), axis=0, return_inverse=True)
    rng = np.random.default_rng(seed)
    is_one_only = min(num_clusters, len(distinct_UD)) in (1, len(distinct_UD))
    clusterings = (clusters(distinct_UD, num_clusters, rng)[row_R] for _ in range(1 if is_one_only else num_clusterings))
    mean_A = np.mean([_balanced_means(raw_RA, cluster_R) for cluster_R in clusterings], axis=0)
    return tuple(float(value) for value in mean_A)


def _balanced_means(raw_RA: Array, cluster_R: IntArray) -> Array:
    """Return the mean [A] over clusters of the means within them, leaving out what is NaN."""
    means = [known_mean(raw_RA[cluster_R == cluster]) for cluster in np.unique(cluster_R)]
    mean_A: Array = np.nanmean(np.stack(means), axis=0)
    return mean_A


def known_mean(value_RA: Array, axis: int = 0) -> Array:
    """Return the means along an axis of the values that are finite; NaN where none is."""
    is_known_RA = np.isfinite(value_RA)
    count = is_known_RA.sum(axis=axis)
    mean: Array = np.where(is_known_RA, value_RA, 0.0).sum(axis=axis) / np.where(count, count, np.nan)
    return mean


def clusters(distinct_UD: Array, num_clusters: int, rng: np.random.Generator) -> IntArray:
    """Return the cluster [U] of every row: k-means from k-means++ centres, over different rows in sorted order.

    So neither the order of the rows nor their repetition matters. A centre that loses its rows stays where it is.
    """
    centre_CD = distinct_UD[[rng.integers(len(distinct_UD))]]
    while len(centre_CD) < min(num_clusters, len(distinct_UD)):
        distance_U = squared_distances(distinct_UD, centre_CD).min(axis=1)
        next_one = rng.choice(len(distinct_UD), p=distance_U / distance_U.sum())
        centre_CD = np.vstack([centre_CD, distinct_UD[next_one]])
    cluster_U = np.full(len(distinct_UD), -1)
    for _ in range(_MAX_ROUNDS):
        before_U, cluster_U = cluster_U, squared_distances(distinct_UD, centre_CD).argmin(axis=1)
        if np.array_equal(before_U, cluster_U):
            break
        for cluster in np.unique(cluster_U):
            centre_CD[cluster] = distinct_UD[cluster_U == cluster].mean(axis=0)
    found_U: IntArray = cluster_U
    return found_U


def squared_distances(x_UD: Array, centre_CD: Array) -> Array:
    if len(x_UD) == 1:
        distance_C: Array = ((x_UD - centre_CD) ** 2).sum(axis=1)
        return distance_C[None]
    # Centre by centre: rows that are centres are exactly 0 away, and there is no array of all three dimensions.
    distance_UC: Array = np.stack([((x_UD - centre_D) ** 2).sum(axis=1) for centre_D in centre_CD], axis=1)
    return distance_UC


def reply_key(text: str | None) -> int:
    """Return a 32-bit number that is the same for the same reply, blanks around it aside. A chance match does no harm."""
    return zlib.crc32((text or "").strip().encode())


def same_reply_shares(reply_RA: IntArray, is_known_RA: BoolArray, min_rows: int = MIN_ROWS) -> Array:
    """Return per agent [A] the share of its replies that are its commonest one; NaN for fewer than `min_rows` replies.

    `reply_RA` are `reply_key`s, `is_known_RA` says where there is a reply at all.
    """
    shares = np.full(reply_RA.shape[1], np.nan)
    for agent in range(reply_RA.shape[1]):
        replies = reply_RA[is_known_RA[:, agent], agent]
        if len(replies) >= min_rows:
            shares[agent] = np.unique(replies, return_counts=True)[1].max() / len(replies)
    return shares


def constant_agents(share_A: Array) -> BoolArray:
    """Return which agents [A] give one reply nearly always, while the others, by the median, do not; from `same_reply_shares`.

    Where most queries have one and the same answer, honest agents repeat themselves too: then nobody is constant. Agents
    without a share are not judged and judge nobody.
    """
    found = np.zeros(len(share_A), dtype=np.bool_)
    for agent in np.flatnonzero(share_A >= CONSTANT_SHARE):
        others = np.delete(share_A, agent)
        others = others[np.isfinite(others)]
        found[agent] = len(others) > 0 and float(np.median(others)) <= USUAL_SHARE
    return found
