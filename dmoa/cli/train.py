"""`dmoa train`: trains the gate on rollouts and writes a checkpoint; stopped, the same command goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmoa.cli.evaluate import TrackOption
from dmoa.cli.serve import AddressOption
from dmoa.validation import redact_command
from dmoa.workflows.console import Common, with_common
from dmoa.workflows.train import run_train

if TYPE_CHECKING:
    pass

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
