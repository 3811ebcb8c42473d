"""What a person sees of an evaluation: bars with rate and time left on stderr, tables on stdout."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dmoa.evaluation import pipeline
    from dmoa.evaluation.results import Evaluation
    from dmoa.evaluation.selfcheck import SelfCheck

PIPE_WIDTH = 160
_LINE_S = 10.0
"""How often a line of progress goes to a pipe or a log."""


class Bars:
    """Progress of a run: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, verbosity: int) -> None:
        self._is_quiet = verbosity < 0
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._is_quiet or not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._last_line_s = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def watch(self, progress: pipeline.Progress) -> None:
        """Show how far a pass of the pipeline is."""
        more = (
            [f"{progress.completion_tokens / max(progress.elapsed_s, 1e-9):.0f} tokens/s"] if progress.completion_tokens else []
        )
        more += [f"{progress.failed} failed"] if progress.failed else []
        self._show(progress.stage, progress.done, progress.total, progress.elapsed_s, more)

    def count(self, stage: str, done: int, total: int) -> None:
        """Show how far something that is only counted is."""
        started = self._started.setdefault(stage, time.monotonic())
        self._show(stage, done, total, time.monotonic() - started, [])

    def _show(self, stage: str, done: int, total: int, elapsed_s: float, more: list[str]) -> None:
        rate = done / max(elapsed_s, 1e-9)
        text = ", ".join([f"{rate:.3g} rows/s", *more])
        if not self._bars.disable:
            task = self._tasks.get(stage)
            if task is None:
                task = self._tasks[stage] = self._bars.add_task(stage, total=total, rate="")
            self._bars.update(task, completed=done, total=total, rate=text)
            return
        now = time.monotonic()
        if not self._is_quiet and (now - self._last_line_s >= _LINE_S or done == total):
            self._last_line_s = now
            left = f", about {(total - done) / rate:.0f} s left" if 0 < done < total else ""
            self._console.print(f"dmoa: {stage}: {done} of {total} rows, {text}{left}", soft_wrap=True)


def stdout_console() -> Console:
    """Return a console for tables: as wide as the terminal, wide enough in a pipe."""
    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=PIPE_WIDTH)


def print_result(evaluation: Evaluation) -> None:
    """Print the tables of an evaluation."""
    from dmoa.cli.report import print_evaluation

    print_evaluation(evaluation, stdout_console())


def print_selfcheck(found: SelfCheck) -> None:
    """Print what a self-check found, a line per benchmark and check."""
    table = Table(box=None, pad_edge=False)
    for name in ("benchmark", "check", "passed", "found"):
        table.add_column(name, overflow="fold")
    for line in found.lines():
        table.add_row(line.benchmark, line.check, "yes" if line.passed else "NO", line.found)
    stdout_console().print(table)
