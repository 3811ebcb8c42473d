"""`dmoa rollouts`: answers queries with exploration, and writes down what every agent's reply was worth, without labels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dmoa.cli.evaluate import (
    CacheOption,
    ConcurrencyOption,
    DataDirOption,
    DifficultyOption,
    SkipOption,
    TrackOption,
    WorkersOption,
)
from dmoa.cli.serve import AddressOption
from dmoa.validation import redact_command
from dmoa.workflows.console import CheckpointOption, Common, with_common

BenchmarksOption = Annotated[
    str,
    typer.Option(
        "--benchmarks", metavar="A:2,B", help="Benchmarks and suites, with weights; all = the nine, suites = generated."
    ),
]
QueriesOption = Annotated[
    list[str] | None,
    typer.Option("--queries", metavar="FILE[:W]", help='Your own queries, a text or {"query": TEXT} a line; repeatable.'),
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the rollouts, or a URI; the same one goes on.")]
SplitOption = Annotated[
    str, typer.Option("--split", metavar="SPLIT", help="train, adaptation or test; suites also anchor, gate, validation.")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Queries in all, by weight [all of a file; suites 200].")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, metavar="S", help="Seed of samples, suites, replies, exploration.")]
DenseOption = Annotated[bool, typer.Option("--dense", help="Every agent runs in every step; so it is without --epsilon.")]
EpsilonOption = Annotated[
    float | None, typer.Option("--epsilon", metavar="E", help="Sparse: a step asks one more agent with this probability.")
]
RoundOption = Annotated[int, typer.Option("--round", min=0, metavar="R", help="Number of the on-policy round, for the record.")]
LabelsOption = Annotated[
    Path | None, typer.Option("--labels", metavar="DIR", help="Keep benchmark rows' labels there, apart from --out.")
]
StepsOption = Annotated[int | None, typer.Option("--max-steps", min=1, metavar="N", help="At most this many steps a query.")]
TokensOption = Annotated[
    int | None, typer.Option("--max-tokens", min=1, metavar="N", help="At most this many new tokens a reply.")
]


@with_common
def rollouts(
    common: Common,
    out: OutOption,
    benchmarks: BenchmarksOption = "",
    queries: QueriesOption = None,
    data_dir: DataDirOption = None,
    split: SplitOption = "train",
    difficulty: DifficultyOption = 1,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    dense: DenseOption = False,
    epsilon: EpsilonOption = None,
    round_: RoundOption = 0,
    checkpoint: CheckpointOption = None,
    labels: LabelsOption = None,
    max_steps: StepsOption = None,
    max_tokens: TokensOption = None,
    skip_bad_rows: SkipOption = False,
    call_cache: CacheOption = None,
    address: AddressOption = None,
    workers: WorkersOption = 1,
    concurrency: ConcurrencyOption = None,
    track: TrackOption = "auto",
) -> None:
    """Collect rollouts for training the gate: who was how sure, step by step, over queries without labels.

    \b
    dmoa rollouts --config specialists --benchmarks arith:2,words --limit 60 --out out/rollouts
    dmoa rollouts --queries prompts.jsonl --out out/rollouts
    dmoa rollouts --queries prompts.jsonl --epsilon 0.2 --checkpoint out/gate/checkpoint --round 1 --out out/rollouts-1
    """
    values: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("common", "checkpoint", "round_")}
    values |= {"round": round_, "queries": queries or ()}
    from dmoa.training.options import parse_rollout_options

    options = parse_rollout_options(values)
    from dmoa.workflows.collect import run_rollouts

    command = redact_command(["dmoa", *sys.argv[1:]])
    manifest = run_rollouts(options, common.load(checkpoint), common, command)
    from dmoa.storage import display_path

    typer.echo(display_path(options.out))
    common.write_json(manifest.model_dump(mode="json"))
