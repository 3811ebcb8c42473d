"""Runs the training loop on Ray Train, with as many workers as pay off, and starts it again after a failure.

A worker group that fails goes on from the state that was kept last; `choose_workers` picks the count for `workers: auto`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from statistics import median
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_context
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.config import LoggingConfig
from torch import distributed

from dmoa.core.inference import one_thread
from dmoa.dataflow import in_background
from dmoa.errors import DmoaError
from dmoa.training.distributed import SingleWorker, TorchGroup, flat_size
from dmoa.training.loop import BadStepsError, Learner, TrainJob, epoch_batches, train_gate
from dmoa.training.objective import batch_loss
from dmoa.training.state import StateStore

_NAME = "ray-train"

_ROUNDS = 9
_GAIN = 0.9
"""More workers are taken only where an update is expected to take less than this share of one worker's: the measurement is
short, and a network is slower than one machine's memory."""
_TIMEOUT = timedelta(seconds=60)


def train_on_ray(job: TrainJob, store: StateStore, num_workers: int) -> None:
    """Train with Ray Train's workers, over gloo or, with GPUs, nccl; a worker that is lost is replaced, `max_failures` times.

    Raises DmoaError where training stops; the state that was kept last stays.
    """
    options = job.options
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    trainer = TorchTrainer(
        _worker,
        # By reference: the workers of a node share one copy of the arrays.
        train_loop_config={"job": ray.put(job), "place": store.place},
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=options.gpu),
        run_config=RunConfig(
            name=_NAME,
            storage_path=store.place,
            failure_config=FailureConfig(max_failures=options.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        result = in_background(trainer.fit, "training")
    except TrainingFailedError as error:
        reason = " ".join(str(error).split())[-1500:]
        raise DmoaError(f"training stopped: {reason}; the same command goes on from the last state that was kept") from error
    if result.return_value is not None:
        raise BadStepsError(result.return_value)


def _worker(config: dict[str, Any]) -> str | None:
    """Be one worker. Returns why training cannot go on, where another try would meet the same; None at its end."""
    job: TrainJob = ray.get(config["job"])
    world = TorchGroup(get_device()) if get_context().get_world_size() > 1 else SingleWorker(get_device())
    torch.set_num_threads(1)
    try:
        train_gate(job, world, StateStore(config["place"]))
    except BadStepsError as error:
        return str(error)
    return None


def choose_workers(job: TrainJob, most: int) -> tuple[int, str]:
    """Return how many of at most `most` workers to take, and why, in words."""
    most = min(most, job.options.batch_queries)
    if most < 2 or job.options.gpu:
        reason = "one GPU is enough for a gate" if job.options.gpu else "there is room for one"
        return 1, reason
    with one_thread():
        learner = Learner(job, SingleWorker(torch.device("cpu")))
        batch = next(epoch_batches(job, 0))

        def gradient(size: int) -> Callable[[], object]:
            part = learner.batches.gather(batch[:size])
            return lambda: torch.autograd.backward(batch_loss(learner.gate, part, loss=job.options.loss, eta=job.eta).total)

        def seconds_with(count: int) -> float:
            return _seconds(gradient(-(-len(batch) // count)))

        alone_s = _seconds(lambda: learner.update(batch))
        fixed_s = max(0.0, alone_s - seconds_with(1))
        sizes = [count for count in (2, 4, 8, 16) if count <= most]
        times = {1: alone_s} | {count: fixed_s + seconds_with(count) for count in sizes}
    reduce_s = _reduce_seconds(flat_size(list(learner.gate.parameters())), learner.gate.head()[0].dtype)
    totals = {count: seconds + (reduce_s if count > 1 else 0.0) for count, seconds in times.items()}
    count = best_count(totals)
    beside = ", ".join(f"{number}: {1e3 * seconds:.2f} ms" for number, seconds in totals.items())
    return count, f"expected time of an update by workers: {beside}"


def best_count(seconds: Mapping[int, float]) -> int:
    """Return the number of workers with the shortest update, of expected times by number; 1 unless it is clearly shorter."""
    best = min(seconds, key=lambda count: seconds[count])
    return best if seconds[best] < _GAIN * seconds[1] else 1


def _seconds(call: Callable[[], object]) -> float:
    """Return the median time of a call, after a first one that does not count."""
    call()
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


def _reduce_seconds(numbers: int, dtype: torch.dtype) -> float:
    """Return the time of one all-reduce between two workers of this machine: two threads over gloo."""
    store = distributed.HashStore()  # type: ignore[attr-defined] # not among its exports

    def worker(rank: int) -> float:
        group = distributed.ProcessGroupGloo(store, rank, 2, _TIMEOUT)
        values = torch.zeros(numbers, dtype=dtype)
        return _seconds(lambda: group.allreduce([values]).wait())  # type: ignore[attr-defined] # of the compiled class

    with ThreadPoolExecutor(max_workers=2) as threads:
        return max(threads.map(worker, range(2)))
