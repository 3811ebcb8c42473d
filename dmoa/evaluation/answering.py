"""Turns a task into a query, what became of it into the record that is kept, and that into a score.

`workflows/backends` builds the swarm's client; the pipeline knows its protocol alone, so evaluation never imports serving.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dmoa.errors import EmptyAnswerError, NoAgentError, PluginError, is_bug
from dmoa.evaluation.records import Answered, Label, Reply, Scored, Scorer, Task
from dmoa.flat import flat
from dmoa.policies.registry import LONGEST_SCHEDULE, has_schedule
from dmoa.trace import replies_in_order
from dmoa.types import AgentReply, Answer, Limits, Query, StepRecord, SummarizerRecord, TokenUsage, total_price
from dmoa.validation import redact_text, storable


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How every task of a run is asked."""

    seed: int
    limits: Limits
    """Budgets of a query; a task with more stages than steps allowed still runs all its stages."""
    budgets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Benchmark -> limits that lower those; those of tokens and price hold within steps too."""
    ends_schedules: bool = False
    """Whether policies with a schedule of their own run it to its end, however few steps the limits allow."""


def query_of_task(task: Task, policy: str, asking: Asking) -> Query:
    """Return the query that puts a task to a policy; its id depends on task, policy and seed alone, so it repeats."""
    digest = hashlib.sha256(f"{task.row_id}\0{policy}\0{asking.seed}".encode()).hexdigest()
    own = LONGEST_SCHEDULE if asking.ends_schedules and has_schedule(policy) else 0
    limits = replace(asking.limits, max_steps=max(asking.limits.max_steps, len(task.stages), own))
    matched = asking.budgets.get(task.benchmark, {})
    if matched:
        lowered: dict[str, Any] = {name: min(getattr(limits, name) or amount, amount) for name, amount in matched.items()}
        is_paced = not matched.keys().isdisjoint(("budget_tokens", "budget_price"))
        limits = replace(limits, within_steps=is_paced, **lowered)
    return Query(trace_id=digest[:32], query_id=task.row_id, text=task.text, limits=limits, stages=task.stages, is_streamed=False)


def _names(task: Task, policy: str) -> dict[str, str]:
    return {"row_id": task.row_id, "benchmark": task.benchmark, "policy": policy, "group": task.group}


def answered(task: Task, policy: str, answer: Answer) -> Answered:
    """Return the record of an answer."""
    calls = [call for step in answer.steps for call in step.calls]
    return Answered(
        **_names(task, policy),
        text=storable(answer.text),
        step_texts=tuple(storable(step.summary) for step in answer.steps),
        stop_reason=answer.stop_reason,
        finish_reason=answer.finish_reason,
        degraded=answer.degraded,
        active=tuple(tuple(reply.agent for reply in _contributing(step)) for step in answer.steps),
        **flat(answer.usage),
        summarizer_tokens=sum(step.summarizer.usage.total for step in answer.steps),
        memoised_tokens=sum(call.usage.total for call in calls if call.is_memoised),
        entropy_nats=_entropy(answer.steps[-1]) if answer.steps else None,
        right_probability=answer.steps[-1].right_probability if answer.steps else None,
        wall_ms=answer.wall_ms,
        gate_version=answer.gate_version,
        price=answer.price,
        calls=len(calls),
        bugs=sum(reply.is_bug for step in answer.steps for reply in step.replies),
    )


def _cost(error: Exception) -> dict[str, Any]:
    """Return what the calls of a query without an answer cost."""
    calls = [call for call in getattr(error, "replies", ()) if isinstance(call, AgentReply | SummarizerRecord)]
    return {
        **flat(sum((call.usage for call in calls), TokenUsage())),
        "summarizer_tokens": sum(call.usage.total for call in calls if isinstance(call, SummarizerRecord)),
        "memoised_tokens": sum(call.usage.total for call in calls if call.is_memoised),
        "calls": len(calls),
        "price": total_price(calls),
    }


def unanswered(task: Task, policy: str, error: EmptyAnswerError, wall_ms: float) -> Answered:
    """Return the record of a query whose every contribution was empty: it was asked, so it is judged and counts what it cost."""
    replies = [reply for reply in error.replies if isinstance(reply, AgentReply)]
    said = tuple(reply.agent for reply in replies if reply.status == "ok")
    return Answered(
        **_names(task, policy),
        error=storable(redact_text(str(error))),
        stop_reason="empty",
        finish_reason="length" if any(reply.finish_reason == "length" for reply in replies) else "stop",
        degraded=len(said) < len(replies),
        active=(said,) if said else (),
        **_cost(error),
        wall_ms=wall_ms,
    )


def failed(task: Task, policy: str, error: Exception, wall_ms: float) -> Answered:
    """Return the record of a query that has no answer; what its calls took counts."""
    return Answered(
        **_names(task, policy),
        status="failed",
        error=storable(redact_text(f"{type(error).__name__}: {error}")),
        **_cost(error),
        wall_ms=wall_ms,
        bugs=int(isinstance(error, PluginError) or is_bug(error) or (isinstance(error, NoAgentError) and error.has_bug)),
    )


def score_answer(answer: Answered, label: Label, scorers: Mapping[str, Scorer]) -> Scored:
    """Judge one answer; a failed query scores 0 in every metric, whatever its text."""
    judged = scorers[answer.benchmark](label, Reply(text=answer.text, step_texts=answer.step_texts))  # names the metrics
    is_failed, reason = answer.status == "failed", judged.reason if judged.is_scored else answer.error or judged.reason
    return Scored(
        **answer.model_dump(include={"row_id", "benchmark", "policy", "group"}),
        value=0.0 if is_failed else judged.value,
        extracted=None if is_failed or judged.extracted is None else storable(judged.extracted),
        reason=answer.error or "failed" if is_failed else storable(reason),
        is_scored=judged.is_scored and not is_failed,
        is_left_out=judged.is_left_out,
        is_failed=is_failed,
        metrics=dict.fromkeys(judged.metrics, 0.0) if is_failed else judged.metrics,
    )


def _contributing(step: StepRecord) -> list[AgentReply]:
    explored = {name for name, _ in step.explored}
    replies = replies_in_order(step)
    return [reply for reply in replies if reply.status == "ok" and reply.agent not in explored and not reply.is_barred]


def _entropy(step: StepRecord) -> float | None:
    """Return the mean over the agents of nats per token, each as precise as replies over HTTP have it."""
    means = [reply.entropy.mean_nats for reply in _contributing(step)]
    known = [round(mean_nats, 6) for mean_nats in means if mean_nats is not None]
    return sum(known) / len(known) if known else None
