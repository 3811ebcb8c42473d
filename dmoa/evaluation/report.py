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
from dmoa.evaluation.results import Evaluation, not_run
from dmoa.evaluation.run_files import write_whole
from dmoa.types import is_untrained

MAX_FAILURES = 50
"""Failed rows that the report lists."""
_TEMPLATE = "report.html.j2"
_MOST_OPEN = 4
"""Drawings of one heading that are shown without being asked for."""


@dataclass(frozen=True, slots=True)
class _Colour:
    """One series on a light and on a dark page."""

    light: str
    dark: str


# Chosen farthest apart from one another as people with and without red, green or blue see them, 3:1 against their page (ours).
_COLOURS = (
    _Colour("#1971af", "#58afe1"),
    _Colour("#af8a19", "#e1e132"),
    _Colour("#3f4b0d", "#58710d"),
    _Colour("#648afa", "#a326d4"),
    _Colour("#320de1", "#7dede1"),
    _Colour("#af1964", "#afa358"),
    _Colour("#96640d", "#328a96"),
    _Colour("#711996", "#8a7dfa"),
    _Colour("#d4718a", "#e13264"),
    _Colour("#fa19e1", "#96d48a"),
    _Colour("#c819a3", "#d4bb0d"),
    _Colour("#0d647d", "#d496a3"),
    _Colour("#bb6458", "#26d4e1"),
    _Colour("#8a0d4b", "#197196"),
    _Colour("#4b7dd4", "#9664c8"),
    _Colour("#715826", "#a38a0d"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """Drawings under one heading."""

    heading: str
    plots: list[_Plot]

    @property
    def is_open(self) -> bool:
        """Whether the page shows them at once; many are folded, so that what follows can be found."""
        return len(self.plots) <= _MOST_OPEN


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plot:
    svg: Any
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
        names=display.names(evaluation),
        overall=display.overall(evaluation),
        first=next((plot for plot in _first_plot(evaluation)), None),
        sections=[section for section in _sections(evaluation) if section.plots],
        provenance=_provenance(evaluation),
        settings=_settings(evaluation),
    )


def _summary(evaluation: Evaluation) -> list[tuple[str, str]]:
    run = evaluation.config
    tokens = sum(row.prompt_tokens + row.completion_tokens for row in evaluation.rows)
    pairs = [
        ("policies", ", ".join(display.names(evaluation).values())),
        ("gate", _gates(evaluation)),
        ("rows", f"{run.split} split, {'all' if run.limit is None else f'at most {run.limit}'} per benchmark, seed {run.seed}"),
        ("limits of a query", _pairs(run.limits)),
        ("engines", ", ".join(run.engines)),
        ("tokens", f"{display.count(tokens)} prompt and completion"),
        ("machine", _machine(evaluation)),
    ]
    if run.ended_unix_s is not None:
        pairs.append(("from first start to end", display.duration(max(0.0, run.ended_unix_s - run.started_unix_s))))
    return [(name, text) for name, text in pairs if text]


def _gates(evaluation: Evaluation) -> str:
    run = evaluation.config
    named = {"": run.gate_version, **{f"{name} ": version for name, version in run.gates.items()}}
    shown = [f"{name}{version}{display.UNTRAINED * is_untrained(version)}" for name, version in named.items() if version]
    return ", ".join(shown) or "none"


def _warnings(evaluation: Evaluation) -> list[str]:
    run = evaluation.config
    versions = {version for row in evaluation.rows for version in row.gate_versions}
    found = [f"Gate {version} is untrained: its routing is arbitrary." for version in sorted(versions) if is_untrained(version)]
    if len(versions) > 1:
        found.append(f"More than one gate answered: {', '.join(sorted(versions))}.")
    lost = [f"{row.policy} on {row.benchmark}: all {row.failed} queries failed" for row in not_run(evaluation)]
    found = [f"Did not run: {text}." for text in lost] + found
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


def _drawn(svg: str | None, **texts: str) -> Iterator[_Plot]:
    from markupsafe import Markup

    if svg is not None:
        # Our own drawing; matplotlib escapes the names in it.
        yield _Plot(svg=Markup(svg), **texts)  # noqa: S704


def _first_plot(evaluation: Evaluation) -> Iterator[_Plot]:
    """Yield the drawing that the page begins with, where there is data."""
    from dmoa.evaluation import plots

    yield from _drawn(
        plots.accuracy_against_tokens(evaluation),
        caption="Vertical lines: 95 % intervals. Dashed: chance. Up and to the left is better.",
    )


def _sections(evaluation: Evaluation) -> Iterator[_Section]:
    """Yield the other drawings by heading, those for which there is no data left out."""
    from dmoa.evaluation import plots

    names = display.names(evaluation)
    yield _Section(heading="Steps", plots=list(_drawn(plots.steps(evaluation))))
    yield _Section(heading="Why queries ended", plots=list(_drawn(plots.stop_reasons(evaluation))))
    by_group = [
        plot
        for info in evaluation.config.benchmarks
        for plot in _drawn(plots.groups(evaluation, info.name), title=info.title or info.name)
    ]
    yield _Section(heading="Accuracy by group", plots=by_group)
    caption = "Share of the steps, in percent, in which the agent's contribution counted."
    routed = [
        plot
        for policy in evaluation.config.all_policies
        for plot in _drawn(plots.routing(evaluation, policy), title=names[policy], caption=caption)
    ]
    yield _Section(heading="Routing", plots=routed)
