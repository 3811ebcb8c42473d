"""The HTML report of an evaluation: one page with its tables, remarks and plots, which are SVG in the page's own colours.

Deterministic, so the same result gives the same bytes. A plot without data is not drawn; matplotlib is loaded when one is.
"""

from __future__ import annotations

import io
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from dmoa.errors import ConfigError
from dmoa.evaluation import figures
from dmoa.evaluation.answer_matrix import ORACLE
from dmoa.evaluation.results import Evaluation, EvaluationRow, GroupRow, not_run
from dmoa.storage import write_whole
from dmoa.types import is_untrained, supervision_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Stand-ins, replaced by the page's variables; no other colour of a plot may be one of them.
_INK, _MUTED, _LINE = "#010203", "#040506", "#070809"
NUM_SERIES = 16
"""Methods that no other one looks like; beyond, looks repeat."""
_SERIES = tuple(f"#0a0b{16 + number:02x}" for number in range(NUM_SERIES))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_SERIES)
}
_SHAPES = "os^vDPX*"
"""Told apart without any colour; filled for the first methods, hollow for as many more."""
_THIN = "PX*"
_WIDTH_INCHES = 9.6
_NAME_CHARS = 48
"""Longer names are cut in a drawing; the tables have them whole."""
_CHARS_PER_INCH = 13.0
"""Of a legend's letters."""
_LEGEND_LINE_INCHES = 0.19
_COLUMNS = 4
_MANY_GROUPS = 20
"""From here on the scale stands above the bars too."""

MAX_FAILURES = 50
"""Failed rows that the report lists."""
_TEMPLATE = "report.html.j2"
_MOST_OPEN = 4
"""Drawings of one heading that are shown without being asked for."""
_FIRST_CAPTION = (
    "Vertical lines: 95 % intervals. Dashed: chance. Dotted: the policies that no other beats in both. "
    "Up and to the left is better."
)


Measure = Literal["tokens", "seconds", "price"]
_MEASURES: dict[Measure, str] = {
    "tokens": "prompt and completion tokens per row",
    "seconds": "seconds of a query, mean; queries run side by side",
    "price": "price per row",
}


def accuracy_against(evaluation: Evaluation, measure: Measure = "tokens") -> str | None:
    """Return accuracy with its interval against what a row took, a panel per benchmark; None without any row.

    A dashed line goes through the policies that no other one beats in both.
    """
    benchmarks: dict[str, list[EvaluationRow]] = defaultdict(list)
    for row in evaluation.rows:
        if row.n and row.did_run and _taken(row, measure) is not None:
            benchmarks[row.benchmark].append(row)
    if not benchmarks:
        return None
    columns = min(_COLUMNS, len(benchmarks))
    lines = -(-len(benchmarks) // columns)
    width = _WIDTH_INCHES if columns > 1 else 6.4
    policies = _in_order(evaluation, {row.policy for rows in benchmarks.values() for row in rows})
    with _figure(width, (2.25 if lines > 1 else 3.0) * lines + 0.5 + _legend_inches(policies, width)) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
        for axes, (name, rows) in zip(panels, benchmarks.items(), strict=False):
            _accuracy_panel(axes, name, rows, evaluation, measure)
        for axes in panels[len(benchmarks) :]:
            axes.remove()
        figure.supxlabel(_MEASURES[measure])
        figure.supylabel("accuracy, %")
        _legend(figure, evaluation, policies)
        return _svg(figure, measure)


def _taken(row: EvaluationRow, measure: Measure) -> float | None:
    """Return what a row took in the mean; None where that is not known, as seconds where calls came from the call cache."""
    if measure == "seconds" and row.memoised_tokens:
        return None
    whole = {"tokens": row.usage.total, "seconds": row.wall_s, "price": row.price}[measure]
    return None if whole is None else row.per_query(whole)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, worth) than which no other costs no more and is worth more, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, worth in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or worth > front[-1][1]:
            front.append((cost, worth))
    return front


def _accuracy_panel(axes: Axes, name: str, rows: Sequence[EvaluationRow], evaluation: Evaluation, measure: Measure) -> None:
    marked = _marked(rows)
    front = pareto([(_taken(row, measure) or 0.0, 100 * row.accuracy) for row in rows if row.policy != ORACLE])
    axes.plot(*zip(*front, strict=True), color=_MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    for row in rows:
        look, taken = _marker(evaluation, row.policy, size=6.5), _taken(row, measure) or 0.0
        axes.plot([taken, taken], [100 * row.low, 100 * row.high], color=look["color"], linewidth=1.4)
        axes.plot([taken], [100 * row.accuracy], **look)
        if row.policy in marked:
            axes.annotate(
                marked[row.policy],
                (taken, 100 * row.accuracy),
                xytext=(6, 6),
                textcoords="offset points",
                fontsize=7.5,
                color=_MUTED,
            )
    if rows[0].chance is not None:
        axes.axhline(100 * rows[0].chance, color=_MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    axes.set_title(name + (" (generated)" if rows[0].is_generated else ""), fontsize=9.5)
    axes.set_ylim(-4, 104)
    axes.margins(x=0.25)
    axes.locator_params(axis="x", nbins=3)
    if measure == "tokens":
        axes.xaxis.set_major_formatter(lambda value, _: figures.count(value))


def _marked(rows: Sequence[EvaluationRow]) -> dict[str, str]:
    """Return what stands beside the points of a panel: the best agent alone, where several ran, and what no router can pass."""
    singles = [row for row in rows if row.policy.startswith("single:")]
    best = {max(singles, key=lambda row: row.accuracy).policy: "best single"} if len(singles) > 1 else {}
    return best | {row.policy: "oracle" for row in rows if row.policy == ORACLE}


def groups(evaluation: Evaluation, benchmark: str) -> str | None:
    """Return accuracy per group of a benchmark as bars, those of a group together; None without groups."""
    rows = [row for row in evaluation.groups if row.benchmark == benchmark]
    if not rows:
        return None
    policies = _in_order(evaluation, {row.policy for row in rows})
    by_group: dict[str, dict[str, GroupRow]] = defaultdict(dict)
    for row in rows:
        by_group[row.group][row.policy] = row
    height = max(0.17, 0.085 * (len(policies) + 1))
    with _figure(_WIDTH_INCHES, height * len(by_group) + 1.0 + _legend_inches(policies)) as figure:
        axes = figure.subplots()
        bar = 0.8 / len(policies)
        for number, policy in enumerate(policies):
            look = _marker(evaluation, policy, size=4.5, has_line=False)
            places = [i for i, found in enumerate(by_group.values()) if policy in found]
            found = [by_group[group][policy] for group in by_group if policy in by_group[group]]
            offsets = [place - 0.4 + bar * (number + 0.5) for place in places]
            axes.barh(offsets, [100 * row.accuracy for row in found], height=bar * 0.9, color=look["color"], alpha=0.8)
            axes.hlines(offsets, [100 * row.low for row in found], [100 * row.high for row in found], color=_INK, linewidth=0.7)
            axes.plot([100 * row.accuracy for row in found], offsets, **look, clip_on=False)
        sizes = [max(row.n for row in found.values()) for found in by_group.values()]
        labels = [f"{group} ({size})" for group, size in zip(_labels(list(by_group)), sizes, strict=True)]
        axes.set_yticks(range(len(by_group)), labels, fontsize=8)
        axes.set_ylim(len(by_group) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.grid(visible=False, axis="y")
        axes.tick_params(labeltop=len(by_group) > _MANY_GROUPS)
        axes.set_xlabel("accuracy, %, with its 95 % interval (number of rows behind the name)")
        _legend(figure, evaluation, policies)
        return _svg(figure, f"groups-{benchmark}")


def robustness(evaluation: Evaluation, benchmark: str) -> str | None:
    """Return accuracy against the share of adversaries, a panel per defence; None where no run had any."""
    lines = [line for line in figures.curves(evaluation) if line.benchmark == benchmark]
    defences = list(dict.fromkeys(line.defence for line in lines))
    if not lines:
        return None
    policies = _in_order(evaluation, {line.policy for line in lines})
    width = min(_WIDTH_INCHES, 2.0 + 3.6 * len(defences))
    with _figure(width, 3.0 + _legend_inches(policies, width)) as figure:
        panels = figure.subplots(1, len(defences), squeeze=False, sharey=True).flatten()
        for axes, defence in zip(panels, defences, strict=True):
            for line in (line for line in lines if line.defence == defence):
                look = _marker(evaluation, line.policy, size=5.5)
                rows = [line.rows[count] for count in sorted(line.rows)]
                share = [100 * row.adversaries / row.agents for row in rows]
                axes.plot(share, [100 * row.accuracy for row in rows], linewidth=1.2, **look)
                axes.vlines(
                    share, [100 * row.low for row in rows], [100 * row.high for row in rows], look["color"], linewidth=0.8
                )
            axes.set_title(f"defence {defence}", fontsize=9.5)
            axes.set_ylim(-4, 104)
            axes.margins(x=0.08)
        figure.supxlabel("agents that work against the swarm, %")
        figure.supylabel("accuracy, %")
        _legend(figure, evaluation, policies)
        return _svg(figure, f"robustness-{benchmark}")


Stream = Mapping[str, Sequence[Mapping[str, Any]]]
"""Policy -> its answers to the first queries, in order: right, entropy_nats, right_probability, agents, tokens, gate_version."""
_ALONG = {
    "right": ("accuracy so far, %", 100.0),
    "right_probability": ("probability of that, %", 100.0),
    "entropy_nats": ("mean entropy so far, nats", 1.0),
    "agents": ("agents", 1.0),
}


def along_the_stream(evaluation: Evaluation, stream: Stream) -> str | None:
    """Return accuracy, posterior, entropy and agents over a stream of queries, with and without adaptation, as means so far."""
    shown = _in_order(evaluation, {policy for policy, points in stream.items() if points})
    if not shown:
        return None
    with _figure(_WIDTH_INCHES, 2.8 + _legend_inches(shown)) as figure:
        for axes, (name, (title, scale)) in zip(figure.subplots(1, len(_ALONG)), _ALONG.items(), strict=True):
            for policy in shown:
                look, total, places, means = _marker(evaluation, policy, size=6.5), 0.0, [], []
                for place, point in enumerate(stream[policy], start=1):
                    if point[name] is not None:
                        total += scale * float(point[name])
                        places.append(place)
                        means.append(total / len(places))
                axes.plot(places, means, color=look["color"], linewidth=1.4)
                axes.plot(places[-1:], means[-1:], **look)
            axes.set_title(title, fontsize=9.5)
        figure.supxlabel("queries of the stream")
        _legend(figure, evaluation, shown)
        return _svg(figure, "stream")


def steps(evaluation: Evaluation) -> str | None:
    """Return the share of rows by number of steps, a panel per policy; None without an answer."""
    return _share_bars(evaluation, "steps", "steps of a query", lambda row: row.steps_histogram)


def stop_reasons(evaluation: Evaluation) -> str | None:
    """Return the share of rows by why the query ended, a panel per policy; None without an answer."""
    return _share_bars(evaluation, "stops", "why queries ended", lambda row: row.stop_reasons)


def _share_bars(
    evaluation: Evaluation, name: str, title: str, counted: Callable[[EvaluationRow], Mapping[Any, int]]
) -> str | None:
    """Draw shares of each policy's answered rows over what is counted of them, in order; an empty text is `(none)`."""
    totals: dict[str, Counter[int | str]] = defaultdict(Counter)
    for row in evaluation.rows:
        for category, count in counted(row).items():
            totals[row.policy]["(none)" if category == "" else category] += count
    if not totals:
        return None
    categories = sorted({category for counts in totals.values() for category in counts})
    with _figure(_WIDTH_INCHES, 2.7 + _legend_inches(list(totals))) as figure:
        axes = figure.subplots()
        bar = 0.8 / len(totals)
        for number, (policy, counts) in enumerate(totals.items()):
            whole = sum(counts.values())
            heights = [100 * counts.get(category, 0) / whole for category in categories]
            places = [place - 0.4 + bar * (number + 0.5) for place in range(len(categories))]
            look = _marker(evaluation, policy, size=5.0, has_line=False)
            axes.bar(places, heights, width=bar * 0.9, color=look["color"], alpha=0.8)
            tops = [(place, share) for place, share in zip(places, heights, strict=True) if share > 0]
            axes.plot([place for place, _ in tops], [share for _, share in tops], **look, clip_on=False)
        axes.set_xticks(range(len(categories)), [str(category) for category in categories])
        axes.set_xlim(-0.6, max(len(categories), 4) - 0.4)
        axes.set_ylim(0, 100)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(title)
        axes.set_ylabel("% of answered rows")
        _legend(figure, evaluation, list(totals))
        return _svg(figure, name)


def routing(evaluation: Evaluation, policy: str) -> str | None:
    """Return heat maps of agent by benchmark and agent by step; None where the policy asked no agent.

    A cell is the share of steps, in percent, in which the agent's contribution counted.
    """
    found = [row for row in evaluation.routing if row.policy == policy]
    if not found:
        return None
    agents = figures.agents_of(evaluation, {row.agent for row in found})
    by_benchmark, by_step = figures.steps_taken(evaluation, policy)
    shares = figures.routing_shares(evaluation, policy)
    width = 2.2 + 0.5 * (len(by_benchmark) + len(by_step)) + max(0, max(map(len, _labels(agents))) - 20) / _CHARS_PER_INCH
    benchmarks = _labels([str(name) for name in by_benchmark])
    height = 0.27 * len(agents) + 1.9 + max(0, max(map(len, benchmarks)) - 20) / _CHARS_PER_INCH
    with _figure(max(5.0, width), height) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[len(by_benchmark), len(by_step)], sharey=True)
        _heat(left, agents, by_benchmark, shares, benchmarks)
        left.set_xticks(left.get_xticks(), benchmarks, rotation=50, ha="right", rotation_mode="anchor")
        left.set_xlabel("benchmark")
        _heat(right, agents, by_step, shares, [str(int(step) + 1) for step in by_step])
        right.set_xlabel("step")
        return _svg(figure, f"routing-{policy}")


def _heat(
    axes: Axes,
    agents: Sequence[str],
    columns: Collection[str | int],
    shares: dict[tuple[str, str | int], float],
    labels: Sequence[str],
) -> None:
    from matplotlib.patches import Rectangle

    for column, key in enumerate(columns):
        for line, agent in enumerate(agents):
            share = shares.get((agent, key), 0.0)
            axes.add_patch(Rectangle((column, line), 1, 1, facecolor=_SERIES[0], alpha=0.75 * share, linewidth=0))
            if share > 0:
                axes.text(column + 0.5, line + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(agents), 0)
    axes.set_xticks([place + 0.5 for place in range(len(columns))], labels, fontsize=8)
    axes.set_yticks([place + 0.5 for place in range(len(agents))], _labels(agents), fontsize=8)
    axes.tick_params(length=0)
    axes.grid(visible=False)


def _in_order(evaluation: Evaluation, policies: Collection[str]) -> list[str]:
    return [policy for policy in evaluation.config.all_policies if policy in policies]


def _marker(evaluation: Evaluation, policy: str, *, size: float, has_line: bool = True) -> dict[str, Any]:
    """Return how the points of a method look: no other of the first 16 has its colour, nor its shape and filling."""
    number = evaluation.config.all_policies.index(policy)
    colour = _SERIES[number % NUM_SERIES]
    is_filled, shape = number % NUM_SERIES < len(_SHAPES), _SHAPES[number % len(_SHAPES)]
    size += 1.0 * (shape in _THIN) + 1.5 * (not is_filled)
    return {
        "color": colour,
        "marker": shape,
        "markersize": size,
        "markerfacecolor": colour if is_filled else "none",
        "markeredgewidth": 1.0,
        "linestyle": "-" if has_line else "none",
    }


def _cut(name: str) -> str:
    """Return a name as a drawing has room for it: both ends of a long one."""
    half = _NAME_CHARS // 2
    return name if len(name) <= _NAME_CHARS else f"{name[:half]}…{name[-half + 1 :]}"


def _labels(names: Sequence[str]) -> list[str]:
    """Return the names as a drawing shows them: cut, unless two would then be one."""
    cut = [_cut(name) for name in names]
    return cut if len(set(cut)) == len(set(names)) else list(names)


def _legend_columns(policies: Sequence[str], width: float) -> int:
    """Return how many names stand side by side in a figure of some inches."""
    longest = max(map(len, _labels(policies))) + len(figures.UNTRAINED) + 6
    return max(1, min(6, len(policies), int(width * _CHARS_PER_INCH / longest)))


def _legend_inches(policies: Sequence[str], width: float = _WIDTH_INCHES) -> float:
    """Return the height of a legend beyond its first line."""
    return _LEGEND_LINE_INCHES * (-(-len(policies) // _legend_columns(policies, width)) - 1)


def _legend(figure: Figure, evaluation: Evaluation, shown: Sequence[str]) -> None:
    """Name the methods above the drawing, each beside its marker, in the order of the run."""
    from matplotlib.lines import Line2D

    ordered = _in_order(evaluation, shown)
    handles = [Line2D([], [], linewidth=1.4, **_marker(evaluation, policy, size=6.5)) for policy in ordered]
    untrained = figures.untrained_policies(evaluation)
    names = [name + figures.UNTRAINED * (policy in untrained) for name, policy in zip(_labels(ordered), ordered, strict=True)]
    columns = _legend_columns(ordered, figure.get_figwidth())
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """Give a figure in the page's style, drawn without any figures."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "dmoa",
        "text.parse_math": False,
        "font.family": ["sans-serif"],
        "font.size": 9.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.5,
        "grid.color": _LINE,
        "axes.edgecolor": _LINE,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "text.color": _INK,
        "axes.labelcolor": _MUTED,
        "axes.titlecolor": _INK,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "xtick.major.size": 0.0,
        "ytick.major.size": 0.0,
    }
    with mpl.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element: no prolog, no metadata, ids of its own, the page's colours."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"[^a-z0-9-]", "-", name.lower())
    text = re.sub(r'(?<= id=")', f"{prefix}-", text)
    text = re.sub(r'(?<=href="#)|(?<=url\(#)', f"{prefix}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{prefix}" ', 1)


# Chosen farthest apart from one another as people with and without red, green or blue see them, 3:1 against their page (ours).
_COLOURS = (
    ("#1971af", "#58afe1"),
    ("#af8a19", "#e1e132"),
    ("#3f4b0d", "#58710d"),
    ("#648afa", "#a326d4"),
    ("#320de1", "#7dede1"),
    ("#af1964", "#afa358"),
    ("#96640d", "#328a96"),
    ("#711996", "#8a7dfa"),
    ("#d4718a", "#e13264"),
    ("#fa19e1", "#96d48a"),
    ("#c819a3", "#d4bb0d"),
    ("#0d647d", "#d496a3"),
    ("#bb6458", "#26d4e1"),
    ("#8a0d4b", "#197196"),
    ("#4b7dd4", "#9664c8"),
    ("#715826", "#a38a0d"),
)
"""Of each series, on a light and on a dark page."""


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


def write_report(evaluation: Evaluation, path: Path, stream: Stream | None = None) -> None:
    """Write the report whole; `stream` as in `along_the_stream`. Raises ConfigError if it cannot be written."""
    if path.is_dir():
        raise ConfigError(f"--html is {str(path)!r}, a folder; expected a file; name one, such as report.html")
    try:
        write_whole(path, render_report(evaluation, stream))
    except OSError as error:
        raise ConfigError(
            f"the report: cannot write {str(path)!r}: {error}; name a file for it (dmoa report DIR --html FILE)"
        ) from error


def render_report(evaluation: Evaluation, stream: Stream | None = None) -> str:
    """Return the page: the same result gives the same text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dmoa", "evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    run = evaluation.config
    return environment.get_template(_TEMPLATE).render(
        evaluation=evaluation,
        run=run,
        notes=figures.Footnotes(evaluation),
        show=figures,
        colours=_COLOURS,
        titles={info.name: info.title or info.name for info in run.benchmarks},
        num_rows=sum(row.n for row in evaluation.rows),
        num_failed=sum(row.failed for row in evaluation.rows),
        failures=evaluation.failures[:MAX_FAILURES],
        started=f"begun {_moment(run.started_unix_s)}",
        summary=_summary(evaluation),
        warnings=_warnings(evaluation),
        names=figures.names(evaluation),
        overall=figures.overall(evaluation),
        curves=figures.curves(evaluation),
        curve_counts=sorted({row.adversaries for row in evaluation.robustness}),
        first=next(_drawn(accuracy_against(evaluation), caption=_FIRST_CAPTION), None),
        sections=[section for section in (*_adaptation(evaluation, stream or {}), *_sections(evaluation)) if section.plots],
        provenance=_provenance(evaluation),
        settings=yaml.safe_dump(
            {"options": run.options, "pool": run.pool.config}, sort_keys=False, allow_unicode=True, width=120
        ),
    )


def _summary(evaluation: Evaluation) -> list[tuple[str, str]]:
    run = evaluation.config
    tokens = sum(row.usage.total for row in evaluation.rows)
    pairs = [
        ("policies", ", ".join(figures.names(evaluation).values())),
        ("gate", _gates(evaluation)),
        ("rows", f"{run.split} split, {'all' if run.limit is None else f'at most {run.limit}'} per benchmark, seed {run.seed}"),
        ("limits of a query", _pairs(run.limits)),
        ("matched", _matched(evaluation)),
        ("repeats", str(run.repeats) if run.repeats > 1 else ""),
        ("engines", ", ".join(run.engines)),
        ("tokens", f"{figures.count(tokens)} prompt and completion"),
        ("machine", _machine(evaluation)),
    ]
    if run.ended_unix_s is not None:
        pairs.append(("from first start to end", figures.duration(max(0.0, run.ended_unix_s - run.started_unix_s))))
    return [(name, text) for name, text in pairs if text]


def _matched(evaluation: Evaluation) -> str:
    run = evaluation.config
    budgets = ", ".join(
        f"{name} {_pairs({key: f'{value:.6g}' for key, value in found.items()})}" for name, found in run.budgets.items()
    )
    return f"{run.match}, as {run.reference} takes: {budgets}" if run.budgets else ""


def _gates(evaluation: Evaluation) -> str:
    run = evaluation.config
    named = {"": run.gate_version, **{f"{name} ": version for name, version in run.gates.items()}}
    shown = [
        f"{name}{version}{figures.UNTRAINED * is_untrained(version)}, supervision {supervision_of(version)}"
        for name, version in named.items()
        if version
    ]
    return "; ".join(shown) or "none"


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


def _adaptation(evaluation: Evaluation, stream: Stream) -> Iterator[_Section]:
    versions = {policy: list(dict.fromkeys(str(point["gate_version"]) for point in points)) for policy, points in stream.items()}
    told = "; ".join(f"{policy}: {len(found)} versions, {found[0]} to {found[-1]}" for policy, found in versions.items() if found)
    caption = f"Counted answers, each given before the update on its query. {told}."
    yield _Section(heading="Adaptation", plots=list(_drawn(along_the_stream(evaluation, stream), caption=caption)))


def _sections(evaluation: Evaluation) -> Iterator[_Section]:
    """Yield the other drawings by heading, those for which there is no data left out."""
    caption = "Share of the steps, in percent, in which the agent's contribution counted."
    gates = figures.gate_policies(evaluation)
    others: list[Measure] = ["seconds", "price"] if evaluation.config.reference else []
    cached = dict.fromkeys(row.policy for row in evaluation.rows if row.memoised_tokens)
    lacks = f"Left out where calls came from the call cache, which take no time: {', '.join(cached)}." if cached else ""
    captions: dict[Measure, str] = {"seconds": lacks}
    against = [plot for name in others for plot in _drawn(accuracy_against(evaluation, name), caption=captions.get(name, ""))]
    yield _Section(heading="Accuracy against time and price", plots=against)
    yield _Section(heading="Accuracy against the share of adversaries", plots=_by_benchmark(evaluation, robustness))
    yield _Section(heading="Whom the gate asks", plots=list(_routed(evaluation, gates, caption)))
    yield _Section(heading="Steps", plots=list(_drawn(steps(evaluation))))
    yield _Section(heading="Why queries ended", plots=list(_drawn(stop_reasons(evaluation))))
    yield _Section(heading="Accuracy by group", plots=_by_benchmark(evaluation, groups))
    rest = [policy for policy in evaluation.config.all_policies if policy not in gates]
    yield _Section(heading="Routing of the other policies", plots=list(_routed(evaluation, rest, caption)))


def _by_benchmark(evaluation: Evaluation, draw: Callable[[Evaluation, str], str | None]) -> list[_Plot]:
    drawn = ((info.title or info.name, draw(evaluation, info.name)) for info in evaluation.config.benchmarks)
    return [plot for title, svg in drawn for plot in _drawn(svg, title=title)]


def _routed(evaluation: Evaluation, policies: Sequence[str], caption: str) -> Iterator[_Plot]:
    names = figures.names(evaluation)
    for policy in policies:
        yield from _drawn(routing(evaluation, policy), title=names[policy], caption=caption)
