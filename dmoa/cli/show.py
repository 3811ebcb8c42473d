"""What a person sees of a query: each step as it finishes, the answer, why it stopped, and whether the gate is trained.

Steps and answers are a program's output (stdout); progress goes to stderr. Texts of models are shown without control
characters, so that no reply can drive the terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from dmoa.cli.terminal import stderr
from dmoa.trace import ReplyAgent, ReplyDmoa, ReplyStep, ReplySummarizer, dump
from dmoa.types import is_untrained

if TYPE_CHECKING:
    from dmoa.trace import Trace

_BAR_CELLS = 20
_MAX_IDLE_ROWS = 8
_MAX_SUMMARY_CHARACTERS = 300
_PIPE_WIDTH = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One answered question, wherever it was answered."""

    question: str
    text: str
    finish_reason: str
    wall_s: float
    dmoa: ReplyDmoa
    """The reply's own object, with every agent's text."""
    trace: Trace | None = None
    """None where no trace was asked for."""

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` writes: question, answer and the `dmoa` object of the contract."""
        return {
            "question": self.question,
            "answer": self.text,
            "finish_reason": self.finish_reason,
            "dmoa": dump(self.dmoa),
        }


def untrained_note(gate_version: str | None) -> str | None:
    """Return the sentence that every output on untrained gate weights carries, None for trained ones and no gate."""
    if gate_version is None or not is_untrained(gate_version):
        return None
    return f"gate {gate_version}: routing is arbitrary until it is trained"


def printable(text: str) -> str:
    """Return text without control characters other than line ends and tabs."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def num_tokens(reply: ReplyDmoa) -> int:
    """Return the prompt and completion tokens of all agents and the summarizer."""
    calls: list[ReplyAgent | ReplySummarizer] = []
    for step in reply.steps:
        calls += [*step.agents, step.summarizer]
    return sum(call.prompt_tokens + call.completion_tokens for call in calls)


class Screen:
    """Prints queries to a terminal or a pipe."""

    def __init__(self, verbosity: int = 0, *, shows_steps: bool = True) -> None:
        self._verbosity = verbosity
        self.shows_steps = shows_steps
        """Whether steps are printed; `/steps` in a chat turns it."""
        self.out = Console(highlight=False, markup=False, emoji=False)
        if not self.out.is_terminal:
            self.out = Console(highlight=False, markup=False, emoji=False, width=_PIPE_WIDTH)
        self.err = Console(file=stderr(), highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._live: Status | None = None
        self._has_text = False
        self._is_line_open = False

    def step(self, step: ReplyStep) -> None:
        """Print a finished step: probabilities, who was active, how sure each was, and the new summary."""
        if self._verbosity < 0 or not self.shows_steps:
            return
        self._end_line()
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

    def remote_line(self, text: str) -> None:
        """Show a running server's word on a finished step until the next one: the steps themselves are printed at the end."""
        if self._verbosity < 0 or not self.shows_steps or not self.err.is_terminal:
            return
        line = Text(" ".join(printable(text).split()), style="dim")
        if self._live is None:
            self._live = self.err.status(line)
            self._live.start()
        self._live.update(line)

    def end_remote_lines(self) -> None:
        """Take the line of the last step away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def delta(self, text: str) -> None:
        """Print a piece of the answer as it comes."""
        self._heading()
        self._has_text = self._is_line_open = True
        self.out.print(Text(printable(text)), end="", soft_wrap=True)

    def answer(self, asked: Asked, *, has_note: bool = True) -> None:
        """Print the answer, unless it came in pieces, then why the query stopped and what it took.

        `has_note` says at the end whether the gate is trained; only where the caller itself says it may it be left out.
        """
        if not self._has_text:
            self._heading()
            self._print(asked.text)
        self._end_line()
        self._has_text = False
        note = untrained_note(asked.dmoa.gate_version) if has_note else None
        if self._verbosity < 0:
            if note:
                self.err.print(f"dmoa: {note}")
            return
        self.out.print(Text(closing_line(asked), style="dim"), soft_wrap=True)
        if note:
            self.out.print(Text(note, style="yellow"), soft_wrap=True)

    def _heading(self) -> None:
        if not self._has_text and self._verbosity >= 0:
            self.out.print(Text("answer", style="bold"))

    def _end_line(self) -> None:
        if self._is_line_open:
            self.out.print()
        self._is_line_open = False

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
        if agent.entropy_nats is None:
            return row
        sure = f"{agent.entropy_nats:.3f} nats/token"
        return [*row, sure, f"{agent.completion_tokens} tokens", f"{agent.latency_ms / 1e3:.2f} s"]


def closing_line(asked: Asked) -> str:
    """Return one line: why the query stopped, and what it took."""
    reply = asked.dmoa
    steps = f"{len(reply.steps)} step{'' if len(reply.steps) == 1 else 's'}"
    lost = ", degraded: an agent was lost" if reply.degraded else ""
    gate = f", gate {reply.gate_version}" if reply.gate_version else ""
    policy = f"policy {reply.policy}{gate}{lost}"
    return f"stopped by {reply.stop_reason} after {steps}, {num_tokens(reply)} tokens, {asked.wall_s:.2f} s ({policy})"


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _MAX_SUMMARY_CHARACTERS else flat[: _MAX_SUMMARY_CHARACTERS - 3] + "..."
