"""What commands share on the terminal: steps and answers of a query, progress, tables of results, common options, errors.

Steps and answers are a program's output (stdout); progress goes to stderr. Texts of models are shown without control
characters, so that no reply can drive the terminal.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, NoReturn, ParamSpec, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text
from typer.exceptions import TyperException

from dmoa.agents.pool import load_pool
from dmoa.config import Config
from dmoa.errors import CheckpointError, ConfigError, DmoaError, RequestError, TraceError
from dmoa.storage import check_local, uri_of, write_whole
from dmoa.trace import ReplyAgent, ReplyStep, Trace, reply_dmoa, reply_step
from dmoa.types import Answer, StepRecord, is_untrained
from dmoa.validation import did_you_mean, redact_text
from dmoa.workflows.terminal import closed, libraries_apart, never_join_by_accident, stderr, tell

if TYPE_CHECKING:
    from dmoa.dataflow import PassProgress
    from dmoa.evaluation.explain import Explanation
    from dmoa.evaluation.figures import Footnotes
    from dmoa.evaluation.results import Evaluation, EvaluationRow
    from dmoa.evaluation.selfcheck import BenchmarkCheck, SelfCheck


_BAR_CELLS = 20
_MAX_IDLE_ROWS = 8
_MAX_SUMMARY_CHARACTERS = 300
_QUERY_WIDTH = 110

PIPE_WIDTH = 160
_REASON_CHARS = 200
_MAX_CHECK_FAILURES = 3
_LINE_S = 10.0
"""How often a line of progress goes to a pipe or a log."""

_MOST_ROUTED = 24
"""Agents up to which the table of whom a gate asks is printed."""
_MAX_FAILURES = 5

P = ParamSpec("P")
_plain = functools.partial(Console, highlight=False, markup=False, emoji=False)
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
_BAD_INPUT = (ConfigError, RequestError, CheckpointError, TraceError)
_TOO_BUSY = 429

PolicyOption = Annotated[
    str | None, typer.Option("--policy", metavar="NAME", help="Who is asked when: a name, see `dmoa policies`, or FILE.py:NAME.")
]
AgentOption = Annotated[str | None, typer.Option("--agent", metavar="NAME", help="Ask this one agent (policy `single`).")]
CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", metavar="DIR", help="Gate to route with, in place of the pool's own.")
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Ask a running server instead of a swarm in this process; key in DMOA_API_KEY."),
]
MaxStepsOption = Annotated[int | None, typer.Option("--max-steps", min=1, metavar="N", help="At most this many steps.")]
DeadlineOption = Annotated[
    float | None, typer.Option("--deadline", min=0.001, metavar="S", help="Best answer so far after this many seconds.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryResult:
    """One answered question, wherever it was answered."""

    question: str
    answer: Answer
    pool: str
    trace: Trace | None = None
    """None where no trace was asked for."""

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` writes: question, answer and the `dmoa` object of the contract."""
        return {
            "question": self.question,
            "answer": self.answer.text,
            "finish_reason": self.answer.finish_reason,
            "dmoa": reply_dmoa(self.answer, pool=self.pool, with_texts=True).model_dump(mode="json"),
        }


def untrained_note(gate_version: str | None) -> str | None:
    """Return the sentence that every output on untrained gate weights carries, None for trained ones and no gate."""
    if gate_version is None or not is_untrained(gate_version):
        return None
    return f"gate {gate_version}: routing is arbitrary until it is trained"


def printable(text: str) -> str:
    """Return text without control characters other than line ends and tabs."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


class Screen:
    """Prints queries to a terminal or a pipe."""

    def __init__(self, verbosity: int = 0, *, shows_steps: bool = True) -> None:
        self._verbosity = verbosity
        self.shows_steps = shows_steps
        """Whether steps are printed; `/steps` in a chat turns it."""
        self.out = stdout_console(_QUERY_WIDTH)
        self.err = _plain(file=stderr(), soft_wrap=True)
        self._live: Status | None = None
        self._coming = ""
        """What has come of the answer while its step is not printed yet."""
        self._has_text = False

    def step(self, record: StepRecord) -> None:
        """Print a finished step: probabilities, who was active, how sure each was, and the new summary."""
        if self._verbosity < 0 or not self.shows_steps:
            return
        self.end_live_line()
        step = reply_step(record, with_texts=True)
        summarizer = step.summarizer
        head = f"step {step.step + 1}  k {step.k}  mass {step.mass:.3f}  {step.wall_ms / 1e3:.2f} s"
        self.out.print(Text(f"{head}  {summarizer.mode}: {summarizer.verdict}", style="bold"))
        self.out.print(self._agents(step))
        if self._verbosity > 0:
            for agent in step.agents:
                if agent.text:
                    self._print(f"  {agent.name}: {agent.text}")
        if step.summary:
            self._print(f"  => {_short(step.summary)}")

    def live_line(self, text: str) -> None:
        """Show what goes on in a line of its own, on a terminal, until the next step is printed or `end_live_line`."""
        if self._verbosity < 0 or not self.shows_steps or not self.err.is_terminal:
            return
        line = Text(" ".join(printable(text).split()), style="dim")
        if self._live is None:
            self._live = self.err.status(line)
            self._live.start()
        self._live.update(line)

    def end_live_line(self) -> None:
        """Take the line of what goes on away."""
        self._coming = ""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def delta(self, text: str) -> None:
        """Show a piece of the answer as it comes: printed, or in a line of its own until the answer's step is printed."""
        if self._verbosity >= 0 and self.shows_steps:
            self._coming += text
            self.live_line(self._coming[-_QUERY_WIDTH:])
            return
        self._heading()
        self._has_text = True
        self.out.print(Text(printable(text)), end="", soft_wrap=True)

    def answer(self, asked: QueryResult) -> None:
        """Print the answer, unless it came in pieces, then why the query stopped, what it took, and an untrained gate."""
        if self._has_text:
            self.out.print()
        else:
            self._heading()
            self._print(asked.answer.text)
        self._has_text = False
        note = untrained_note(asked.answer.gate_version)
        if self._verbosity < 0:
            if note:
                self.err.print(f"dmoa: {note}")
            return
        self.out.print(Text(closing_line(asked.answer), style="dim"), soft_wrap=True)
        if note:
            self.out.print(Text(note, style="yellow"), soft_wrap=True)

    def _heading(self) -> None:
        if not self._has_text and self._verbosity >= 0:
            self.out.print(Text("answer", style="bold"))

    def _print(self, text: str) -> None:
        self.out.print(Text(printable(text)), soft_wrap=True)

    def _agents(self, step: ReplyStep) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, width=_BAR_CELLS)
        table.add_column(no_wrap=True, min_width=4)
        for _ in range(3):
            table.add_column(no_wrap=True, justify="right")
        unasked = sorted((a for a in step.agents if a.status in ("idle", "masked")), key=lambda a: -a.probability)
        asked = [agent for agent in step.agents if agent.status not in ("idle", "masked")]
        for agent in (*asked, *unasked[:_MAX_IDLE_ROWS]):
            table.add_row(*self._row(agent), style=None if agent.status == "ok" and not agent.explored else "dim")
        hidden = unasked[_MAX_IDLE_ROWS:]
        if hidden:
            table.add_row(f"  and {len(hidden)} more", f"{sum(a.probability for a in hidden):.3f}", style="dim")
        return table

    def _row(self, agent: ReplyAgent) -> list[str]:
        cell = "█" if self.out.encoding.startswith("utf") else "#"
        bar = cell * round(agent.probability * _BAR_CELLS)
        name = f"{'*' if agent.status == 'ok' and not agent.explored else ' '} {agent.name}"
        row = [name, f"{agent.probability:.3f}", bar, "explored" if agent.explored and agent.status == "ok" else agent.status]
        if agent.error:
            return [*row, printable(agent.error)[:60]]
        known = [] if agent.entropy_nats is None else [f"{agent.entropy_nats:.3f} nats/token"]
        known += [] if agent.right_probability is None else [f"{agent.right_probability:.0%} right"]
        if not known:
            return row
        return [*row, ", ".join(known), f"{agent.completion_tokens} tokens", f"{agent.latency_ms / 1e3:.2f} s"]


def closing_line(answer: Answer) -> str:
    """Return one line: why the query stopped, and what it took."""
    steps = f"{len(answer.steps)} step{'' if len(answer.steps) == 1 else 's'}"
    lost = ", degraded: an agent was lost" if answer.degraded else ""
    gate = f", gate {answer.gate_version}" if answer.gate_version else ""
    price = "" if answer.price is None else f", price {answer.price:.3g}"
    took = f"{steps}, {answer.usage.total} tokens, {answer.wall_ms / 1e3:.2f} s{price}"
    return f"stopped by {answer.stop_reason} after {took} (policy {answer.policy}{gate}{lost})"


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _MAX_SUMMARY_CHARACTERS else flat[: _MAX_SUMMARY_CHARACTERS - 3] + "..."


class Bars:
    """Progress of a run: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, verbosity: int) -> None:
        self._is_quiet = verbosity < 0
        self._console = _plain(file=stderr())
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
        self._begun: dict[str, tuple[float, int]] = {}
        self._ended: set[str] = set()
        """Stages whose last line is printed."""
        self._last_line_s = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def watch(self, progress: PassProgress) -> None:
        """Show how far a pass is."""
        elapsed_s = max(progress.elapsed_s, 1e-9)
        more = [f"{progress.completion_tokens / elapsed_s:.0f} tokens/s"] if progress.completion_tokens else []
        more += [f"{progress.failed} failed"] if progress.failed else []
        self._show(progress.stage, progress.done, progress.total, progress.done / elapsed_s, more, ends_with_line=True)

    def count(self, stage: str, done: int, total: int) -> None:
        """Show how far something that is only counted is; its rate is that of what came after the first count."""
        begun_s, first = self._begun.setdefault(stage, (time.monotonic(), done))
        self._show(stage, done, total, (done - first) / max(time.monotonic() - begun_s, 1e-9), [], ends_with_line=False)

    def _show(self, stage: str, done: int, total: int, rate: float, more: list[str], *, ends_with_line: bool) -> None:
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
            left = f", about {(total - done) / rate:.0f} s left" if rate and done < total else ""
            self._console.print(f"dmoa: {stage}: {done} of {total} rows, {text}{left}", soft_wrap=True)


def stdout_console(pipe_width: int = PIPE_WIDTH) -> Console:
    """Return a console for tables: as wide as the terminal, wide enough in a pipe."""
    console = _plain()
    return console if console.is_terminal else _plain(width=pipe_width)


def line(console: Console, text: str) -> None:
    """Print a text as one line, which the terminal wraps."""
    console.print(Text(" ".join(printable(text).split())), soft_wrap=True)


def new_table(*columns: str, words: Collection[str]) -> Table:
    """Return a table without lines: columns of `words` fold on the left, figures stay whole on the right."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        is_text = name in words
        table.add_column(name, overflow="fold", no_wrap=not is_text, justify="left" if is_text else "right")
    return table


def print_explanation(found: Explanation) -> None:
    """Print how a reply is judged, a line or more a field; the part of the text that states the answer is marked."""
    console = stdout_console()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    text = Text(printable(found.text))
    if found.span:
        text.highlight_words([found.span], style="reverse")
    gold = ", ".join(f"{name} {printable(str(value))[:_MAX_SUMMARY_CHARACTERS]}" for name, value in found.gold.items())
    fields = {"row": found.row_id, "reply": found.source, "thought": printable(_short(found.reasoning))}
    fields |= {"span": printable(found.span), "rule": found.rule, "read as": printable(found.extracted or "nothing")}
    fields |= {"gold": gold, "verdict": f"{found.verdict}: {printable(found.reason)}"}
    for name, value in fields.items():
        if name == "span":
            table.add_row("text", text)
        table.add_row(name, Text(value))
    console.print(table)
    console.print()


def print_selfcheck(found: SelfCheck) -> None:
    """Print what a self-check found, a line per benchmark and check, and the rows that cannot be judged on this host."""
    columns = ("benchmark", "check", "passed", "found")
    table = new_table(*columns, words=columns)
    for check in found.benchmarks:
        for name, passed, text in _selfcheck_lines(check):
            table.add_row(check.name, name, "yes" if passed else "NO", text)
    console = stdout_console()
    console.print(table)
    for check in found.benchmarks:
        for row in check.unscored:
            version = row.version or "not installed"
            reason = " ".join(row.reason.split())[:_REASON_CHARS]
            line(console, f"unscored: {row.row_id} ({row.group} {version}): {reason}")


def _selfcheck_lines(check: BenchmarkCheck) -> Iterator[tuple[str, bool, str]]:
    """Yield (what was checked, whether it holds, in figures)."""
    for gold in check.gold:
        unscored = f", {gold.num_unscored} unscored" if gold.num_unscored else ""
        more = "".join(f"; {failure}" for failure in gold.failures[:_MAX_CHECK_FAILURES])
        yield f"right answers: {gold.measure}", gold.passed, f"{gold.num_right} of {gold.num_rows} score 1.0{unscored}{more}"
    silent, dealt = check.silent, check.dealt
    more = "".join(f"; {failure}" for failure in silent.failures[:_MAX_CHECK_FAILURES])
    yield "empty and refused", silent.passed, f"{silent.num_above_zero} of {silent.num_replies} score above 0{more}"
    expected = f"{dealt.expected:.3f} +- {dealt.tolerance:.3f}"
    more = "" if dealt.can_fail else "; so few rows cannot fail, and show nothing"
    yield "answers dealt out", dealt.passed, f"{dealt.accuracy:.3f} of {dealt.num_rows} rows, expected {expected}{more}"


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the tables of an evaluation: results, comparisons, failed rows, and every remark they need."""
    from dmoa.evaluation import figures

    notes = figures.Footnotes(evaluation)
    _print_results(evaluation, notes, console)
    print_routing(evaluation, console)
    if evaluation.paired:
        console.print()
        _print_paired(evaluation, notes, console)
    untrained = sorted(figures.untrained_policies(evaluation))
    if untrained:
        line(console, f"untrained gate, its routing is arbitrary: {', '.join(untrained)}")
    for note in notes.all():
        line(console, f"[{note.mark}] {note.text}")
    for failure in evaluation.failures[:_MAX_FAILURES]:
        line(console, f"failed: {failure.row_id} ({failure.policy}): {failure.error}")
    hidden = sum(row.failed for row in evaluation.rows) - _MAX_FAILURES
    if hidden > 0:
        line(console, f"and {hidden} more failed rows; the HTML report and answers/ have them")


def _print_results(evaluation: Evaluation, notes: Footnotes, console: Console) -> None:
    from dmoa.evaluation import figures

    cells: dict[str, Callable[[EvaluationRow], str]] = {
        "n": lambda row: str(row.n),
        "acc %": figures.accuracy,
        "95 %": figures.accuracy_ends,
        "chance": figures.chance,
        "unsc.": lambda row: str(row.unscored),
        "failed": lambda row: str(row.failed),
        "prompt": lambda row: figures.count(row.prompt_tokens),
        "cached": lambda row: figures.count(row.cached_tokens),
        "compl.": lambda row: figures.count(row.completion_tokens),
        "steps": lambda row: figures.decimals(row.steps_mean),
        "active": lambda row: figures.decimals(row.active_mean),
        "wall": lambda row: figures.duration(row.wall_s),
    }
    if any(row.price is not None for row in evaluation.rows):
        cells["price"] = lambda row: figures.money(row.price)
    table = new_table("benchmark", "policy", "note", *cells, "also", words=("benchmark", "policy", "note", "also"))
    previous = ""
    for row in evaluation.rows:
        name = row.benchmark if row.benchmark != previous else ""
        table.add_row(name, row.policy, notes.marks(row), *(cell(row) for cell in cells.values()), figures.metrics(row))
        previous = row.benchmark
    console.print(table)
    line(console, "acc: failed and unscored rows count as 0; wall: the queries' own times added up, they ran side by side")


def print_overall(evaluation: Evaluation, names: Mapping[str, str], reference: str | None = None) -> None:
    """Print a line per policy over all benchmarks together; `names`: what the policies shown are called, in their order.

    With a `reference` policy every line has its difference from it.
    """
    from dmoa.evaluation import figures

    rows = {row.policy: row for row in figures.overall(evaluation)}
    benchmarks = [info.name for info in evaluation.config.benchmarks]
    against = ["against default"] if reference else []
    table = new_table("policy", "all rows %", "95 %", *benchmarks, *against, "active", "tokens a row", words=("policy",))
    base = rows[reference].accuracy if reference else None
    for policy, name in names.items():
        row = rows[policy]
        mean = "-" if row.accuracy is None else figures.share(row.accuracy)
        change = "-" if row.accuracy is None or base is None else figures.points(row.accuracy - base)
        table.add_row(name, mean, row.ends, *row.by_benchmark, *([change] if reference else []), row.active, row.tokens)
    stdout_console().print(table)


def print_routing(evaluation: Evaluation, console: Console) -> None:
    """Print whom the gate asks on each benchmark, in percent of its steps; before and after training where both gates ran.

    Nothing where no gate ran, or where a pool has more agents than a screen has lines.
    """
    from dmoa.evaluation import figures

    shares = {policy: figures.routing_shares(evaluation, policy) for policy in figures.gate_policies(evaluation)}
    shares = {policy: found for policy, found in shares.items() if found}
    agents = figures.agents_of(evaluation, {agent for found in shares.values() for agent, _ in found})
    if not shares or len(agents) > _MOST_ROUTED:
        return
    benchmarks = [info.name for info in evaluation.config.benchmarks]
    table = new_table("agent", *benchmarks, words=("agent",))
    for agent in agents:
        cells = (" > ".join(f"{100 * found.get((agent, name), 0.0):.0f}" for found in shares.values()) for name in benchmarks)
        table.add_row(agent, *cells)
    console.print()
    console.print(table)
    names = figures.names(evaluation)
    line(console, f"whom the gate asks, % of its steps: {' > '.join(names[policy] for policy in shares)}")


def _print_paired(evaluation: Evaluation, notes: Footnotes, console: Console) -> None:
    from dmoa.evaluation import figures

    tests = figures.tests(evaluation.paired)
    texts = ("benchmark", "a", "b", "note")
    table = new_table(*texts, "n", "a - b, points", "95 %", "p", "p (Holm)", "test", words=texts)
    for row in evaluation.paired:
        test = chr(ord("A") + tests.index(row.test))
        marks = notes.marks_of_benchmark(row.benchmark)
        cells = (
            str(row.n),
            figures.points(row.difference),
            figures.point_ends(row),
            figures.p_value(row.p),
            figures.p_value(row.p_holm),
            test,
        )
        table.add_row(row.benchmark, row.a, row.b, marks, *(cells if row.n else ("0", "-", "", "", "", "")))
    console.print(table)
    named = ", ".join(f"{chr(ord('A') + number)}: {test}" for number, test in enumerate(tests))
    line(
        console,
        f"the same rows of both, failed and unscored ones as 0; p two-sided, by Holm corrected within a benchmark; {named}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The options that every command has."""

    config: Path | None = None
    """Pool file; None: the one that DMOA_CONFIG names, else the packaged default pool."""
    overrides: tuple[str, ...] = ()
    """`a.b=c` changes to it."""
    json_path: Path | None = None
    """Where the command's result is written as JSON."""
    verbosity: int = 0
    """-1: results only; 0: progress too; 1: details and logs."""

    def load(self, checkpoint: Path | None = None) -> Config:
        """Return the pool that the options name; `checkpoint` replaces its gate. Raises ConfigError."""
        config = load_pool(self.config or os.environ.get("DMOA_CONFIG") or None, self.overrides)
        if checkpoint is None:
            return config
        return config.changed("gate", checkpoint=uri_of(checkpoint) or str(checkpoint.absolute()))

    def load_without(self, url: str | None, checkpoint: Path | None, **more: object) -> Config | None:
        """Return the pool, or None where a server at `url` has its own. Raises ConfigError for options that have no effect there.

        `more`: other such options that were given, by name.
        """
        if url is None:
            return self.load(checkpoint)
        given = {"config": self.config, "set": self.overrides, "checkpoint": checkpoint} | more
        refuse_together({f"--{name}": value for name, value in given.items()}, "with --url: the server has its own pool")
        return None

    def say(self, text: str) -> None:
        """Tell progress on stderr, unless quiet."""
        if self.verbosity >= 0:
            tell(f"dmoa: {text}")

    def write_json(self, value: Any) -> None:
        """Write the command's result whole where `--json` says, if it does. Raises ConfigError if that cannot be written."""
        if self.json_path is None:
            return
        try:
            path = self.json_path if _is_device(self.json_path) else self.json_path.resolve()  # a link stays one
            write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise _unwritable_json(self.json_path, error) from error

    def check_json(self, named: Collection[object]) -> None:
        """Raise ConfigError, before any work, where `--json` cannot be written, or is a file that is `named` elsewhere too."""
        path = self.json_path
        if path is None:
            return
        check_local(path, "--json")
        if path == Path("-"):
            raise ConfigError("--json is '-'; expected a file, as stdout has the result as text; name one")
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not _is_device(path) and not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise _unwritable_json(path, f"{str(above)!r} is no folder that can be written to")
        places = {one.resolve() for one in (*named, self.config) if isinstance(one, Path)}
        if path.resolve() in places or (path.is_file() and str(path) in named):
            raise ConfigError(f"--json is {str(path)!r}, which another option names too; name another file")


def _is_device(path: Path) -> bool:
    """Tell a pipe or a device, such as /dev/stdout, which is written to as it is."""
    return path.exists() and not path.is_file()


def _unwritable_json(path: Path, reason: OSError | str) -> ConfigError:
    return ConfigError(f"--json: cannot write {str(path)!r}: {reason}; name a file that can be written")


def _common(
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Pool file, - for standard input [DMOA_CONFIG, else the default pool]."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change one field of the pool, such as gate.temperature=0.2; repeatable."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON too.", dir_okay=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results only, no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Details, and all logs on stderr.")] = False,
) -> Common:
    """Return the common options of a command; the parameters are its flags."""
    verbosity = int(verbose) - int(quiet)
    return Common(config=config, overrides=tuple(overrides or ()), json_path=json_path, verbosity=verbosity)


def with_common(command: Callable[Concatenate[Common, P], None], *, has_pool: bool = True) -> Callable[..., None]:
    """Give a command the common options; it receives them as its first argument.

    A command that `has_pool` False looks at no pool, and has no options for one.
    """
    flags = dict(inspect.signature(_common, eval_str=True).parameters)
    if not has_pool:
        del flags["config"], flags["overrides"]
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        common = _common(**{name: values.pop(name) for name in flags})
        common.check_json([one for value in values.values() for one in (value if isinstance(value, list) else [value])])
        _start_logging(common.verbosity)
        with libraries_apart(command.__name__.removesuffix("_job"), verbosity=common.verbosity):
            command(common, **values)  # type: ignore[call-arg]

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *flags.values())]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


class _StderrHandler(logging.Handler):
    """Writes dmoa's own logs where its own words go at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(redact_text(self.format(record)))


def _start_logging(verbosity: int) -> None:
    logger = logging.getLogger("dmoa")
    logger.setLevel({-1: logging.ERROR, 0: logging.WARNING}.get(verbosity, logging.INFO))
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)


def fail(error: DmoaError) -> NoReturn:
    """End the command with one message on stderr: status 2 for bad input, else 1."""
    is_bad_input = isinstance(error, _BAD_INPUT) and getattr(error, "status", 0) != _TOO_BUSY
    tell(f"dmoa: {redact_text(str(error))}")
    raise typer.Exit(EXIT_BAD_INPUT if is_bad_input else EXIT_FAILED)


@contextmanager
def suggesting() -> Iterator[None]:
    """Let what is wrong on the command line be said as every other mistake is: in one message, with the nearest right option."""
    try:
        yield
    except TyperException as error:
        if not hasattr(error, "ctx") or (error.ctx is not None and error.message == error.ctx.get_help()):
            raise  # the help, where a group was named without a command
        seen, more, option = error.format_message().rstrip("."), "", getattr(error, "option_name", None)
        if error.ctx is not None:
            more = f" (see `{error.ctx.command_path} --help`)"
        if isinstance(option, str) and hasattr(error, "possibilities"):
            known = [name for parameter in error.ctx.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
            seen, more = error.message, more + did_you_mean(option, known)
        tell(f"dmoa: {redact_text(seen + more)}")
        raise typer.Exit(EXIT_BAD_INPUT) from error


class OneMessage:
    """Mixed into a command or a group of them: an error of ours is one message and an exit code, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn a DmoaError or a signal into an exit code."""
        try:
            with suggesting():
                return closed(functools.partial(super().invoke, ctx))  # type: ignore[misc]
        except DmoaError as error:
            fail(error)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Parse the options."""
        with suggesting():
            return super().make_context(*args, **extra)  # type: ignore[misc]


def run_app(app: typer.Typer) -> None:
    """Run a command line to the end of the process."""
    # Read when torch is loaded: threads that spin while they wait slow every token some thirty times on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    never_join_by_accident()
    app()


def refuse_together(given: Mapping[str, object], because: str) -> None:
    """Raise ConfigError naming the options in `given` that were used although they have no effect here."""
    used = [name for name, value in given.items() if value]
    if used:
        raise ConfigError(f"{', '.join(used)}: no effect {because}; leave it out")
