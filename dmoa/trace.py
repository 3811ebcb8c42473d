"""The reply's `dmoa` object, and traces: what became of a query, step by step, in the names of the contract.

Made from an Answer; the HTTP reply and the trace files hold it, `dmoa schema reply` prints `ReplyDmoa`. Durations are rounded to
3 decimals, probabilities and entropies to 6; no number in it is ever non-finite.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmoa import __version__
from dmoa.errors import TraceError
from dmoa.storage import replacing
from dmoa.types import (
    AgentReply,
    AgentStatus,
    Answer,
    EntropyKind,
    FinishReason,
    Query,
    RoutedBy,
    RouteDecision,
    RouteRequest,
    StepRecord,
    StopReason,
    SummarizerRecord,
    Verdict,
)
from dmoa.validation import describe, redact, redact_text

_MAX_IDLE = 16


class ReplyModel(BaseModel):
    """Base of every record of a reply: fields documented in place, non-finite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ReplyAgent(ReplyModel):
    """One agent in one step."""

    name: str
    """Name of the agent."""
    probability: float = Field(ge=0, le=1)
    """The gate's; 1 for policies without a gate."""
    status: AgentStatus
    """ok, or why there is no contribution; cold: it had no replica, so the next-ranked agent took its place; masked: dead, so
    the gate passed over it; idle: not asked."""
    explored: bool = False
    """Whether it was asked only to learn from: then its reply counts for nothing but tokens."""
    entropy_nats: float | None
    """Mean predictive entropy per token over the whole vocabulary, before temperature; null without tokens."""
    entropy_tokens: int
    """Tokens that it is the mean of; 0: nothing is known of it."""
    entropy_kind: EntropyKind
    """exact, or truncated: from listed log-probabilities only, the middle of two bounds."""
    entropy_slack_nats: float = 0.0
    """How far entropy_nats may be off either way, being the middle of two bounds; 0 where it is exact."""
    finish_reason: FinishReason | None
    """null where the agent generated nothing."""
    prompt_tokens: int
    cached_tokens: int
    """Part of prompt_tokens that a prefix cache had."""
    completion_tokens: int
    estimated: bool = False
    """Whether the token counts are guesses, because an endpoint did not tell."""
    latency_ms: float
    """From the call to the reply, as the orchestrator saw it."""
    engine_ms: float
    """Part of latency_ms between the engine's accept and its last token."""
    engine: str
    """Engine and the options that may change numbers, such as transformers/float32; empty where nothing ran."""
    replica: str = ""
    """The replica that answered; empty where nothing ran, and without a server."""
    attempts: int
    """How often the call was sent; above 1 an earlier attempt was lost."""
    memoised: bool = False
    """Whether a call cache gave the contribution; its counts are those of the run that filled the cache."""
    error: str | None
    """Why there is no contribution; null where there is one."""
    text: str | None = None
    """Its contribution; only with `dmoa.trace`."""


class ReplySummarizer(ReplyModel):
    """What the summarizer did in a step."""

    mode: Literal["select", "llm"]
    """As in the pool."""
    verdict: Verdict
    """final or continue; unparsable: an LLM said neither; rule: no LLM was asked."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    latency_ms: float
    engine_ms: float
    memoised: bool = False
    """Whether a call cache gave its words."""
    error: str | None
    """Why the summarizer's own words are missing; the summary is then the chosen contribution."""


class ReplyStep(ReplyModel):
    """One finished step."""

    step: int
    """Counts from 0."""
    k: int
    """Agents whose contributions counted."""
    wall_ms: float
    """How long the step took."""
    mass: float
    """Probability of the active set."""
    agents: list[ReplyAgent]
    """Asked agents first, the active ones in order of probability, explored ones last; then, where a gate decided, masked
    agents and the most probable ones of those left idle (16 at most: traces keep every probability)."""
    summarizer: ReplySummarizer
    summary: str | None = None
    """The state after the step; only with `dmoa.trace`."""


class ReplyDmoa(ReplyModel):
    """What became of a query."""

    trace_id: str
    """Names the query: GET /v1/dmoa/traces/ID."""
    pool: str
    """The pool that answered."""
    policy: str
    """The policy that chose who was asked."""
    gate_version: str | None
    """Weights that decided; null for policies without a gate."""
    untrained: bool
    """Whether the gate that decided had untrained weights."""
    routed_by: RoutedBy
    """router, or ingress where the router was away in some step."""
    degraded: bool
    """At least one chosen agent failed, was masked, or was passed over because it was cold, or a call had to be sent again."""
    stop_reason: StopReason
    """Why the query ended: by the summarizer's verdict, agreement of the agents, low entropy, a policy that asks once (single),
    or a budget (max_steps, budget_tokens, deadline). no_agent: agents were lost on the way, this is the best answer before.
    stages: all set steps are done (evaluation)."""
    steps: list[ReplyStep]
    """The finished steps, in order."""


def reply_dmoa(answer: Answer, *, pool: str = "", with_texts: bool = False) -> ReplyDmoa:
    """Return the reply's `dmoa` object; `with_texts` adds every agent's text and every step's summary."""
    return ReplyDmoa(
        trace_id=answer.trace_id,
        pool=pool,
        policy=answer.policy,
        gate_version=answer.gate_version,
        untrained=answer.gate_trained is False,
        routed_by=answer.routed_by,
        degraded=answer.degraded,
        stop_reason=answer.stop_reason,
        steps=[reply_step(step, with_texts=with_texts) for step in answer.steps],
    )


def dump(reply: ReplyDmoa) -> dict[str, Any]:
    """Return the object as plain JSON values; texts that were not asked for are left out, every other field is there."""
    tree = reply.model_dump(mode="json")
    for step in tree["steps"]:
        for record in (step, *step["agents"]):
            for name in ("summary", "text"):
                if record.get(name, "") is None:
                    del record[name]
    return tree


def step_probabilities(step: StepRecord) -> dict[str, float]:
    """Return each agent's probability in a step; empty for policies without a gate."""
    if step.decision is None:
        return {}
    return dict(zip(step.decision.agents, step.decision.probability_A.tolist(), strict=True))


def finite(value: float, digits: int = 3) -> float:
    """Return a number that JSON can carry, rounded; 0.0 for what is not finite."""
    return round(float(value), digits) if math.isfinite(value) else 0.0


def reply_step(step: StepRecord, *, with_texts: bool = False) -> ReplyStep:
    """Return one finished step of the `dmoa` object; `with_texts` as in `reply_dmoa`."""
    return ReplyStep(
        step=step.step,
        k=len(step.active),
        wall_ms=finite(step.wall_ms),
        mass=finite(step.mass, 6),
        agents=list(_agents(step, with_texts)),
        summarizer=_summarizer(step.summarizer),
        summary=step.summary if with_texts else None,
    )


def _agents(step: StepRecord, with_texts: bool) -> Iterator[ReplyAgent]:
    chance = step_probabilities(step)
    rank = {name: i for i, name in enumerate(step.active)}
    explored = {name for name, _ in step.explored}
    asked = sorted(step.replies, key=lambda reply: (reply.agent in explored, rank.get(reply.agent, len(rank))))
    for reply in asked:
        yield _agent(reply, chance.get(reply.agent, 0.0 if chance else 1.0), with_texts, explored=reply.agent in explored)
    passed_over = set(chance) - {reply.agent for reply in asked}
    masked = [name for name in (step.decision.masked if step.decision else ()) if name in passed_over]
    for name in masked:
        yield _agent(AgentReply(agent=name, status="masked"), chance[name], False)
    for name in sorted(passed_over.difference(masked), key=lambda name: (-chance[name], name))[:_MAX_IDLE]:
        yield _agent(AgentReply(agent=name, status="idle"), chance[name], False)


def _agent(reply: AgentReply, probability: float, with_texts: bool, *, explored: bool = False) -> ReplyAgent:
    entropy = reply.entropy_nats
    return ReplyAgent(
        name=reply.agent,
        probability=min(max(finite(probability, 6), 0.0), 1.0),
        status=reply.status,
        explored=explored,
        entropy_nats=None if entropy is None or not math.isfinite(entropy) else round(entropy, 6),
        entropy_tokens=reply.entropy_tokens,
        entropy_kind=reply.entropy_kind,
        entropy_slack_nats=finite(reply.entropy_slack_nats / max(1, reply.entropy_tokens), 6),
        finish_reason=reply.finish_reason if reply.status == "ok" or reply.completion_tokens else None,
        prompt_tokens=reply.prompt_tokens,
        cached_tokens=reply.cached_tokens,
        completion_tokens=reply.completion_tokens,
        estimated=reply.are_tokens_estimated,
        latency_ms=finite(reply.latency_ms),
        engine_ms=finite(reply.engine_ms),
        engine=reply.engine,
        replica=reply.replica,
        attempts=reply.attempts,
        memoised=reply.is_memoised,
        error=reply.error,
        text=reply.text if with_texts else None,
    )


def _summarizer(record: SummarizerRecord) -> ReplySummarizer:
    return ReplySummarizer(
        mode=record.mode,
        verdict=record.verdict,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        completion_tokens=record.completion_tokens,
        latency_ms=finite(record.latency_ms),
        engine_ms=finite(record.engine_ms),
        memoised=record.is_memoised,
        error=record.error,
    )


SCHEMA_VERSION = 1


class TraceRoute(BaseModel):
    """One routing decision: what the gate was given and what it decided."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int
    gate_version: str
    input_X: list[float]
    """Embeddings and feedback features, as the gate read them."""
    masked: list[str]
    max_agents: int | None
    probability_A: list[float]
    ranking: list[int]
    k: int
    mass: float
    hidden_H: list[float]
    """Hidden state after the step."""
    theta: float | None = None
    """Highest score of a sure reply; null where the gate version fitted none."""
    limit: int | None = None
    """Most agents that the step could come to; null in traces of versions without a cascade."""
    cold: list[str] = []
    """Agents that had no replica when the decision was made."""


class Trace(BaseModel):
    """One query, from question to answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: int = SCHEMA_VERSION
    trace_id: str
    created_unix_s: float
    dmoa_version: str
    pool_fingerprint: str
    query: dict[str, Any]
    """text, system, turns, sampling (seed included), limits."""
    user: str | None = None
    metadata: dict[str, str] = {}
    answer: str
    finish_reason: str
    wall_ms: float
    agents: list[str]
    """Agents of the gate, in the order of probability_A; empty for policies without a gate."""
    routes: list[TraceRoute]
    dmoa: ReplyDmoa
    """The reply's own object, with every agent's text."""


def trace_of(
    query: Query,
    answer: Answer,
    *,
    pool: str,
    fingerprint: str,
    user: str | None = None,
    metadata: dict[str, str] | None = None,
    created_unix_s: float | None = None,
) -> Trace:
    """Return the trace of an answered query; `user` and `metadata` are the client's own words, without secrets.

    `created_unix_s` is when the query was answered, None for now.
    """
    decisions = [step.decision for step in answer.steps if step.decision]
    return Trace(
        trace_id=answer.trace_id,
        created_unix_s=time.time() if created_unix_s is None else created_unix_s,
        dmoa_version=__version__,
        pool_fingerprint=fingerprint,
        query=asdict(query),
        user=None if user is None else redact_text(user),
        metadata=redact(metadata or {}),
        answer=answer.text,
        finish_reason=answer.finish_reason,
        wall_ms=answer.wall_ms,
        agents=list(decisions[0].agents) if decisions else [],
        routes=[_route(step, step.route, step.decision) for step in answer.steps if step.route and step.decision],
        dmoa=reply_dmoa(answer, pool=pool, with_texts=True),
    )


def _route(step: StepRecord, request: RouteRequest, decision: RouteDecision) -> TraceRoute:
    return TraceRoute(
        step=step.step,
        gate_version=decision.gate_version,
        input_X=request.input_X.tolist(),
        masked=list(decision.masked),
        max_agents=request.max_agents,
        probability_A=decision.probability_A.tolist(),
        ranking=list(decision.ranking),
        k=decision.k,
        mass=decision.mass,
        hidden_H=decision.hidden_H.tolist(),
        theta=decision.theta,
        limit=decision.limit,
        cold=list(decision.cold),
    )


def write_traces(path: str | Path, traces: Iterable[Trace]) -> Path:
    """Write traces as JSON lines, whole, then renamed. Returns the path."""
    with replacing(Path(path)) as file:
        file.writelines(trace.model_dump_json().encode() + b"\n" for trace in traces)
    return Path(path)


def read_traces(path: str | Path) -> list[Trace]:
    """Read a file of traces. Raises TraceError naming file and line."""
    try:
        # Not splitlines: texts may hold other line separators, which JSON does not escape.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"trace {str(path)!r}: {error}; give a file of JSON lines that dmoa wrote") from error
    return [_parse(str(path), number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(path: str, number: int, line: str) -> Trace:
    where = f"trace {path!r}, line {number}"
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not valid JSON: {error}; give a file that dmoa wrote") from error
    seen = tree.get("schema_version", SCHEMA_VERSION) if isinstance(tree, dict) else SCHEMA_VERSION
    if seen != SCHEMA_VERSION:
        raise TraceError(f"{where}: schema_version is {seen!r}, this dmoa reads {SCHEMA_VERSION}; use the dmoa that wrote it")
    try:
        return Trace.model_validate(tree)
    except ValidationError as error:
        raise TraceError(f"{where}: {describe(error, Trace)}") from error
