"""Fits tau (how large the active set must be), theta (how sure is sure) and the operating point on held-back dense rows.

Run once per training, after it; the numbers are frozen with the gate version and act in `core/activation` (tau) and in
the cascade and the stopping rules (theta). Shape letters: R rows, A agents in the pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from dmoa.core.activation import activate, probabilities
from dmoa.core.gate import GateSpec
from dmoa.core.scores import Array, IntArray, Numbers
from dmoa.errors import ConfigError
from dmoa.types import FloatArray

ENTROPY_PRICE = 0.1
"""How much one more agent a step must lower the logarithm of the winner's entropy to be worth asking: a tenth surer."""
ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""What `core/calibration` tries where no alpha is given."""
ONE_FIRST = 1.0
"""Level of tau at which a step begins with one agent, however even the gate's probabilities are; tried beside several alphas."""
_TAU_OF_ONE = 1e-6

MAX_REGRET = 3.0
"""A winner whose entropy is twenty times that of the surest agent, or that was cut off, is as bad as it gets."""


def fit_mass_left(probability_RA: Numbers, score_RA: Array, alpha: float) -> float:
    """Return 1 - tau such that the smallest set that leaves no more holds the surest agent with probability >= 1 - alpha.

    The conformal quantile (rank ceil((n + 1)(1 - alpha)) of n rows) of the probability left after the surest agent, in the
    order of `core/activation`, summed from the smallest up; 0 where there are too few rows for alpha. It holds on average over
    exchangeable rows, where K does not cut the set first, and says nothing of the *correct* agent. The level is nominal where
    the same rows also chose alpha, eta or when training stopped. Scores are NaN where an
    agent gave nothing; rows without any score are left out; of agents equally sure the most probable counts. Raises
    ConfigError without rows, or for an alpha outside (0, 1). Source: ours (conformal prediction: Vovk; adaptive sets:
    Romano et al. 2020).
    """
    is_heard_R = np.isfinite(score_RA).any(axis=1)
    p_RA = np.asarray(probability_RA, dtype=np.float64)[is_heard_R]
    surest_RA = score_RA[is_heard_R] == np.nanmin(score_RA[is_heard_R], axis=1, keepdims=True)
    ranking_RA = np.argsort(-p_RA, axis=1, kind="stable")
    ranked_RA = np.take_along_axis(p_RA, ranking_RA, axis=1)
    left_RA = np.zeros_like(ranked_RA)
    left_RA[:, :-1] = np.cumsum(ranked_RA[:, :0:-1], axis=1)[:, ::-1]
    place_R1 = np.take_along_axis(surest_RA, ranking_RA, axis=1).argmax(axis=1)[:, None]
    left_R = np.take_along_axis(left_RA, place_R1, axis=1)[:, 0]
    rank = _conformal_rank(len(left_R), alpha, "tau")
    return 0.0 if rank > len(left_R) else float(np.sort(left_R)[-rank])


def tau_levels(alphas: Sequence[float]) -> tuple[float, ...]:
    """Return the levels of tau to choose from: where there is a choice, `ONE_FIRST` is one of them."""
    return (*alphas, *((ONE_FIRST,) if len(alphas) > 1 else ()))


def fit_level(probability_RA: Numbers, score_RA: Array, level: float) -> float:
    """Return 1 - tau of a level: that of `fit_mass_left`, or nearly all of the probability for `ONE_FIRST`."""
    return 1.0 - _TAU_OF_ONE if level == ONE_FIRST else fit_mass_left(probability_RA, score_RA, level)


def fit_theta(score_RA: Array, alpha: float) -> float:
    """Return theta, the score that the surest agent of a row stays at or below with probability >= 1 - alpha.

    The same quantile as `fit_mass_left`'s, of each row's lowest score; the largest of them where there are too few rows for
    alpha. Raises ConfigError without rows, or for an alpha outside (0, 1). Source: ours.
    """
    lowest_R = np.nanmin(score_RA[np.isfinite(score_RA).any(axis=1)], axis=1)
    rank = _conformal_rank(len(lowest_R), alpha, "theta")
    return float(np.sort(lowest_R)[min(rank, len(lowest_R)) - 1])


def _conformal_rank(num_rows: int, alpha: float, what: str) -> int:
    """Return ceil((n + 1)(1 - alpha)): which of n sorted values is the quantile, n + 1 where none is."""
    if not 0.0 < alpha < 1.0:
        raise ConfigError(f"{what}: alpha is {alpha!r}; expected a number between 0 and 1")
    if not num_rows:
        raise ConfigError(f"{what}: no held-back row holds a score; at least one is needed; hold back more queries")
    # Before rounding up, what binary fractions add: (9 + 1)(1 - 0.1) is 9, not a hair above.
    return math.ceil((num_rows + 1) * (1.0 - alpha) - 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """One pair of alphas, and what it comes to on the held-back rows."""

    alpha: float
    theta_alpha: float | None
    """None where no theta is fitted."""
    mass_left: float
    """1 - tau."""
    theta: float | None
    agents: float
    """Agents asked per row, those of the cascade included, mean."""
    regret: float
    """Score of the surest agent asked minus that of the surest of all, at most `MAX_REGRET`, mean."""


def fit_operating_point(
    spec: GateSpec,
    logits_RA: FloatArray,
    score_RA: Array,
    finished_RA: Array | None,
    *,
    alphas: Sequence[float] = ALPHAS,
    theta_alphas: Sequence[float] = ALPHAS,
    price: float,
) -> OperatingPoint:
    """Return the pair of alphas with the smallest regret + price x agents; of equally good ones the most cautious.

    Where there are several alphas, to begin with one agent is tried too: an alpha of .9 still asks more on a tenth of the rows.

    `score_RA` ranks all replies, NaN where an agent gave none; `finished_RA` has NaN for those that were cut off too, and
    theta is fitted on it; None: no theta. Rows without any score are left out. Raises ConfigError as `fit_mass_left` does.
    Source: ours (conformal quantiles; the price is a Lagrange multiplier on compute).
    """
    is_heard_R = np.isfinite(score_RA).any(axis=1)
    logits_RA, score_RA = logits_RA[is_heard_R], score_RA[is_heard_R]
    p_RA = probabilities(logits_RA, np.ones(logits_RA.shape, dtype=np.bool_), spec.temperature)
    ranking_RA = np.argsort(-p_RA, axis=1, kind="stable")
    ranked_RA = np.take_along_axis(np.where(np.isfinite(score_RA), score_RA, np.inf), ranking_RA, axis=1)
    best_RA = np.minimum.accumulate(ranked_RA, axis=1)
    found = []
    for alpha, theta_alpha in product(tau_levels(alphas), theta_alphas if finished_RA is not None else (None,)):
        left = fit_level(p_RA, score_RA, alpha)
        theta = None if finished_RA is None or theta_alpha is None else fit_theta(finished_RA, theta_alpha)
        k_R = _asked(spec, logits_RA, best_RA, left, theta)
        regret_R = np.minimum(best_RA[np.arange(len(k_R)), k_R - 1] - best_RA[:, -1], MAX_REGRET)
        point = OperatingPoint(
            alpha=alpha,
            theta_alpha=theta_alpha,
            mass_left=left,
            theta=theta,
            agents=float(k_R.mean()),
            regret=float(regret_R.mean()),
        )
        found.append(point)
    return min(found, key=lambda point: round(point.regret + price * point.agents, 9))


def num_active(spec: GateSpec, logits_RA: FloatArray, mass_left: float) -> IntArray:
    """Return how many agents of a step are active by tau [R], at most `max_agents`."""
    found = activate(
        logits_RA,
        np.ones(logits_RA.shape, dtype=np.bool_),
        temperature=spec.temperature,
        rule=spec.rule,
        mass_left=mass_left,
        max_agents_B=np.full(len(logits_RA), min(spec.max_agents, logits_RA.shape[1])),
    )
    return np.asarray(found.k_B, dtype=np.int64)


def _asked(spec: GateSpec, logits_RA: FloatArray, best_RA: Array, mass_left: float, theta: float | None) -> IntArray:
    """Return how many agents a step asks [R]: those active by tau, and one more while none is as sure as theta."""
    k_R = num_active(spec, logits_RA, mass_left)
    if theta is None or not spec.cascade:
        return k_R
    # The first place from which on someone is sure; the best score never rises along the ranking.
    sure_R = (best_RA > theta).sum(axis=1) + 1
    asked_R: IntArray = np.clip(sure_R, k_R, min(spec.max_agents, logits_RA.shape[1]))
    return asked_R
