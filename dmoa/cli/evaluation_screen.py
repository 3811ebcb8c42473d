"""What a person sees of an evaluation: bars with rate and time left on stderr, tables on stdout."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dmoa.cli.terminal import stderr

if TYPE_CHECKING:
    from dmoa import dataflow as passes
    from dmoa.evaluation.results import Evaluation
    from dmoa.evaluation.selfcheck import BenchmarkCheck, SelfCheck

PIPE_WIDTH = 160
_REASON_CHARS = 200
_MAX_FAILURES = 3
_LINE_S = 10.0
"""How often a line of progress goes to a pipe or a log."""


class Bars:
    """Progress of a run: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, verbosity: int) -> None:
        self._is_quiet = verbosity < 0
        self._console = Console(file=stderr(), highlight=False, markup=False, emoji=False)
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
        self._ended: set[str] = set()
        """Stages whose last line is printed."""
        self._last_line_s = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def watch(self, progress: passes.PassProgress) -> None:
        """Show how far a pass is."""
        more = (
            [f"{progress.completion_tokens / max(progress.elapsed_s, 1e-9):.0f} tokens/s"] if progress.completion_tokens else []
        )
        more += [f"{progress.failed} failed"] if progress.failed else []
        self._show(progress.stage, progress.done, progress.total, progress.elapsed_s, more, ends_with_line=True)

    def count(self, stage: str, done: int, total: int) -> None:
        """Show how far something that is only counted is."""
        started = self._started.setdefault(stage, time.monotonic())
        self._show(stage, done, total, time.monotonic() - started, [], ends_with_line=False)

    def _show(self, stage: str, done: int, total: int, elapsed_s: float, more: list[str], *, ends_with_line: bool) -> None:
        rate = done / max(elapsed_s, 1e-9)
        text = ", ".join([f"{rate:.3g} rows/s", *more])
        if not self._bars.disable:
            task = self._tasks.get(stage)
            if task is None:
                task = self._tasks[stage] = self._bars.add_task(stage, total=total, rate="")
            self._bars.update(task, completed=done, total=total, rate=text)
            return
        now = time.monotonic()
        is_last = ends_with_line and done == total and stage not in self._ended
        if not self._is_quiet and (now - self._last_line_s >= _LINE_S or is_last):
            self._last_line_s = now
            if done == total:
                self._ended.add(stage)
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
    """Print what a self-check found, a line per benchmark and check, and the rows that cannot be judged on this host."""
    table = Table(box=None, pad_edge=False)
    for name in ("benchmark", "check", "passed", "found"):
        table.add_column(name, overflow="fold")
    for check in found.benchmarks:
        for name, passed, text in _selfcheck_lines(check):
            table.add_row(check.name, name, "yes" if passed else "NO", text)
    console = stdout_console()
    console.print(table)
    for check in found.benchmarks:
        for row in check.unscored:
            version = row.version or "not installed"
            reason = " ".join(row.reason.split())[:_REASON_CHARS]
            console.print(f"unscored: {row.row_id} ({row.group} {version}): {reason}", soft_wrap=True)


def _selfcheck_lines(check: BenchmarkCheck) -> Iterator[tuple[str, bool, str]]:
    """Yield (what was checked, whether it holds, in figures)."""
    for gold in check.gold:
        unscored = f", {gold.num_unscored} unscored" if gold.num_unscored else ""
        more = "".join(f"; {failure}" for failure in gold.failures[:_MAX_FAILURES])
        yield f"right answers: {gold.measure}", gold.passed, f"{gold.num_right} of {gold.num_rows} score 1.0{unscored}{more}"
    silent, dealt = check.silent, check.dealt
    more = "".join(f"; {failure}" for failure in silent.failures[:_MAX_FAILURES])
    yield "empty and refused", silent.passed, f"{silent.num_above_zero} of {silent.num_replies} score above 0{more}"
    expected = f"{dealt.expected:.3f} +- {dealt.tolerance:.3f}"
    yield "answers dealt out", dealt.passed, f"{dealt.accuracy:.3f} of {dealt.num_rows} rows, expected {expected}"
