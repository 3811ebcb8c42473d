"""The demo's end: untrained and trained gate beside single agents, everyone, anyone and the oracle, on held-out rows.

One untrained gate is a single draw of random weights, lucky or not: the mean over many stands beside it, replayed from the
answers that every agent gave alone.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmoa.cli.demo_asking import DEMO_SUITES, SEED
from dmoa.cli.options import Common
from dmoa.config import Config

if TYPE_CHECKING:
    from dmoa.core.gate import Gate
    from dmoa.evaluation.answer_matrix import AnswerMatrix
    from dmoa.evaluation.results import Evaluation
    from dmoa.evaluation.run_folder import RunFolder
    from dmoa.training.probe import ProbeReport
    from dmoa.types import FloatArray

TRAINED = "dmoa:trained"
GENERALIST = "generalist"
NUM_UNTRAINED = 20
"""Untrained gates whose mean is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One method on all held-out rows."""

    name: str
    policy: str
    accuracy: float
    low: float
    high: float
    """Wilson's 95 % interval; of several gates, what the middle 95 % of them reach."""
    by_suite: dict[str, float]
    active: float
    """Agents asked per step."""
    tokens: float
    """Per question: prompt and completion, summarizer included."""
    not_run: tuple[str, ...] = ()
    """Suites of which every query failed: they count in no figure."""

    @property
    def did_run(self) -> bool:
        """Whether it ran on any suite."""
        return len(self.not_run) < len(self.by_suite)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return asdict(self)


def compare(common: Common, config: Config, out: Path, checkpoint: Path, held_out: int) -> list[Compared]:
    """Evaluate everything on held-out rows, add the oracle, and return the methods of the closing table.

    Raises DmoaError where the evaluation stops.
    """
    from dmoa.cli.evaluation_session import run_evaluation
    from dmoa.evaluation.answer_matrix import add_oracle, matrix_policies
    from dmoa.evaluation.records import parse_evaluate_options
    from dmoa.evaluation.run import finish_run
    from dmoa.evaluation.run_folder import RunFolder

    policies = ["dmoa", TRAINED, *matrix_policies(config.agent_names), "dense", "random"]
    values = {
        "benchmarks": ",".join(DEMO_SUITES),
        "policies": ",".join(policies),
        "gates": f"trained={checkpoint}",
        "limit": held_out,
        "seed": SEED,
        "out": out / "evaluation",
        "call_cache": out / "calls",
    }
    given = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    options = parse_evaluate_options(values)
    run_evaluation(options, config, common, shlex.join(["dmoa", "evaluate", *given]), shows_result=False)
    folder = RunFolder((out / "evaluation").absolute())
    add_oracle(folder, DEMO_SUITES, config.agent_names)
    found = summarise(finish_run(folder), config.agent_names)
    return [*found[:2], *first_steps(config, folder, checkpoint), *found[2:]]


def first_steps(config: Config, folder: RunFolder, checkpoint: Path) -> list[Compared]:
    """Return what many untrained gates, and the trained one, get with one step a question: replayed, nobody is asked.

    Blocks while the encoder loads. Raises ConfigError where an agent has not answered every row.
    """
    from dmoa import checkpoint as checkpoints
    from dmoa.agents.pool import build_encoder, build_pool_gate
    from dmoa.evaluation.answer_matrix import read_matrix

    matrices = [read_matrix(folder, suite, config.agent_names) for suite in DEMO_SUITES]
    encoder = build_encoder(config)
    embedded = [np.stack(asyncio.run(encoder.embed([task.text for task in matrix.tasks]))) for matrix in matrices]
    seeds = (config.gate.model_copy(update={"seed": seed, "checkpoint": None}) for seed in range(NUM_UNTRAINED))
    untrained = [build_pool_gate(config.model_copy(update={"gate": gate}))[0] for gate in seeds]
    trained = checkpoints.load(checkpoint)[0]
    return [
        _replayed(f"untrained gates, first step (mean of {NUM_UNTRAINED})", "dmoa", untrained, matrices, embedded),
        _replayed("trained gate, first step", TRAINED, [trained], matrices, embedded),
    ]


def _replayed(
    name: str, policy: str, gates: Sequence[Gate], matrices: Sequence[AnswerMatrix], embedded: Sequence[FloatArray]
) -> Compared:
    """Return the mean of some gates over all rows; for a single one the interval is Wilson's."""
    from dmoa.evaluation.answer_matrix import gate_choices, replay_choices
    from dmoa.evaluation.statistics import wilson

    pairs = list(zip(matrices, embedded, strict=True))
    parts = [[replay_choices(matrix, gate_choices(gate, rows_RD)) for matrix, rows_RD in pairs] for gate in gates]
    value_GR = np.stack([np.concatenate([part.value_R for part in those]) for those in parts])
    low, high = np.quantile(value_GR.mean(axis=1), (0.025, 0.975))
    if len(gates) == 1:
        share = wilson(round(float(value_GR.sum())), value_GR.shape[1])
        low, high = share.low, share.high
    return Compared(
        name=name,
        policy=policy,
        accuracy=float(value_GR.mean()),
        low=float(low),
        high=float(high),
        by_suite={
            matrix.benchmark: float(np.mean([those[place].value_R for those in parts])) for place, matrix in enumerate(matrices)
        },
        active=float(np.mean([part.k_R for those in parts for part in those])),
        tokens=float(np.mean([part.tokens_R for those in parts for part in those])),
    )


def summarise(evaluation: Evaluation, agents: Sequence[str]) -> list[Compared]:
    """Return the methods of the closing table, all suites together."""
    from dmoa.evaluation.answer_matrix import ORACLE, matrix_policies

    singles = [_method(evaluation, policy, policy.partition(":")[2]) for policy in matrix_policies(agents)]
    best = max(singles, key=lambda method: (not method.not_run, method.did_run, method.accuracy))
    found = [_method(evaluation, "dmoa", "untrained gate"), _method(evaluation, TRAINED, "trained gate")]
    found.append(_method(evaluation, best.policy, f"best single agent ({best.name})"))
    found += [method for method in singles if method.name == GENERALIST and method.policy != best.policy]
    found += [_method(evaluation, "dense", "dense (every agent)"), _method(evaluation, "random", "random agent")]
    return [*found, _method(evaluation, ORACLE, "oracle (knows the labels)")]


def _method(evaluation: Evaluation, policy: str, name: str) -> Compared:
    from dmoa.evaluation.statistics import wilson

    rows = [row for row in evaluation.rows if row.policy == policy]
    ran = [row for row in rows if row.did_run]
    count, correct = sum(row.n for row in ran), sum(row.correct for row in ran)
    share = wilson(correct, count)
    return Compared(
        name=name,
        policy=policy,
        accuracy=share.value,
        low=share.low,
        high=share.high,
        by_suite={row.benchmark: row.accuracy for row in rows},
        active=sum((row.active_mean or 0.0) * row.n for row in ran) / max(count, 1),
        tokens=sum(row.prompt_tokens + row.completion_tokens for row in ran) / max(count, 1),
        not_run=tuple(row.benchmark for row in rows if not row.did_run),
    )


def _figures(method: Compared) -> list[str]:
    """Return the cells of a method; a mean over other suites than the others' is none."""
    suites = ["did not run" if suite in method.not_run else f"{method.by_suite[suite]:.0%}" for suite in DEMO_SUITES]
    if not method.did_run:
        return ["did not run", "", *suites, "", ""]
    overall = ["", ""] if method.not_run else [f"{method.accuracy:.1%}", f"{method.low:.0%} to {method.high:.0%}"]
    return [*overall, *suites, f"{method.active:.2f}", f"{method.tokens:.0f}"]


def print_comparison(methods: Sequence[Compared], config: Config, probe: ProbeReport) -> None:
    """Print the closing table."""
    from rich.table import Table

    from dmoa.cli.evaluation_screen import stdout_console

    console = stdout_console()
    table = Table(box=None, pad_edge=False, title=f"{config.name}: held-out rows, all suites together", title_justify="left")
    for name in ("method", "accuracy", "95 %", *DEMO_SUITES, "agents a step", "tokens a question"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in methods:
        table.add_row(method.name, *_figures(method))
    console.print()
    console.print(table)
    if probe.verdict != "can":
        console.print(f"the probe said: {probe.verdict}; {'; '.join(probe.reasons)}", soft_wrap=True)
