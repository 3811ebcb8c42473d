"""`dmoa demo`: the whole system in a few minutes: a swarm on Ray Serve, ten questions over HTTP, their routing, replay.

Arithmetic questions come from a seeded generator with computed answers, so that right and wrong can be told; the two
open ones have none. Everything that the demo shows can be had with `dmoa serve` and `dmoa run --url`.
"""

from __future__ import annotations

import asyncio
import os
import random
import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmoa.cli.options import EXIT_FAILED, Common, with_common
from dmoa.errors import DmoaError

if TYPE_CHECKING:
    from dmoa.cli.demo_report import Report
    from dmoa.cli.remote import RemoteBackend
    from dmoa.cli.show import Asked
    from dmoa.config import Config

SEED = 0
APP = "dmoa-demo"
_CONCURRENCY = 3
"""Queries in flight: enough for the engine to batch them, few enough to follow."""
_MAX_STEPS = 3
_MAX_TOKENS = 64
_OPEN = ("What is the capital of France?", "What is a good way to fall asleep at night?")
_WORDS = (
    ("Tom has {a} apples and buys {b} more. How many apples does he have now?", "+"),
    ("A shelf holds {a} books. {b} of them are lent out. How many books are left?", "-"),
    ("A box holds {a} pens. How many pens do {b} boxes hold?", "*"),
    ("What is {a} + {b}?", "+"),
    ("What is {a} - {b}?", "-"),
    ("What is {a} * {b}?", "*"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of the demo."""

    text: str
    expected: str | None
    """The computed answer, None for an open question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a question."""

    question: Question
    asked: Asked | None
    """None where the query failed."""
    error: str = ""

    @property
    def is_right(self) -> bool | None:
        """Whether the answer is the computed one; None for open questions."""
        from dmoa.core.answers import extract_answer, same_answer

        if self.question.expected is None:
            return None
        found = extract_answer(self.asked.text) if self.asked else None
        return found is not None and same_answer(found, self.question.expected)


def generate(count: int, seed: int = SEED) -> list[Question]:
    """Return `count` arithmetic questions with their answers: deterministic in the seed, all different."""
    rng = random.Random(seed)  # noqa: S311 -- questions, not secrets
    questions: dict[str, Question] = {}
    while len(questions) < count:
        template, operation = _WORDS[len(questions) % len(_WORDS)]
        a, b = rng.randint(10, 20), rng.randint(2, 9)
        result = {"+": a + b, "-": a - b, "*": a * b}[operation]
        text = template.format(a=a, b=b)
        questions[text] = Question(text=text, expected=str(result))
    return list(questions.values())


@with_common
def demo(
    common: Common,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port to serve on [a free one].")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the traces go.")] = Path("out/demo"),
    questions: Annotated[int, typer.Option("--questions", min=1, max=200, metavar="N", help="Arithmetic questions.")] = 8,
) -> None:
    """Serve a swarm, ask it ten questions, show the routing.

    \b
    dmoa demo
    dmoa demo --config pool.yaml --questions 4 --out out/mine
    """
    from dmoa.cli.demo_report import Report
    from dmoa.serving.launch import launch, stop

    config = common.load()
    asking = [*generate(questions), *(Question(text=text, expected=None) for text in _OPEN)]
    report = Report(common, config, out, num_questions=len(asking))
    common.say(f"starting pool {config.name} ({len(config.agents)} agents) on Ray Serve; this takes a minute or so")
    is_up = False
    try:
        launched = launch(config, host="127.0.0.1", port=port or free_port(), app=APP)
        is_up = True
        report.opening(launched.url, launched.gate_version)
        asked_at = time.monotonic()
        outcomes = asyncio.run(ask_all(launched.url, asking, report))
        wall_s = time.monotonic() - asked_at
    finally:
        if is_up:
            common.say("stopping the swarm")
            stop(APP, end_ray=True)
    report.closing(outcomes, wall_s)
    is_identical = replay_demo(common, config, report, out, outcomes)
    common.write_json(report.to_json(outcomes, is_identical=is_identical))
    if not is_identical or any(outcome.asked is None for outcome in outcomes):
        raise typer.Exit(EXIT_FAILED)


def free_port() -> int:
    """Return a loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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

    wish = Wish(max_steps=_MAX_STEPS, max_tokens=_MAX_TOKENS, keeps_trace=True)
    async with places:
        try:
            asked = await backend.ask(question.text, (), wish, report.progress(number))
        except DmoaError as error:
            outcome = Outcome(question=question, asked=None, error=str(error))
        else:
            outcome = Outcome(question=question, asked=asked)
    report.query(number, outcome)
    return outcome


def replay_demo(common: Common, config: Config, report: Report, out: Path, outcomes: list[Outcome]) -> bool:
    """Keep the traces, route them again, and tell how to do the same; return whether every decision was repeated."""
    from dmoa.cli.run import replay_traces
    from dmoa.trace import read, write

    for number, outcome in enumerate(outcomes, 1):
        if outcome.asked is not None and outcome.asked.trace is not None:
            write(out / f"query-{number:02d}.jsonl", [outcome.asked.trace])
    path = write(out / "traces.jsonl", [o.asked.trace for o in outcomes if o.asked is not None and o.asked.trace is not None])
    results = replay_traces(config, read(path))
    command = ["dmoa", "run", "--replay", str(path)]
    if common.config is not None:
        command += ["--config", str(common.config)]
    for override in common.overrides:
        command += ["--set", override]
    return report.replayed(results, shlex.join(command))
