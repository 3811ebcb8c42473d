"""`dmoa rollouts`: queries answered with exploration, and what every agent's reply was worth written down, without labels."""

from __future__ import annotations

import typer

from dmoa.cli.options import takes_options, this_command
from dmoa.training.options import RolloutOptions
from dmoa.workflows.console import CheckpointOption, Common, with_common


@with_common
@takes_options(RolloutOptions)
def rollouts(common: Common, options: RolloutOptions, checkpoint: CheckpointOption = None) -> None:
    """Collect rollouts for training the gate: who was how sure, step by step, over queries without labels.

    \b
    dmoa rollouts --config specialists --benchmarks arith:2,words --limit 60 --out out/rollouts
    dmoa rollouts --queries prompts.jsonl --out out/rollouts
    dmoa rollouts --queries prompts.jsonl --epsilon 0.2 --checkpoint out/gate/checkpoint --round 1 --out out/rollouts-1
    """
    from dmoa.storage import display_path
    from dmoa.workflows.collect import run_rollouts

    manifest = run_rollouts(options, common.load(checkpoint), common, this_command())
    typer.echo(display_path(options.out))
    common.write_json(manifest.model_dump(mode="json"))
