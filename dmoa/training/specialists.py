"""Trains a LoRA specialist on Ray Train or in process: steps, checks on held-out rows, state to go on from, the adapter's files.

All workers know the seeded order of rows; of every global batch, worker r of W takes rows r, r + W, ...; losses are divided by
the tokens of the global batch and gradients summed, so the weights do not depend on W.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmoa.engine_options import Node
from dmoa.engines.models import model_id
from dmoa.errors import CheckpointError, ConfigError, DmoaError
from dmoa.tracking import Mode, Tracker, keep_run_id, open_tracker
from dmoa.training.lora import LoraModel, LoraSettings, TrainingRow, encode

STATE, WEIGHTS, ADAPTER = "state.json", "state.safetensors", "adapter"

MAX_FAILURES = 3
"""Workers that may be lost before a run fails."""


class Schedule(Node):
    """How an adapter is trained."""

    steps: int = Field(ge=1)
    """Most updates; every row is used once, so `steps` x `batch_rows` rows are needed."""
    batch_rows: int = Field(default=16, ge=1)
    """Rows of one update, all workers together."""
    rows_per_pack: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    """Of AdamW at its highest: it rises over the first steps and falls along half a cosine."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    final_share: float = Field(default=0.05, ge=0, le=1)
    """Part of the learning rate that is left at the end."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a gradient."""
    seed: int = Field(default=0, ge=0)
    """Of the fresh adapter; the rows have theirs."""
    check_every: int = Field(default=20, ge=1)
    """Updates between two looks at the held-out rows; each keeps the state."""
    stop_accuracy: float | None = Field(default=None, gt=0, le=1)
    """End as soon as so many of the held-out rows are right; None: after `steps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraJob:
    """Everything that a worker is told; pickles."""

    name: str
    model: str
    """The `model` of an LLM, such as `embedded:smollm2-135m`."""
    base: str
    """Stable id of the base's bytes: goes into the adapter's settings."""
    settings: LoraSettings
    schedule: Schedule
    rows: tuple[TrainingRow, ...]
    held_out: tuple[TrainingRow, ...]
    identity: str
    """Hash of all the above: state of another job is refused."""
    run_dir: str
    """Absolute folder for curves, on the machine of the first worker."""
    track: Mode
    threads: int | None
    """CPU threads of a worker; None: as torch finds them."""
    state_dir: str | None
    """Where state is kept without workers; None: Ray Train keeps it."""
    run_id: str | None = None
    """Of the tracker's run, whatever machine the first worker is on; None: the one kept in `run_dir`."""


def train_worker(config: dict[str, Any]) -> None:
    """Train to the end; Ray Train calls this in every worker with {"job": LoraJob}."""
    import ray.train

    job: LoraJob = config["job"]
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    context = ray.train.get_context()
    worker = _Worker(job, rank=context.get_world_rank(), num_workers=context.get_world_size())
    with _kept(job) as folder:
        if folder is not None:
            worker.restore(folder)
    # A training that is over has nothing to log.
    mode, place = job.track if worker.rank == 0 and not worker.is_done else "none", Path(job.run_dir)
    tracker = open_tracker(mode, run_dir=place, name=f"adapter-{job.name}", run_id=job.run_id, of=job.identity)
    tracker.config({"settings": job.settings.model_dump(), "schedule": job.schedule.model_dump(), "base": job.base})
    try:
        while not worker.is_done:
            worker.update(tracker)
            if worker.is_due:
                metrics = worker.check(tracker)
                _keep(worker, metrics)
    finally:
        tracker.finish()


class _Worker:
    """One worker's share of the training, and the state that all workers have alike."""

    def __init__(self, job: LoraJob, *, rank: int, num_workers: int) -> None:
        self.job, self.rank, self.num_workers = job, rank, num_workers
        self.model = LoraModel(job.model, job.settings, seed=job.schedule.seed)
        self.rows = encode(self.model.tokenizer, job.rows)
        self.held_out = encode(self.model.tokenizer, job.held_out)
        self.weights = self.model.weights
        schedule = job.schedule
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.has_stopped = False

    @property
    def is_done(self) -> bool:
        """Whether all updates are made, or the accuracy asked for is reached."""
        return self.has_stopped or self.step >= self.job.schedule.steps

    @property
    def is_due(self) -> bool:
        """Whether the held-out rows are to be looked at."""
        return self.step % self.job.schedule.check_every == 0 or self.step >= self.job.schedule.steps

    def update(self, tracker: Tracker) -> None:
        """Make one update from the next global batch. Raises DmoaError for a loss that is not finite."""
        schedule, begun_s = self.job.schedule, time.perf_counter()
        batch = self.rows[self.step * schedule.batch_rows :][: schedule.batch_rows]
        num_tokens = sum(len(row.target) for row in batch)
        self.optimizer.zero_grad(set_to_none=False)
        own = batch[self.rank :: self.num_workers]
        total = torch.zeros(1)
        if own:
            loss = self.model.loss(own, schedule.rows_per_pack) / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().cpu()
        _sum_over_workers([total, *(_gradient(weight) for weight in self.weights.values())])
        if not math.isfinite(float(total)):
            raise DmoaError(f"{self.job.name}: the loss of step {self.step} is {float(total)}; lower the learning_rate")
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), schedule.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate * _share(schedule, self.step)
        self.optimizer.step()
        self.step += 1
        took_s = time.perf_counter() - begun_s
        tracker.log({"loss_nats": float(total), "gradient_norm": float(norm), "step_s": took_s}, step=self.step)
        if self.rank == 0:
            _tell(f"{self.job.name}: step {self.step}/{schedule.steps}, loss {float(total):.3f} nats/token, {took_s:.1f} s")

    def check(self, tracker: Tracker) -> dict[str, float]:
        """Look at the held-out rows, the same on all workers; decide whether to stop."""
        share = self.held_out[self.rank :: self.num_workers]
        size = self.job.schedule.batch_rows
        judged = [
            result
            for first in range(0, len(share), size)
            for result in self.model.judge(share[first : first + size], self.job.schedule.rows_per_pack)
        ]
        names = sorted({row.source for row in self.held_out})
        sums = torch.zeros(len(names), 3, dtype=torch.float64)
        for row, result in zip(share, judged, strict=True):
            sums[names.index(row.source)] += torch.tensor([1.0, float(result.is_right), result.entropy_nats])
        _sum_over_workers([sums])
        metrics = {"step": float(self.step), **_figures(names, sums)}
        self.curve.append(metrics)
        stop = self.job.schedule.stop_accuracy
        self.has_stopped = stop is not None and metrics["accuracy"] >= stop
        tracker.log({f"held_out/{name}": value for name, value in metrics.items() if name != "step"}, step=self.step)
        if self.rank == 0:
            _tell(f"{self.job.name}: step {self.step}, held-out accuracy {metrics['accuracy']:.3f}")
        return metrics

    def save(self, folder: Path) -> None:
        """Write the state, and the adapter as it is now."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            state = self.optimizer.state[weight]
            tensors |= {f"{name}|weight": weight.detach()}
            tensors |= {f"{name}|{key}": state[key] for key in ("exp_avg", "exp_avg_sq", "step")}
        save_file(tensors, folder / WEIGHTS)
        plain = {"identity": self.job.identity, "step": self.step, "has_stopped": self.has_stopped, "curve": self.curve}
        (folder / STATE).write_text(json.dumps(plain), encoding="utf-8")
        self.model.save(folder / ADAPTER, base=self.job.base)

    def restore(self, folder: Path) -> None:
        """Go on from a state. Raises CheckpointError for that of another job."""
        plain = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if plain["identity"] != self.job.identity:
            raise CheckpointError(
                f"{self.job.name}: the folder holds the state of a run with other settings, rows or base model; name another "
                "folder in job.out, or remove the old one"
            )
        tensors = load_file(folder / WEIGHTS)
        for name, weight in self.weights.items():
            weight.data.copy_(tensors[f"{name}|weight"])
            self.optimizer.state[weight] = {
                key: tensors[f"{name}|{key}"].to(weight.device if key != "step" else "cpu")
                for key in ("exp_avg", "exp_avg_sq", "step")
            }
        self.step, self.has_stopped, self.curve = plain["step"], plain["has_stopped"], plain["curve"]


def _gradient(weight: torch.nn.Parameter) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _sum_over_workers(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all workers, in one exchange."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flat = torch.cat([tensor.flatten().to(device) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _share(schedule: Schedule, step: int) -> float:
    """Part of the learning rate at a step, counted from 0."""
    rise = min(1.0, (step + 1) / max(1.0, schedule.warmup_share * schedule.steps))
    fall = 0.5 * (1.0 + math.cos(math.pi * step / schedule.steps))
    return rise * (schedule.final_share + (1.0 - schedule.final_share) * fall)


def _figures(names: Sequence[str], sums: Tensor) -> dict[str, float]:
    total = sums.sum(dim=0)
    figures = {"accuracy": float(total[1] / total[0]), "entropy_nats": float(total[2] / total[0])}
    for name, (count, right, entropy) in zip(names, sums.tolist(), strict=True):
        figures |= {f"accuracy/{name}": right / count, f"entropy_nats/{name}": entropy / count}
    return figures


@contextmanager
def _kept(job: LoraJob) -> Iterator[Path | None]:
    """Yield the folder of the state to go on from, None where there is none."""
    import ray.train

    if job.state_dir is not None:
        yield latest_state(Path(job.state_dir))
        return
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as directory:
        yield Path(directory)


def latest_state(state_dir: Path) -> Path | None:
    """Return the newest state in a folder that training without workers keeps, None where there is none."""
    return max((file.parent for file in state_dir.glob(f"step-*/{STATE}")), default=None)


def _keep(worker: _Worker, metrics: dict[str, float]) -> None:
    """Keep the state: every worker reports, the first one with its files."""
    import ray.train

    job = worker.job
    # Training without workers keeps its state in a folder, because Ray's in-process mode keeps nothing.
    if job.state_dir is not None:
        root = Path(job.state_dir)
        unfinished, folder = root / "unfinished", root / f"step-{worker.step:08d}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        worker.save(unfinished)
        unfinished.rename(folder)
        for older in root.glob("step-*"):
            if older != folder:
                shutil.rmtree(older)
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = None
        if worker.rank == 0:
            worker.save(Path(directory))
            checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report(metrics, checkpoint=checkpoint)


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


def train_adapter(job: LoraJob, *, out: Path, workers: int, storage_path: str | None, use_gpu: bool = False) -> TrainedAdapter:
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


def _hand_over(state: Path, out: Path) -> TrainedAdapter:
    """Copy the finished adapter out of a state."""
    plain: dict[str, Any] = json.loads((state / STATE).read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted((state / ADAPTER).iterdir()):
        unfinished = out / f"{file.name}.tmp"
        shutil.copyfile(file, unfinished)
        unfinished.replace(out / file.name)
    return TrainedAdapter(folder=out, steps=plain["step"], curve=plain["curve"])
