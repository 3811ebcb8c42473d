"""Traces: one JSON line per query, enough to repeat its routing decisions bit for bit.

A trace keeps the reply's `dmoa` object with texts, the messages, the gate's inputs and decisions, seeds, the pool's
fingerprint, versions and times. Floats survive JSON exactly: a float32 is written as the float64 that equals it.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dmoa import __version__
from dmoa.errors import TraceError
from dmoa.explain import describe
from dmoa.redaction import redact, redact_text
from dmoa.reply import ReplyDmoa, reply_dmoa
from dmoa.types import Answer, Query, RouteDecision, RouteRequest, StepRecord

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


def write(path: str | Path, traces: Iterable[Trace]) -> Path:
    """Write traces as JSON lines, whole, then renamed. Returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(trace.model_dump_json() + "\n" for trace in traces)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def read(path: str | Path) -> list[Trace]:
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
