"""Routes the queries of recorded traces again and says whether the decisions are the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dmoa.core.gate import Gate
from dmoa.core.in_step import judge
from dmoa.core.inference import Decider
from dmoa.errors import TraceError
from dmoa.trace import ReplyStep, Trace, TraceRoute, reply_of_agent
from dmoa.types import FloatArray, RouteDecision, RouteRequest
from dmoa.validation import REDACTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A trace routed again."""

    trace_id: str
    decisions: tuple[RouteDecision, ...]
    differences: tuple[str, ...]
    """What differs from the trace, one sentence each; empty: bit for bit the same."""


def replay_routing(traces: Sequence[Trace], gate: Gate, version: str) -> list[Replay]:
    """Route traces again, step by step, all of them in the same batches.

    Inputs are read from the trace; hidden states are computed again, step by step. Raises TraceError for a trace of
    another gate version or another pool.
    """
    for trace in traces:
        _check(trace, gate, version)
    decider = Decider(gate, version)
    hidden: dict[int, FloatArray | None] = dict.fromkeys(range(len(traces)))
    decisions: dict[int, list[RouteDecision]] = {index: [] for index in range(len(traces))}
    for step in range(max((len(trace.routes) for trace in traces), default=0)):
        rows = [index for index, trace in enumerate(traces) if step < len(trace.routes)]
        requests = [_request(traces[index].routes[step], hidden[index]) for index in rows]
        for index, decision in zip(rows, decider.decide(requests, frozenset()), strict=True):
            hidden[index] = decision.hidden_H
            decisions[index].append(replace(decision, cold=tuple(traces[index].routes[step].cold)))
    return [
        Replay(
            trace_id=trace.trace_id, decisions=tuple(decisions[index]), differences=tuple(_differences(trace, decisions[index]))
        )
        for index, trace in enumerate(traces)
    ]


def _check(trace: Trace, gate: Gate, version: str) -> None:
    versions = {route.gate_version for route in trace.routes}
    if versions - {version}:
        raise TraceError(
            f"trace {trace.trace_id}: gate_version is {', '.join(sorted(versions))}, the gate at hand is {version}; "
            "give the pool (--config) and checkpoint that made the trace"
        )
    if trace.routes and tuple(trace.agents) != gate.spec.agents:
        raise TraceError(f"trace {trace.trace_id}: its agents are {', '.join(trace.agents)}; the gate has others")


def _request(route: TraceRoute, hidden_H: FloatArray | None) -> RouteRequest:
    return RouteRequest(
        input_X=np.asarray(route.input_X, dtype=np.float32),
        hidden_H=hidden_H,
        max_agents=route.max_agents,
        unavailable=tuple(route.masked),
    )


def _differences(trace: Trace, decisions: list[RouteDecision]) -> Iterable[str]:
    for route, decision in zip(trace.routes, decisions, strict=True):
        pairs: dict[str, tuple[object, object]] = {
            "probability_A": (route.probability_A, decision.probability_A.tolist()),
            "ranking": (route.ranking, list(decision.ranking)),
            "k": (route.k, decision.k),
            "mass": (route.mass, decision.mass),
            "hidden_H": (route.hidden_H, decision.hidden_H.tolist()),
        }
        if route.limit is not None:
            pairs |= {"theta": (route.theta, decision.theta), "limit": (route.limit, decision.limit)}
        step = next((step for step in trace.dmoa.steps if step.step == route.step), None)
        if step is not None and decision.label_model is not None and not _was_redacted(step, _asked(trace, route.step)):
            pairs["right_probability"] = _right_probabilities(step, decision, _asked(trace, route.step))
        for name, (seen, now) in pairs.items():
            if seen != now:
                yield f"step {route.step}: {name} was {seen}, is {now}"


def _asked(trace: Trace, step: int) -> str:
    """Return what the agents were asked at a step."""
    stages = trace.query.get("stages") or ()
    part = stages[step].get("part") if step < len(stages) else None
    return str(trace.query["text"] if part is None else part)


def _was_redacted(step: ReplyStep, asked: str) -> bool:
    """Tell whether secrets were taken out of what replies were judged by: they cannot be judged again."""
    return any(REDACTED in text for text in (asked, *(agent.text or "" for agent in step.agents)))


def _right_probabilities(step: ReplyStep, decision: RouteDecision, asked: str) -> tuple[object, object]:
    """Return the probabilities of a step's replies being right, and of its leading answer: as recorded, and judged again."""
    counted = [agent for agent in step.agents if not agent.explored]
    found = judge(decision, [reply_of_agent(agent) for agent in counted], asked=asked)
    seen = {agent.name: agent.right_probability for agent in counted if agent.right_probability is not None}
    if found is None or step.right_probability is None:  # a step whose first reply passed was not judged
        return seen, {}
    return (step.right_probability, seen), (round(found.probability, 6), {name: round(p, 6) for name, p in found.right.items()})
