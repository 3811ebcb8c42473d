"""The entry points of `jobs/`: the commands of the same name, their options read from the `job:` section of a YAML file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from dmoa.agents.pool import load_pool
from dmoa.config import Config, from_tree
from dmoa.errors import ConfigError
from dmoa.evaluation.records import EvaluateOptions
from dmoa.storage import uri_of
from dmoa.training.options import AdaptOptions, OnlineOptions, RolloutOptions, TrainOptions
from dmoa.validation import redact, redact_command, short
from dmoa.workflows.adapt import run_adapt
from dmoa.workflows.adapt_online import run_online_adaptation
from dmoa.workflows.console import Common, OneMessage, run_app, with_common
from dmoa.workflows.terminal import warn
from dmoa.workflows.train import run_train
from dmoa.yaml_tree import parse_yaml, read, set_value

JOB, POOL = "job", "pool"
_COPIES = "working_dir_files"
"""Folder of a Ray under which the folders lie that were submitted with jobs."""


class _Job(OneMessage, TyperCommand):
    """The one command of a script."""


def run_job(command: Callable[..., None]) -> None:
    """Run a job's command to the end of the process; errors become exit codes as in `dmoa`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(cls=_Job)(command)
    run_app(app)


def job(command: Callable[[Common], None]) -> Callable[[], None]:
    """Make the entry point of a script in `jobs/` of a command that takes nothing but the common options."""
    return partial(run_job, with_common(command))


@job
def evaluate_job(common: Common) -> None:
    """Evaluate policies on benchmarks; the options of `dmoa evaluate` stand in the `job:` section of --config.

    \b
    python jobs/evaluate.py --config jobs/evaluate.yaml --set job.limit=20
    """
    from dmoa.workflows.evaluate import check_ran, run_evaluation

    config, values = read_job(common)
    options = EvaluateOptions.parse(values)
    if options.out is None:
        raise ConfigError("job.out: missing; name the folder of the run, so that a job that is submitted again goes on with it")
    evaluation = run_evaluation(options, None if options.url else config, common, _command())
    common.write_json(evaluation.model_dump(mode="json"))
    check_ran(evaluation)


@job
def collect_rollouts_job(common: Common) -> None:
    """Collect rollouts; the options of `dmoa rollouts` stand in the `job:` section of --config.

    \b
    python jobs/collect_rollouts.py --config jobs/collect_rollouts.yaml --set job.limit=20
    """
    from dmoa.workflows.collect import run_rollouts

    config, values = read_job(common)
    manifest = run_rollouts(RolloutOptions.parse(values), config, common, _command())
    common.write_json(manifest.model_dump(mode="json"))


@job
def train_specialist_job(common: Common) -> None:
    """Train the LoRA adapter of one recipe; recipes and options stand in the `job:` section of --config.

    \b
    python jobs/train_specialist.py --config jobs/train_specialist.yaml --set job.name=words
    """
    from dmoa.workflows.specialists import SpecialistOptions, train_specialist

    _, values = read_job(common)
    common.write_json(train_specialist(SpecialistOptions.parse(values), common, _command()))


@job
def train_gate_job(common: Common) -> None:
    """Train the gate on rollouts; the options of `dmoa train` stand in the `job:` section of --config.

    \b
    python jobs/train_gate.py --config jobs/train_gate.yaml --set job.preset=full
    """
    config, values = read_job(common)
    result = run_train(TrainOptions.parse(values), config, common, _command())
    common.write_json(result.report.model_dump(mode="json"))


@job
def train_rounds_job(common: Common) -> None:
    """Collect and train in turns; the options stand in the `job:` section of --config.

    \b
    python jobs/train_rounds.py --config jobs/train_rounds.yaml --set job.rounds=2
    """
    from dmoa.workflows.rounds import RoundsOptions, run_rounds

    config, values = read_job(common)
    result = run_rounds(RoundsOptions.parse(values), config, common, _command())
    common.write_json(result.report.model_dump(mode="json"))


@job
def adapt_job(common: Common) -> None:
    """Adapt a gate to a benchmark; the options of `dmoa adapt` stand in the `job:` section of --config.

    \b
    python jobs/adapt.py --config jobs/adapt.yaml --set job.queries=30
    """
    config, values = read_job(common)
    options = AdaptOptions.parse(values)
    checkpoint = None if options.zero_shot or not config.gate.checkpoint else Path(config.gate.checkpoint)
    common.write_json(run_adapt(options, config, checkpoint, common, _command()).model_dump(mode="json"))


@job
def adapt_online_job(common: Common) -> None:
    """Learn from the traffic of a running swarm; the options of `dmoa adapt --online` stand in the `job:` section of --config.

    \b
    python jobs/adapt.py --online --config jobs/adapt_online.yaml --set job.app=dmoa
    """
    _, values = read_job(common)
    run_online_adaptation(OnlineOptions.parse(values), common, _command())


def _command() -> str:
    """Return the command line of this process; secrets are taken out."""
    return redact_command(["python", *sys.argv])


def read_job(common: Common) -> tuple[Config, dict[str, Any]]:
    """Return the pool of a job file and its `job:` section.

    Beside `job:` stands a whole pool, or `pool:` with the name of a packaged one or a path and what is to be changed in it (lists
    as a whole), or nothing: the default pool. Raises ConfigError naming the file and the field.
    """
    if common.config is None:
        raise ConfigError("--config: missing; name a YAML file with a job section, such as jobs/evaluate.yaml")
    try:
        text, source = read(common.config)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: cannot read {str(common.config)!r}: {error}; give the path of a job file") from error
    tree = parse_yaml(text, source)
    if not isinstance(tree, dict) or not isinstance(tree.get(JOB), dict):
        raise ConfigError(f"{source}: job: missing; add a job section with the options of the command")
    is_named = POOL in tree or set(tree) == {JOB}
    own = [override for override in common.overrides if not is_named or override.startswith((f"{JOB}.", f"{POOL}="))]
    for override in own:
        set_value(tree, override)
    values = tree.pop(JOB)
    _warn_of_copy(values)
    if not is_named:
        return from_tree(tree, source=source), values
    return _named_pool(tree, source, [override for override in common.overrides if override not in own]), values


def _warn_of_copy(values: dict[str, Any]) -> None:
    """Say where results would go into a job's own folder, which Ray removes."""
    out = values.get("out")
    if isinstance(out, str) and _COPIES in Path.cwd().parts and not Path(out).is_absolute() and uri_of(out) is None:
        warn(
            f"job.out is {out!r}, in the copy of a folder that Ray made for this job and removes later; name a URI, or an "
            "absolute path that the cluster's machines share (--set job.out=...)"
        )


def _named_pool(tree: dict[str, Any], source: str, overrides: list[str]) -> Config:
    pool = tree.pop(POOL, None)
    if pool is not None and not isinstance(pool, str):
        raise ConfigError(
            f"{source}: pool is {short(redact(pool))}; expected the name of a packaged pool or the path of a pool file; the "
            "sections of a whole pool (name, llms, agents ...) stand beside job:, without pool:"
        )
    if not tree:
        return load_pool(pool, overrides)
    try:
        return load_pool(pool, overrides, tree)
    except ConfigError as error:
        raise ConfigError(f"{source}: with its own {', '.join(map(str, tree))}: {error}") from error
