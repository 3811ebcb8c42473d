"""P14's plain loop learns what the training loop learns, so that the two are worth comparing; the bar is for `dmoa bench`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dmoa.bench.training import made_up_job, plain_rate
from dmoa.training.distributed import SingleWorker
from dmoa.training.loop import train_gate
from dmoa.training.state import StateStore


def test_the_plain_loop_ends_with_the_weights_of_the_training_loop(tmp_path: Path) -> None:
    job = made_up_job(tmp_path)
    job = replace(job, options=job.options.model_copy(update={"epochs": 7}))
    store = StateStore(str(tmp_path / "state"))
    store.check()
    train_gate(job, SingleWorker(torch.device("cpu")), store)
    assert plain_rate(job, tmp_path / "plain.pt") > 0
    state = store.read()
    assert state is not None
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)["gate"]
    for name, weight in state.part("weights").items():
        torch.testing.assert_close(plain[name], weight, rtol=1e-3, atol=1e-4)
    assert float((plain["head_weight"] - job.weights["head_weight"]).abs().max()) > 0.01


def test_the_loop_without_looking_runs_too(tmp_path: Path) -> None:
    job = made_up_job(tmp_path)
    job = replace(job, options=job.options.model_copy(update={"epochs": 6}))
    assert plain_rate(job, None) > 0
