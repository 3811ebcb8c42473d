"""Turns a task into a query, and what became of it into the record that is kept.

An `Answerer` reaches a swarm, in this process or behind a URL. `workflows/backends` builds it; the pipeline knows the protocol
alone, so evaluation never imports serving.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from dmoa.evaluation.records import Answered, Task
from dmoa.flat import flat
from dmoa.trace import ReplyAgent, ReplyDmoa, ReplyStep, ReplySummarizer, reply_dmoa
from dmoa.types import Answer, Limits, Query, TokenUsage
from dmoa.validation import redact_text

if TYPE_CHECKING:
    from dmoa.swarm import Swarm

AGENT_MARK = ":"
"""`single:NAME` is the policy `single` on the agent NAME."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmOutcome:
    """A swarm's answer to one query, wherever it runs."""

    text: str
    finish_reason: str
    dmoa: ReplyDmoa
    """With texts."""
    wall_ms: float


class Answerer(Protocol):
    """Reaches a swarm."""

    async def answer(self, query: Query, policy: str, agent: str | None) -> SwarmOutcome:
        """Answer one query. Raises DmoaError; cancelling it cancels the agent calls in flight."""
        ...

    async def close(self) -> None:
        """Free what it holds."""
        ...


OpenAnswerer = Callable[[], Answerer]
"""Builds an answerer where it works, maybe in another process; must be picklable, what it builds need not be. May block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How every task of a run is asked."""

    seed: int
    limits: Limits
    """Budgets of a query; a task with more stages than steps allowed still runs all its stages."""


async def ask_swarm(swarm: Swarm, query: Query, policy: str, agent: str | None) -> SwarmOutcome:
    """Answer one query with a swarm of this process. Raises DmoaError."""
    started = time.perf_counter()
    async with aclosing(swarm.answer(query, policy, agent)) as events:
        async for event in events:
            if isinstance(event, Answer):
                answer = event
    return SwarmOutcome(
        text=answer.text,
        finish_reason=answer.finish_reason,
        dmoa=reply_dmoa(answer, pool=swarm.config.name, with_texts=True),
        wall_ms=(time.perf_counter() - started) * 1e3,
    )


def split_policy(policy: str) -> tuple[str, str | None]:
    """Return a policy's name and the agent it names, as in `single:NAME`."""
    name, mark, agent = policy.partition(AGENT_MARK)
    return name, agent if mark else None


def query_of_task(task: Task, policy: str, asking: Asking) -> Query:
    """Return the query that puts a task to a policy; its id depends on task, policy and seed alone, so it repeats."""
    digest = hashlib.sha256(f"{task.row_id}\0{policy}\0{asking.seed}".encode()).hexdigest()
    limits = replace(asking.limits, max_steps=max(asking.limits.max_steps, len(task.stages)))
    return Query(
        trace_id=digest[:32],
        text=task.text,
        limits=limits,
        stages=task.stages,
        is_streamed=False,
    )


def answered(task: Task, policy: str, outcome: SwarmOutcome) -> Answered:
    """Return the record of an answer."""
    steps = outcome.dmoa.steps
    parts: list[ReplyAgent | ReplySummarizer] = [agent for step in steps for agent in step.agents]
    parts += [step.summarizer for step in steps]
    return Answered(
        row_id=task.row_id,
        benchmark=task.benchmark,
        policy=policy,
        group=task.group,
        text=_storable(outcome.text),
        step_texts=tuple(_storable(step.summary or "") for step in steps),
        stop_reason=outcome.dmoa.stop_reason,
        finish_reason=outcome.finish_reason,
        degraded=outcome.dmoa.degraded,
        active=tuple(_active(step) for step in steps),
        **flat(sum((part.usage for part in parts), TokenUsage())),
        summarizer_tokens=sum(step.summarizer.usage.total for step in steps),
        memoised_tokens=sum(part.usage.total for part in parts if part.memoised),
        entropy_nats=_entropy(steps[-1]) if steps else None,
        wall_ms=outcome.wall_ms,
        gate_version=outcome.dmoa.gate_version,
    )


def failed(task: Task, policy: str, error: Exception, wall_ms: float) -> Answered:
    """Return the record of a query that has no answer."""
    return Answered(
        row_id=task.row_id,
        benchmark=task.benchmark,
        policy=policy,
        group=task.group,
        status="failed",
        error=_storable(redact_text(f"{type(error).__name__}: {error}")),
        **flat(TokenUsage()),
        wall_ms=wall_ms,
    )


def _storable(text: str) -> str:
    """Replace what UTF-8 cannot carry (lone surrogates)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _active(step: ReplyStep) -> tuple[str, ...]:
    return tuple(agent.name for agent in step.agents if agent.status == "ok" and not agent.explored)


def _entropy(step: ReplyStep) -> float | None:
    active = [agent for agent in step.agents if agent.status == "ok" and not agent.explored]
    known = [agent.entropy_nats for agent in active if agent.entropy_nats is not None]
    return sum(known) / len(known) if known else None
