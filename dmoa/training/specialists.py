"""Trains a LoRA specialist with transformers' Trainer, in this process or in Ray Train's workers; a broken run goes on.

Rows are taken in their order, each once. Losses are divided by the target tokens of the whole batch, so that the weights do
not depend on the number of workers, but for rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from pydantic import Field
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from dmoa.engine_options import Node
from dmoa.engines.models import model_id
from dmoa.errors import CheckpointError, ConfigError, DmoaError
from dmoa.tracking import Mode, Tracker, keep_run_id, open_tracker
from dmoa.training.lora import LoraSettings, TrainingRow, collate, encode, export_adapter, judge_rows, load_lora

STATE = "trainer_state.json"
"""The file of a state that is written last: a folder without it was not finished."""
MAX_FAILURES = 3
"""Workers that may be lost before a run fails."""


class Schedule(Node):
    """How an adapter is trained."""

    steps: int = Field(ge=1)
    """Most updates; every row is used once, so `steps` x `batch_rows` rows are needed."""
    batch_rows: int = Field(default=16, ge=1)
    """Rows of one update, all workers together: a multiple of their number."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Of AdamW at its highest: it rises over the first steps and falls along half a cosine."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    final_share: float = Field(default=0.05, ge=0, le=1)
    """Part of the learning rate that is left at the end."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a gradient."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the fresh adapter; the rows have theirs."""
    check_every: int = Field(default=20, ge=1)
    """Updates between two looks at the held-out rows; each keeps the state."""
    stop_accuracy: float | None = Field(default=None, gt=0, le=1)
    """End as soon as so many of the held-out rows are right; None: after `steps`."""
    bfloat16: bool = False
    """Multiply in bfloat16, several times quicker where the processor has it; the adapter itself stays float32."""


@dataclass(frozen=True, kw_only=True)
class LoraJob:
    """Everything that a worker is told; pickles."""

    name: str
    model: str
    """The `model` of an LLM, such as `embedded:smollm2-135m`."""
    settings: LoraSettings
    schedule: Schedule
    rows: tuple[TrainingRow, ...]
    held_out: tuple[TrainingRow, ...]
    run_dir: Path
    """Absolute folder for curves, on the machine of the first worker."""
    track: Mode = "none"
    threads: int | None = None
    """CPU threads of a worker; None: as torch finds them."""
    run_id: str | None = None
    """Of the tracker's run, whatever machine the first worker is on; None: the one kept in `run_dir`."""

    @cached_property
    def base(self) -> str:
        """Stable id of the base's bytes: goes into the adapter's settings."""
        return model_id(self.model)

    @cached_property
    def identity(self) -> str:
        """Hash of what decides the adapter: state of another job is refused."""
        texts = [row.model_dump_json() for row in (*self.rows, *self.held_out)]
        values = [self.name, self.base, self.settings.model_dump(), self.schedule.model_dump(), texts]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class _Trainer(Trainer):  # type: ignore[misc]  # transformers ships no usable types
    """Computes logits for targets alone: those of a whole prompt are most of the work on a large vocabulary."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        return super().compute_loss(model, inputs | {"logits_to_keep": inputs["labels"].shape[1]}, *args, **options)


class _Progress(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Tells how the training goes, ends it, and hands every state to Ray Train where that keeps them."""

    def __init__(self, job: LoraJob, tracker: Tracker, *, reports: bool) -> None:
        self._job, self._tracker, self._reports = job, tracker, reports
        self._begun_s = 0.0

    def state(self) -> dict[str, Any]:
        """Return what is kept beside a state."""
        return {"args": {}, "attributes": {"identity": self._job.identity}}

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._begun_s = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **more: Any) -> None:
        if "loss" not in logs:
            return
        loss, took_s = logs["loss"], time.perf_counter() - self._begun_s
        if not math.isfinite(loss):
            raise DmoaError(f"{self._job.name}: the loss of step {state.global_step} is {loss}; lower the learning_rate")
        values = {"loss_nats": loss, "gradient_norm": float(logs["grad_norm"]), "step_s": took_s}
        self._tracker.log(values, step=state.global_step)
        if state.is_world_process_zero:
            place = f"step {state.global_step}/{state.max_steps}"
            _tell(f"{self._job.name}: {place}, loss {loss:.3f} nats/token, {took_s:.1f} s")

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        last = _curve(state.log_history)[-1]
        values = {f"held_out/{name}": value for name, value in last.items() if name != "step"}
        self._tracker.log(values, step=state.global_step)
        control.should_training_stop |= _is_enough(self._job, [last])
        if state.is_world_process_zero:
            _tell(f"{self._job.name}: step {state.global_step}, held-out accuracy {last['accuracy']:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        import ray.train

        if not self._reports:
            return
        checkpoint = None
        if state.is_world_process_zero:
            checkpoint = ray.train.Checkpoint.from_directory(args.output_dir)
        ray.train.report(_curve(state.log_history)[-1], checkpoint=checkpoint)


def _curve(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return the held-out figures of every check: step, accuracy, entropy_nats, and both per source."""
    own = ("step", "eval_accuracy", "eval_entropy_nats")
    checks = (point for point in history if "eval_accuracy" in point)
    return [{name.removeprefix("eval_"): float(point[name]) for name in point if name.startswith(own)} for point in checks]


def _is_enough(job: LoraJob, curve: Sequence[dict[str, float]]) -> bool:
    stop = job.schedule.stop_accuracy
    return bool(curve) and stop is not None and curve[-1]["accuracy"] >= stop


def _figures(sources: Sequence[str], judged_N2: np.ndarray[Any, Any]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name in (None, *sorted(set(sources))):
        own = [number for number, source in enumerate(sources) if name in (None, source)]
        accuracy, entropy = judged_N2[own].mean(axis=0)
        end = "" if name is None else f"/{name}"
        figures |= {f"accuracy{end}": float(accuracy), f"entropy_nats{end}": float(entropy)}
    return figures


def _arguments(schedule: Schedule, folder: Path, num_workers: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_rows // num_workers,
        per_device_eval_batch_size=schedule.batch_rows,
        train_sampling_strategy="sequential",
        learning_rate=schedule.learning_rate,
        adam_beta2=0.99,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": schedule.final_share},
        warmup_steps=int(schedule.warmup_share * schedule.steps),
        max_grad_norm=schedule.clip,
        seed=schedule.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=schedule.check_every,
        save_steps=schedule.check_every,
        save_total_limit=2,
        bf16=schedule.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )


def _train(job: LoraJob, folder: Path, state: Path | None, *, rank: int = 0, num_workers: int = 1, reports: bool = False) -> None:
    """Train to the end, from a state where there is one; states go to `folder`. Raises CheckpointError for another job's."""
    if state is not None and _is_done(job, state):
        return
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    transformers.utils.logging.set_verbosity_error()
    # transformers, accelerate and PEFT warn of each other's calls, and steps are told on the same stderr.
    with warnings.catch_warnings(action="ignore"):
        _fit(job, folder, state, rank=rank, num_workers=num_workers, reports=reports)


def _fit(job: LoraJob, folder: Path, state: Path | None, *, rank: int, num_workers: int, reports: bool) -> None:
    model, tokenizer = load_lora(job.model, job.settings, seed=job.schedule.seed)
    sources = [row.source for row in job.held_out]
    mode = job.track if rank == 0 else "none"
    tracker = open_tracker(mode, run_dir=job.run_dir, name=f"adapter-{job.name}", run_id=job.run_id, of=job.identity)
    tracker.config({"settings": job.settings.model_dump(), "schedule": job.schedule.model_dump(), "base": job.base})
    arguments = _arguments(job.schedule, folder, num_workers)
    arguments._n_gpu = min(1, arguments.n_gpu)  # Trainer would widen the batch over every GPU that it sees
    trainer = _Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=encode(tokenizer, job.rows),
        eval_dataset=encode(tokenizer, job.held_out),
        preprocess_logits_for_metrics=judge_rows,
        compute_metrics=lambda found: _figures(sources, found.predictions),
        callbacks=[_Progress(job, tracker, reports=reports)],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=None if state is None else str(state))
    finally:
        tracker.finish()


def _is_done(job: LoraJob, state: Path) -> bool:
    """Tell whether a state is that of a finished training. Raises CheckpointError for that of another job."""
    plain = json.loads((state / STATE).read_text(encoding="utf-8"))
    if plain["stateful_callbacks"][_Progress.__name__]["attributes"]["identity"] != job.identity:
        raise CheckpointError(
            f"{job.name}: the folder holds the state of a run with other settings, rows or base model; name another folder in "
            "job.out, or remove the old one"
        )
    return plain["global_step"] >= job.schedule.steps or _is_enough(job, _curve(plain["log_history"]))


def train_worker(config: dict[str, Any]) -> None:
    """Train to the end; Ray Train calls this in every worker with {"job": LoraJob}."""
    import ray.train

    context, checkpoint = ray.train.get_context(), ray.train.get_checkpoint()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    kept = checkpoint.as_directory() if checkpoint else nullcontext()
    with tempfile.TemporaryDirectory() as folder, kept as directory:
        state = latest_state(Path(directory)) if directory else None
        _train(config["job"], Path(folder), state, rank=rank, num_workers=num_workers, reports=True)


def latest_state(folder: Path) -> Path | None:
    """Return the newest whole state in a folder, None where there is none."""
    return max((file.parent for file in folder.glob(f"checkpoint-*/{STATE}")), key=lambda p: int(p.name[11:]), default=None)


def _tell(sentence: str) -> None:
    print(f"dmoa: {sentence}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedAdapter:
    """A finished adapter."""

    folder: Path
    steps: int
    """Updates made."""
    curve: list[dict[str, float]]
    """Held-out figures of every check, oldest first: step, accuracy, entropy_nats, and both per source."""


def train_adapter(job: LoraJob, *, out: Path, workers: int, storage_path: str | None, use_gpu: bool = False) -> TrainedAdapter:
    """Train an adapter and write it into `out`; `workers` 0 trains in this process, else Ray must be up.

    `storage_path` is where Ray Train keeps checkpoints (any of Ray's file systems; None: beside the curves). Raises
    ConfigError where there are too few rows, or workers cannot share a batch evenly, CheckpointError where the run's folder
    belongs to another job, DmoaError where training ends without an adapter.
    """
    schedule = job.schedule
    needed = schedule.steps * schedule.batch_rows
    if len(job.rows) < needed:
        raise ConfigError(
            f"steps is {schedule.steps} of {schedule.batch_rows} rows; there are {len(job.rows)} rows and each is used "
            f"once; give {needed} rows or fewer steps"
        )
    if workers and schedule.batch_rows % workers:
        raise ConfigError(
            f"workers is {workers}; batch_rows is {schedule.batch_rows}, which they cannot share evenly; give a "
            "number that divides it"
        )
    run_dir, states = job.run_dir, job.run_dir / "state"
    state = None if workers else latest_state(states)
    if state is not None:
        _is_done(job, state)  # another job is refused before its curves take the place of this one's
    run_dir.mkdir(parents=True, exist_ok=True)
    if job.track != "none":
        job = replace(job, run_id=keep_run_id(run_dir, of=job.identity))
    if workers == 0:
        _train(job, states, state)
        return _hand_over(job, states, out)
    from ray.train import CheckpointConfig

    from dmoa.training.ray_train import run_trainer

    result = run_trainer(
        train_worker,
        {"job": job},
        storage_path or str(run_dir / "ray"),
        workers,
        use_gpu=use_gpu,
        max_failures=MAX_FAILURES,
        name=f"adapter-{job.name}",
        checkpoint_config=CheckpointConfig(num_to_keep=2),
        stopped=f"{job.name}: training stopped",
        advice="the same command goes on from the last state",
    )
    if result.checkpoint is None:
        raise DmoaError(f"{job.name}: Ray Train returned no checkpoint; look at {result.path} and train again")
    with result.checkpoint.as_directory() as directory:
        return _hand_over(job, Path(directory), out)


def _hand_over(job: LoraJob, states: Path, out: Path) -> TrainedAdapter:
    """Write the finished adapter of the newest state."""
    state = latest_state(states)
    if state is None:
        raise DmoaError(f"{job.name}: training kept no state in {str(states)!r}; remove the folder and train again")
    plain = json.loads((state / STATE).read_text(encoding="utf-8"))
    export_adapter(state, out, base=job.base)
    return TrainedAdapter(folder=out, steps=plain["global_step"], curve=_curve(plain["log_history"]))
