"""Measures a gate on held-back queries without labels: how it ranks the agents, whom it chooses, how it spreads the load.

`held_metrics` is the quick look after every epoch, `measure_gate` the whole at the end. Scores are those that the gate was
trained on. Shape letters: Q episodes, N steps that are looked at, A agents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch

from dmoa.core.activation import probabilities
from dmoa.core.gate import Gate
from dmoa.core.losses import Loss, Targets, ranking_loss
from dmoa.core.scores import Array, BoolArray, IntArray, known_mean
from dmoa.training.dataset import Episodes
from dmoa.training.objective import Batches, TrainingData, unroll

Ranking = Literal["better than chance", "no better than chance", "unknown"]
"""`unknown`: no held-back step holds two replies of different scores."""
_COIN = 0.5
_CONFIDENCE = 0.95
_CHUNK = 256
"""Episodes that are looked at together."""


class HeldMetrics(NamedTuple):
    """The quick look."""

    loss: float
    """NaN where no step holds a pair."""
    pairwise: float
    """Share of the pairs of different scores that the logits rank alike; NaN where there is none."""


@torch.no_grad()
def _logits(gate: Gate, batches: Batches, episodes: IntArray) -> Iterator[tuple[torch.Tensor, Targets]]:
    """Yield logits [N, A] and targets of the episodes' steps, in order, some episodes at a time."""
    for start in range(0, len(episodes), _CHUNK):
        batch = batches.gather(episodes[start : start + _CHUNK])
        yield unroll(gate, batch), batch.targets


def logits_of(gate: Gate, batches: Batches, episodes: IntArray) -> Array:
    """Return the logits [N, A] float64 of the episodes' steps, in order."""
    return np.concatenate([logits_NA.double().cpu().numpy() for logits_NA, _ in _logits(gate, batches, episodes)])


def held_metrics(gate: Gate, batches: Batches, episodes: IntArray, *, loss: Loss, eta: float) -> HeldMetrics:
    """Return loss and pairwise accuracy on the episodes."""
    total = weight = 0.0
    alike = pairs = 0
    for logits_NA, targets in _logits(gate, batches, episodes):
        sums = ranking_loss(loss, logits_NA, targets, temperature=gate.spec.temperature, eta=eta)
        total, weight = total + float(sums.total), weight + float(sums.weight)
        counts = _count_pairs(
            logits_NA.double().cpu().numpy(), targets.score_NA.double().cpu().numpy(), targets.ran_NA.cpu().numpy()
        )
        alike, pairs = alike + int(counts[0].sum()), pairs + int(counts[1].sum())
    return HeldMetrics(total / weight if weight else float("nan"), alike / pairs if pairs else float("nan"))


def _count_pairs(logits_NA: Array, score_NA: Array, ran_NA: BoolArray) -> tuple[IntArray, IntArray]:
    """Return by step [N] how many ordered pairs have s_a < s_b, and z_a > z_b as well; and how many have the former."""
    score_NA = np.where(ran_NA, score_NA, np.nan)
    is_surer_NAA = score_NA[:, :, None] < score_NA[:, None, :]
    is_ranked_NAA = logits_NA[:, :, None] > logits_NA[:, None, :]
    return (is_surer_NAA & is_ranked_NAA).sum(axis=(1, 2)), is_surer_NAA.sum(axis=(1, 2))


def measure_gate(gate: Gate, batches: Batches, episodes: Episodes, data: TrainingData) -> dict[str, float]:
    """Return the label-free metrics of a gate on the held-back queries, those that cannot be computed left out.

    `pairwise`, `pairwise_low`, `pairwise_high`: share of the pairs of different scores that are ranked alike, with its 95 %
    interval over queries; `ndcg`; `chosen_nats`, `surest_nats`, `mean_nats`: mean entropy per token of the most probable agent,
    the surest, and all that replied, over the steps where the most probable one replied; `surest_share`: how often the two are
    one; `load_max`, `load_entropy`: share of the most used agent as first choice, and evenness of all shares (1: even);
    `effective`: mean exp of the entropy of the probabilities; `distance_step_S`: mean total variation distance from the
    policy that collected, at step S, agents without a row taken together.
    """
    steps = episodes.steps_of(data.held_Q)
    logits_NA = logits_of(gate, batches, data.held_Q)
    if not np.isfinite(logits_NA).all():
        return {}
    everyone = np.ones(logits_NA.shape, dtype=np.bool_)
    p_NA = probabilities(logits_NA.astype(np.float32), everyone, gate.spec.temperature).astype(np.float64)
    ran_NA, score_NA = data.ran_NA[steps], data.score_NA[steps]
    found = _pairwise(logits_NA, score_NA, ran_NA, _query_of_steps(episodes, data.held_Q))
    found |= {"ndcg": _ndcg(logits_NA, score_NA, ran_NA)}
    with np.errstate(invalid="ignore"):
        nats_NA = np.where(ran_NA, episodes.sum_NA[steps] / episodes.tokens_NA[steps], np.nan)
    found |= _choices(p_NA, nats_NA, score_NA, ran_NA) | _load(p_NA) | _distances(p_NA, episodes, data, steps)
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _query_of_steps(episodes: Episodes, held_Q: IntArray) -> IntArray:
    """Return a number of the query of every step [N] of some episodes, the same for all episodes of a query."""
    numbers: dict[str, int] = {}
    number_Q = [numbers.setdefault(episodes.key_Q[episode].query_id, len(numbers)) for episode in held_Q]
    return np.repeat(np.array(number_Q, dtype=np.int64), (episodes.start_Q[1:] - episodes.start_Q[:-1])[held_Q])


def _pairwise(logits_NA: Array, score_NA: Array, ran_NA: BoolArray, query_N: IntArray) -> dict[str, float]:
    """Return the share of pairs ranked alike, and its 95 % interval.

    Pairs of one query hang together, so queries are the sample: the share is a ratio of two means over them, its spread that
    of the ratio's residuals, its interval Student's. A single query says nothing of the spread: 0 to 1. Two queries that agree
    to the last pair say as little: without spread the interval is Wilson's over queries.
    """
    alike_Q, pairs_Q = (np.bincount(query_N, weights=count_N) for count_N in _count_pairs(logits_NA, score_NA, ran_NA))
    alike_Q, pairs_Q = alike_Q[pairs_Q > 0], pairs_Q[pairs_Q > 0]
    if not len(pairs_Q):
        return {}
    share = float(alike_Q.sum() / pairs_Q.sum())
    low, high = _share_ends(share, (alike_Q - share * pairs_Q) / pairs_Q.mean())
    return {"pairwise": share, "pairwise_low": low, "pairwise_high": high}


def _share_ends(share: float, residual_Q: Array) -> tuple[float, float]:
    from scipy.stats import binomtest, t

    num_queries = len(residual_Q)
    if num_queries < 2:
        return 0.0, 1.0
    spread = float(residual_Q.std(ddof=1)) / num_queries**0.5
    if spread < 1e-9:
        found = binomtest(round(share * num_queries), num_queries).proportion_ci(confidence_level=_CONFIDENCE, method="wilson")
        return min(float(found.low), share), max(float(found.high), share)
    half = float(t.ppf(0.5 + _CONFIDENCE / 2, num_queries - 1)) * spread
    return max(0.0, share - half), min(1.0, share + half)


def ranking_of(metrics: Mapping[str, float]) -> Ranking:
    """Return whether a gate's metrics show that it ranks agents on held-back queries better than a coin."""
    if "pairwise_low" not in metrics:
        return "unknown"
    return "better than chance" if metrics["pairwise_low"] > _COIN else "no better than chance"


def _ndcg(logits_NA: Array, score_NA: Array, ran_NA: BoolArray) -> float:
    """Return the mean normalised discounted cumulative gain; an agent's gain is the number of agents it is surer than."""
    values = []
    for logits_A, score_A, ran_A in zip(logits_NA, score_NA, ran_NA, strict=True):
        s, z = score_A[ran_A], logits_A[ran_A]
        gain = (s[:, None] < s[None, :]).sum(axis=1).astype(np.float64)
        if gain.any():
            discount = 1.0 / np.log2(np.arange(2, len(s) + 2))
            values.append(float(gain[np.argsort(-z, kind="stable")] @ discount / (np.sort(gain)[::-1] @ discount)))
    return float(np.mean(values)) if values else float("nan")


def _choices(p_NA: Array, nats_NA: Array, score_NA: Array, ran_NA: BoolArray) -> dict[str, float]:
    first_N = p_NA.argmax(axis=1)
    is_known_N = ran_NA[np.arange(len(first_N)), first_N]
    if not is_known_N.any():
        return {}
    nats_NA, score_NA, first_N = nats_NA[is_known_N], np.where(ran_NA, score_NA, np.inf)[is_known_N], first_N[is_known_N]
    rows = np.arange(len(first_N))
    lowest_N = score_NA.min(axis=1)
    return {
        "chosen_nats": float(nats_NA[rows, first_N].mean()),
        "surest_nats": float(nats_NA[rows, score_NA.argmin(axis=1)].mean()),
        "mean_nats": float(known_mean(nats_NA, axis=1).mean()),
        "surest_share": float((score_NA[rows, first_N] == lowest_N).mean()),
    }


def _load(p_NA: Array) -> dict[str, float]:
    num_steps, num_agents = p_NA.shape
    share_A = np.bincount(p_NA.argmax(axis=1), minlength=num_agents) / num_steps
    row_entropy_N = _entropy(p_NA)
    evenness = float(_entropy(share_A[None])[0] / np.log(num_agents)) if num_agents > 1 else 1.0
    return {"load_max": float(share_A.max()), "load_entropy": evenness, "effective": float(np.exp(row_entropy_N).mean())}


def _entropy(p_NA: Array) -> Array:
    found_N: Array = -(p_NA * np.log(p_NA, out=np.zeros_like(p_NA), where=p_NA > 0)).sum(axis=1)
    return found_N


def _distances(p_NA: Array, episodes: Episodes, data: TrainingData, steps: IntArray) -> dict[str, float]:
    """Return the mean total variation distance from the collecting policy, by step of the query."""
    before_NA = episodes.probability_NA[steps]
    is_known_NA = np.isfinite(before_NA)
    gap_N = np.abs(np.where(is_known_NA, before_NA - p_NA, 0.0)).sum(axis=1)
    rest_N = np.abs(np.where(is_known_NA, before_NA, 0.0).sum(axis=1) - np.where(is_known_NA, p_NA, 0.0).sum(axis=1))
    distance_N = 0.5 * (gap_N + rest_N)
    length_Q = np.diff(episodes.start_Q)[data.held_Q]
    place_N = np.concatenate([np.arange(length) for length in length_Q])
    return {f"distance_step_{place}": float(distance_N[place_N == place].mean()) for place in np.unique(place_N)}


def load_shares(gate: Gate, batches: Batches, episodes: IntArray) -> dict[str, float]:
    """Return by agent how often it is the most probable one."""
    first_N = logits_of(gate, batches, episodes).argmax(axis=1)
    share_A = np.bincount(first_N, minlength=len(gate.spec.agents)) / len(first_N)
    return dict(zip(gate.spec.agents, share_A.tolist(), strict=True))
