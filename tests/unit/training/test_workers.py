"""What one worker does alone, and as one of several."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from dmoa.core.losses import LossSums
from dmoa.training.distributed import SingleWorker, TorchGroup


def test_one_worker_divides_by_the_weight() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    world = SingleWorker(torch.device("cpu"))
    loss = world.backward(LossSums((parameter * torch.tensor([3.0, 5.0])).sum(), torch.tensor(4.0)), [parameter])
    assert loss == (13.0, 4.0)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.75, 1.25]
    assert world.share(7.0) == 7.0


def test_a_batch_without_pairs_leaves_no_gradient() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    loss = SingleWorker(torch.device("cpu")).backward(LossSums((parameter * 0).sum(), torch.tensor(0.0)), [parameter])
    assert loss.weight == 0
    assert parameter.grad is None


def test_a_group_of_one_agrees_with_working_alone(tmp_path: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    try:
        found = []
        for world in (SingleWorker(torch.device("cpu")), TorchGroup(torch.device("cpu"))):
            weights = [torch.nn.Parameter(torch.tensor([[1.0, 2.0]])), torch.nn.Parameter(torch.tensor([3.0]))]
            total = (weights[0] ** 2).sum() * weights[1].sum()
            loss = world.backward(LossSums(total, torch.tensor(5.0)), weights)
            found.append((loss, [weight.grad.tolist() for weight in weights if weight.grad is not None]))
        assert found[0] == found[1]
        # A worker that has no query of a batch adds nothing; here nobody has one.
        spare = [torch.nn.Parameter(torch.ones(2))]
        assert TorchGroup(torch.device("cpu")).backward(None, spare).weight == 0
        assert spare[0].grad is not None
        assert spare[0].grad.tolist() == [0.0, 0.0]
        assert TorchGroup(torch.device("cpu")).share(0.1) == 0.1
    finally:
        distributed.destroy_process_group()
