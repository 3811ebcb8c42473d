"""Predictive entropy: exact per token, from the logits.

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
