"""From gate logits to the active agents: masked softmax, ranking, and how many of the ranked ones act.

Second stage of routing, after `core/gate`; vectorised over a batch because `core/inference` calls it for every
micro-batch. Shape letters: B queries, A agents in the pool.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dmoa.core.gate import Rule
from dmoa.core.scores import BoolArray, IntArray
from dmoa.types import FloatArray

LEFT_TOLERANCE = 1e-4
"""Share of 1 - tau by which the mass that is left may be above it: float32 rounds the logits of sharp gates as coarsely."""
COUNT_TOLERANCE = 1e-4
"""exp(H) of n equal agents is n up to rounding; this keeps the ceiling from giving n + 1."""

MAX_STEEPNESS = 1e30
"""Most of 1 / T: times infinity the most probable agent's 0 would be NaN."""


class ActivationBatch(NamedTuple):
    """Who is active, one row per query."""

    probability_BA: FloatArray
    """[B, A] float32, rows sum to 1; exactly 0 where masked."""
    ranking_BA: IntArray
    """[B, A] indices, most probable first, ties by pool order; the masked ones last."""
    k_B: IntArray
    """[B] how many of the ranking are active, 1..min(K, available)."""
    mass_B: FloatArray
    """[B] float32, probability of the active set, at most 1."""


def probabilities(logits_BA: FloatArray, available_BA: BoolArray, temperature: float) -> FloatArray:
    """Return softmax(logits / T) over the available agents, [B, A] float32, exactly 0 for the others.

    Every row needs at least one available agent and finite logits. Source: paper (T = 0.1).
    """
    p_BA = np.where(available_BA, logits_BA, np.float32(-np.inf))
    p_BA -= np.maximum.reduce(p_BA, axis=1, keepdims=True)
    p_BA *= np.float32(min(1.0 / temperature, MAX_STEEPNESS))
    np.exp(p_BA, out=p_BA)
    p_BA /= np.add.reduce(p_BA, axis=1, keepdims=True)
    return p_BA


def effective_count(probability_BA: FloatArray) -> IntArray:
    """Return ceil(exp(H(p))) per row [B], H in nats: n for n equal agents, 1 for a certain one."""
    p_BA = probability_BA.astype(np.float64)
    log_BA = np.log(p_BA, out=np.zeros_like(p_BA), where=p_BA > 0)
    entropy_B = -(p_BA * log_BA).sum(axis=1)
    count_B: IntArray = np.ceil(np.exp(entropy_B) - COUNT_TOLERANCE).astype(np.int64)
    return count_B


def activate(
    logits_BA: FloatArray, available_BA: BoolArray, *, temperature: float, rule: Rule, mass_left: float, max_agents_B: IntArray
) -> ActivationBatch:
    """Choose the active agents of every row.

    `top_mass`: the smallest set that leaves at most `mass_left` (1 - tau) of the probability to the others; `fixed`:
    max_agents; `effective_count`: ceil(exp(H(p))); always at least 1, at most `max_agents_B` (each at least 1) and the number
    of available agents. Every row needs an available agent. Source: sparse adaptive activation from the paper, the rules ours.
    """
    probability_BA = probabilities(logits_BA, available_BA, temperature)
    # Masked agents sort behind available ones even where those underflow to 0; a stable sort keeps pool order on ties.
    ranking_BA = np.where(available_BA, -probability_BA, np.float32(1.0)).argsort(axis=1, kind="stable")
    offset_B1 = _row_offsets(*ranking_BA.shape)
    ranked_BA = probability_BA.take(ranking_BA + offset_B1)
    cumulative_BA = np.add.accumulate(ranked_BA, axis=1)
    limit_B = np.minimum(max_agents_B, np.add.reduce(available_BA, axis=1, dtype=np.int64))
    if rule == "top_mass":
        # Not the mass that is reached: a sharp gate's first agent has all of it but 1e-6, which float32 takes for tau.
        k_B = np.add.reduce(_left(ranked_BA)[:, 1:] > np.float32(mass_left * (1 + LEFT_TOLERANCE)), axis=1, dtype=np.int64) + 1
    elif rule == "fixed":
        k_B = max_agents_B
    else:
        k_B = effective_count(probability_BA)
    k_B = np.minimum(k_B, limit_B)
    mass_B = cumulative_BA.take(offset_B1[:, 0] + k_B - 1)
    return ActivationBatch(probability_BA, ranking_BA, k_B, np.minimum(mass_B, np.float32(1.0)))


def _left(ranked_BA: FloatArray) -> FloatArray:
    """Return the probability from every place on [B, A], summed from the smallest up, so that tiny sums stay exact."""
    left_BA: FloatArray = np.add.accumulate(ranked_BA[:, ::-1], axis=1)[:, ::-1]
    return left_BA


@lru_cache(maxsize=64)
def _row_offsets(num_rows: int, num_agents: int) -> IntArray:
    return np.arange(0, num_rows * num_agents, num_agents)[:, None]
