"""Ranking losses: what the gate's logits should have been, given how sure every agent turned out to be.

Training calls `ranking_loss` on the logits of all steps of a batch; the gradient goes on through the GRU. Pure torch, any
floating dtype. Shape letters: A agents in the pool; in this file alone N leading dimensions: the steps of all queries of
a batch. `_NAA` holds a value per ordered pair of agents, first index a, second b.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, softplus

from dmoa.errors import ConfigError

Loss = Literal["soft", "hard", "hinge", "listnet"]


class Targets(NamedTuple):
    """What the agents of each step turned out to be, as `core/scores` gives it."""

    score_NA: Tensor
    """s, lower is surer; may be NaN where `ran_NA` is false."""
    ran_NA: Tensor
    """[.., A] bool, agents whose replies count."""
    weight_NA: Tensor
    """Say of each reply (`reply_weights`); a pair has the product."""
    noise_NA: Tensor
    """Variance of each reply's score (`reply_noise`)."""


class LossSums(NamedTuple):
    """A loss before its division, so that several workers can add up theirs."""

    total: Tensor
    """Sum of the weighted terms, differentiable in the logits."""
    weight: Tensor
    """Sum of the weights; 0 where no step held two agents."""


def ranking_loss(loss: Loss, logits_NA: Tensor, targets: Targets, *, temperature: float, eta: float) -> LossSums:
    """Return the sum of weighted terms and the sum of weights over all pairs (`listnet`: all steps).

    d = z_a - z_b; with w = w_a w_b of the replies, terms and weights are, per pair of agents that ran:
    - `soft`: cross-entropy of sigmoid(d / T) against sigmoid((s_b - s_a) / eta); weight w |1/log2(1 + r_a) - 1/log2(1 + r_b)|,
      r the rank by s from 1 (ties: the mean over the orders they could have); half of it where |s_a - s_b| < delta_ab.
      The optimum is finite: softmax(z / T) = softmax(-s / eta). Source: ours, after RankNet and LambdaRank (Burges).
    - `hard`: only s_a < s_b - delta_ab: log(1 + exp(-d)); weight w. Source: paper, as a pairwise ranking (RankNet).
    - `hinge`: the same pairs: max(0, 1 - d / T); weight w. Source: ours.
    - `listnet`: per step with two agents or more, cross-entropy of softmax(z / T) against softmax(-s / eta) over
      those that ran; weight the mean w of its pairs. Source: Cao et al. 2007.
    Raises ConfigError unless T and eta are positive.
    """
    for name, value in (("temperature", temperature), ("eta", eta)):
        if not value > 0.0:
            raise ConfigError(f"ranking loss: {name} is {value!r}; expected a number above 0")
    counts_NA = targets.ran_NA & torch.isfinite(targets.score_NA)
    score_NA, weight_NA, noise_NA = (
        torch.where(counts_NA, value.to(logits_NA), 0.0) for value in (targets.score_NA, targets.weight_NA, targets.noise_NA)
    )
    # Each unordered pair stands here twice. A gap is positive where a is surer than b; one below delta may be chance.
    is_self_AA = torch.eye(score_NA.shape[-1], dtype=torch.bool, device=score_NA.device)
    weight_NAA = (weight_NA[..., :, None] * weight_NA[..., None, :]).masked_fill(is_self_AA, 0.0)
    if loss == "listnet":
        return _listnet(logits_NA / temperature, -score_NA / eta, counts_NA, weight_NAA)
    gap_NAA = score_NA[..., None, :] - score_NA[..., :, None]
    delta_NAA = (noise_NA[..., :, None] + noise_NA[..., None, :]).sqrt()
    margin_NAA = logits_NA[..., :, None] - logits_NA[..., None, :]
    if loss == "soft":
        term_NAA = binary_cross_entropy_with_logits(margin_NAA / temperature, torch.sigmoid(gap_NAA / eta), reduction="none")
        # Half, because both orders of a pair have the same term.
        weight_NAA = 0.5 * weight_NAA * rank_weights(score_NA, counts_NA)
        weight_NAA = torch.where(gap_NAA.abs() < delta_NAA, 0.5 * weight_NAA, weight_NAA)
    else:
        term_NAA = softplus(-margin_NAA) if loss == "hard" else torch.relu(1.0 - margin_NAA / temperature)
        weight_NAA = torch.where(gap_NAA > delta_NAA, weight_NAA, 0.0)
    return LossSums((weight_NAA * term_NAA).sum(), weight_NAA.sum())


def rank_weights(score_NA: Tensor, counts_NA: Tensor) -> Tensor:
    """Return |1/log2(1 + r_a) - 1/log2(1 + r_b)| of every pair, [.., A, A]; r ranks the agents that count by score.

    Tied agents have the mean over all orders that they could stand in, so that nothing depends on the order of the pool.
    Pairs with an agent that does not count have values without meaning.
    """
    is_both_NAA = counts_NA[..., :, None] & counts_NA[..., None, :]
    is_tied_NAA = (score_NA[..., None, :] == score_NA[..., :, None]) & is_both_NAA
    before_NA = ((score_NA[..., None, :] < score_NA[..., :, None]) & is_both_NAA).sum(dim=-1)
    tied_NA = is_tied_NAA.sum(dim=-1)
    rank_A = torch.arange(1, score_NA.shape[-1] + 1, dtype=score_NA.dtype, device=score_NA.device)
    discount_A = 1.0 / torch.log2(1.0 + rank_A)
    # Sums over the ranks before+1 .. before+tied that a group of ties shares: of the discounts, and of rank x discount.
    sum_NA, moment_NA = (
        cumulative[before_NA + tied_NA] - cumulative[before_NA]
        for cumulative in (torch.cat([value.new_zeros(1), value.cumsum(0)]) for value in (discount_A, rank_A * discount_A))
    )
    mean_NA = sum_NA / tied_NA.clamp(min=1)
    # Sum over pairs i < j of a group of D_i - D_j = sum_i (tied + 1 - 2i) D_i, i counted within the group.
    num_pairs_NA = (tied_NA * (tied_NA - 1) / 2).clamp(min=1.0)
    within_NA = ((tied_NA + 1 + 2 * before_NA) * sum_NA - 2.0 * moment_NA) / num_pairs_NA
    return torch.where(is_tied_NAA, within_NA[..., :, None], (mean_NA[..., :, None] - mean_NA[..., None, :]).abs())


def _listnet(logits_NA: Tensor, target_NA: Tensor, counts_NA: Tensor, weight_NAA: Tensor) -> LossSums:
    # A large finite number in place of -inf: rows without agents must stay finite.
    lowest = torch.finfo(logits_NA.dtype).min / 4
    predicted_NA = log_softmax(logits_NA.masked_fill(~counts_NA, lowest), dim=-1)
    wanted_NA = torch.softmax(target_NA.masked_fill(~counts_NA, lowest), dim=-1)
    term_N = -torch.where(counts_NA, wanted_NA * predicted_NA, 0.0).sum(dim=-1)
    count_N = counts_NA.sum(dim=-1)
    weight_N = weight_NAA.sum(dim=(-2, -1)) / (count_N * (count_N - 1)).clamp(min=1)
    return LossSums((weight_N * term_N).sum(), weight_N.sum())
