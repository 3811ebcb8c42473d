"""Predictive entropy: exact per token from the logits, streamed into three sums per call.

Engines call `token_entropy` at every decode step, before temperature and sampling filters. All entropies are in nats.
Shape letters: B sequences that decode together, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoa.core.inference import one_thread

_FLOOR = -200.0
"""exp(-200) is 0 in float32: clamping here changes no probability, and keeps 0 x -inf out."""
NOT_FINITE = (
    "its logits are NaN or infinite, so neither its words nor its entropy can be trusted; check the weights of the model and of "
    "the adapter, or run it in a dtype of a wider range"
)
"""Why an engine gives up a call whose `token_entropy` is NaN."""


@torch.no_grad()
def token_entropy(logits_BV: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) of every row, [B] float32 in nats, exact over the whole vocabulary.

    Half-precision logits are widened first; -inf logits have probability 0. A row that is not a distribution (all -inf,
    or holding NaN or +inf) gives NaN: nothing is known of it. Source: paper; Malinin & Gales 2021.
    """
    if logits_BV.device.type != "cpu":
        return _entropy_of_rows(logits_BV)
    # Row by row, so that the temporaries stay in the cache: half the time of whole-batch operations, and on one
    # thread, which is 1 % of a decode step, instead of waiting for busy cores at every operation.
    with one_thread():
        return torch.cat([_entropy_of_rows(row_1V) for row_1V in torch.split(logits_BV, 1)])


def _entropy_of_rows(logits_BV: Tensor) -> Tensor:
    """H = log sum_v e_v - sum_v e_v d_v / sum_v e_v, with d = z - max z and e = exp d."""
    shifted_BV = logits_BV.float() - logits_BV.amax(dim=1, keepdim=True).float()
    shifted_BV.clamp_(min=_FLOOR)
    weight_BV = shifted_BV.exp()
    total_B = weight_BV.sum(dim=1)
    weighted_B = shifted_BV.mul_(weight_BV).sum(dim=1)
    return (total_B.log() - weighted_B / total_B).clamp_(min=0.0)


class EntropySums:
    """Sum, sum of squares and count of token entropies: all that is kept of a call, whatever its length."""

    __slots__ = ("sq_sum", "sum_nats", "tokens")

    def __init__(self, sum_nats: float = 0.0, sq_sum: float = 0.0, tokens: int = 0) -> None:
        """Start from nothing, or from sums kept earlier."""
        self.sum_nats = sum_nats
        self.sq_sum = sq_sum
        self.tokens = tokens

    def add(self, entropy_nats: float) -> None:
        """Count one more token."""
        self.sum_nats += entropy_nats
        self.sq_sum += entropy_nats * entropy_nats
        self.tokens += 1

    def merge(self, other: EntropySums) -> None:
        """Count the tokens of another call too."""
        self.sum_nats += other.sum_nats
        self.sq_sum += other.sq_sum
        self.tokens += other.tokens

    @property
    def mean_nats(self) -> float | None:
        """Mean entropy in nats per token; None without tokens."""
        return self.sum_nats / self.tokens if self.tokens else None

    @property
    def variance(self) -> float | None:
        """Population variance over the tokens, in nats squared, never negative; None without tokens."""
        if not self.tokens:
            return None
        mean = self.sum_nats / self.tokens
        return max(self.sq_sum / self.tokens - mean * mean, 0.0)
