"""`dmoa train`: the gate learns from rollouts, and a checkpoint comes out; stopped, the same command goes on."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmoa.cli.evaluate import TrackOption
from dmoa.cli.interrupts import goes_on
from dmoa.cli.options import Common, with_common
from dmoa.cli.serve import AddressOption
from dmoa.cli.terminal import warn
from dmoa.validation import redact_command

if TYPE_CHECKING:
    from dmoa.config import Config
    from dmoa.training.options import TrainOptions
    from dmoa.training.state import EpochRecord
    from dmoa.training.trainer import TrainReport, TrainResult

RolloutsOption = Annotated[
    list[Path], typer.Option("--rollouts", metavar="DIR", help="What `dmoa rollouts` wrote, folder or URI; repeatable.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run, or a URI; the same folder goes on.")]
PresetOption = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="few-shot (40-80 queries) or full (thousands); sets the next four.")
]
EpochsOption = Annotated[int | None, typer.Option("--epochs", min=1, metavar="N", help="At most so many [10; full 60].")]
BatchOption = Annotated[
    int | None, typer.Option("--batch-queries", min=1, metavar="N", help="Queries of an update, over all workers [4; full 16].")
]
RateOption = Annotated[float | None, typer.Option("--lr", metavar="X", help="Learning rate of AdamW [0.001].")]
PatienceOption = Annotated[
    int | None, typer.Option("--patience", min=1, metavar="N", help="Epochs without a lower held-back loss [5; full 8].")
]
WorkersOption = Annotated[
    str, typer.Option("--workers", metavar="W", help="Ray Train workers; auto: never slower than one; 0: in process.")
]
GpuOption = Annotated[bool, typer.Option("--gpu", help="A GPU for every worker.")]
LossOption = Annotated[str, typer.Option("--loss", metavar="NAME", help="soft, hard, hinge or listnet.")]
ScoreOption = Annotated[
    str | None, typer.Option("--score", metavar="NAME", help="What of a reply is ranked: raw or anchored [gate.score].")
]
HeadOption = Annotated[str | None, typer.Option("--head", metavar="NAME", help="linear or profile [gate.head].")]
CoreOption = Annotated[
    str | None, typer.Option("--core", metavar="NAME", help="gru, or for ablations reset, linear, mlp [gate.core].")
]
StartOption = Annotated[
    Path | None, typer.Option("--start-from", metavar="DIR", help="Checkpoint to go on from, in a later round [untrained].")
]
AnchorsOption = Annotated[
    Path | None, typer.Option("--anchor-rollouts", metavar="DIR", help="Dense rollouts for the anchor set [--rollouts].")
]
ConstantOption = Annotated[
    bool,
    typer.Option(
        "--discount-constant/--keep-constant",
        help="Anchored: an agent with one reply for nearly every query, where others have many, is never the surest.",
    ),
]
HoldoutOption = Annotated[float, typer.Option("--holdout", metavar="X", help="Share of the queries that is held back.")]
AlphaOption = Annotated[
    str,
    typer.Option("--alpha", metavar="X", help="tau covers the surest agent on 1 - alpha of the held-back steps; auto: chosen."),
]
ThetaOption = Annotated[
    float | None, typer.Option("--theta-alpha", metavar="X", help="The same for theta [alpha; chosen with it].")
]
PriceOption = Annotated[
    float, typer.Option("--agent-price", min=0.0, metavar="X", help="With --alpha auto: how much surer one more agent must make.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, metavar="S", help="Seed of weights and order.")]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="NAME", help="float32 or float64.")]
BadStepsOption = Annotated[
    int, typer.Option("--max-bad-steps", min=0, metavar="N", help="Updates that may be skipped as not finite.")
]
FailuresOption = Annotated[int, typer.Option("--max-failures", min=0, metavar="N", help="Lost workers that are replaced.")]
StorageOption = Annotated[
    str | None, typer.Option("--storage-path", metavar="URI", help="Where workers keep the run's state [in --out].")
]
_LINE_S = 1.0
"""How often an epoch is told of at most."""


@with_common
def train(
    common: Common,
    rollouts: RolloutsOption,
    out: OutOption,
    preset: PresetOption = "few-shot",
    epochs: EpochsOption = None,
    batch_queries: BatchOption = None,
    lr: RateOption = None,
    patience: PatienceOption = None,
    workers: WorkersOption = "auto",
    gpu: GpuOption = False,
    loss: LossOption = "soft",
    score: ScoreOption = None,
    head: HeadOption = None,
    core: CoreOption = None,
    start_from: StartOption = None,
    anchor_rollouts: AnchorsOption = None,
    discount_constant: ConstantOption = True,
    holdout: HoldoutOption = 0.25,
    alpha: AlphaOption = "auto",
    theta_alpha: ThetaOption = None,
    agent_price: PriceOption = 0.1,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
    max_bad_steps: BadStepsOption = 10,
    max_failures: FailuresOption = 3,
    storage_path: StorageOption = None,
    address: AddressOption = None,
    track: TrackOption = "auto",
) -> None:
    """Train the gate on rollouts, label-free, on Ray Train; the checkpoint lies in --out/checkpoint.

    \b
    dmoa train --rollouts out/rollouts --out out/gate
    dmoa train --rollouts out/rollouts --rollouts out/rollouts-1 --start-from out/gate/checkpoint --out out/gate-1
    dmoa serve --checkpoint out/gate/checkpoint
    """
    values: dict[str, Any] = {name: value for name, value in locals().items() if name != "common"}
    from dmoa.training.options import parse_train_options

    options = parse_train_options(values)
    result = run_train(options, common.load(), common, redact_command(["dmoa", *sys.argv[1:]]))
    common.write_json(result.report.model_dump(mode="json"))


def run_train(options: TrainOptions, config: Config, common: Common, command: str) -> TrainResult:
    """Train, tell how it goes, and print where the checkpoint is; for `dmoa train` and `jobs/train_gate.py`.

    Raises ConfigError and CheckpointError for bad input, DmoaError where training stops.
    """
    from dmoa.cli.evaluation_session import opened_ray
    from dmoa.provenance import code_revision
    from dmoa.storage import display_path, localized, uri_of
    from dmoa.training.trainer import TrainContext, run_training

    place = uri_of(options.out)
    if place is not None and options.storage_path is None:
        options = options.model_copy(update={"storage_path": f"{place.rstrip('/')}/state"})  # workers reach it, and no copy
    num_gpus = float(options.gpu) * (1 if options.workers == "auto" else options.workers)
    around = TrainContext(
        open_ray=partial(opened_ray, options.address, num_gpus),
        say=common.say,
        watch=_Teller(common).tell,
        command=command,
        code_revision=code_revision(),
    )
    rollouts = ", ".join(map(display_path, options.rollouts))
    common.say(f"training a gate for {config.name} on {rollouts}; the run lies in {display_path(options.out)}")
    reads = ("rollouts", "anchor_rollouts", "start_from")
    advice = f"the same command goes on from the last state that is kept in {display_path(options.out)}"
    with goes_on(advice), localized(options, common.say, reads=reads, writes=("out",), apart=("state",)) as here:
        result = run_training(here, config, around)
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
