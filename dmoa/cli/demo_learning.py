"""The demo's middle: look at the pool, collect rollouts, train the gate, install it in the running swarm.

Each part is what the command of the same name does; the commands are printed for doing it by hand.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoa.cli.demo_asking import DEMO_SUITES
from dmoa.cli.options import Common
from dmoa.config import Config

if TYPE_CHECKING:
    from dmoa.training.probe import ProbeReport

SEED = 1
"""Of the queries that the gate learns from: other rows than those it is shown or compared on, in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What came of the learning."""

    probe: ProbeReport
    checkpoint: Path
    version: str
    training: dict[str, Any]
    """`train.json`."""
    warnings: tuple[str, ...]
    """What is to be said of the gate's worth, label-free."""
    commands: list[str]
    """The same by hand."""


def learn(common: Common, config: Config, out: Path, app: str, queries: int) -> Learned:
    """Collect dense rollouts, look at them, train, and install. Raises DmoaError where a part fails."""
    from dmoa.cli.probe import show
    from dmoa.cli.probe_session import look_at_rollouts
    from dmoa.cli.rollout_session import run_rollouts
    from dmoa.cli.train import ranking_warning, run_train
    from dmoa.serving.router.admin import RouterAdmin, checkpoint_files
    from dmoa.training.options import parse_rollout_options as rollout_options
    from dmoa.training.options import parse_train_options as train_options

    rollouts, gate = out / "rollouts", out / "gate"
    pool = ["--config", str(common.config)] if common.config else []
    pool += [part for override in common.overrides for part in ("--set", override)]
    collect = ["dmoa", "rollouts", *pool, "--benchmarks", ",".join(DEMO_SUITES), "--limit", str(queries), "--seed", str(SEED)]
    collect += ["--out", str(rollouts)]
    train = ["dmoa", "train", *pool, "--rollouts", str(rollouts), "--out", str(gate)]
    commands = [shlex.join(command) for command in (collect, train)]
    common.say(f"3 of 6: {queries} generated queries, without labels, asked of every agent: can entropy route this pool?")
    options = {"benchmarks": ",".join(DEMO_SUITES), "limit": queries, "seed": SEED, "out": rollouts, "track": "none"}
    run_rollouts(rollout_options({**options, "call_cache": out / "calls"}), config, common, commands[0])
    probe = look_at_rollouts(rollouts, config)
    if common.verbosity >= 0:
        show(probe, config)
    common.say("4 of 6: training the gate on Ray Train, by predictive entropy alone")
    result = run_train(train_options({"rollouts": rollouts, "out": gate}), config, common, commands[1])
    change = RouterAdmin(app).install(checkpoint_files(result.checkpoint), "dmoa demo")
    common.say(f"installed in the running swarm: {change['previous']} -> {change['version']}")
    probing = shlex.join(["dmoa", "probe", *pool, "--rollouts", str(rollouts)])
    install = shlex.join(["dmoa", "router", "install", str(gate / "checkpoint")])
    return Learned(
        probe=probe,
        checkpoint=result.checkpoint,
        version=result.record.version,
        training=result.report.model_dump(mode="json"),
        warnings=(*result.report.silent, *ranking_warning(result.report)),
        commands=[commands[0], probing, commands[1], install],
    )
