"""What a list of traces shows of each query, how the list is filtered and paged, and what its agents did in all of them.

The same for a server's own traces and for files of traces on disk.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import Field, ValidationError

from dmoa.errors import RequestError
from dmoa.trace import ReplyModel, finite, replies_in_order, rounded
from dmoa.types import Answer, Query
from dmoa.validation import describe, findings, redact_text, storable

MAX_LISTED = 200
"""Most traces of one page of the list."""
NOT_STORED = "(not stored)"
"""The question of a query whose client forbade to keep it."""
WELL = frozenset(("ok", "examiner"))
"""What became of a call that was answered: an examiner said what it thinks of another one's answer."""
_QUESTION_CHARACTERS = 240
_ERROR_CHARACTERS = 500
LOAD_S = 60.0
"""Over how long an agent's load is taken."""
_BINS = 12
_MAX_NATS = 3.0
"""Where the last bin of the entropies begins to hold everything above."""


class TraceCalls(ReplyModel):
    """One agent's reply in one step, as the statistics of the agents need it."""

    agent: str
    status: str
    is_active: bool
    entropy_nats: float | None
    right_probability: float | None
    tokens: int
    """Completion tokens."""
    latency_ms: float


class TraceSummary(ReplyModel):
    """One query as a list shows it."""

    trace_id: str
    created_unix_s: float
    """When it was answered."""
    question: str
    """How its text begins; `(not stored)` where the client sent `store: false`: then there is no trace of it."""
    policy: str
    gate_version: str | None
    stop_reason: str | None
    """null where it was not answered."""
    steps: int
    agents: list[str]
    """Those whose replies counted, each once, in the order in which they were asked."""
    prompt_tokens: int
    completion_tokens: int
    wall_ms: float
    price: float | None
    degraded: bool
    error: str | None
    """Why there is no answer, or which agents failed; null where all went well."""


def summarise(answer: Answer, *, question: str, created_unix_s: float) -> tuple[TraceSummary, tuple[TraceCalls, ...]]:
    """Return an answered query as a list shows it, and its calls; numbers are rounded as in the reply's `dmoa` object."""
    asked = [
        (reply, place < len(step.active) and all(reply.agent != name for name, _ in step.explored))
        for step in answer.steps
        for place, reply in enumerate(replies_in_order(step))
        if reply.status not in ("idle", "masked")
    ]
    failed = dict.fromkeys(f"{reply.agent}: {reply.status}" for reply, _ in asked if reply.status not in WELL)
    calls = tuple(
        TraceCalls(
            agent=reply.agent,
            status=reply.status,
            is_active=is_active,
            entropy_nats=rounded(reply.entropy.mean_nats),
            right_probability=rounded(reply.right_probability),
            tokens=reply.usage.completion_tokens,
            latency_ms=finite(reply.latency_ms),
        )
        for reply, is_active in asked
    )
    usage = answer.usage
    summary = TraceSummary(
        trace_id=answer.trace_id,
        created_unix_s=created_unix_s,
        question=question[:_QUESTION_CHARACTERS],
        policy=answer.policy,
        gate_version=answer.gate_version,
        stop_reason=answer.stop_reason,
        steps=len(answer.steps),
        agents=list(dict.fromkeys(reply.agent for reply, is_active in asked if is_active)),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        wall_ms=round(answer.wall_ms, 3),
        price=answer.price,
        degraded=answer.degraded,
        error=", ".join(failed) or None,
    )
    return summary, calls


def summary_of_failure(
    query: Query, policy: str, error: Exception, started_unix_s: float, *, is_stored: bool = True
) -> TraceSummary:
    """Return a query that was not answered as a list shows it.

    Of one that is not to be stored the error's kind and code alone are told: its words may quote a prompt, or the answer.
    """
    now, code = time.time(), getattr(error, "code", None)
    kind = type(error).__name__
    told = f"{kind}: {error}" if is_stored else f"{kind} ({code})" if code else kind
    return TraceSummary(
        trace_id=query.trace_id,
        created_unix_s=now,
        question=query.text[:_QUESTION_CHARACTERS] if is_stored else NOT_STORED,
        policy=policy,
        gate_version=None,
        stop_reason=None,
        steps=0,
        agents=[],
        prompt_tokens=0,
        completion_tokens=0,
        wall_ms=round((now - started_unix_s) * 1e3, 3),
        price=None,
        degraded=False,
        error=redact_text(storable(told))[:_ERROR_CHARACTERS],
    )


class TraceFilter(ReplyModel):
    """Which traces are listed: the query string of GET /v1/dmoa/traces."""

    limit: int = Field(default=50, ge=1, le=MAX_LISTED)
    """Most traces of one reply."""
    before: str | None = Field(default=None, pattern=r"^[0-9]{1,12}(\.[0-9]{1,20})?:.{1,160}$")
    """`next` of the page before."""
    error: bool = False
    """Only queries that were not answered, or that an agent failed in."""
    slow_ms: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Only queries that took this long."""
    policy: str | None = Field(default=None, max_length=200)
    gate_version: str | None = Field(default=None, max_length=200)
    mine: bool = False
    """With an admin key, only what was asked with that key; another key sees nothing else anyway."""

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> TraceFilter:
        """Build it from a query string. Raises RequestError (400) naming the field."""
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            first = findings(error)[0]
            field = str(first["loc"][0]) if first["loc"] else "query"
            raise RequestError(f"{describe(error, cls)}; see /openapi.json", param=field, code="invalid_value") from error

    def takes(self, one: TraceSummary) -> bool:
        """Tell whether a trace is among those wanted."""
        return (
            (not self.error or one.error is not None)
            and (self.slow_ms is None or one.wall_ms >= self.slow_ms)
            and (self.policy is None or one.policy == self.policy)
            and (self.gate_version is None or one.gate_version == self.gate_version)
            and (self.before is None or _key(one) < _place(self.before))
        )


class TracePage(ReplyModel):
    """Body of GET /v1/dmoa/traces."""

    data: list[TraceSummary]
    """Newest first."""
    next: str | None
    """`before` of the page that follows; null at the end."""


def page_of(summaries: Iterable[TraceSummary], wanted: TraceFilter) -> TracePage:
    """Return one page of a list, newest first: pages follow each other in that order, however the summaries came."""
    found: list[TraceSummary] = []
    for one in sorted(summaries, key=_key, reverse=True):
        if wanted.takes(one):
            if len(found) == wanted.limit:
                return TracePage(data=found, next=f"{found[-1].created_unix_s!r}:{found[-1].trace_id}")
            found.append(one)
    return TracePage(data=found, next=None)


def _key(one: TraceSummary) -> tuple[float, str]:
    return one.created_unix_s, one.trace_id


def _place(text: str) -> tuple[float, str]:
    """Return where a page begins."""
    moment, _, trace_id = text.partition(":")
    return float(moment), trace_id


def unknown_trace(trace_id: str) -> RequestError:
    """Return the error of a trace that the key does not see."""
    message = f"trace_id is {trace_id[:80]!r}; no trace of that id was made with this key, or it is gone"
    return RequestError(message, param="trace_id", code="trace_not_found", status=404)


class AgentStatistics(ReplyModel):
    """What one agent did in the traces that are kept."""

    agent: str
    calls: int
    active: int
    """Calls whose reply counted."""
    failed: int
    share: float
    """Of all replies that counted, 0..1."""
    tokens: int
    tokens_per_s: float | None
    """Completion tokens a second of a call that was answered; null without one that took time."""
    load: float | None
    """Mean calls in flight over the last minute, by the queries that were answered in it; null for files."""
    latency_ms: float | None
    """Median of a call."""
    entropies: list[int]
    """Replies by mean entropy per token, in equal bins from 0 to `max_nats`; the last one holds what is above."""
    right: list[int]
    """Replies by probability of being right, in as many equal bins from 0 to 1; all 0 where the gate gives none."""
    max_nats: float = _MAX_NATS


def statistics_of(
    calls: Iterable[TraceCalls], agents: Sequence[str] = (), recent: Iterable[TraceCalls] | None = None
) -> list[AgentStatistics]:
    """Return what each agent did, `agents` first and in their order; `recent`: the calls of the last `LOAD_S`."""
    by_agent: dict[str, list[TraceCalls]] = defaultdict(list)
    for name in agents:
        by_agent[name] = []
    for call in calls:
        by_agent[call.agent].append(call)
    active = sum(call.is_active for group in by_agent.values() for call in group)
    busy_s: dict[str, float] = defaultdict(float)
    for call in recent or ():
        busy_s[call.agent] += call.latency_ms / 1e3  # Little's law: mean calls in flight = rate x mean time of a call
    load = {name: None if recent is None else round(busy_s[name] / LOAD_S, 3) for name in by_agent}
    return [_statistics(name, group, active, load[name]) for name, group in by_agent.items()]


def _statistics(agent: str, calls: Sequence[TraceCalls], active: int, load: float | None) -> AgentStatistics:
    own = sum(call.is_active for call in calls)
    well = [call for call in calls if call.status in WELL]
    took_ms = [call.latency_ms for call in well]
    entropies = [call.entropy_nats for call in calls if call.entropy_nats is not None]
    right = [call.right_probability for call in calls if call.right_probability is not None]
    return AgentStatistics(
        agent=agent,
        calls=len(calls),
        active=own,
        failed=len(calls) - len(well),
        share=own / active if active else 0.0,
        tokens=sum(call.tokens for call in calls),
        tokens_per_s=round(1e3 * sum(call.tokens for call in well) / sum(took_ms), 1) if sum(took_ms) else None,
        load=load,
        latency_ms=round(statistics.median(took_ms), 3) if took_ms else None,
        entropies=_histogram(entropies, _MAX_NATS),
        right=_histogram(right, 1.0),
    )


def _histogram(values: Iterable[float], top: float) -> list[int]:
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int(max(0.0, value) / top * _BINS))] += 1
    return counts


@cache
def described_filter() -> list[dict[str, Any]]:
    """Return the parameters of the list for the OpenAPI document."""
    fields = TraceFilter.model_json_schema()["properties"]
    return [
        {"name": name, "in": "query", "required": False, "schema": schema.get("anyOf", [schema])[0]}  # null is to leave it out
        for name, schema in fields.items()
    ]
