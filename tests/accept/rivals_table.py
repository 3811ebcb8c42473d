"""What the lines of `accept_rivals` share: policies asked over rows, and the figures of a table."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dmoa.errors import DmoaError
from dmoa.evaluation.answering import Asking, query_of_task
from dmoa.evaluation.records import Reply, Row, Task
from dmoa.evaluation.registry import SUITES
from dmoa.evaluation.statistics import interval
from dmoa.policies.registry import split_policy
from dmoa.protocols import Encoder, final_answer
from dmoa.swarm import Swarm
from dmoa.types import Answer, FloatArray, Limits

IN_FLIGHT = 8
SEED = 0
Figures = dict[str, Any]
Judge = Callable[[int, str], float]


class Remembering:
    """An encoder that embeds a text once, so that many policies over the same rows cost one embedding a row."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[str, FloatArray] = {}

    async def embed(self, texts: Sequence[str]) -> list[FloatArray]:
        """Return the embeddings, in order."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known |= dict(zip(new, await self._encoder.embed(new) if new else [], strict=True))
        return [self._known[text] for text in texts]


async def ask_all(swarm: Swarm, policy: str, tasks: Sequence[Task], limits: Limits, seed: int = SEED) -> list[Answer | DmoaError]:
    """Return the answer of a policy to each task, or why there is none: one lost query does not end a table."""
    asking, room = Asking(seed=seed, limits=limits, ends_schedules=True), asyncio.Semaphore(IN_FLIGHT)

    async def one(task: Task) -> Answer | DmoaError:
        async with room:
            try:
                return await final_answer(swarm, query_of_task(task, policy, asking), *split_policy(policy))
            except DmoaError as error:
                return error

    return list(await asyncio.gather(*map(one, tasks)))


def figures(values: Sequence[float], calls: Sequence[float], tokens: Sequence[float]) -> Figures:
    """Return accuracy with its interval, and what a query takes."""
    found = interval(values)
    return {
        "n": len(values),
        "accuracy": round(found.value, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
        "calls": round(float(np.mean(calls)), 2),
        "tokens": round(float(np.mean(tokens)), 1),
    }


def of_answers(answers: Sequence[Answer | DmoaError], judge: Judge) -> Figures:
    """Return the figures of a policy's answers, with the value of each row; a query without an answer is wrong, and counted."""
    lost = [str(found)[-300:] for found in answers if isinstance(found, DmoaError)]
    values = [judge(number, found.text) if isinstance(found, Answer) else 0.0 for number, found in enumerate(answers)]
    calls = [sum(len(step.calls) for step in found.steps) for found in answers if isinstance(found, Answer)]
    tokens = [found.usage.total for found in answers if isinstance(found, Answer)]
    said = {"lost": len(lost), "first_lost": lost[0]} if lost else {}
    return figures(values, calls or [0], tokens or [0]) | said | {"values": values}


def judge_of(rows: Sequence[Row]) -> Judge:
    """Return what scores an answer to one of the rows of the suites."""

    def judge(number: int, text: str) -> float:
        label = rows[number].label
        assert label is not None
        return SUITES[rows[number].task.benchmark].score(label, Reply(text=text)).value

    return judge
