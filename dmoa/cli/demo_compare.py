"""The demo's end: untrained and trained gate beside single agents, everyone, anyone and the oracle, on held-out rows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoa.cli.demo_asking import DEMO_SUITES, SEED
from dmoa.cli.options import Common
from dmoa.config import Config

if TYPE_CHECKING:
    from dmoa.evaluation.results import Evaluation
    from dmoa.training.probe import ProbeReport

TRAINED = "dmoa:trained"
GENERALIST = "generalist"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One method on all held-out rows."""

    name: str
    policy: str
    accuracy: float
    low: float
    high: float
    """Wilson's 95 % interval."""
    by_suite: dict[str, float]
    active: float
    """Agents asked per step."""
    tokens: float
    """Per question: prompt and completion, summarizer included."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return asdict(self)


def compare(common: Common, config: Config, out: Path, checkpoint: Path, held_out: int) -> list[Compared]:
    """Evaluate everything on held-out rows, add the oracle, and return the methods of the closing table.

    Raises DmoaError where the evaluation stops.
    """
    from dmoa.cli.evaluation_session import run_evaluation
    from dmoa.evaluation.derived import add_oracle
    from dmoa.evaluation.matrix import matrix_policies
    from dmoa.evaluation.options import parse_options
    from dmoa.evaluation.run import finish
    from dmoa.evaluation.run_files import RunFolder

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
    options = parse_options(values)
    run_evaluation(options, config, common, shlex.join(["dmoa", "evaluate", *given]), shows_result=False)
    folder = RunFolder((out / "evaluation").absolute())
    add_oracle(folder, DEMO_SUITES, config.agent_names)
    return summarise(finish(folder), config.agent_names)


def summarise(evaluation: Evaluation, agents: Sequence[str]) -> list[Compared]:
    """Return the methods of the closing table, all suites together."""
    from dmoa.evaluation.derived import ORACLE
    from dmoa.evaluation.matrix import matrix_policies

    singles = [_method(evaluation, policy, policy.partition(":")[2]) for policy in matrix_policies(agents)]
    best = max(singles, key=lambda method: method.accuracy)
    found = [_method(evaluation, "dmoa", "untrained gate"), _method(evaluation, TRAINED, "trained gate")]
    found.append(_method(evaluation, best.policy, f"best single agent ({best.name})"))
    found += [method for method in singles if method.name == GENERALIST and method.policy != best.policy]
    found += [_method(evaluation, "dense", "dense (every agent)"), _method(evaluation, "random", "random agent")]
    return [*found, _method(evaluation, ORACLE, "oracle (knows the labels)")]


def _method(evaluation: Evaluation, policy: str, name: str) -> Compared:
    from dmoa.evaluation.statistics import wilson

    rows = [row for row in evaluation.rows if row.policy == policy]
    count, correct = sum(row.n for row in rows), sum(row.correct for row in rows)
    share = wilson(correct, count)
    return Compared(
        name=name,
        policy=policy,
        accuracy=share.value,
        low=share.low,
        high=share.high,
        by_suite={row.benchmark: row.accuracy for row in rows},
        active=sum((row.active_mean or 0.0) * row.n for row in rows) / count,
        tokens=sum(row.prompt_tokens + row.completion_tokens for row in rows) / count,
    )


def print_comparison(methods: Sequence[Compared], config: Config, probe: ProbeReport) -> None:
    """Print the closing table."""
    from rich.table import Table

    from dmoa.cli.evaluation_screen import stdout_console

    console = stdout_console()
    table = Table(box=None, pad_edge=False, title=f"{config.name}: held-out rows, all suites together", title_justify="left")
    for name in ("method", "accuracy", "95 %", *DEMO_SUITES, "agents a step", "tokens a question"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in methods:
        table.add_row(
            method.name,
            f"{method.accuracy:.1%}",
            f"{method.low:.0%} to {method.high:.0%}",
            *(f"{method.by_suite[suite]:.0%}" for suite in DEMO_SUITES),
            f"{method.active:.2f}",
            f"{method.tokens:.0f}",
        )
    console.print()
    console.print(table)
    if probe.verdict != "can":
        console.print(f"the probe said: {probe.verdict}; {'; '.join(probe.reasons)}", soft_wrap=True)
