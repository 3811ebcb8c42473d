"""The loss of a batch of queries: the gate is run again over their steps, and its logits are ranked against the scores.

Back-propagation goes through all steps of a query, however many it has; hidden states are recomputed, never read. Used by
the training loop, by validation and by the benchmark of updates.

Shape letters: B queries of a batch, S steps of its longest query, N steps that exist, A agents, X gate input, H gate hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmoa.core.gate import Gate
from dmoa.core.losses import Loss, LossSums, Targets, ranking_loss
from dmoa.training.targets import IndexArray, TrainingData


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

    def gather(self, episodes: IndexArray) -> Batch:
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
