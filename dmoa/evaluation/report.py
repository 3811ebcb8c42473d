"""The HTML report of an evaluation: one file that makes no request, with tables, plots, and how to repeat the run.

What models and errors say is text to the page, never markup: everything is escaped but our own plots, and the page's
policy forbids scripts and every source from outside.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dmoa.errors import ConfigError
from dmoa.evaluation import display
from dmoa.evaluation.results import Evaluation
from dmoa.evaluation.run_files import write_whole

MAX_FAILURES = 50
"""Failed rows that the report lists."""
_TEMPLATE = "report.html.j2"


@dataclass(frozen=True, slots=True)
class _Colour:
    """One series on a light and on a dark page."""

    light: str
    dark: str


# Told apart by people who see no red or green, and dark or light enough against their page (ours).
_COLOURS = (
    _Colour("#1f6fb4", "#5aa9e6"),
    _Colour("#c65102", "#f2914a"),
    _Colour("#1b7f5c", "#4cc29a"),
    _Colour("#8e3fa8", "#c98be0"),
    _Colour("#a88700", "#e0c24a"),
    _Colour("#b3234f", "#f0728f"),
    _Colour("#3a4db0", "#8d9cf0"),
    _Colour("#4d7a1a", "#9ccc5a"),
    _Colour("#7a5230", "#c9a27e"),
    _Colour("#5b6470", "#aab4c0"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plot:
    svg: Any
    heading: str = ""
    title: str = ""
    caption: str = ""


def write(evaluation: Evaluation, path: Path) -> None:
    """Write the report whole. Raises ConfigError if it cannot be written."""
    if path.is_dir():
        raise ConfigError(f"--html: value seen: {str(path)!r}, a folder; allowed is a file; name one, such as report.html")
    write_whole(path, render(evaluation))


def render(evaluation: Evaluation) -> str:
    """Return the page: the same result gives the same text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dmoa", "evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    run = evaluation.config
    return environment.get_template(_TEMPLATE).render(
        evaluation=evaluation,
        run=run,
        notes=display.Footnotes(evaluation),
        show=display,
        colours=_COLOURS,
        titles={info.name: info.title or info.name for info in run.benchmarks},
        num_rows=sum(row.n for row in evaluation.rows),
        num_failed=sum(row.failed for row in evaluation.rows),
        failures=evaluation.failures[:MAX_FAILURES],
        started=f"begun {_moment(run.started_unix_s)}",
        summary=_summary(evaluation),
        warnings=_warnings(evaluation),
        plots=list(_plots(evaluation)),
        provenance=_provenance(evaluation),
        settings=_settings(evaluation),
    )


def _summary(evaluation: Evaluation) -> list[tuple[str, str]]:
    run = evaluation.config
    tokens = sum(row.prompt_tokens + row.completion_tokens for row in evaluation.rows)
    pairs = [
        ("policies", ", ".join(run.all_policies)),
        ("gate", run.gate_version or "none"),
        ("rows", f"{run.split} split, {'all' if run.limit is None else f'at most {run.limit}'} per benchmark, seed {run.seed}"),
        ("limits of a query", _pairs(run.limits)),
        ("engines", ", ".join(run.engines)),
        ("tokens", f"{display.count(tokens)} prompt and completion"),
        ("machine", _machine(evaluation)),
    ]
    if run.ended_unix_s is not None:
        pairs.append(("from first start to end", display.duration(max(0.0, run.ended_unix_s - run.started_unix_s))))
    return [(name, text) for name, text in pairs if text]


def _warnings(evaluation: Evaluation) -> list[str]:
    from dmoa.types import is_untrained

    run = evaluation.config
    versions = {version for row in evaluation.rows for version in row.gate_versions}
    found = [f"Gate {version} is untrained: its routing is arbitrary." for version in sorted(versions) if is_untrained(version)]
    if len(versions) > 1:
        found.append(f"More than one gate answered: {', '.join(sorted(versions))}.")
    missing = sum(row.missing for row in evaluation.rows)
    if missing:
        found.append(f"{missing} of {sum(info.rows for info in run.benchmarks) * len(run.all_policies)} rows are still missing.")
    return found


def _provenance(evaluation: Evaluation) -> list[tuple[str, str]]:
    run = evaluation.config
    pairs = [
        ("dmoa", f"{run.dmoa_version}{f', revision {run.code_revision}' if run.code_revision else ''}"),
        ("seed", str(run.seed)),
        ("pool fingerprint", run.pool.fingerprint),
        ("gate", run.gate_version or ""),
        ("isolation of programs", run.isolation),
        ("versions", _pairs({"python": run.machine.python, **run.machine.versions, **run.versions})),
        ("machine", _machine(evaluation)),
        ("begun", _moment(run.started_unix_s)),
        ("ended", _moment(run.ended_unix_s) if run.ended_unix_s is not None else "not yet"),
    ]
    return [(name, text) for name, text in pairs if text]


def _settings(evaluation: Evaluation) -> str:
    run = evaluation.config
    return yaml.safe_dump({"options": run.options, "pool": run.pool.config}, sort_keys=False, allow_unicode=True, width=120)


def _machine(evaluation: Evaluation) -> str:
    machine = evaluation.config.machine
    gpus = f", {', '.join(machine.gpus)}" if machine.gpus else ""
    return f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB{gpus}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _moment(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_s))


def _plots(evaluation: Evaluation) -> Iterator[_Plot]:
    """Yield the plots for which there is data."""
    from markupsafe import Markup

    from dmoa.evaluation import plots

    def drawn(svg: str | None, **texts: str) -> Iterator[_Plot]:
        if svg is not None:
            # Our own drawing; matplotlib escapes the names in it.
            yield _Plot(svg=Markup(svg), **texts)  # noqa: S704

    yield from drawn(
        plots.accuracy_against_tokens(evaluation),
        heading="Accuracy against tokens",
        caption="Vertical lines: 95 % intervals. Dashed: chance. Up and to the left is better.",
    )
    heading = "Accuracy by group"
    for info in evaluation.config.benchmarks:
        for plot in drawn(plots.groups(evaluation, info.name), heading=heading, title=info.title or info.name):
            heading = ""
            yield plot
    yield from drawn(plots.steps(evaluation), heading="Steps")
    yield from drawn(plots.stop_reasons(evaluation), heading="Why queries ended")
    heading = "Routing"
    for policy in evaluation.config.all_policies:
        for plot in drawn(
            plots.routing(evaluation, policy),
            heading=heading,
            title=policy,
            caption="Share of the steps, in percent, in which the agent's contribution counted.",
        ):
            heading = ""
            yield plot
