"""P14: gate updates per second under Ray Train beside the same training as a plain torch loop, after start-up.

Both arms train the default gate on the same made-up rollouts, in the same global batches, with the same loss: one Ray Train
worker with everything that `dmoa train` does (held-back queries every epoch, state on disk for at most 2 % of the time), and a
loop as one writes it by hand, with a look at the held-back loss every epoch and a `torch.save` as seldom. Reported beside it:
the updates alone. No agent runs.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import ray
import torch
from torch import Tensor

from dmoa.bench.harness import BenchResult, interleave, ratio, record, spread
from dmoa.config import GateConfig
from dmoa.core.gate import GateSpec, init_gate
from dmoa.core.inference import one_thread
from dmoa.core.losses import Targets, ranking_loss
from dmoa.training.loop import KEEP_SHARE, TrainJob, epoch_batches
from dmoa.training.objective import TrainingData
from dmoa.training.options import TrainOptions
from dmoa.training.state import StateStore

NUM_AGENTS = 8
NUM_STEPS = 3
NUM_QUERIES = 80
EPOCHS = 150
BATCH_QUERIES = 4
BAR = 0.95
ENGINE = "gate"
_SKIPPED = 5
"""Epochs of each run that do not count: what is done for the first time takes longer."""
_ETA = 1.0


def run(rounds: int = 7) -> list[BenchResult]:
    """Return P14 and the figures beside it. Takes some twenty seconds a round; starts a Ray of its own unless one runs."""
    is_own = not ray.is_initialized()
    if is_own:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job = made_up_job(folder)
            arms = {
                "ray": _ray_arm(job, folder),
                "plain": lambda: plain_rate(job, folder / "plain.pt"),
                "bare": lambda: plain_rate(job, None),
            }
            rates = interleave(arms, rounds)
    finally:
        if is_own:
            ray.shutdown()
    size = f"{NUM_QUERIES} queries of {NUM_STEPS} steps, {NUM_AGENTS} agents, batches of {BATCH_QUERIES}"
    judged = f"one Ray Train worker / plain torch loop, updates/s after start-up; {size}"
    bare = "the same against a loop that neither looks nor keeps"
    return [
        record("P14", ratio(rates["ray"], rates["plain"]), "x", engine=ENGINE, note=judged, at_least=BAR),
        record("P14.bare", ratio(rates["ray"], rates["bare"]), "x", engine=ENGINE, note=bare),
        *(record(f"P14.{arm}_rate", spread(rates[arm]), "updates/s", engine=ENGINE, note=note) for arm, note in _ARMS.items()),
    ]


_ARMS = {
    "ray": "one Ray Train worker, epochs as `dmoa train` runs them",
    "plain": "plain torch loop with a look at the held-back loss, and a torch.save for at most 2 % of the time",
    "bare": "plain torch loop of updates alone",
}


def made_up_job(folder: Path) -> TrainJob:
    """Return a training of the default gate on random inputs and scores: what is learned does not matter, its size does."""
    rng = np.random.default_rng(0)
    spec = GateSpec.from_config(GateConfig(), tuple(f"agent-{i}" for i in range(NUM_AGENTS)))
    num_steps = NUM_QUERIES * NUM_STEPS
    shape = (num_steps, NUM_AGENTS)
    held = NUM_QUERIES // 4
    options = TrainOptions.parse(
        {
            "rollouts": ["made-up"],
            "out": folder / "run",
            "epochs": EPOCHS,
            "patience": EPOCHS,
            "batch_queries": BATCH_QUERIES,
            "workers": 1,
        }
    )
    data = TrainingData(
        start_Q=np.arange(0, num_steps + 1, NUM_STEPS),
        input_NX=(rng.standard_normal((num_steps, spec.input_dim)) / math.sqrt(spec.embedding_dim)).astype(np.float32),
        score_NA=rng.standard_normal(shape),
        ran_NA=np.ones(shape, dtype=np.bool_),
        weight_NA=np.full(shape, 0.8),
        noise_NA=np.full(shape, 0.01),
        train_Q=np.arange(held, NUM_QUERIES),
        held_Q=np.arange(held),
    )
    weights = {name: tensor.detach().clone() for name, tensor in init_gate(spec, seed=0).state_dict().items()}
    return TrainJob(options=options, spec=spec, weights=weights, data=data, eta=_ETA, identity={})


def _ray_arm(job: TrainJob, folder: Path) -> Callable[[], float]:
    """Return a call that trains once under Ray Train, and gives the updates per second after start-up."""
    runs = count()

    def call() -> float:
        from dmoa.training.ray_train import train_on_ray

        store = StateStore(str(folder / f"state-{next(runs)}"))
        store.check()
        train_on_ray(job, store, 1)
        progress = store.read_progress()
        assert progress is not None
        counted = progress.epochs[_SKIPPED:]
        return sum(epoch.updates for epoch in counted) / sum(epoch.seconds for epoch in counted)

    return call


def plain_rate(job: TrainJob, keep: Path | None) -> float:
    """Train the same job by a loop written by hand, and return the updates per second after the first epochs.

    `keep`: where weights and optimizer are saved, as seldom as `training/loop` does, and at the end; None: neither saved nor the
    held-back loss looked at.
    """
    options, data = job.options, job.data
    gate = job.build_gate(torch.device("cpu"))
    optimizer = torch.optim.AdamW(gate.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
    x_QSX = torch.from_numpy(data.input_NX).view(NUM_QUERIES, NUM_STEPS, -1)
    parts = (data.score_NA, data.ran_NA, data.weight_NA, data.noise_NA)
    target_QSA = [torch.from_numpy(part).view(NUM_QUERIES, NUM_STEPS, -1) for part in parts]
    target_QSA = [part if part.dtype == torch.bool else part.float() for part in target_QSA]

    def loss(queries: Tensor) -> Tensor:
        hidden_BH = torch.zeros(len(queries), gate.spec.hidden)
        logits_S = []
        for x_BX in x_QSX[queries].unbind(1):
            logits_BA, hidden_BH = gate(x_BX, hidden_BH)
            logits_S.append(logits_BA)
        targets = Targets(*(part[queries].flatten(0, 1) for part in target_QSA))
        logits_NA = torch.stack(logits_S, dim=1).flatten(0, 1)
        total, weight = ranking_loss("soft", logits_NA, targets, temperature=gate.spec.temperature, eta=job.eta)
        return total / weight

    held_Q, updates, began = torch.from_numpy(data.held_Q), 0, 0.0
    due_s = 0.0
    with one_thread():
        for epoch in range(1, options.epochs + 1):
            if epoch == _SKIPPED + 1:
                updates, began = 0, time.perf_counter()
            for queries in epoch_batches(job, epoch):
                optimizer.zero_grad()
                torch.autograd.backward(loss(torch.from_numpy(queries)))
                torch.nn.utils.clip_grad_norm_(gate.parameters(), options.clip)
                optimizer.step()
                updates += 1
            if keep is not None:
                with torch.no_grad():
                    loss(held_Q)
                saving = time.perf_counter()
                if saving >= due_s or epoch == options.epochs:
                    torch.save({"gate": gate.state_dict(), "optimizer": optimizer.state_dict()}, keep)
                    due_s = time.perf_counter() + (time.perf_counter() - saving) / KEEP_SHARE
    return updates / (time.perf_counter() - began)
