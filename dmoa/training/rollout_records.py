"""Records of rollouts: what was asked, one row per agent and step of what became of it, and the manifest beside them.

`dmoa rollouts` writes them, `dmoa train` and `dmoa probe` read them. Nothing here holds a label: labels of benchmark rows
lie in another folder, which training never opens. Shape letters: D embedding, F feedback features, X gate input.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from dmoa.core.features import FEEDBACK_FEATURES, Preset
from dmoa.types import AgentReply, AgentStatus, Answer, EntropyKind, FinishReason, FloatArray, Stage, StepRecord

SCHEMA_VERSION = 1
_LISTS = ("context", "feedback")


class RolloutModel(BaseModel):
    """Base of the records that lie in files: frozen, unknown keys refused, fields documented in place."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RolloutRow(RolloutModel):
    """One row of the Parquet files: one agent that was asked, or masked, in one step of one query."""

    query_id: str
    """Names the query in every file: `benchmark/split/hash`, or `queries/hash` for the user's own."""
    source: str
    """Benchmark, suite, or name of the file of queries."""
    split: str
    """Of the benchmark or suite; `train` for the user's own queries."""
    step: int
    """Counts from 0."""
    num_steps: int
    """Steps that the query took."""
    context: list[float]
    """float32; the embedding part of the gate's input: [2D] in the default preset, [D] in `paper`."""
    feedback: list[float]
    """float32 [F]; the rest of the gate's input, zeros in the `paper` preset."""
    agent: str
    probability: float
    """The gate's; exactly 0 where masked."""
    is_selected: bool
    """Whether the agent was in the step's active set, from which the next context was built."""
    is_explored: bool
    """Whether it was asked only to learn from."""
    propensity: float
    """Probability with which exploration came to ask it; 1.0 for selected agents and in dense rollouts."""
    entropy_sum_nats: float
    """Sum over the generated tokens, stop token included, of the entropy of the next-token distribution."""
    entropy_sq_sum: float
    """Sum of the squares of the same entropies."""
    entropy_tokens: int
    entropy_kind: EntropyKind
    """truncated: the sums are the middle of two bounds."""
    entropy_slack_nats: float = 0.0
    """How far the bounds of a truncated sum lie off, either way; NaN: not known, as in files from before this column."""
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    latency_ms: float
    """From the call to the reply."""
    text: str
    """What it contributed."""
    status: AgentStatus
    """ok, masked, or why there is no contribution."""
    gate_version: str
    engine: str
    """Engine and the options that may change numbers; empty where nothing ran."""
    seed: int
    """Of the collection."""
    pool_fingerprint: str
    schema_version: int


def _schema() -> pa.Schema:
    """Return the Parquet schema of `RolloutRow`."""
    types: dict[Any, pa.DataType] = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), list[float]: pa.list_(pa.float32())}
    fields = RolloutRow.model_fields.items()
    return pa.schema([pa.field(name, types.get(field.annotation, pa.string()), nullable=False) for name, field in fields])


SCHEMA: pa.Schema = _schema()
"""Columns of the Parquet files, in order."""
LATER_COLUMNS = {"entropy_slack_nats": float("nan")}
"""Columns that older files lack, each with what is read then."""


class RolloutQuery(RolloutModel):
    """One query of a collection: a line of `queries.jsonl`."""

    query_id: str
    source: str
    split: str
    text: str
    stages: tuple[Stage, ...] = ()
    """Set where the query runs exactly these steps."""


class SourceInfo(RolloutModel):
    """One source of queries."""

    name: str
    weight: float
    queries: int
    """How many it gave."""
    origin: dict[str, str]
    """File -> SHA-256, or hub data set -> revision, or the generator and its parameters."""


class Counts(RolloutModel):
    """What lies in the Parquet files."""

    queries: int = 0
    steps: int = 0
    rows: int = 0
    failed: int = 0
    """Queries without any answer in the last session; the same command asks them again."""


class Manifest(RolloutModel):
    """`rollouts.json`: where rollouts come from, and everything needed to repeat them."""

    schema_version: int = SCHEMA_VERSION
    pool: str
    pool_fingerprint: str
    agents: list[str]
    """In the pool's order, which is that of the gate's logits."""
    gate_version: str
    """The gate that chose the active agents."""
    preset: Preset
    engines: list[str]
    """Engine and options per LLM of the pool."""
    sources: list[SourceInfo]
    mode: Literal["dense", "epsilon"]
    """dense: all agents ran in every step; epsilon: the active ones, and with probability epsilon one more."""
    epsilon: float | None = None
    seed: int
    round: int = 0
    """Of on-policy collecting: 0 is collected with the first gate, 1 with the gate that was trained on it, and so on."""
    options: dict[str, Any]
    """What the collection was asked for."""
    config: dict[str, Any]
    """The whole pool."""
    counts: Counts = Field(default_factory=Counts)
    failures: list[str] = []
    """The first failed queries of the last session, each with its error."""
    dmoa_version: str
    code_revision: str = ""
    command: str = ""
    started_unix_s: float
    ended_unix_s: float | None = None
    """null: the collection was stopped before its end."""


def table_of(asked: RolloutQuery, answer: Answer, *, preset: Preset, seed: int, fingerprint: str) -> pa.Table:
    """Return the rows of an answered query, by `SCHEMA`."""
    common: dict[str, Any] = {
        "query_id": asked.query_id,
        "source": asked.source,
        "split": asked.split,
        "num_steps": len(answer.steps),
        "seed": seed,
        "pool_fingerprint": fingerprint,
        "schema_version": SCHEMA_VERSION,
    }
    rows = [common | row for step in answer.steps for row in _rows(step, preset)]
    columns = [
        _lists([row[field.name] for row in rows])
        if field.name in _LISTS
        else pa.array([row[field.name] for row in rows], field.type)
        for field in SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _rows(step: StepRecord, preset: Preset) -> list[dict[str, Any]]:
    """Return what is particular to each row of a step: agents that were asked, then masked ones."""
    assert step.decision is not None
    assert step.route is not None
    context, feedback_F = split_input(step.route.input_X, preset)
    chance = dict(zip(step.decision.agents, step.decision.probability_A.tolist(), strict=True))
    explored = dict(step.explored)
    asked = {reply.agent: reply for reply in step.replies}
    masked = [AgentReply(agent=name, status="masked") for name in step.decision.masked if name not in asked]
    return [
        {
            "step": step.step,
            "context": context,
            "feedback": feedback_F,
            "agent": reply.agent,
            "probability": chance[reply.agent],
            "is_selected": reply.agent in step.active,
            "is_explored": reply.agent in explored,
            "propensity": explored.get(reply.agent, 1.0),
            "gate_version": step.decision.gate_version,
            **_measures(reply),
        }
        for reply in (*asked.values(), *masked)
    ]


def _measures(reply: AgentReply) -> dict[str, Any]:
    """Return the columns that are fields of the reply."""
    return {
        "entropy_sum_nats": reply.entropy_sum_nats,
        "entropy_sq_sum": reply.entropy_sq_sum,
        "entropy_tokens": reply.entropy_tokens,
        "entropy_kind": reply.entropy_kind,
        "entropy_slack_nats": reply.entropy_slack_nats,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "cached_tokens": reply.cached_tokens,
        "completion_tokens": reply.completion_tokens,
        "latency_ms": reply.latency_ms,
        "text": reply.text.encode("utf-8", "replace").decode("utf-8"),  # UTF-8 carries no lone surrogates
        "status": reply.status,
        "engine": reply.engine,
    }


def split_input(input_X: FloatArray, preset: Preset) -> tuple[FloatArray, FloatArray]:
    """Return the embedding part and the feedback part [F] of a gate's input; zeros for `paper`, which has no feedback."""
    if preset == "paper":
        return input_X, np.zeros(FEEDBACK_FEATURES, dtype=np.float32)
    return input_X[:-FEEDBACK_FEATURES], input_X[-FEEDBACK_FEATURES:]


def _lists(arrays: list[FloatArray]) -> pa.Array:
    """Return a column of lists of float32; from Python floats it would take a millisecond a step."""
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = np.concatenate(arrays).astype(np.float32, copy=False) if arrays else np.zeros(0, dtype=np.float32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))
