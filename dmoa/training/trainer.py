"""Trains a gate, from rollouts to a checkpoint: what `dmoa train` and `jobs/train_gate.py` run.

Read and split the rollouts, fit the scale of the scores, train (in process or on Ray Train), measure, export. The same
command in the same folder goes on from the last state that was kept; the checkpoint is written last, and whole.

    OUT/checkpoint/      the trained gate
    OUT/train.json       options, curve, metrics, what it was trained on
    OUT/state/           what a stopped run goes on from
    OUT/metrics.jsonl    the curve as it grew; OUT/wandb where W&B is on
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from dmoa import checkpoint
from dmoa.checkpoint import Checkpoint
from dmoa.config import Config
from dmoa.errors import ConfigError
from dmoa.training.curves import Curves
from dmoa.training.export import build_trained
from dmoa.training.objective import Batches
from dmoa.training.options import TrainOptions
from dmoa.training.preparing import Material, Start, build_start, check_rollouts, prepare, tell_constant, tell_silent
from dmoa.training.rollouts import write_whole
from dmoa.training.run_state import EpochRecord, Progress, StateStore
from dmoa.training.train_loop import Job, train
from dmoa.training.validation import Ranking, load_shares, ranking_of
from dmoa.training.world import Alone
from dmoa.validation import redact

Say = Callable[[str], None]


class TrainReport(BaseModel):
    """`train.json`: what a training was, and what came of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: int = 1
    command: str
    """The command line; secrets are taken out."""
    code_revision: str
    options: dict[str, Any]
    pool: str
    pool_fingerprint: str
    workers: int
    """Of the last session; 0: in process."""
    workers_note: str
    """Why so many."""
    trained_on: dict[str, Any]
    parent: str | None
    """Version of the gate that training began with; null: untrained weights."""
    version: str
    """Of the checkpoint."""
    ended: str
    """Why training was over."""
    epochs: list[EpochRecord]
    metrics: dict[str, float]
    """Of the checkpoint's weights, on the held-back queries."""
    ranking: Ranking = "unknown"
    """Whether the interval of `pairwise` among the metrics lies above 0.5."""
    silent: list[str] = []
    """A line for every agent that the rollouts hold no reply of: what that means."""
    load: dict[str, float]
    """By agent, on which share of the held-back steps it is the most probable one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A finished training."""

    checkpoint: Path
    record: Checkpoint
    report: TrainReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a training needs of the command that runs it."""

    open_ray: Callable[[], AbstractContextManager[None]]
    """Joins or starts Ray; not called for a training in process."""
    say: Say
    watch: Callable[[EpochRecord, int], None]
    """Called with each epoch of this session, and how many there may be."""
    command: str = ""
    code_revision: str = ""


def run_training(options: TrainOptions, config: Config, around: Surroundings) -> TrainResult:
    """Train a gate for a pool, or go on with the training in `options.out`.

    Raises ConfigError and CheckpointError for bad input, DmoaError where training stops; an earlier checkpoint in the folder
    stays as it is then, and the state that was kept last too.
    """
    store = StateStore(options.storage_path or str(options.out.absolute() / "state"))
    store.check()
    start = build_start(options, config)
    manifests = check_rollouts(options, start)
    on_ray = options.workers != 0
    with around.open_ray() if on_ray else nullcontext():
        material = prepare(options, start, manifests, on_ray=on_ray)
        for line in tell_constant(material):
            around.say(line)
        before = _progress_before(store, material.job)
        if before is not None:
            around.say(
                f"going on after epoch {len(before.epochs)}" if before.ended is None else f"already trained: {before.ended}"
            )
        workers, note = _choose(material.job)
        around.say(f"{workers} worker{'s' if workers > 1 else ''}: {note}" if workers else note)
        curves = Curves(options, config.name, material.job.identity)
        try:
            with curves.follow(store, lambda epoch: around.watch(epoch, options.epochs)):
                if before is None or before.ended is None:
                    _train(material.job, store, workers)
            return _finish(options, config, start, material, store, curves, around, (workers, note))
        finally:
            curves.close()


def _progress_before(store: StateStore, job: Job) -> Progress | None:
    """Return how far the run in the folder is. Raises ConfigError where it is another one's, naming what differs."""
    before = store.read_progress()
    if before is None or before.identity == job.identity:
        return before
    then, now = _flat(before.identity), _flat(job.identity)
    names = [name for name in then | now if then.get(name) != now.get(name)]
    different = "; ".join(f"{name}: begun with {then.get(name)}, now {now.get(name)}" for name in names)
    raise ConfigError(
        f"--out: {str(job.options.out)!r} holds another training; {different}; repeat its options and rollouts to go on with "
        "it, or name another folder"
    )


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in identity.items() if name != "options"}
    return {**identity.get("options", {}), **rest}


def _choose(job: Job) -> tuple[int, str]:
    """Return the number of workers, and why."""
    workers = job.options.workers
    if workers == "auto":
        import ray

        from dmoa.training.choose_workers import choose_workers

        # This machine's own cores, whatever a Ray on it claims; a network between workers was not measured.
        return choose_workers(job, min(int(ray.cluster_resources().get("CPU", 1)), os.cpu_count() or 1))
    return workers, "in process, without Ray" if workers == 0 else "as asked for"


def _train(job: Job, store: StateStore, workers: int) -> None:
    if workers == 0:
        train(job, Alone(torch.device("cuda" if job.options.gpu else "cpu")), store)
        return
    from dmoa.training.ray_workers import train_on_ray

    train_on_ray(job, store, workers)


def _finish(
    options: TrainOptions,
    config: Config,
    start: Start,
    material: Material,
    store: StateStore,
    curves: Curves,
    around: Surroundings,
    workers: tuple[int, str],
) -> TrainResult:
    """Measure and export the best weights, and write down what the training was."""
    state = store.read()
    assert state is not None
    assert state.progress.ended is not None
    trained = build_trained(
        material.job.spec,
        state.part("best"),
        material.evidence,
        options,
        state.progress,
        fingerprint=start.fingerprint,
        parent=start.parent,
        trained_on=material.trained_on,
        code_revision=around.code_revision,
    )
    batches = Batches(material.evidence.data, torch.float32, torch.device("cpu"))
    report = TrainReport(
        command=around.command,
        code_revision=around.code_revision,
        options=redact(options.model_dump(mode="json")),
        pool=config.name,
        pool_fingerprint=start.fingerprint,
        workers=workers[0],
        workers_note=workers[1],
        trained_on=material.trained_on,
        parent=start.parent,
        version=trained.record.version,
        ended=state.progress.ended,
        epochs=list(state.progress.epochs),
        metrics=trained.record.metrics,
        ranking=ranking_of(trained.record.metrics),
        silent=tell_silent(material),
        load=load_shares(trained.gate, batches, material.evidence.data.held_Q),
    )
    out = options.out.absolute()
    folder = checkpoint.save(out / "checkpoint", trained.gate, trained.record)
    write_whole(out / "train.json", (report.model_dump_json(indent=2) + "\n").encode())
    curves.end(trained, report.load, folder, start.parent)
    return TrainResult(checkpoint=folder, record=trained.record, report=report)
