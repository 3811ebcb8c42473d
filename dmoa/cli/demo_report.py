"""What `dmoa demo` prints: each query's routing when it is done, a closing table, the replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dmoa.cli.options import Common
from dmoa.cli.show import Screen, num_tokens, printable, untrained_note
from dmoa.config import Config
from dmoa.core.answers import extract_answer

if TYPE_CHECKING:
    from dmoa.cli.demo_asking import Outcome
    from dmoa.replay import Replay

_ANSWER_CHARACTERS = 24
_QUESTION_CHARACTERS = 34


class Report:
    """Prints a demo as it goes."""

    def __init__(self, common: Common, config: Config, out: Path, *, num_questions: int) -> None:
        self._screen = Screen(common.verbosity)
        self._verbosity = common.verbosity
        self._config = config
        self._out = out
        self._num_questions = num_questions
        self._gate_version = ""

    def opening(self, url: str, gate_version: str) -> None:
        """Print what is served and what to expect of it."""
        self._gate_version = gate_version
        self._print(f"dmoa: ready at {url} (pool {self._config.name}, gate {gate_version})")
        for note in self._notes():
            self._print(note)

    def _notes(self) -> list[str]:
        notes = [untrained_note(self._gate_version)]
        is_small = any(llm.model == "embedded:smollm2-135m" for llm in self._config.llms.values())
        if is_small and not any(agent.adapter for agent in self._config.agents):
            notes.append(
                "agents that differ by role prompt alone hardly differ on a 135M model: this shows the machinery, not its worth"
            )
        return [note for note in notes if note]

    def query(self, number: int, outcome: Outcome) -> None:
        """Print a finished query: its steps, its answer, and whether that is right."""
        if self._verbosity < 0:
            return
        self._print(f"\n=== question {number} of {self._num_questions}: {outcome.question.text}")
        if outcome.asked is None:
            self._print(f"failed: {outcome.error}")
            return
        for step in outcome.asked.dmoa.steps:
            self._screen.step(step)
        self._screen.answer(outcome.asked, has_note=False)
        self._print(f"expected {outcome.question.expected}: {_verdict(outcome)}")

    def closing(self, outcomes: Sequence[Outcome], wall_s: float) -> None:
        """Print the closing table with totals; `wall_s` is how long all queries took together."""
        table = Table(box=None, pad_edge=False)
        for name in ("#", "question", "answer", "right", "steps", "agents", "tokens", "seconds", "stopped by"):
            is_text = name in ("question", "answer", "right", "stopped by")
            is_long = name in ("question", "answer")
            table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_long)
        for number, outcome in enumerate(outcomes, 1):
            table.add_row(str(number), *_row(outcome))
        table.add_row("", "in all", "", *_totals(outcomes, wall_s), style="bold")
        self._print("")
        self._screen.out.print(table)
        self._print("agents: mean number of active agents of a step; queries ran side by side, so their seconds overlap")
        for note in self._notes():
            self._print(note)

    def replayed(self, results: Sequence[Replay], command: str) -> bool:
        """Print where the traces lie and what their replay said; return whether all decisions were repeated."""
        different = [result.trace_id for result in results if result.differences]
        count = sum(len(result.decisions) for result in results)
        self._print(f"traces of {len(results)} queries in {self._out}; replay them with:\n  {command}")
        if different:
            self._print(f"replayed here: {len(different)} of {len(results)} traces differ: {', '.join(different)}")
        else:
            self._print(f"replayed here: all {count} routing decisions identical")
        return not different

    def _print(self, text: str) -> None:
        self._screen.out.print(Text(printable(text)), soft_wrap=True)


def _verdict(outcome: Outcome) -> str:
    return "right" if outcome.is_right else "wrong"


def _row(outcome: Outcome) -> list[str]:
    question = _cut(outcome.question.text, _QUESTION_CHARACTERS)
    asked = outcome.asked
    if asked is None:
        return [question, "failed", _verdict(outcome)]
    text = extract_answer(asked.text) or asked.text
    steps = asked.dmoa.steps
    return [
        question,
        _cut(text, _ANSWER_CHARACTERS),
        _verdict(outcome),
        str(len(steps)),
        f"{fmean(step.k for step in steps):.1f}",
        str(num_tokens(asked.dmoa)),
        f"{asked.wall_s:.1f}",
        asked.dmoa.stop_reason,
    ]


def _totals(outcomes: Sequence[Outcome], wall_s: float) -> list[str]:
    answered = [outcome.asked for outcome in outcomes if outcome.asked is not None]
    steps = [step for asked in answered for step in asked.dmoa.steps]
    return [
        f"{sum(outcome.is_right for outcome in outcomes)} of {len(outcomes)}",
        str(len(steps)),
        f"{fmean(step.k for step in steps):.1f}" if steps else "",
        str(sum(num_tokens(asked.dmoa) for asked in answered)),
        f"{wall_s:.1f}",
        "",
    ]


def _cut(text: str, length: int) -> str:
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= length else flat[: length - 3] + "..."
