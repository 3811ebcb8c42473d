"""What a training aims at: held-back queries, the scale and score of every reply, global batches, and the loss of a batch.

Split, scale and scores are fitted once per training, before the first update, and frozen with the gate version. Next stop:
`training/loop`. Shape letters: Q episodes, N steps of all episodes, A agents in the pool, X gate input, R rows of a sample.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmoa.core.gate import Gate
from dmoa.core.label_model import LabelModel
from dmoa.core.losses import Loss, LossSums, Targets, ranking_loss
from dmoa.core.scores import (
    CONSTANT_PENALTY,
    Array,
    BoolArray,
    IntArray,
    clipped_propensity,
    constant_agents,
    fit_anchors,
    fit_eta,
    posterior_scores,
    reply_noise,
    reply_weights,
    same_reply_shares,
    scores,
)
from dmoa.errors import ConfigError
from dmoa.training.dataset import Episodes
from dmoa.types import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which episodes are learned from, and which are held back."""

    train_Q: IntArray
    held_Q: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How entropies become scores, and scores targets."""

    score: Literal["raw", "anchored", "posterior"]
    eta: float
    """Scale of the soft loss: the median gap between two agents' scores; 1 for `posterior`, whose scores are log odds."""
    anchors: tuple[float, ...] | None
    """Per agent its mean raw score over the anchor set, `CONSTANT_PENALTY` less where it is discounted; None where that was
    not needed."""
    anchor_rows: int = 0
    """Steps of the anchor set; 0 where the anchors are another gate version's."""
    constant: tuple[tuple[int, float], ...] = ()
    """Agents, by place, that gave one reply to nearly all steps of the anchor set, and to which share of them."""
    is_discounted: bool = False
    """Whether these count as less sure than everybody else."""
    label_model: LabelModel | None = None
    """With score `posterior`: what its scores come from."""
    right_NA: Array | None = None
    """With score `posterior`: the probability of each reply being right, NaN where there is none."""
    target_NA: Array | None = None
    """With score `posterior`: the probability that the gate learns of each reply (`judging.judged`)."""

    @property
    def used_anchors(self) -> tuple[float, ...] | None:
        """What the score subtracts: None for raw scores."""
        return self.anchors if self.score == "anchored" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What every worker holds: plain arrays, so that the workers of a node share one copy."""

    start_Q: IntArray
    input_NX: FloatArray
    score_NA: Array
    """NaN where an agent did not reply."""
    ran_NA: BoolArray
    weight_NA: Array
    noise_NA: Array
    train_Q: IntArray
    held_Q: IntArray


def split_episodes(episodes: Episodes, share: float) -> Split:
    """Return the episodes to learn from, and those held back: of the queries with the lowest hashes, `share` of all queries.

    All episodes of a query, whatever their round, are on one side; both sides have a query at least. Raises ConfigError
    for fewer than two queries.
    """
    queries = sorted({key.query_id for key in episodes.key_Q}, key=lambda query: hashlib.sha256(query.encode()).digest())
    if len(queries) < 2:
        raise ConfigError(f"rollouts: {len(queries)} queries; training and holding back need two at least; collect more")
    count = min(max(round(share * len(queries)), 1), len(queries) - 1)
    held = set(queries[:count])
    is_held_Q = np.array([key.query_id in held for key in episodes.key_Q], dtype=np.bool_)
    return Split(train_Q=np.flatnonzero(~is_held_Q), held_Q=np.flatnonzero(is_held_Q))


class AnchorSample(NamedTuple):
    """Rows that anchors are fitted on."""

    raw_RA: Array
    """Raw scores, NaN where an agent gave nothing."""
    embedding_RD: FloatArray
    reply_RA: IntArray
    """`reply_key`s."""


def anchor_sample(episodes: Episodes, among_Q: IntArray, embedding_dim: int) -> AnchorSample:
    """Return the dense steps of some episodes."""
    dense = episodes.dense_steps(among_Q)
    raw_RA = scores(episodes.sum_NA[dense], episodes.tokens_NA[dense])
    return AnchorSample(raw_RA, episodes.input_NX[dense, :embedding_dim], episodes.reply_NA[dense])


def fit_scale(
    episodes: Episodes,
    split: Split,
    sample: AnchorSample,
    *,
    score: Literal["raw", "anchored", "posterior"],
    num_clusters: int,
    seed: int,
    earlier: tuple[float, ...] | None = None,
    discounts_constant: bool = True,
) -> Scale:
    """Fit anchors on the sample, eta on the held-back dense steps.

    `discounts_constant`: agents that gave one reply to nearly all of the sample count as less sure than all others under
    anchored scores; eta does not feel it. Without a sample the anchors are `earlier`, those of the gate version that training
    goes on from; without dense steps eta comes from whatever pairs the held-back steps hold. Raises ConfigError where there
    is nothing to fit on. Source: ours.
    """
    anchors = earlier
    if len(sample.raw_RA):
        # An agent that never replied has no anchor of its own; nothing of it is ever scored, so 0 stands for it.
        is_heard_A: BoolArray = np.asarray(np.isfinite(sample.raw_RA).any(axis=0))
        found = iter(fit_anchors(sample.raw_RA[:, is_heard_A], sample.embedding_RD, num_clusters=num_clusters, seed=seed))
        anchors = tuple(next(found) if is_heard else 0.0 for is_heard in is_heard_A)
    if score == "anchored" and anchors is None:
        raise ConfigError(
            "score is 'anchored'; anchors need dense steps, and these rollouts have none; add a folder collected with "
            "--dense, start from a checkpoint that has anchors, or use score 'raw'"
        )
    held = episodes.dense_steps(split.held_Q)
    held = held if len(held) else episodes.steps_of(split.held_Q)
    used = anchors if score == "anchored" else None
    eta = 1.0 if score == "posterior" else fit_eta(scores(episodes.sum_NA[held], episodes.tokens_NA[held], used))
    share_A = same_reply_shares(sample.reply_RA, np.isfinite(sample.raw_RA))
    constant = tuple((int(agent), float(share_A[agent])) for agent in np.flatnonzero(constant_agents(share_A)))
    is_discounted = discounts_constant and score == "anchored"
    if anchors is not None and is_discounted:
        discounted = {agent for agent, _ in constant}
        anchors = tuple(value - CONSTANT_PENALTY * (agent in discounted) for agent, value in enumerate(anchors))
    return Scale(
        score=score,
        eta=eta,
        anchors=anchors,
        anchor_rows=len(sample.raw_RA),
        constant=constant,
        is_discounted=is_discounted,
    )


def build_data(episodes: Episodes, split: Split, scale: Scale) -> TrainingData:
    """Return inputs and targets of all steps."""
    sum_NA, tokens_NA, propensity_NA = episodes.sum_NA, episodes.tokens_NA, episodes.propensity_NA
    if scale.target_NA is not None:
        # Its probability has a reply's length, spread and slack in it already.
        score_NA, ran_NA = posterior_scores(scale.target_NA), np.isfinite(scale.target_NA)
        weight_NA, noise_NA = ran_NA / clipped_propensity(propensity_NA), np.zeros(ran_NA.shape)
    else:
        score_NA, ran_NA = scores(sum_NA, tokens_NA, scale.used_anchors, episodes.cut_NA), episodes.ran_NA
        weight_NA = reply_weights(tokens_NA, propensity_NA)
        noise_NA = reply_noise(sum_NA, episodes.sq_sum_NA, tokens_NA, episodes.slack_NA)
    return TrainingData(
        start_Q=episodes.start_Q,
        input_NX=episodes.input_NX,
        score_NA=score_NA,
        ran_NA=ran_NA,
        weight_NA=weight_NA,
        noise_NA=noise_NA,
        train_Q=split.train_Q,
        held_Q=split.held_Q,
    )


class Batch(NamedTuple):
    """Some queries, padded to the longest of them."""

    x_BSX: Tensor
    is_step_BS: Tensor | None
    """[B, S] bool, false where a query has ended; None: all have the same number of steps."""
    targets: Targets
    """Of the steps that exist, query by query."""


class Batches:
    """Gathers batches from arrays that are never copied as a whole, so that the workers of a node share them."""

    def __init__(self, data: TrainingData, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` and `device`: of the batches."""
        self._data = data
        self._dtype = dtype
        self._device = device

    def gather(self, episodes: IntArray) -> Batch:
        """Return a batch of at least one episode."""
        data = self._data
        start_B, end_B = data.start_Q[episodes], data.start_Q[episodes + 1]
        step_BS = start_B[:, None] + np.arange(int((end_B - start_B).max()))
        is_step_BS = step_BS < end_B[:, None]
        # Where a query has ended its first step stands in: finite numbers that nothing reads.
        index_BS = np.where(is_step_BS, step_BS, start_B[:, None])
        index_N = step_BS[is_step_BS]
        score_NA, weight_NA, noise_NA = (
            self._tensor(values[index_N]) for values in (data.score_NA, data.weight_NA, data.noise_NA)
        )
        ran_NA = torch.from_numpy(data.ran_NA[index_N]).to(self._device)
        is_step = None if is_step_BS.all() else torch.from_numpy(is_step_BS).to(self._device)
        return Batch(self._tensor(data.input_NX[index_BS]), is_step, Targets(score_NA, ran_NA, weight_NA, noise_NA))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device, self._dtype)


def unroll(gate: Gate, batch: Batch) -> Tensor:
    """Return the logits [N, A] of the steps that exist, query by query, differentiable through all steps."""
    logits_BSA = gate.unroll(batch.x_BSX)
    return logits_BSA.flatten(0, 1) if batch.is_step_BS is None else logits_BSA[batch.is_step_BS]


def batch_loss(gate: Gate, batch: Batch, *, loss: Loss, eta: float) -> LossSums:
    """Return the loss of a batch before its division: sums over the pairs of all steps of all its queries."""
    return ranking_loss(loss, unroll(gate, batch), batch.targets, temperature=gate.spec.temperature, eta=eta)
