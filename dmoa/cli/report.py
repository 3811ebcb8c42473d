"""`dmoa report`: the tables of a run on the terminal, and its HTML report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmoa.cli.options import Common, refuse_together, with_common

if TYPE_CHECKING:
    from rich.console import Console

    from dmoa.evaluation.figures import Footnotes
    from dmoa.evaluation.results import Evaluation

_PIPE_WIDTH = 160
_MAX_FAILURES = 5


@with_common
def report(
    common: Common,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, as `dmoa evaluate --out` wrote it.")],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Where the report is written [DIR/report.html].", dir_okay=False)
    ] = None,
) -> None:
    """Show the result of an evaluation and write it as one HTML file; a run that is not finished is shown as far as it is.

    \b
    dmoa report out/run1
    dmoa report out/run1 --html report.html
    """
    refuse_together({"--config": common.config, "--set": common.overrides}, "on a run, which keeps its own settings")
    from rich.console import Console

    from dmoa.evaluation import report as html_report
    from dmoa.evaluation.results import read_evaluation
    from dmoa.evaluation.run_folder import RunFolder

    evaluation = read_evaluation(directory)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=_PIPE_WIDTH)
    print_evaluation(evaluation, console)
    path = html or RunFolder(directory).report
    html_report.write_report(evaluation, path)
    common.say(f"report: {path}")
    common.write_json(evaluation.model_dump(mode="json"))


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the tables of an evaluation: results, comparisons, failed rows, and every remark they need."""
    from dmoa.evaluation import figures as display

    notes = display.Footnotes(evaluation)
    _print_results(evaluation, notes, console)
    if evaluation.paired:
        console.print()
        _print_paired(evaluation, notes, console)
    untrained = sorted(display.untrained_policies(evaluation))
    if untrained:
        _line(console, f"untrained gate, its routing is arbitrary: {', '.join(untrained)}")
    for note in notes.all():
        _line(console, f"[{note.mark}] {note.text}")
    for failure in evaluation.failures[:_MAX_FAILURES]:
        _line(console, f"failed: {failure.row_id} ({failure.policy}): {failure.error}")
    hidden = sum(row.failed for row in evaluation.rows) - _MAX_FAILURES
    if hidden > 0:
        _line(console, f"and {hidden} more failed rows; the HTML report and answers/ have them")


def _print_results(evaluation: Evaluation, notes: Footnotes, console: Console) -> None:
    from rich.table import Table

    from dmoa.evaluation import figures as display

    table = Table(box=None, pad_edge=False)
    for name in ("benchmark", "policy", "note"):
        table.add_column(name, overflow="fold")
    titles = ("n", "acc %", "95 %", "chance", "unsc.", "failed", "prompt", "cached", "compl.", "steps", "active", "wall")
    for name in titles:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("also", overflow="fold")
    previous = ""
    for row in evaluation.rows:
        table.add_row(
            row.benchmark if row.benchmark != previous else "",
            row.policy,
            notes.marks(row),
            str(row.n),
            display.accuracy(row),
            display.accuracy_ends(row),
            display.chance(row),
            str(row.unscored),
            str(row.failed),
            display.count(row.prompt_tokens),
            display.count(row.cached_tokens),
            display.count(row.completion_tokens),
            display.decimals(row.steps_mean),
            display.decimals(row.active_mean),
            display.duration(row.wall_s),
            display.metrics(row),
        )
        previous = row.benchmark
    console.print(table)
    _line(console, "acc: failed and unscored rows count as 0; wall: the queries' own times added up, they ran side by side")


def _print_paired(evaluation: Evaluation, notes: Footnotes, console: Console) -> None:
    from rich.table import Table

    from dmoa.evaluation import figures as display

    tests = display.tests(evaluation.paired)
    table = Table(box=None, pad_edge=False)
    for name in ("benchmark", "a", "b", "note"):
        table.add_column(name, overflow="fold")
    for name in ("n", "a - b, points", "95 %", "p", "test"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in evaluation.paired:
        test = chr(ord("A") + tests.index(row.test))
        marks = notes.marks_of_benchmark(row.benchmark)
        ends = display.point_ends(row)
        figures = (str(row.n), display.points(row.difference), ends, display.p_value(row.p), test)
        table.add_row(row.benchmark, row.a, row.b, marks, *(figures if row.n else ("0", "-", "", "", "")))
    console.print(table)
    named = ", ".join(f"{chr(ord('A') + number)}: {test}" for number, test in enumerate(tests))
    _line(console, f"the same rows of both, failed and unscored ones as 0; p two-sided, one comparison at a time; {named}")


def _line(console: Console, text: str) -> None:
    from rich.text import Text

    from dmoa.cli.show import printable

    console.print(Text(" ".join(printable(text).split())), soft_wrap=True)
