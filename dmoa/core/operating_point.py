"""How many agents are worth asking: tau and theta chosen together, label-free, by a replay of held-back dense steps.

tau says with how many agents a step begins, theta when it asks more. Both stay conformal quantiles (`core/conformal`); here their
two alphas are chosen, so that a step whose first agent is sure stays at one. Run once per training, after it; frozen with
the gate version. Shape letters: R rows, A agents in the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from dmoa.core.activation import IntArray, activate, probabilities
from dmoa.core.conformal import ALPHAS, fit_tau, fit_theta
from dmoa.core.gate import GateSpec
from dmoa.core.scores import Array
from dmoa.types import FloatArray

MAX_REGRET = 3.0
"""A winner whose entropy is twenty times that of the surest agent, or that was cut off, is as bad as it gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """One pair of alphas, and what it comes to on the held-back rows."""

    alpha: float
    theta_alpha: float | None
    """None where no theta is fitted."""
    tau: float
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

    `score_RA` ranks all replies, NaN where an agent gave none; `finished_RA` has NaN for those that were cut off too, and
    theta is fitted on it; None: no theta. Rows without any score are left out. Raises ConfigError as `fit_tau` does.
    Source: ours (conformal quantiles; the price is a Lagrange multiplier on compute).
    """
    is_heard_R = np.isfinite(score_RA).any(axis=1)
    logits_RA, score_RA = logits_RA[is_heard_R], score_RA[is_heard_R]
    p_RA = probabilities(logits_RA, np.ones(logits_RA.shape, dtype=np.bool_), spec.temperature)
    ranking_RA = np.argsort(-p_RA, axis=1, kind="stable")
    ranked_RA = np.take_along_axis(np.where(np.isfinite(score_RA), score_RA, np.inf), ranking_RA, axis=1)
    best_RA = np.minimum.accumulate(ranked_RA, axis=1)
    found = []
    for alpha, theta_alpha in product(alphas, theta_alphas if finished_RA is not None else (None,)):
        tau = fit_tau(p_RA, score_RA, alpha)
        theta = None if finished_RA is None or theta_alpha is None else fit_theta(finished_RA, theta_alpha)
        k_R = _asked(spec, logits_RA, best_RA, tau, theta)
        regret_R = np.minimum(best_RA[np.arange(len(k_R)), k_R - 1] - best_RA[:, -1], MAX_REGRET)
        point = OperatingPoint(
            alpha=alpha,
            theta_alpha=theta_alpha,
            tau=tau,
            theta=theta,
            agents=float(k_R.mean()),
            regret=float(regret_R.mean()),
        )
        found.append(point)
    return min(found, key=lambda point: round(point.regret + price * point.agents, 9))


def _asked(spec: GateSpec, logits_RA: FloatArray, best_RA: Array, tau: float, theta: float | None) -> IntArray:
    """Return how many agents a step asks [R]: those active by tau, and one more while none is as sure as theta."""
    limit = min(spec.max_agents, logits_RA.shape[1])
    k_R = activate(
        logits_RA,
        np.ones(logits_RA.shape, dtype=np.bool_),
        temperature=spec.temperature,
        rule=spec.rule,
        mass=tau,
        max_agents_B=np.full(len(logits_RA), limit),
    ).k_B
    if theta is None or not spec.cascade:
        return k_R
    # The first place from which on someone is sure; the best score never rises along the ranking.
    sure_R = (best_RA > theta).sum(axis=1) + 1
    asked_R: IntArray = np.clip(sure_R, k_R, limit)
    return asked_R
