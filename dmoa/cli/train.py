"""`dmoa train`: the gate learns from rollouts, and a checkpoint comes out; stopped, the same command goes on."""

from __future__ import annotations

from dmoa.cli.options import takes_options, this_command
from dmoa.training.options import JOB_ONLY, PRESETS, TrainOptions
from dmoa.workflows.console import Common, with_common
from dmoa.workflows.train import run_train

_BY_PRESET = {name: f"{value:g}; preset full: {PRESETS['full'][name]:g}" for name, value in PRESETS["few-shot"].items()}


@with_common
@takes_options(TrainOptions, leave_out=JOB_ONLY, unset=_BY_PRESET)
def train(common: Common, options: TrainOptions) -> None:
    """Train the gate on rollouts, label-free, on Ray Train; the checkpoint lies in --out/checkpoint.

    \b
    dmoa train --rollouts out/rollouts --out out/gate
    dmoa train --rollouts out/rollouts --rollouts out/rollouts-1 --start-from out/gate/checkpoint --out out/gate-1
    dmoa serve --checkpoint out/gate/checkpoint
    """
    result = run_train(options, common.load(), common, this_command())
    common.write_json(result.report.model_dump(mode="json"))
