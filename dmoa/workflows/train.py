"""Trains a gate as commands and jobs do: progress while it trains, warnings about the agents, and where the checkpoint is."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import typer

from dmoa.config import Config
from dmoa.provenance import code_revision
from dmoa.storage import display_path, localized, only_one, under, uri_of
from dmoa.training.options import TrainOptions
from dmoa.workflows.console import Common
from dmoa.workflows.terminal import goes_on, warn

if TYPE_CHECKING:
    from dmoa.training.state import EpochRecord
    from dmoa.training.trainer import TrainReport, TrainResult


_LINE_S = 1.0
"""How often an epoch is told of at most."""


def run_train(options: TrainOptions, config: Config, common: Common, command: str) -> TrainResult:
    """Train, tell how it goes, and print where the checkpoint is; for `dmoa train` and `jobs/train_gate.py`.

    Raises ConfigError and CheckpointError for bad input, DmoaError where training stops.
    """
    from dmoa.training.trainer import TrainContext, run_training
    from dmoa.workflows.evaluate import opened_ray

    place = uri_of(display_path(options.out))  # of a round it lies in a local copy
    if place is not None and options.storage_path is None:
        options = options.model_copy(update={"storage_path": under(place, "state")})  # workers reach it, and no copy
    num_gpus = float(options.gpu) * (1 if options.workers == "auto" else options.workers)
    context = TrainContext(
        open_ray=partial(opened_ray, options.address, num_gpus),
        say=common.say,
        watch=_Teller(common).tell,
        command=command,
        code_revision=code_revision(),
    )
    rollouts = ", ".join(map(display_path, options.rollouts))
    common.say(f"training a gate for {config.name} on {rollouts}; the run lies in {display_path(options.out)}")
    reads = ("rollouts", "anchor_rollouts", "start_from", "outcomes")
    advice = f"the same command goes on from the last state that is kept in {display_path(options.out)}"
    local = localized(options, common.say, reads=reads, writes=("out",), apart=("state",))
    with goes_on(advice), local as here, only_one(here.out, "training", "train"):
        result = run_training(here, config, context)
        common.say(f"{result.report.ended}; {_words(result)}")
        for line in (*result.report.silent, *ranking_warning(result.report)):
            warn(line)
        checkpoint = display_path(here.out / "checkpoint")
    typer.echo(checkpoint)
    return result


class _Teller:
    """Tells of epochs as they end, now and then."""

    def __init__(self, common: Common) -> None:
        self._common = common
        self._last_s = -_LINE_S

    def tell(self, epoch: EpochRecord, most: int) -> None:
        """Tell of an epoch, unless another was told of just now."""
        now = time.monotonic()
        if now - self._last_s >= _LINE_S or epoch.epoch == most:
            self._last_s = now
            parts = [f"loss {_number(epoch.train_loss)}", f"held back {_number(epoch.held_loss)}"]
            parts += [f"{epoch.held_pairwise:.1%} of pairs"] if epoch.held_pairwise is not None else []
            parts += [f"{epoch.updates / max(epoch.seconds, 1e-9):.0f} updates/s"]
            parts += [f"{epoch.bad_steps} skipped as not finite"] if epoch.bad_steps else []
            left = f", about {(most - epoch.epoch) * epoch.seconds:.0f} s left" if epoch.epoch < most else ""
            self._common.say(f"epoch {epoch.epoch} of {most}: {', '.join(parts)}{left}")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def ranking_warning(report: TrainReport) -> list[str]:
    """Return what is to be said of a gate that is not known to rank agents better than a coin; nothing of any other."""
    metrics = report.metrics
    if report.ranking == "better than chance":
        return []
    then = "its routing is as good as arbitrary; collect more queries, and ask `dmoa probe` whether entropy can route this pool"
    if report.ranking == "unknown":
        return [f"whether the gate ranks better than chance is not known: no held-back step holds two different scores; {then}"]
    ends = f"95 %: {metrics['pairwise_low']:.1%} to {metrics['pairwise_high']:.1%}"
    return [f"the gate ranks no better than chance: {metrics['pairwise']:.1%} of held-back pairs ({ends}), a coin 50 %; {then}"]


def _words(result: TrainResult) -> str:
    metrics = result.record.metrics
    named = {"pairwise": "pairs ranked right", "surest_share": "surest agent first", "ndcg": "NDCG", "load_max": "largest load"}
    ends = {"pairwise": " (95 %: {pairwise_low:.3f} to {pairwise_high:.3f})"}
    parts = [
        f"{words} {metrics[name]:.3f}{ends.get(name, '').format(**metrics)}" for name, words in named.items() if name in metrics
    ]
    found = ", ".join(parts)
    activation = result.record.activation
    asked = f"; {metrics['agents']:.2f} agents a step" if "agents" in metrics else ""
    fitted = f"tau {activation['mass']:.3f}, theta {_number(activation['theta'])}"
    return f"gate {result.record.version}, held back: {found}; {fitted}{asked}"
