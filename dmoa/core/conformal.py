"""How large the active set must be, and how sure is sure: tau and theta, fitted on held-back dense rows.

Run once per training, after it; both numbers are frozen with the gate version and act in `core/activation` (tau) and in
the cascade and the stopping rules (theta). Shape letters: R rows, A agents in the pool.
"""

from __future__ import annotations

import math

import numpy as np

from dmoa.core.scores import Array, Numbers
from dmoa.errors import ConfigError

ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""What `core/operating_point` tries where no alpha is given."""


def fit_tau(probability_RA: Numbers, score_RA: Array, alpha: float) -> float:
    """Return tau such that the smallest set whose mass reaches it holds the surest agent with probability >= 1 - alpha.

    The conformal quantile (rank ceil((n + 1)(1 - alpha)) of n rows) of the cumulative probability down to the surest
    agent, in the order of `core/activation`; 1 where there are too few rows for alpha. It holds on average over
    exchangeable rows, where K does not cut the set first, and says nothing of the *correct* agent. Scores are NaN where an
    agent gave nothing; rows without any score are left out; of agents equally sure the most probable counts. Raises
    ConfigError without rows, or for an alpha outside (0, 1). Source: ours (conformal prediction: Vovk; adaptive sets:
    Romano et al. 2020).
    """
    is_heard_R = np.isfinite(score_RA).any(axis=1)
    p_RA = np.asarray(probability_RA, dtype=np.float64)[is_heard_R]
    surest_RA = score_RA[is_heard_R] == np.nanmin(score_RA[is_heard_R], axis=1, keepdims=True)
    ranking_RA = np.argsort(-p_RA, axis=1, kind="stable")
    mass_RA = np.cumsum(np.take_along_axis(p_RA, ranking_RA, axis=1), axis=1)
    place_R1 = np.take_along_axis(surest_RA, ranking_RA, axis=1).argmax(axis=1)[:, None]
    mass_R = np.take_along_axis(mass_RA, place_R1, axis=1)[:, 0]
    rank = _conformal_rank(len(mass_R), alpha, "tau")
    return 1.0 if rank > len(mass_R) else min(float(np.sort(mass_R)[rank - 1]), 1.0)


def fit_theta(score_RA: Array, alpha: float) -> float:
    """Return theta, the score that the surest agent of a row stays at or below with probability >= 1 - alpha.

    The same quantile as `fit_tau`'s, of each row's lowest score; the largest of them where there are too few rows for
    alpha. Raises ConfigError without rows, or for an alpha outside (0, 1). Source: ours.
    """
    lowest_R = np.nanmin(score_RA[np.isfinite(score_RA).any(axis=1)], axis=1)
    rank = _conformal_rank(len(lowest_R), alpha, "theta")
    return float(np.sort(lowest_R)[min(rank, len(lowest_R)) - 1])


def _conformal_rank(num_rows: int, alpha: float, what: str) -> int:
    """Return ceil((n + 1)(1 - alpha)): which of n sorted values is the quantile, n + 1 where none is."""
    if not 0.0 < alpha < 1.0:
        raise ConfigError(f"{what}: alpha is {alpha!r}; allowed is a number between 0 and 1; change it")
    if not num_rows:
        raise ConfigError(f"{what}: no held-back row holds a score; at least one is needed; hold back more queries")
    # Before rounding up, what binary fractions add: (9 + 1)(1 - 0.1) is 9, not a hair above.
    return math.ceil((num_rows + 1) * (1.0 - alpha) - 1e-9)
