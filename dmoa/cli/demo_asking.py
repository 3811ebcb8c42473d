"""The questions of the demo, asked over HTTP as a client would, and their traces routed again."""

from __future__ import annotations

import asyncio
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoa.cli.options import Common
from dmoa.errors import DmoaError
from dmoa.evaluation.records import Label, Reply
from dmoa.evaluation.registry import SUITES

if TYPE_CHECKING:
    from dmoa.cli.demo_report import Report
    from dmoa.cli.remote import RemoteBackend
    from dmoa.cli.show import Asked
    from dmoa.config import Config

DEMO_SUITES = ("arith", "words", "calendar")
SEED = 0
_CONCURRENCY = 3
"""Queries in flight: enough for the engine to batch them, few enough to follow."""
_MAX_STEPS = 3
_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of the demo."""

    text: str
    label: Label
    """Its suite and computed answer."""

    @property
    def expected(self) -> str:
        """The right answer."""
        return str(self.label.gold["answer"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a question."""

    question: Question
    asked: Asked | None
    """None where the query failed."""
    error: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the answer is the computed one, by the suite's own scorer."""
        if self.asked is None:
            return False
        return SUITES[self.question.label.benchmark].score(self.question.label, Reply(text=self.asked.text)).value == 1.0

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` says of it."""
        return {
            "question": self.question.text,
            "suite": self.question.label.benchmark,
            "expected": self.question.expected,
            "right": self.is_right,
            "error": self.error or None,
            "reply": self.asked.to_json() if self.asked else None,
            "wall_s": round(self.asked.wall_s, 3) if self.asked else None,
        }


def generate(count: int, seed: int = SEED) -> list[Question]:
    """Return `count` held-out questions of each suite, in turns: deterministic in the seed, all different."""
    columns = [
        [Question(text=row.task.text, label=row.label) for row in SUITES[name].generate("test", count, seed)]
        for name in DEMO_SUITES
    ]
    return [question for together in zip(*columns, strict=True) for question in together]


async def ask_all(url: str, questions: list[Question], report: Report) -> list[Outcome]:
    """Ask every question over HTTP, a few at a time; each is reported when it is done. Returned in the order given."""
    from dmoa.cli.remote import RemoteBackend
    from dmoa.serving.client import SwarmClient

    places = asyncio.Semaphore(_CONCURRENCY)
    async with SwarmClient(url, api_key=os.environ.get("DMOA_API_KEYS", "").partition(",")[0].strip()) as client:
        backend = RemoteBackend(client)
        tasks = [_ask(backend, places, number, question, report) for number, question in enumerate(questions, 1)]
        return await asyncio.gather(*tasks)


async def _ask(backend: RemoteBackend, places: asyncio.Semaphore, number: int, question: Question, report: Report) -> Outcome:
    from dmoa.cli.local import Wish
    from dmoa.cli.show import Screen

    wish = Wish(max_steps=_MAX_STEPS, max_tokens=_MAX_TOKENS, keeps_trace=True)
    async with places:
        try:
            # Nothing is shown before the query is done: a few of them are under way at once.
            asked = await backend.ask(question.text, (), wish, Screen(shows_steps=False))
        except DmoaError as error:
            outcome = Outcome(question=question, asked=None, error=str(error))
        else:
            outcome = Outcome(question=question, asked=asked)
    report.query(number, outcome)
    return outcome


def replay_demo(common: Common, config: Config, report: Report, out: Path, outcomes: list[Outcome]) -> bool:
    """Keep the traces, route them again, and tell how to do the same; return whether every decision was repeated."""
    from dmoa.cli.run import replay_traces
    from dmoa.trace import read_traces, write_traces

    for number, outcome in enumerate(outcomes, 1):
        if outcome.asked is not None and outcome.asked.trace is not None:
            write_traces(out / f"query-{number:02d}.jsonl", [outcome.asked.trace])
    path = write_traces(
        out / "traces.jsonl", [o.asked.trace for o in outcomes if o.asked is not None and o.asked.trace is not None]
    )
    results = replay_traces(config, read_traces(path))
    command = ["dmoa", "run", "--replay", str(path)]
    if common.config is not None:
        command += ["--config", str(common.config)]
    for override in common.overrides:
        command += ["--set", override]
    return report.replayed(results, shlex.join(command))
