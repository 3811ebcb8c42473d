"""The training loop of one worker: epochs over global batches that are the same whatever the number of workers.

Runs in process, in each Ray Train worker, and in the benchmark of updates. Worker r of W takes the queries r, r + W, ... of
each global batch; the first one measures the held-back queries and keeps the run's state between epochs. No Ray here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from dmoa.core.gate import Gate, GateSpec
from dmoa.core.inference import one_thread
from dmoa.core.losses import LossSums
from dmoa.core.scores import IntArray
from dmoa.errors import DmoaError
from dmoa.training.distributed import WorkerGroup
from dmoa.training.gate_metrics import held_metrics
from dmoa.training.objective import Batches, TrainingData, batch_loss
from dmoa.training.options import TrainOptions
from dmoa.training.state import EpochRecord, RunState, StateStore, TrainProgress

KEEP_SHARE = 0.02
"""Part of the time that may go into keeping the state: few-shot epochs are over sooner than a state is written."""
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What is to be trained, on what; the same for all workers."""

    options: TrainOptions
    spec: GateSpec
    weights: dict[str, Tensor]
    """Initial weights and buffers, float32 on the CPU."""
    data: TrainingData
    eta: float
    identity: dict[str, Any]
    """As in `TrainProgress`."""

    def build_gate(self, device: torch.device) -> Gate:
        """Return the gate with its initial weights, in the dtype that is trained."""
        return Gate.of(self.spec, self.weights).to(device, _DTYPES[self.options.dtype])


def epoch_batches(job: TrainJob, epoch: int) -> Iterator[IntArray]:
    """Yield the global batches of an epoch: all episodes that are learned from, in an order of seed and epoch alone."""
    order = np.random.default_rng([job.options.seed, epoch]).permutation(job.data.train_Q)
    for start in range(0, len(order), job.options.batch_queries):
        yield order[start : start + job.options.batch_queries]


class Learner:
    """A gate with its optimizer, and what becomes of it batch by batch."""

    def __init__(self, job: TrainJob, world: WorkerGroup) -> None:
        """Begin with the job's initial weights."""
        self.gate = job.build_gate(world.device)
        self.batches = Batches(job.data, _DTYPES[job.options.dtype], world.device)
        self.progress = TrainProgress(identity=job.identity)
        self.best = self._weights()
        self._lap_s = time.perf_counter()
        self._job = job
        self._world = world
        self._parameters = list(self.gate.parameters())
        options = job.options
        self._optimizer = torch.optim.AdamW(self._parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True)

    def follow(self, job: TrainJob) -> None:
        """Go on with another job's data and targets: weights and moments stay as they are, and so does the optimizer."""
        self._job = job
        self.batches = Batches(job.data, _DTYPES[job.options.dtype], self._world.device)

    def update(self, episodes: IntArray) -> UpdateResult:
        """Learn from one global batch; a loss or gradient that is not finite changes nothing."""
        mine = episodes[self._world.rank :: self._world.size]
        self._optimizer.zero_grad()
        sums: LossSums | None = None
        if len(mine):
            sums = batch_loss(self.gate, self.batches.gather(mine), loss=self._job.options.loss, eta=self._job.eta)
        total, weight = self._world.backward(sums, self._parameters)
        if weight == 0:
            return UpdateResult(0.0, 0.0, 0.0, is_bad=False)
        norm = float(clip_grad_norm_(self._parameters, self._job.options.clip))
        if not (math.isfinite(total) and math.isfinite(weight) and math.isfinite(norm)):
            return UpdateResult(0.0, 0.0, 0.0, is_bad=True)
        self._optimizer.step()
        return UpdateResult(total, weight, norm, is_bad=False)

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.gate.state_dict().items()}

    def snapshot(self) -> RunState:
        """Return everything that going on needs."""
        tensors = {f"weights/{name}": tensor for name, tensor in self._weights().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.gate.named_parameters():
            for kind in ("exp_avg", "exp_avg_sq"):
                if parameter in self._optimizer.state:
                    tensors[f"{kind}/{name}"] = self._optimizer.state[parameter][kind].detach().cpu()
        return RunState(self.progress, tensors)

    def restore(self, state: RunState) -> None:
        """Go on from a state of the same job."""
        self.progress = state.progress
        self.gate.load_state_dict(state.part("weights"))
        self.best = state.part("best")
        first, second = state.part("exp_avg"), state.part("exp_avg_sq")
        for name, parameter in self.gate.named_parameters():
            if name in first:
                moments = {"exp_avg": first[name].to(parameter), "exp_avg_sq": second[name].to(parameter)}
                step = torch.tensor(float(state.progress.num_updates), device=parameter.device)
                self._optimizer.state[parameter] = {"step": step, **moments}

    def lap_s(self) -> float:
        """Return the seconds since the last call, or since the beginning."""
        before, self._lap_s = self._lap_s, time.perf_counter()
        return self._lap_s - before

    def end_epoch(self, record: EpochRecord, num_updates: int) -> None:
        """Take note of a finished epoch; the best weights are those with the lowest held-back loss, else the last."""
        before = self.progress
        held, best = record.held_loss, before.best_loss
        is_best = best is None or (held is not None and held < best)
        best_epoch = record.epoch if is_best else before.best_epoch
        if is_best:
            self.best = self._weights()
        self.progress = before.model_copy(
            update={
                "epochs": (*before.epochs, record),
                "num_updates": before.num_updates + num_updates,
                "bad_steps": record.bad_steps,
                "best_epoch": best_epoch,
                "best_loss": held if is_best else best,
                "ended": _end(self._job.options, record.epoch, best_epoch),
            }
        )


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """The outcome of one global batch."""

    total: float
    """Sum of the loss's weighted terms; 0 where the batch taught nothing."""
    weight: float
    norm: float
    """Of the gradient, before clipping."""
    is_bad: bool
    """Loss or gradient was not finite, and the batch was skipped."""


def _end(options: TrainOptions, epoch: int, best_epoch: int) -> str | None:
    """Return why training is over after an epoch, None while it is not."""
    if epoch - best_epoch >= options.patience:
        return f"no lower held-back loss for {options.patience} epochs"
    return "all epochs done" if epoch >= options.epochs else None


def train_gate(job: TrainJob, world: WorkerGroup, store: StateStore, keep_share: float = KEEP_SHARE) -> TrainProgress:
    """Train to the end, from the state in `store` if there is one; states of whole epochs are kept there.

    One is kept as soon as keeping has taken no more than `keep_share` of the time, and at the end: what a failure costs is some
    fifty times what writing takes. Raises DmoaError, the state that was kept last intact, where more than `max_bad_steps`
    updates were not finite.
    """
    with one_thread():
        learner = Learner(job, world)
        state = store.read()
        if state is not None:
            learner.restore(state)
        epoch = len(learner.progress.epochs)
        if world.share(epoch) != epoch:
            raise DmoaError(
                f"train: the workers read states of different epochs from {store.place!r}; is another run writing it?"
            )
        due_s = time.perf_counter()
        while learner.progress.ended is None:
            run_epoch(learner, job, world)
            began_s = time.perf_counter()
            if world.rank == 0 and (began_s >= due_s or learner.progress.ended is not None):
                store.write(learner.snapshot())
                ended_s = time.perf_counter()
                due_s = ended_s + (ended_s - began_s) / keep_share
    return learner.progress


def run_epoch(learner: Learner, job: TrainJob, world: WorkerGroup) -> None:
    """Learn from every global batch of the next epoch, and measure the held-back queries."""
    epoch = len(learner.progress.epochs) + 1
    results: list[UpdateResult] = []
    bad_steps = learner.progress.bad_steps
    for episodes in epoch_batches(job, epoch):
        result = learner.update(episodes)
        bad_steps += result.is_bad
        if bad_steps > job.options.max_bad_steps:
            raise BadStepsError(
                f"train: loss or gradient was not finite in {bad_steps} updates, max_bad_steps is {job.options.max_bad_steps}; "
                "lower lr, or look for rollouts with extreme numbers"
            )
        if result.weight:
            results.append(result)
    if bad := next((name for name, one in learner.gate.named_parameters() if not one.isfinite().all()), None):
        raise BadStepsError(f"train: {bad} is not finite after epoch {epoch}; lower lr, which is {job.options.lr:g}")
    weight = sum(result.weight for result in results)
    loss, pairwise = _held(learner, job, world)
    record = EpochRecord(
        epoch=epoch,
        train_loss=sum(result.total for result in results) / weight if weight else None,
        held_loss=loss,
        held_pairwise=pairwise,
        grad_norm=sum(result.norm for result in results) / max(1, len(results)),
        updates=len(results),
        bad_steps=bad_steps,
        seconds=learner.lap_s(),
    )
    learner.end_epoch(record, len(results))


class BadStepsError(DmoaError, RuntimeError):
    """Too many updates were not finite, or weights are not: trying again would meet the same."""


def _held(learner: Learner, job: TrainJob, world: WorkerGroup) -> tuple[float | None, float | None]:
    """Return loss and pairwise accuracy on the held-back queries, by the first worker's numbers; None where not finite."""
    found = (math.nan, math.nan)
    if world.rank == 0:
        found = held_metrics(learner.gate, learner.batches, job.data.held_Q, loss=job.options.loss, eta=job.eta)
    loss, pairwise = (value if math.isfinite(value) else None for value in world.share(found))
    return loss, pairwise
