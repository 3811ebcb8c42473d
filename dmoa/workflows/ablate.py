"""`dmoa evaluate --ablations`: trains gates with one thing changed on the same rollouts, beside routers that learn nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmoa.agents.pool import build_encoder
from dmoa.config import Config
from dmoa.errors import ConfigError
from dmoa.evaluation.answer_matrix import add_derived, add_oracle, matrix_policies
from dmoa.evaluation.records import EvaluateOptions
from dmoa.evaluation.registry import expand_names
from dmoa.evaluation.results import Evaluation
from dmoa.evaluation.run import finish_run
from dmoa.evaluation.run_folder import RunFolder
from dmoa.protocols import Encoder
from dmoa.storage import check_local
from dmoa.training.ablations import ABLATIONS, left_out, train_ablation
from dmoa.training.cluster_router import fit_rival
from dmoa.training.rollouts import read_manifest, read_table
from dmoa.training.trainer import TrainContext
from dmoa.workflows.console import Common, line, print_overall, stdout_console
from dmoa.workflows.evaluate import run_evaluation
from dmoa.workflows.terminal import goes_on

KMEANS = "kmeans"
REFERENCE = "dmoa:default"
_OTHERS = ("dense", "random", "selector")
_CLUSTERS = 8


def run_ablations(options: EvaluateOptions, rollouts: Path | None, config: Config, common: Common, command: str) -> Evaluation:
    """Train every ablation, evaluate all of them, and print the table.

    The same command with --resume goes on. Raises ConfigError for bad input, DmoaError where it stops.
    """
    if rollouts is None:
        raise ConfigError("--rollouts: missing; --ablations trains on them: name a folder that `dmoa rollouts` wrote, dense")
    assert options.out is not None
    for option, place in (("--out", options.out), ("--rollouts", rollouts)):
        check_local(place, option, "copy it here, --ablations train from it")
    out = options.out.absolute()
    with goes_on(f"the same command with --out {options.out} --resume goes on from here"):
        gates = train_all(rollouts, out / "ablations", config, common, options.seed)
    policies = (*(f"dmoa:{name}" for name in gates), *matrix_policies(config.agent_names), *_OTHERS)
    options = options.model_copy(update={"policies": policies, "gates": gates})
    run_evaluation(options, config, common, command, shows_result=False)
    folder = RunFolder(out)
    names = expand_names(options.benchmarks)
    add_derived(folder, KMEANS, config.agent_names, cluster_choices(folder, names, rollouts, config, options.seed))
    add_oracle(folder, names, config.agent_names)
    evaluation = finish_run(folder)
    print_table(evaluation)
    common.say(f"report: {folder.report}")
    return evaluation


def train_all(
    rollouts: Path, out: Path, config: Config, common: Common, seed: int, train: Callable[..., Path] | None = None
) -> dict[str, Path]:
    """Train every ablation that the pool allows in process, or take those that are there; returns their checkpoints by name.

    `train`: in place of `train_ablation`.
    """
    found: dict[str, Path] = {}
    skipped = left_out(config)
    if skipped:
        common.say(f"left out: {'; '.join(f'{name} ({why})' for name, why in skipped.items())}")
    names = [name for name in ABLATIONS if name not in skipped]
    for number, name in enumerate(names, 1):
        common.say(f"training {number} of {len(names)}: {name} ({ABLATIONS[name].summary})")
        found[name] = (train or train_ablation)(name, rollouts, out, config, TrainContext(), {"seed": seed})
    return found


def cluster_choices(
    folder: RunFolder,
    benchmarks: Sequence[str],
    rollouts: Path,
    config: Config,
    seed: int,
    encoder: Encoder | None = None,
) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Return whom k-means over embeddings + the surest agent of each cluster, fitted on the rollouts, would ask."""
    preset = read_manifest(rollouts).preset
    router = fit_rival(read_table(rollouts), config.agent_names, preset, num_clusters=_CLUSTERS, seed=seed)
    encoder = encoder or build_encoder(config)
    texts = {name: [task.text for task in folder.read_tasks(name)] for name in benchmarks}
    return {name: router.rank(np.stack(list(asyncio.run(encoder.embed(those)))))[:, 0] for name, those in texts.items()}


def print_table(evaluation: Evaluation) -> None:
    """Print one line per ablation and rival: accuracy by benchmark, and the difference from the default."""
    print_overall(evaluation, {policy: policy for policy in evaluation.config.all_policies}, REFERENCE)
    console = stdout_console()
    for name, ablation in ABLATIONS.items():
        if f"dmoa:{name}" in evaluation.config.policies:
            line(console, f"dmoa:{name}: {ablation.summary}")
    line(console, f"{KMEANS}: k-means over embeddings, the surest agent of the cluster; oracle: knows the labels")
    line(console, "paired tests of every two policies on every benchmark are in the report and in --json")
