"""One worker among those that train together: how gradients are added up, and what all of them agree on.

`SingleWorker` trains alone, `TorchGroup` is a process group of torch.distributed (gloo between CPUs, nccl between GPUs) that
Ray Train has set up. Both divide by the weight of all pairs of the global batch, so the update does not depend on how the batch
was shared out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import distributed, nn

from dmoa.core.losses import LossSums

Shared = TypeVar("Shared")


class GlobalLoss(NamedTuple):
    """The loss of a global batch; the parameters' gradients are those of total / weight."""

    total: float
    weight: float
    """0 where no query of the batch held a pair: then there is nothing to learn from it."""


class SingleWorker:
    """The only worker."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def backward(self, sums: LossSums | None, parameters: Sequence[nn.Parameter]) -> GlobalLoss:
        """Leave the gradient of the global batch in the parameters."""
        assert sums is not None, "the only worker has all queries"
        total, weight = float(sums.total.detach()), float(sums.weight)
        if weight:
            torch.autograd.backward(sums.total / weight)
        return GlobalLoss(total, weight)

    def share(self, value: Shared) -> Shared:
        """Return the value."""
        return value


class TorchGroup:
    """One of several workers. Every call is made by all of them, in the same order."""

    def __init__(self, device: torch.device) -> None:
        """Join the process group that is there."""
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        self.device = device

    def backward(self, sums: LossSums | None, parameters: Sequence[nn.Parameter]) -> GlobalLoss:
        """Add up gradients, totals and weights in one all-reduce, and divide; `sums` None: it has none of the batch's queries."""
        counts = parameters[0].new_zeros(2)
        if sums is not None:
            torch.autograd.backward(sums.total)
            counts = torch.stack([sums.total.detach(), sums.weight.detach()])
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(part.reshape(-1) for part in parts), counts])
        distributed.all_reduce(flat)
        total, weight = flat[-2:].tolist()
        place = 0
        for parameter in parameters:
            view = flat[place : place + parameter.numel()].view_as(parameter)
            parameter.grad = view / weight if weight else torch.zeros_like(view)
            place += parameter.numel()
        return GlobalLoss(total, weight)

    def share(self, value: Shared) -> Shared:
        """Return the first worker's value, anything that pickles, to all of them; what the others give is not read."""
        found = [value]
        distributed.broadcast_object_list(found, src=0, device=self.device)
        return found[0]


WorkerGroup = SingleWorker | TorchGroup
"""This worker and the others."""
