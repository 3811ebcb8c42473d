"""The reply's `dmoa` object, and traces: what became of a query, step by step, in the names of the contract.

Made from an Answer; the HTTP reply and the trace files hold it, `dmoa schema reply` prints `ReplyDmoa`. Durations are rounded to
3 decimals, probabilities and entropies to 6; no number in it is ever non-finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dmoa import __version__
from dmoa.config import SUMMARIZER
from dmoa.errors import TraceError
from dmoa.flat import TokenFields, flat
from dmoa.reading import MAX_OWN_BYTES, lines_of, read_json, regular
from dmoa.records import quicken
from dmoa.storage import json_line, replacing
from dmoa.types import (
    AgentReply,
    AgentStatus,
    Answer,
    EntropyKind,
    EntropySum,
    FinishReason,
    Limits,
    Message,
    Query,
    RoutedBy,
    RouteDecision,
    RouteRequest,
    Stage,
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


def _is_none(value: object) -> bool:
    return value is None


def _is_false(value: object) -> bool:
    return value is False


class _ReplyAgentHead(ReplyModel):
    name: str
    """Name of the agent."""
    probability: float = Field(ge=0, le=1)
    """The gate's; 1 for policies without a gate."""
    status: AgentStatus
    """ok, or why there is no contribution; cold: it had no replica, so the next-ranked agent took its place; masked: dead, so
    the gate passed over it; idle: not asked; examiner: it said whether another's answer is right, for the pool's defence."""
    explored: bool = False
    """Whether it was asked only to learn from: then its reply counts for nothing but tokens."""
    barred: bool = Field(default=False, exclude_if=_is_false)
    """Whether the pool's defence left its contribution out."""
    entropy_nats: float | None
    """Mean predictive entropy per token over the whole vocabulary, before temperature; null without tokens."""
    entropy_sq_nats: float | None = Field(default=None, exclude_if=_is_none)
    """Mean of the squares of the tokens' entropies; only with `dmoa.trace`."""
    entropy_tokens: int
    """Tokens that it is the mean of; 0: nothing is known of it."""
    entropy_kind: EntropyKind
    """exact, or truncated: from listed log-probabilities only, the middle of two bounds."""
    entropy_slack_nats: float = 0.0
    """How far entropy_nats may be off either way, being the middle of two bounds; 0 where it is exact."""
    reasoning_entropy_nats: float | None = None
    """The same mean over the tokens of its thought; null where it did not think, or nothing is known of it."""
    reasoning_entropy_tokens: int = 0
    """Tokens of the thought that it is the mean of."""
    right_probability: float | None = Field(default=None, exclude_if=_is_none)
    """That its answer is right, given all replies of the step; only where the gate was trained on such probabilities."""
    finish_reason: FinishReason | None
    """null where the agent generated nothing."""


class ReplyAgent(TokenFields, _ReplyAgentHead):
    """One agent in one step."""

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
    price: float | None = None
    """What the call cost, in the currency of the pool's prices; null where no price is known."""
    error: str | None
    """Why there is no contribution; null where there is one."""
    text: str | None = Field(default=None, exclude_if=_is_none)
    """Its contribution; only with `dmoa.trace`."""
    reasoning: str | None = Field(default=None, exclude_if=_is_none)
    """What it thought before; only with `dmoa.trace`."""


class _ReplySummarizerHead(ReplyModel):
    mode: Literal["select", "llm"]
    """As in the pool."""
    verdict: Verdict
    """final or continue; unparsable: an LLM said neither; rule: no LLM was asked."""


class ReplySummarizer(TokenFields, _ReplySummarizerHead):
    """What the summarizer did in a step."""

    latency_ms: float
    engine_ms: float
    memoised: bool = False
    """Whether a call cache gave its words."""
    price: float | None = None
    """What the call cost; null where no price is known, or no LLM was asked."""
    error: str | None
    """Why the summarizer's own words are missing; the summary is then the chosen contribution."""
    reasoning: str | None = Field(default=None, exclude_if=_is_none)
    """What it thought before; only with `dmoa.trace`."""


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
    right_probability: float | None = Field(default=None, exclude_if=_is_none)
    """That the leading answer is right; only where the gate was trained on such probabilities."""
    agents: list[ReplyAgent]
    """Asked agents first, the active ones in order of probability, explored ones and examiners last; then, where a gate decided,
    masked agents and the most probable ones of those left idle (16 at most: traces keep every probability)."""
    summarizer: ReplySummarizer
    summary: str | None = Field(default=None, exclude_if=_is_none)
    """The state after the step; only with `dmoa.trace`."""


def _stop_reason(value: object) -> object:
    return "sure" if value == "entropy" else value  # as older traces call it


class ReplyDmoa(ReplyModel):
    """What became of a query."""

    trace_id: str
    """Names the query: GET /v1/dmoa/traces/ID."""
    trace_url: str | None = Field(default=None, exclude_if=_is_none)
    """Where the server's page shows the query."""
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
    stop_reason: Annotated[StopReason, BeforeValidator(_stop_reason)]
    """Why the query ended: by the summarizer's verdict, agreement of the agents, a reply that was sure, a policy that asks once
    (single), or a budget (max_steps, budget_tokens, budget_price, budget_calls, deadline). no_agent: agents were lost on the way,
    this is the best answer before. stages: all set steps are done (evaluation). schedule: the policy's last step is done."""
    price: float | None = None
    """What all calls cost together; null where that of one is not known."""
    ignored: list[str] = Field(default_factory=list, exclude_if=lambda value: not value)
    """Fields of the request that were passed over; left out where there are none."""
    steps: list[ReplyStep]
    """The finished steps, in order."""


_OF_ANSWER = ("trace_id", "policy", "stop_reason", "degraded", "gate_version", "routed_by")
"""What an answer and its reply tell by the same names."""
_OF_SUMMARIZER = {name: name for name in ("mode", "verdict", "price", "error")} | {"is_memoised": "memoised"}
"""What a summarizer's record and the reply tell alike, by the names there and here; `_OF_AGENT` the same of an agent's reply."""
_OF_AGENT = {name: name for name in ("status", "engine", "replica", "attempts", "price", "error")} | {
    "is_barred": "barred",
    "are_tokens_estimated": "estimated",
    "is_memoised": "memoised",
}
_OF_DECISION = ("gate_version", "masked", "ranking", "k", "mass", "theta", "limit", "cold")
"""What a decision and its record in a trace tell by the same names."""


def reply_dmoa(answer: Answer, *, pool: str = "", with_texts: bool = False, trace_url: str | None = None) -> ReplyDmoa:
    """Return the reply's `dmoa` object; `with_texts` adds every agent's text and every step's summary."""
    return ReplyDmoa(
        **{name: getattr(answer, name) for name in _OF_ANSWER},
        trace_url=trace_url,
        pool=pool,
        untrained=answer.gate_trained is False,
        price=answer.price,
        steps=[reply_step(step, with_texts=with_texts) for step in answer.steps],
    )


def answer_of_reply(
    reply: ReplyDmoa, *, text: str, finish_reason: Literal["stop", "length"], wall_ms: float, reasoning: str = ""
) -> Answer:
    """Return the answer that a reply tells of: the inverse of `reply_dmoa`, with what the reply leaves out.

    Numbers are rounded as there; states of the gate, propensities and agents left idle beyond those listed are not known.
    """
    return Answer(
        **{name: getattr(reply, name) for name in _OF_ANSWER},
        text=text,
        reasoning=reasoning,
        steps=tuple(_step_of(step, reply) for step in reply.steps),
        finish_reason=finish_reason,
        gate_trained=None if reply.gate_version is None else not reply.untrained,
        wall_ms=wall_ms,
    )


def _step_of(step: ReplyStep, reply: ReplyDmoa) -> StepRecord:
    asked = [agent for agent in step.agents if agent.status not in ("masked", "idle")]
    decision = None
    if reply.gate_version is not None:
        decision = decision_of(
            [agent.name for agent in step.agents],
            [agent.probability for agent in step.agents],
            masked=tuple(agent.name for agent in step.agents if agent.status == "masked"),
            k=step.k,
            mass=step.mass,
            gate_version=reply.gate_version,
            routed_by=reply.routed_by,
        )
    summarizer = step.summarizer
    return StepRecord(
        step=step.step,
        replies=tuple(map(reply_of_agent, asked)),
        active=tuple(agent.name for agent in asked[: step.k]),
        summary=step.summary or "",
        summarizer=SummarizerRecord(
            **{name: getattr(summarizer, here) for name, here in _OF_SUMMARIZER.items()},
            reasoning=summarizer.reasoning or "",
            usage=summarizer.usage,
            latency_ms=summarizer.latency_ms,
            engine_ms=summarizer.engine_ms,
        ),
        mass=step.mass,
        right_probability=step.right_probability,
        explored=tuple((agent.name, math.nan) for agent in asked if agent.explored),
        wall_ms=step.wall_ms,
        decision=decision,
    )


def decision_of(
    agents: Sequence[str], probabilities: Sequence[float], *, masked: tuple[str, ...] = (), **more: Any
) -> RouteDecision:
    """Return a decision as records tell of it: the agents ranked by their probabilities, no state; `more`: its other fields."""
    ranking = sorted((a for a, name in enumerate(agents) if name not in masked), key=lambda a: -probabilities[a])
    return RouteDecision(
        agents=tuple(agents),
        probability_A=np.asarray(probabilities, dtype=np.float32),
        ranking=tuple(ranking),
        masked=masked,
        hidden_H=np.zeros(0, dtype=np.float32),
        **more,
    )


def reply_of_agent(agent: ReplyAgent) -> AgentReply:
    """Return the reply that a record of an agent tells of."""
    tokens, thought_tokens = agent.entropy_tokens, agent.reasoning_entropy_tokens
    mean_nats = math.nan if agent.entropy_nats is None else agent.entropy_nats
    return AgentReply(
        **{name: getattr(agent, here) for name, here in _OF_AGENT.items()},
        agent=agent.name,
        text=agent.text or "",
        reasoning=agent.reasoning or "",
        finish_reason=agent.finish_reason or "stop",
        entropy=EntropySum(
            sum_nats=mean_nats * tokens if tokens else 0.0,
            sq_sum=(math.nan if agent.entropy_sq_nats is None else agent.entropy_sq_nats * tokens) if tokens else 0.0,
            slack_nats=agent.entropy_slack_nats * max(1, tokens),
            tokens=tokens,
            kind=agent.entropy_kind,
        ),
        reasoning_entropy=EntropySum(
            sum_nats=(agent.reasoning_entropy_nats or 0.0) * thought_tokens,
            sq_sum=math.nan if thought_tokens else 0.0,
            tokens=thought_tokens,
            kind=agent.entropy_kind,
        ),
        usage=agent.usage,
        latency_ms=agent.latency_ms,
        engine_ms=agent.engine_ms,
        right_probability=agent.right_probability,
    )


def answer_of_trace(trace: Trace, epsilon: float | None = None) -> Answer:
    """Return the answer that a trace tells of, with decisions and inputs of the gate as they were; entropies are rounded.

    `epsilon` as the query had it, for the propensities of explored agents; None: they were asked for certain.
    """
    finish_reason: Literal["stop", "length"] = "length" if trace.finish_reason == "length" else "stop"
    answer = answer_of_reply(trace.dmoa, text=trace.answer, finish_reason=finish_reason, wall_ms=trace.wall_ms)
    routes = {route.step: route for route in trace.routes}
    steps = [_routed(step, routes[step.step], trace, epsilon) if step.step in routes else step for step in answer.steps]
    return replace(answer, trace_id=trace.trace_id, steps=tuple(steps))


def _routed(step: StepRecord, route: TraceRoute, trace: Trace, epsilon: float | None) -> StepRecord:
    chance = 1.0 if epsilon is None else epsilon / max(1, len(route.ranking) - route.k)
    return replace(
        step,
        explored=tuple((name, chance) for name, _ in step.explored),
        decision=RouteDecision(
            gate_version=route.gate_version,
            agents=tuple(trace.agents),
            probability_A=np.asarray(route.probability_A, np.float32),
            ranking=tuple(route.ranking),
            k=route.k,
            mass=route.mass,
            masked=tuple(route.masked),
            cold=tuple(route.cold),
            hidden_H=np.asarray(route.hidden_H, np.float32),
            routed_by=trace.dmoa.routed_by,
            theta=route.theta,
            max_agents=route.gate_max_agents or 1,
        ),
        route=RouteRequest(input_X=np.asarray(route.input_X, np.float32), max_agents=route.max_agents),
    )


def query_of_trace(trace: Trace, trace_id: str) -> Query:
    """Return the query of a trace as it was asked, under a new id; for a text, whatever form its client wanted."""
    told = {name: value for name, value in trace.query.items() if name in {field.name for field in fields(Query)}}
    sampling = dict(told.get("sampling") or {})
    if isinstance(sampling.get("stop"), list):
        sampling["stop"] = tuple(sampling["stop"])
    if "template" in sampling:
        sampling["template"] = tuple((name, value) for name, value in sampling["template"])
    made = {
        "trace_id": trace_id,
        "turns": tuple(Message(**turn) for turn in told.get("turns") or ()),
        "limits": Limits(**(told.get("limits") or {})),
        "stages": tuple(Stage(**stage) for stage in told.get("stages") or ()),
        "sampling": sampling,
        "traceparent": "",
        "final": None,
    }
    return Query(**(told | made))


def step_probabilities(step: StepRecord) -> dict[str, float]:
    """Return each agent's probability in a step; empty for policies without a gate."""
    if step.decision is None:
        return {}
    return dict(zip(step.decision.agents, step.decision.probability_A.tolist(), strict=True))


def finite(value: float, digits: int = 3) -> float:
    """Return a number that JSON can carry, rounded; 0.0 for what is not finite."""
    return round(float(value), digits) if math.isfinite(value) else 0.0


def _mean_square(entropy: EntropySum) -> float | None:
    is_known = entropy.mean_nats is not None and math.isfinite(entropy.sq_sum)
    return round(entropy.sq_sum / entropy.tokens, 6) if is_known else None


def rounded(value: float | None) -> float | None:
    """Return a probability or an entropy as replies and lists of traces show it."""
    return None if value is None else round(value, 6)


def reply_step(step: StepRecord, *, with_texts: bool = False) -> ReplyStep:
    """Return one finished step of the `dmoa` object; `with_texts` as in `reply_dmoa`."""
    return ReplyStep(
        step=step.step,
        k=len(step.active),
        wall_ms=finite(step.wall_ms),
        mass=finite(step.mass, 6),
        right_probability=rounded(step.right_probability),
        agents=list(_agents(step, with_texts)),
        summarizer=_summarizer(step.summarizer, with_texts),
        summary=step.summary if with_texts else None,
    )


def replies_in_order(step: StepRecord) -> list[AgentReply]:
    """Return a step's replies: the active agents in order of probability, then lost ones, explored ones, and examiners.

    An agent may be active and lost: one of its samples, or when it was to examine another's answer.
    """
    rank = {name: i for i, name in enumerate(step.active)}
    explored = {name for name, _ in step.explored}

    def place(reply: AgentReply) -> tuple[bool, bool, bool, int]:
        return reply.status == "examiner", reply.agent in explored, reply.status != "ok", rank.get(reply.agent, len(rank))

    return sorted(step.replies, key=place)


def _agents(step: StepRecord, with_texts: bool) -> Iterator[ReplyAgent]:
    chance = step_probabilities(step)
    explored = {name for name, _ in step.explored}
    asked = replies_in_order(step)
    for reply in asked:
        yield _agent(reply, chance.get(reply.agent, 0.0 if chance else 1.0), with_texts, explored=reply.agent in explored)
    passed_over = set(chance) - {reply.agent for reply in asked}
    masked = [name for name in (step.decision.masked if step.decision else ()) if name in passed_over]
    for name in masked:
        yield _agent(AgentReply(agent=name, status="masked"), chance[name], False)
    for name in sorted(passed_over.difference(masked), key=lambda name: (-chance[name], name))[:_MAX_IDLE]:
        yield _agent(AgentReply(agent=name, status="idle"), chance[name], False)


def _agent(reply: AgentReply, probability: float, with_texts: bool, *, explored: bool = False) -> ReplyAgent:
    entropy = reply.entropy
    return ReplyAgent(
        **{here: getattr(reply, name) for name, here in _OF_AGENT.items()},
        name=reply.agent,
        probability=min(max(finite(probability, 6), 0.0), 1.0),
        explored=explored,
        entropy_nats=rounded(entropy.mean_nats),
        entropy_sq_nats=_mean_square(entropy) if with_texts else None,
        entropy_tokens=entropy.tokens,
        entropy_kind=entropy.kind,
        entropy_slack_nats=finite(entropy.slack_nats / max(1, entropy.tokens), 6),
        right_probability=rounded(reply.right_probability),
        reasoning_entropy_nats=rounded(reply.reasoning_entropy.mean_nats),
        reasoning_entropy_tokens=reply.reasoning_entropy.tokens,
        finish_reason=reply.finish_reason if reply.status == "ok" or reply.usage.completion_tokens else None,
        **flat(reply.usage),
        latency_ms=finite(reply.latency_ms),
        engine_ms=finite(reply.engine_ms),
        text=reply.text if with_texts else None,
        reasoning=(reply.reasoning or None) if with_texts else None,
    )


def _summarizer(record: SummarizerRecord, with_texts: bool) -> ReplySummarizer:
    return ReplySummarizer(
        **{here: getattr(record, name) for name, here in _OF_SUMMARIZER.items()},
        **flat(record.usage),
        latency_ms=finite(record.latency_ms),
        engine_ms=finite(record.engine_ms),
        reasoning=(record.reasoning or None) if with_texts else None,
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
    gate_max_agents: int | None = None
    """K of the gate version; null in older traces."""


class TraceCall(ReplyModel):
    """What one agent, or the summarizer, was asked in a step, and when."""

    step: int
    agent: str
    """The agent's name, or `summarizer`."""
    started_ms: float
    """From the query's first call to this one."""
    messages: list[dict[str, str]]
    """The whole prompt: role and content of each message."""


class Trace(ReplyModel):
    """One query, from question to answer."""

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
    choices: list[dict[str, Any]] = []
    """What a final call wrote where that is more than one text: text and tool_calls of each answer."""
    finish_reason: str
    wall_ms: float
    agents: list[str]
    """Agents of the gate, in the order of probability_A; empty for policies without a gate."""
    routes: list[TraceRoute]
    dmoa: ReplyDmoa
    """The reply's own object, with every agent's text."""
    calls: list[TraceCall] = []
    """Every call with the prompt that the agent saw, in the order of the steps and their agents; empty in older traces."""

    def line(self) -> bytes:
        """Return it as a line of a file of traces."""
        return json_line(self.model_dump(mode="json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredQuery:
    """An answered query, with all that its trace needs; who answers adds the pool's name and fingerprint."""

    query: Query
    answer: Answer
    pool: str = ""
    fingerprint: str = ""
    user: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    created_unix_s: float = field(default_factory=time.time)
    is_stored: bool = True
    """Whether its texts may be kept, learnt from and exported; else its client forbade that."""
    branched_at: int | None = None
    """Where it goes on from another query, as somebody chose: how many steps are that one's. No gate learns from it, or is judged
    by it."""

    @property
    def own(self) -> Answer:
        """The answer without the steps that a branch took over: another query has told of them."""
        return replace(self.answer, steps=self.answer.steps[self.branched_at :]) if self.branched_at else self.answer

    def trace(self) -> Trace:
        """Return its trace; `user` and `metadata`, the client's own words, without secrets."""
        answer = self.answer
        decisions = [step.decision for step in answer.steps if step.decision]
        made = [{"text": one.text, "tool_calls": [asdict(call) for call in one.tool_calls]} for one in answer.choices]
        return Trace(
            trace_id=answer.trace_id,
            created_unix_s=self.created_unix_s,
            dmoa_version=__version__,
            pool_fingerprint=self.fingerprint,
            query=asdict(self.query),
            user=None if self.user is None else redact_text(self.user),
            metadata=redact(self.metadata),
            answer=answer.text,
            choices=made if len(made) > 1 or any(one["tool_calls"] for one in made) else [],
            finish_reason=answer.finish_reason,
            wall_ms=answer.wall_ms,
            agents=list(decisions[0].agents) if decisions else [],
            routes=[_route(step, step.route, step.decision) for step in answer.steps if step.route and step.decision],
            dmoa=reply_dmoa(answer, pool=self.pool, with_texts=True),
            calls=list(_calls(answer)),
        )


def _calls(answer: Answer) -> Iterator[TraceCall]:
    """Yield every call whose prompt is known, those of a step in the order of its agents in the `dmoa` object."""
    made: list[tuple[int, str, AgentReply | SummarizerRecord]] = []
    for step in answer.steps:
        made += [(step.step, reply.agent, reply) for reply in replies_in_order(step) if reply.prompt]
        made += [(step.step, SUMMARIZER, step.summarizer)] if step.summarizer.prompt else []
    start_unix_s = min((call.sent_unix_s for _, _, call in made), default=0.0)
    for number, agent, call in made:
        messages = [{"role": message.role, "content": message.content} for message in call.prompt]
        started_ms = finite((call.sent_unix_s - start_unix_s) * 1e3)
        yield TraceCall(step=number, agent=agent, started_ms=started_ms, messages=messages)


def _route(step: StepRecord, request: RouteRequest, decision: RouteDecision) -> TraceRoute:
    return TraceRoute(
        **{name: getattr(decision, name) for name in _OF_DECISION},
        step=step.step,
        input_X=request.input_X.tolist(),
        max_agents=request.max_agents,
        probability_A=decision.probability_A.tolist(),
        hidden_H=decision.hidden_H.tolist(),
        gate_max_agents=decision.max_agents,
    )


def write_traces(path: str | Path, traces: Iterable[Trace]) -> Path:
    """Write traces as JSON lines, whole, then renamed. Returns the path."""
    with replacing(Path(path)) as file:
        file.writelines(trace.line() for trace in traces)
    return Path(path)


def read_traces(path: str | Path) -> list[Trace]:
    """Read a file of traces. Raises TraceError naming file and line."""
    try:
        # Not splitlines: texts may hold other line separators, which JSON does not escape.
        with open(path, encoding="utf-8", newline="\n", opener=regular) as file:
            lines = enumerate(lines_of(file, path, MAX_OWN_BYTES), 1)
            return [_parse(str(path), number, line) for number, line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"trace {str(path)!r}: {error}; give a file of JSON lines that dmoa wrote") from error


def _parse(path: str, number: int, line: str) -> Trace:
    where = f"trace {path!r}, line {number}"
    try:
        tree = read_json(line)
    except ValueError as error:
        raise TraceError(f"{where}: not valid JSON: {error}; give a file that dmoa wrote") from error
    seen = tree.get("schema_version", SCHEMA_VERSION) if isinstance(tree, dict) else SCHEMA_VERSION
    if seen != SCHEMA_VERSION:
        raise TraceError(f"{where}: schema_version is {seen!r}, this dmoa reads {SCHEMA_VERSION}; use the dmoa that wrote it")
    try:
        return Trace.model_validate(tree)
    except ValidationError as error:
        raise TraceError(f"{where}: {describe(error, Trace)}") from error


quicken(vars(), __name__)
