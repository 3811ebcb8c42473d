"""The probability of every reply being right, given who answered the same: one pass over the agents, a query a row.

A query has a hidden truth z (one of the answers given, or none of them) and a hidden difficulty d. An agent is right with a
probability that depends on d; wrong answers are its own unless it errs alike with an agent before it. Source: ours; without
difficulty and shared errors it is the one-coin model of Dawid and Skene (1979) over free-form answers.

Shape letters: R queries, J judged ones, A agents, Z = A + 1 candidates for the truth (a class of answers each; the last: none
of them), K nodes of difficulty.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dmoa.core.witnesses import NOT_ASKED, Array, IntArray, Witnesses

MAX_SHARED = 0.95
"""The most that a wrong agent repeats other wrong answers: an answer of its own is never impossible."""
ONE_WITNESS = 1.0
"""As a chance of saying the same: two that agree are one witness, right or wrong. No estimate reaches it."""
MIN_CHANCE = 1e-3
NODES = 5
USUAL_COPY = 0.2
"""Probability that two wrong agents say the same beforehand, ..."""
_COPY_ERRORS = 60.0
"""... and for how many joint errors that counts in the estimate of what is usual, ..."""
_PAIR_ERRORS = 20.0
"""... as what is usual does in that of each pair."""
ALIKE = 0.9
"""Share of the queries on which agents of one voice say the same, ..."""
_FEWEST_BOTH = 8
"""... of at least so many that both answered."""
_NOISE_OUTCOMES = 40.0
"""For how many outcomes the share of wrong ones that is expected beforehand counts."""


class Truth(NamedTuple):
    """What the replies say about the truth."""

    weight_RZK: Array
    """Posterior of truth and difficulty; a row sums to 1."""
    log_likelihood_R: Array
    """Logarithm of the probability of the row's answers."""


def truth_posterior(
    answer_RA: IntArray, right_RAK: Array, copy_AA: Array, node_weight_K: Array, log_prior_RZ: Array, order: IntArray
) -> Truth:
    """Return the posterior of truth and difficulty.

    `right_RAK`: probability that an agent is right at a difficulty; `copy_AA`: that two agents, both wrong, say the same (or
    ONE_WITNESS); `log_prior_RZ`: what outcomes say of each candidate; `order`: agents in the order in which they count, the most
    competent first. Agents with an answer below 0 are left out where not asked, and wrong where they gave none.
    """
    num_rows, num_agents = answer_RA.shape
    num_truths = num_agents + 1
    log_RZK = np.repeat(log_prior_RZ[:, :, None], len(node_weight_K), axis=2) + np.log(node_weight_K)
    is_used_RZ = np.zeros((num_rows, num_truths), dtype=bool)
    is_used_RZ[:, -1] = True
    rows = np.arange(num_rows)
    said_ARZ = answer_RA.T[:, :, None] == np.arange(num_truths)
    is_used_RZ |= said_ARZ.any(axis=0)
    log_RZK[~is_used_RZ] = -np.inf
    log_right_RAK, log_wrong_RAK = np.log(right_RAK), np.log1p(-right_RAK)
    order = order[(answer_RA[:, order] > NOT_ASKED).any(axis=0)]
    for place, agent in enumerate(order):
        answer_R = answer_RA[:, agent]
        shared_RZ = shared_errors(said_ARZ, copy_AA[agent], order[:place])
        is_given_R = answer_R >= 0
        said_R = np.maximum(answer_R, 0)
        # Given z, the wrong answers are those of the other classes.
        total_RZ = shared_RZ.sum(axis=1, keepdims=True) - shared_RZ
        said_share_R = shared_RZ[rows, said_R]
        scale_RZ = MAX_SHARED / np.maximum(total_RZ, MAX_SHARED)
        chance_RZ = np.where(said_share_R[:, None] > 0, said_share_R[:, None] * scale_RZ, 1 - total_RZ * scale_RZ)
        term_RZK = log_wrong_RAK[:, agent, None, :] + np.log(np.maximum(chance_RZ, MIN_CHANCE))[:, :, None]
        term_RZK[rows, said_R] = log_right_RAK[:, agent]
        is_silent_R = answer_R == -1
        term_RZK[is_silent_R] = log_wrong_RAK[is_silent_R, agent, None, :]
        one = order[:place][copy_AA[agent, order[:place]] >= ONE_WITNESS]
        is_heard_R = is_given_R & ~(answer_RA[:, one] == answer_R[:, None]).any(axis=1)
        term_RZK[~(is_heard_R | is_silent_R)] = 0.0
        log_RZK += term_RZK
    top_R = log_RZK.max(axis=(1, 2), keepdims=True)
    weight_RZK = np.exp(log_RZK - top_R)
    total_R = weight_RZK.sum(axis=(1, 2), keepdims=True)
    return Truth(weight_RZK / total_R, (np.log(total_R) + top_R)[:, 0, 0])


def held_open(truth: Truth, side_RZ: Array) -> Truth:
    """Return the truth in which rows with sides have these shares in place of what their replies say [R, Z]."""
    open_RZK = side_RZ[:, :, None] * truth.weight_RZK.sum(axis=1, keepdims=True)
    return truth._replace(weight_RZK=np.where(np.asarray(side_RZ.any(axis=1))[:, None, None], open_RZK, truth.weight_RZK))


def shared_errors(said_ARZ: npt.NDArray[np.bool_], copy_A: Array, before: IntArray) -> Array:
    """Return how probable it is that an agent, if wrong, repeats each class of wrong answers given before it [R, Z].

    Of several agents with one answer the one counts that it errs most alike with: a crowd of copies is one witness.
    """
    shared_RZ = np.zeros(said_ARZ.shape[1:])
    for other in before:
        np.maximum(shared_RZ, said_ARZ[other] * copy_A[other], out=shared_RZ)
    return shared_RZ


def right_of(weight_RZK: Array, answer_RA: IntArray) -> npt.NDArray[np.float64]:
    """Return the joint posterior of each agent being right and of the difficulty [R, A, K]; 0 without an answer."""
    found_RAK: npt.NDArray[np.float64] = weight_RZK[np.arange(len(answer_RA))[:, None], np.maximum(answer_RA, 0)]
    found_RAK[answer_RA < 0] = 0.0
    return found_RAK


@cache
def nodes(spread: float) -> tuple[Array, Array]:
    """Return values and weights of the difficulty: Gauss-Hermite nodes of a normal of that standard deviation."""
    if spread == 0:
        return np.zeros(1), np.ones(1)
    value_K, weight_K = np.polynomial.hermite_e.hermegauss(NODES)
    return value_K * spread, weight_K / weight_K.sum()


def outcome_evidence(witnesses: Witnesses, noise: float) -> Array:
    """Return the log probability of the known outcomes, had each candidate been the truth [R, Z]."""
    num_rows, num_agents = witnesses.answer_RA.shape
    log_RZ = np.zeros((num_rows, num_agents + 1))
    known_RA = np.isfinite(witnesses.outcome_RA) & witnesses.asked
    for agent in np.flatnonzero(known_RA.any(axis=0)):
        rows = np.flatnonzero(known_RA[:, agent])
        good_J = witnesses.outcome_RA[rows, agent, None]
        if_right_J = np.log(good_J * (1 - noise) + (1 - good_J) * noise)
        if_wrong_J = np.log(good_J * noise + (1 - good_J) * (1 - noise))
        log_RZ[rows] += np.where(np.arange(num_agents + 1) == witnesses.answer_RA[rows, agent, None], if_right_J, if_wrong_J)
    return log_RZ


def wrong_outcomes(witnesses: Witnesses, right_RA: Array, *, expected: float) -> float:
    """Return the share of outcomes that are wrong: what the posterior contradicts, drawn to what is expected beforehand."""
    outcome_RA = np.where(witnesses.asked, witnesses.outcome_RA, np.nan)
    wrong_RA = outcome_RA * (1 - right_RA) + (1 - outcome_RA) * right_RA
    return float((np.nansum(wrong_RA) + expected * _NOISE_OUTCOMES) / (np.isfinite(outcome_RA).sum() + _NOISE_OUTCOMES))


def copies(answer_RA: IntArray, right_RA: Array, weight_R: Array) -> Array:
    """Return how probable it is that two agents, both wrong, say the same [A, A]; drawn to the mean of all pairs."""
    given_RA = answer_RA >= 0
    both_RAA = given_RA[:, :, None] & given_RA[:, None, :]
    is_same_RAA = answer_RA[:, :, None] == answer_RA[:, None, :]
    wrong_RA = 1 - right_RA
    apart_RAA = np.maximum(wrong_RA[:, :, None] - right_RA[:, None, :], 0.0)  # two answers cannot both be right
    weighted_RAA = np.where(both_RAA, weight_R[:, None, None], 0.0)
    same_AA = (weighted_RAA * is_same_RAA * wrong_RA[:, :, None]).sum(axis=0)
    apart_AA = (weighted_RAA * ~is_same_RAA * apart_RAA).sum(axis=0)
    off_AA = ~np.eye(len(same_AA), dtype=bool)
    # The median of all pairs is the chance that a pair is drawn to: two that collude do not make others suspect.
    chance_AA = (same_AA + USUAL_COPY * _COPY_ERRORS) / (same_AA + apart_AA + _COPY_ERRORS)
    pooled = float(np.median(chance_AA[off_AA])) if off_AA.any() else USUAL_COPY
    copy_AA: Array = (same_AA + pooled * _PAIR_ERRORS) / (same_AA + apart_AA + _PAIR_ERRORS)
    return copy_AA


class Voice(NamedTuple):
    """Agents that say the same on `ALIKE` of the queries."""

    members: IntArray
    among: float
    """How often the others, two or more, agree with each other, ..."""
    across: float
    """... and with the members: about as often, or more, if these agree because they are right."""


def voices(answer_RA: IntArray) -> list[Voice]:
    """Return the groups of agents that speak with one voice. Source: ours, after Dong, Berti-Equille and Srivastava (2009)."""
    said_RA = np.where(answer_RA >= 0, answer_RA, -1)
    both_AA = np.einsum("ra,rb->ab", said_RA >= 0, said_RA >= 0, dtype=np.float64)
    same_RAA = (said_RA[:, :, None] == said_RA[:, None, :]) & (said_RA >= 0)[:, :, None]
    same_AA: Array = same_RAA.sum(axis=0).astype(np.float64)
    reach_AA = (same_AA >= ALIKE * both_AA) & (both_AA >= _FEWEST_BOTH)
    for middle in range(len(reach_AA)):
        reach_AA |= reach_AA[:, [middle]] & reach_AA[[middle]]
    found = []
    for members in sorted({tuple(np.flatnonzero(reach_A).tolist()) for reach_A in reach_AA}):
        others = np.setdiff1d(np.arange(len(reach_AA)), members)
        if len(members) > 1 and len(others) > 1:
            among, across = np.ix_(others, others), np.ix_(members, others)
            same, both = (pair_AA[among].sum() - pair_AA[others, others].sum() for pair_AA in (same_AA, both_AA))
            share = same_AA[across].sum() / max(both_AA[across].sum(), 1.0)
            found.append(Voice(np.array(members, dtype=np.int64), float(same / max(both, 1.0)), float(share)))
    return found


def repeated(answer_RA: IntArray, copy_AA: Array) -> float:
    """Return the log probability that agents say the same as those before them whose witness they are, as often as they do."""
    total = 0.0
    for agent in range(1, len(copy_AA)):
        said_RA = answer_RA[:, :agent][:, copy_AA[agent, :agent] >= ONE_WITNESS]
        could_R = (answer_RA[:, agent] >= 0) & (said_RA >= 0).any(axis=1)
        count, same = could_R.sum(), (could_R & (said_RA == answer_RA[:, [agent]]).any(axis=1)).sum()
        share = (same + 1) / (count + 2)
        total += same * np.log(share) + (count - same) * np.log1p(-share)
    return float(total)
