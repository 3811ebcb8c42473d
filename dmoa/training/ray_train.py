"""Runs the training loop on Ray Train, and starts it again after a failure: from the state that was kept last."""

from __future__ import annotations

import logging
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_context
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.config import LoggingConfig

from dmoa.dataflow import in_background
from dmoa.errors import DmoaError
from dmoa.training.distributed import SingleWorker, TorchGroup
from dmoa.training.loop import BadStepsError, TrainJob, train_gate
from dmoa.training.state import StateStore

_NAME = "ray-train"


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
