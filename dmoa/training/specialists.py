"""Specialists: supervised training of LoRA adapters under Ray Train, data-parallel and resumable.

Driven by `cli/specialists.py`, which writes the rows; ends in a folder that PEFT and both engines load. Called again with
the same job and folder, training goes on where it was, or hands over what is finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dmoa.engines.models import model_id
from dmoa.errors import ConfigError, DmoaError
from dmoa.tracking import Mode, keep_run_id
from dmoa.training.lora_loop import ADAPTER, STATE, LoraJob, Schedule, latest_state, train_worker
from dmoa.training.lora_model import LoraSettings
from dmoa.training.lora_rows import TrainingRow

MAX_FAILURES = 3
"""Workers that may be lost before a run fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished adapter."""

    folder: Path
    steps: int
    """Updates made."""
    curve: list[dict[str, float]]
    """Held-out figures of every check, oldest first: step, accuracy, entropy_nats, and both per source."""


def build_job(
    name: str,
    model: str,
    settings: LoraSettings,
    schedule: Schedule,
    rows: list[TrainingRow],
    held_out: list[TrainingRow],
    *,
    run_dir: Path,
    track: Mode,
    threads: int | None,
) -> LoraJob:
    """Put a job together. Raises ConfigError where there are too few rows for the schedule."""
    needed = schedule.steps * schedule.batch_rows
    if len(rows) < needed:
        raise ConfigError(
            f"steps: value seen: {schedule.steps} of {schedule.batch_rows} rows; there are {len(rows)} rows and each is used "
            f"once; give {needed} rows or fewer steps"
        )
    base = model_id(model)
    texts = [row.model_dump_json() for row in (*rows, *held_out)]
    identity = json.dumps([name, base, settings.model_dump(), schedule.model_dump(), texts], sort_keys=True)
    return LoraJob(
        name=name,
        model=model,
        base=base,
        settings=settings,
        schedule=schedule,
        rows=tuple(rows),
        held_out=tuple(held_out),
        identity=hashlib.sha256(identity.encode()).hexdigest(),
        run_dir=str(run_dir.absolute()),
        track=track,
        threads=threads,
        state_dir=None,
    )


def train_adapter(job: LoraJob, *, out: Path, workers: int, storage_path: str | None, use_gpu: bool = False) -> Trained:
    """Train an adapter and write it into `out`; `workers` 0 trains in this process, else Ray must be up.

    `storage_path` is where Ray Train keeps checkpoints (any of Ray's file systems; None: beside the curves).
    Raises CheckpointError where the run's folder belongs to another job, DmoaError where training ends without an adapter.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from dmoa.dataflow import in_background

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    run_dir = Path(job.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if job.track != "none":
        job = replace(job, run_id=keep_run_id(run_dir, of=job.identity))
    state_dir = run_dir / "state"
    if workers == 0:
        job = replace(job, state_dir=str(state_dir))
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=f"adapter-{job.name}",
            storage_path=storage_path or str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        # Without workers it trains in this thread.
        result = in_background(trainer.fit, "training") if workers else trainer.fit()
    except TrainingFailedError as error:
        reason = " ".join(str(error).split())[-1500:]
        raise DmoaError(f"{job.name}: training stopped: {reason}; the same command goes on from the last state") from error
    if workers == 0:
        folder = latest_state(state_dir)
        if folder is None:
            raise DmoaError(f"{job.name}: training kept no state in {str(state_dir)!r}; remove the folder and train again")
        return _hand_over(folder, out)
    if result.checkpoint is None:
        raise DmoaError(f"{job.name}: Ray Train returned no checkpoint; look at {result.path} and train again")
    with result.checkpoint.as_directory() as directory:
        return _hand_over(Path(directory), out)


def _hand_over(state: Path, out: Path) -> Trained:
    """Copy the finished adapter out of a state."""
    plain: dict[str, Any] = json.loads((state / STATE).read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted((state / ADAPTER).iterdir()):
        unfinished = out / f"{file.name}.tmp"
        shutil.copyfile(file, unfinished)
        unfinished.replace(out / file.name)
    return Trained(folder=out, steps=plain["step"], curve=plain["curve"])
