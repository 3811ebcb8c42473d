"""`dmoa bench`: measured figures beside the bars they must reach."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from dmoa.errors import ConfigError
from dmoa.provenance import machine
from dmoa.validation import did_you_mean
from dmoa.workflows.console import EXIT_FAILED, Common, new_table, refuse_together, stdout_console, with_common

if TYPE_CHECKING:
    from dmoa.bench.harness import BenchResult


class _Metric(NamedTuple):
    """One metric: the module and function of `dmoa.bench` that measure it, imported when asked for; what it measures; its bar."""

    home: str
    measures: str
    bar: str


_METRICS = {
    "P1": _Metric(
        "gate:run",
        "one gate decision (16 agents, one thread), against the bare matrix products of its sizes",
        "<= 1.5 x",
    ),
    "P3": _Metric(
        "latency:run_p3",
        "share of a query's time that is not the engines', one query at a time, real model",
        "<= 3 %",
    ),
    "P4": _Metric(
        "latency:run_p4",
        "a step through Serve with agents that take no time, against a bare Serve chain of the same hops",
        "<= 1.3 x",
    ),
    "P5": _Metric(
        "throughput:run",
        "how full `dmoa evaluate` keeps an engine, against the same calls on the bare engine",
        ">= 0.9",
    ),
    "P6": _Metric("prefix:run", "a step with 3 agents on one engine, against a step with 1", "reported"),
    "P7": _Metric(
        "prefix:run",
        "prefilled prompt tokens, against the least that whole blocks allow; time to the first token, against role-first prompts",
        "<= 1.15 x; <= 0.5 x",
    ),
    "P8": _Metric(
        "engine:run",
        "exact entropy: error against a float64 softmax; share of a decode step",
        "<= 1e-3 nat; <= 3 %",
    ),
    "P13": _Metric(
        "throughput:run",
        "how full `dmoa rollouts` keeps an engine, dense and exploring, measured as P5 is",
        ">= 0.9",
    ),
    "P14": _Metric("training:run", "gate updates/s under Ray Train, against a plain torch loop", ">= 0.95"),
    "P15": _Metric("adaptation:run", "p50 latency while gates are offered and tried, over that without", "<= 1.05 x"),
    "P15.real": _Metric("adaptation:run", "the same with a real model", "<= 1.05 x"),
    "P17": _Metric("memory:run", "memory of one more role in `shared` placement, against an engine", "<= 2 %"),
    "P18": _Metric("engine:run", "tokens/s of the `transformers` engine, against plain batched `generate`", ">= 0.9"),
    "peers": _Metric(
        "peers:run",
        "CPU a query, queries/s and p50 beside the model calls, against LangGraph behind FastAPI (installed apart, once)",
        "<= 1.0 x; >= 1.0 x; <= 1.5 x",
    ),
    "growth": _Metric("latency:run_growth", "log-log slope of the time per step over the number of agents, to 1,024", "<= 0.2"),
    "otlp": _Metric(
        "tracing:run",
        "a step of P4 while spans go to a collector, over one without; what spans take of a query while they are off",
        "<= 1.05 x; <= 1 %",
    ),
    "prefill": _Metric(
        "prefix:run",
        "log-log slope of all prefilled tokens over the steps of a query, up to 20",
        "<= 1.1",
    ),
}
_BOTH_ENGINES = ("P5", "P6", "P7", "prefill")
"""The metrics that are measured on every engine that is installed, or on one."""


@with_common
def bench(
    common: Common,
    only: Annotated[str | None, typer.Option("--only", metavar="P1,P3", help=f"Some of {', '.join(_METRICS)} [all].")] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, metavar="N", help="Rounds of each measurement [each bench's own].")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="E", help="transformers or vllm, for P5, P6, P7 and prefill alone [all installed]."),
    ] = None,
    lists: Annotated[bool, typer.Option("--list", help="Say what each metric measures, and measure nothing.")] = False,
) -> None:
    """Measure speed and cost; exit 1 if a bar is missed.

    \b
    dmoa bench --list
    dmoa bench --only P1
    dmoa bench --only P1,P3,P4,P8,P17 --json out/bench.json
    dmoa bench --only P5 --engine vllm
    """
    refuse_together({"--config": common.config, "--set": common.overrides}, "on benches, which bring their own pools")
    if lists:
        _list(common, group(only))
        return
    from dmoa.bench.harness import BenchReport

    results: list[BenchResult] = []
    groups = group(only)
    refuse_engine(engine, [name for ids in groups.values() for name in ids])
    try:
        for home, ids in groups.items():
            common.say(f"measuring {', '.join(ids)}")
            found = _measure(home, ids, rounds, engine)
            results += found
            for result in found:
                common.say(f"{result.id}: {result.value:.4g} {result.unit}")
    finally:  # what was measured is told, whatever becomes of the rest
        if results:
            print_results(results)
            common.write_json(BenchReport(machine=machine(), results=results).model_dump(mode="json"))
    if any(result.passed is False for result in results):
        raise typer.Exit(EXIT_FAILED)


def _list(common: Common, groups: Mapping[str, Sequence[str]]) -> None:
    from dmoa.workflows.reference import show_markdown

    shown = {name: metric for name, metric in _METRICS.items() if any(name in ids for ids in groups.values())}
    rows = "".join(f"| {name} | {metric.measures} | {metric.bar} |\n" for name, metric in shown.items())
    show_markdown(f"| id | what it measures | bar |\n|---|---|---|\n{rows}")
    common.write_json([{"id": name, "measures": metric.measures, "bar": metric.bar} for name, metric in shown.items()])


def group(only: str | None) -> dict[str, list[str]]:
    """Return the metrics that were asked for, by what measures them. Raises ConfigError for unknown ones."""
    asked = [name.strip() for name in only.split(",") if name.strip()] if only is not None else list(_METRICS)
    unknown = [name for name in asked if name not in _METRICS]
    if unknown or not asked:
        seen = ", ".join(unknown) or repr(only)
        nearest = did_you_mean(unknown, _METRICS)
        raise ConfigError(f"--only is {seen}; expected one of {', '.join(_METRICS)}, separated by commas{nearest}")
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(asked):
        groups.setdefault(_METRICS[name].home, []).append(name)
    return groups


def refuse_engine(engine: str | None, ids: Collection[str]) -> None:
    """Raise ConfigError for `--engine` beside a metric that knows no choice of one."""
    others = [name for name in ids if name not in _BOTH_ENGINES]
    if engine is not None and others:
        both = ", ".join(_BOTH_ENGINES)
        raise ConfigError(f"--engine: {engine!r} stands beside {', '.join(others)}; give it with --only of {both}")


def _measure(home: str, ids: Sequence[str], rounds: int | None, engine: str | None) -> list[BenchResult]:
    """Measure metrics of one home; a function that measures several is told which."""
    module, name = home.split(":")
    run: Callable[..., list[BenchResult]] = getattr(import_module(f"dmoa.bench.{module}"), name)
    is_shared = sum(metric.home == home for metric in _METRICS.values()) > 1
    asked = {"ids": ids if is_shared else None, "rounds": rounds, "engine": engine}
    return run(**{key: value for key, value in asked.items() if value is not None})


def print_results(results: Sequence[BenchResult]) -> None:
    """Print the results as a table."""
    columns = ("id", "value", "spread", "bar", "passed", "engine", "note")
    table = new_table(*columns, words=[name for name in columns if name not in ("value", "spread")])
    for result in results:
        passed = {True: "yes", False: "NO", None: ""}[result.passed]
        spread = f"{result.low:.4g}..{result.high:.4g} ({result.rounds})"
        table.add_row(result.id, f"{result.value:.4g} {result.unit}", spread, result.bar, passed, result.engine, result.note)
    stdout_console().print(table)
