"""Runs the training loop on Ray Train, and starts it again after a failure: from the state that was kept last."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.config import LoggingConfig

from dmoa.dataflow import in_background, stopped_by
from dmoa.errors import ConfigError
from dmoa.training.distributed import SingleWorker, TorchGroup, WorkerGroup
from dmoa.training.loop import BadStepsError, TrainJob, train_gate
from dmoa.training.state import StateStore


def train_on_ray(job: TrainJob, store: StateStore, num_workers: int) -> None:
    """Train with Ray Train's workers, over gloo or, with GPUs, nccl; a worker that is lost is replaced, `max_failures` times.

    Raises DmoaError where training stops; the state that was kept last stays.
    """
    options = job.options
    # By reference: the workers of a node share one copy of the arrays.
    config = {"job": ray.put(job), "place": store.place}
    error = fit_on_ray(_worker, config, store.place, num_workers, use_gpu=options.gpu, max_failures=options.max_failures)
    if error is not None:
        raise BadStepsError(error)


def fit_on_ray(
    worker: Callable[[dict[str, Any]], str | None],
    config: dict[str, Any],
    place: str,
    num_workers: int,
    *,
    use_gpu: bool = False,
    max_failures: int = 0,
    tick: Callable[[], None] = lambda: None,
    shares_place: bool = True,
) -> str | None:
    """Run a function in Ray Train's workers and return what the first one returns; `tick` is called now and then.

    `shares_place`: what the first one writes in `place` is read here. Raises DmoaError where it fails, ConfigError before it
    begins where its machine has another `place`.
    """
    with StateStore(place).marked() if shares_place else nullcontext("") as mark:
        result = run_trainer(
            _where_marked(worker, place, mark) if mark else worker,
            config,
            place,
            num_workers,
            use_gpu=use_gpu,
            max_failures=max_failures,
            tick=tick,
            name="ray-train",
            stopped="training stopped",
            advice="the same command goes on from the last state that was kept",
        )
    found: str | _Elsewhere | None = result.return_value
    if isinstance(found, _Elsewhere):
        raise ConfigError(
            f"--out: {place!r} is this machine's alone: Ray runs the worker on {found.host}, which would write to another; name "
            "a folder that all machines of the Ray share, or, to train a gate, a URI"
        )
    return found


def run_trainer(
    worker: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    place: str,
    num_workers: int,
    *,
    use_gpu: bool,
    max_failures: int,
    tick: Callable[[], None] = lambda: None,
    stopped: str,
    advice: str,
    **run: Any,
) -> ray.train.Result:
    """Run a function in Ray Train's workers; `run` as of `RunConfig`. Raises DmoaError where they stop, in the words given."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    trainer = TorchTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=RunConfig(
            storage_path=place,
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            **run,
        ),
    )
    try:
        return in_background(trainer.fit, "training", tick)
    except TrainingFailedError as error:
        raise stopped_by(error, stopped, advice) from error


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """Returned by workers in place of anything else where the first one does not see the place."""

    host: str


def _where_marked(worker: Callable[[dict[str, Any]], Any], place: str, mark: str) -> Callable[[dict[str, Any]], Any]:
    """Return a worker function that does its work only where the first worker sees the mark in the place."""

    def checked(config: dict[str, Any]) -> Any:
        host = "" if StateStore(place).has(mark) else socket.gethostname()
        if get_context().get_world_size() > 1:
            host = broadcast_from_rank_zero(host)
        return _Elsewhere(host) if host else worker(config)

    return checked


def world_of_worker() -> WorkerGroup:
    """Return the group of the Ray Train worker that this process is, and let torch use one thread."""
    torch.set_num_threads(1)
    return TorchGroup(get_device()) if get_context().get_world_size() > 1 else SingleWorker(get_device())


def _worker(config: dict[str, Any]) -> str | None:
    """Be one worker. Returns why training cannot go on, where another try would meet the same; None at its end."""
    job: TrainJob = ray.get(config["job"])
    try:
        train_gate(job, world_of_worker(), StateStore(config["place"]))
    except BadStepsError as error:
        return str(error)
    return None
