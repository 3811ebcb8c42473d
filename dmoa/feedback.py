"""What the stream of finished queries is made of: records without texts, and the snapshot of them, a Parquet file.

Answers are known by tokens, salted hashes of what `core/forms` reads from a reply: equal answers have equal tokens, within a
query and across queries, and nobody without the salt can tell which answer it was. Of a question the gate's inputs are kept.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmoa.core.features import Preset
from dmoa.core.forms import agreement_key
from dmoa.core.in_step import context_part
from dmoa.errors import ConfigError
from dmoa.flat import flat_reply, reply_of
from dmoa.records import quicken
from dmoa.trace import AnsweredQuery, decision_of
from dmoa.types import Answer, FloatArray, RouteRequest, StepRecord, SummarizerRecord

_LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
"""Tokens have no digits: a number in a text would be read as its answer."""
FILE = "queries.parquet"
"""Of the snapshot, under `feedback/` of `router.state_uri`."""
OUTCOMES = "outcomes.jsonl"
"""Beside it, in the format of `dmoa train --outcomes`."""
MARK = "traffic/"
"""What the query_id of a recorded query begins with; its trace id follows."""
MAX_CONTEXTS = 16
"""Groups of similar queries that are told apart; further kinds join the nearest."""
SAME_CONTEXT = 0.3
"""Least cosine of two first inputs of one group; questions of one benchmark have more, those of two mostly less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """One finished query, without a text of anybody's."""

    answer: Answer
    """Texts are tokens, thoughts and errors are left out; decisions carry neither states nor label models."""
    tenant: str
    """Whose query it was: `tenant_of` the key's hash."""
    fingerprint: str
    """Of the pool."""
    created_unix_s: float
    """When it was answered."""


def tenant_of(key_hash: str) -> str:
    """Return the name of a key in records: a hash of its hash; the same for all who come without a key."""
    return hashlib.sha256(f"dmoa-tenant\0{key_hash}".encode()).hexdigest()[:16]


def tenants_of(keys: Iterable[str]) -> frozenset[str]:
    """Return the names in records of keys that are given by their hashes, or by these names (`router.feedback_exclude`)."""
    return frozenset(key if len(key) < 64 else tenant_of(key) for key in keys)


class Contexts:
    """Groups queries by their first inputs (leader clustering, Hartigan 1975)."""

    def __init__(self, kept: Iterable[str] = ()) -> None:
        """`kept`: what `state` gave."""
        self._leaders: list[FloatArray] = [np.frombuffer(b64decode(one), np.float16).astype(np.float32) for one in kept]

    def state(self) -> list[str]:
        """Return the groups' first inputs, about a kilobyte each."""
        return [b64encode(leader_D.astype(np.float16).tobytes()).decode() for leader_D in self._leaders]

    def of(self, input_D: FloatArray) -> int:
        """Return which group of queries an input belongs to, or begin one."""
        unit_D = input_D / max(float(np.linalg.norm(input_D)), 1e-12)
        near = [float(leader_D @ unit_D) if leader_D.shape == unit_D.shape else -1.0 for leader_D in self._leaders]
        best = int(np.argmax(near)) if near else -1
        if best >= 0 and (near[best] >= SAME_CONTEXT or len(near) >= MAX_CONTEXTS):
            return best
        self._leaders.append(unit_D)
        return len(near)


def query_part(input_X: FloatArray, preset: Preset) -> FloatArray:
    """Return the part of a first input that the query alone makes: its embedding [D]."""
    context_D = context_part(input_X, preset)
    return context_D if preset == "paper" else context_D[: len(context_D) // 2]


def is_held_back(trace_id: str, share: float) -> bool:
    """Tell whether a query is one of the share (`router.guards.held_back`) that gates are judged by and never learn from."""
    return zlib.crc32(f"held back\0{trace_id}".encode()) < share * 2**32


def feedback_of(one: AnsweredQuery, *, key_hash: str, salt: bytes) -> Feedback:
    """Return the record of an answered query. Reading the answers takes about a millisecond."""
    query, answer = one.query, one.answer
    routed = answer.steps[:-1] if answer.choices else answer.steps  # a final call is no step that the gate decided
    steps = tuple(_without_texts(step, query.text, salt) for step in routed)
    return Feedback(
        answer=replace(answer, text=_token(answer.text, query.text, salt), reasoning="", steps=steps, choices=()),
        tenant=tenant_of(key_hash),
        fingerprint=one.fingerprint,
        created_unix_s=one.created_unix_s,
    )


def _without_texts(step: StepRecord, asked: str, salt: bytes) -> StepRecord:
    decision, route = step.decision, step.route
    return replace(
        step,
        replies=tuple(
            replace(
                reply, text=_token(reply.text, asked, salt) if reply.status == "ok" else "", reasoning="", error=None, prompt=()
            )
            for reply in step.replies
        ),
        summary="",
        summarizer=replace(step.summarizer, reasoning="", error=None, prompt=()),
        decision=None if decision is None else replace(decision, hidden_H=np.zeros(0, np.float32), label_model=None),
        route=None if route is None else RouteRequest(input_X=route.input_X, max_agents=route.max_agents),
    )


def _token(text: str, asked: str, salt: bytes) -> str:
    """Return a text that has the same answer as another where the two texts it stands for have."""
    key = agreement_key(text, asked)
    said = text.strip() if key is None else f"\0{key}"
    found = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), key=salt, digest_size=8).hexdigest().translate(_LETTERS)
    # Prose too long for an answer: it is to be read as none, and to differ from other such replies.
    return f"Nothing that could be read as the answer of a reply was found here, its mark was {found}" if key is None else found


_REPLY = pa.struct(
    {name: pa.string() for name in ("agent", "status", "text", "finish_reason", "entropy_kind", "engine")}
    | {name: pa.int64() for name in ("entropy_tokens", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")}
    | {name: pa.float64() for name in ("entropy_sum_nats", "entropy_sq_sum", "entropy_slack_nats", "latency_ms", "engine_ms")}
    | {"right_probability": pa.float64(), "attempts": pa.int64()}
)
_NAMES = pa.list_(pa.string())
_OF_RECORD = ("tenant", "fingerprint", "created_unix_s")
_OF_ANSWER = ("trace_id", "policy", "stop_reason", "finish_reason", "degraded", "gate_version", "wall_ms")
SCHEMA = pa.schema(
    {name: pa.string() for name in ("trace_id", "tenant", "fingerprint", "policy", "stop_reason", "finish_reason", "answer")}
    | {"degraded": pa.bool_(), "gate_version": pa.string(), "created_unix_s": pa.float64(), "wall_ms": pa.float64()}
    | {"step": pa.int64(), "step_wall_ms": pa.float64(), "mass": pa.float64(), "right_probability": pa.float64()}
    | {"agents": _NAMES, "masked": _NAMES, "active": _NAMES, "explored": _NAMES, "propensity": pa.list_(pa.float64())}
    | {"max_agents": pa.int64(), "summarizer": pa.string(), "verdict": pa.string()}
    | {"input": pa.list_(pa.float32()), "probability": pa.list_(pa.float32()), "replies": pa.list_(_REPLY)}
)
"""Columns of the snapshot: one row a step."""


def table_of_feedback(records: Iterable[Feedback]) -> pa.Table:
    """Return records as a table, by `SCHEMA`; queries that no gate decided are left out, nothing can learn from them."""
    rows = [row for record in records if _is_decided(record.answer) for row in _rows(record)]
    inputs = [np.asarray(row.pop("input"), np.float32) for row in rows]
    table = pa.Table.from_pylist(rows, schema=SCHEMA.remove(SCHEMA.get_field_index("input")))
    ends = np.cumsum([0, *map(len, inputs)], dtype=np.int32)
    values = np.concatenate(inputs) if inputs else np.zeros(0, np.float32)
    column = pa.ListArray.from_arrays(pa.array(ends), pa.array(values))  # from Python floats it would take a millisecond a step
    return table.append_column("input", column).select(SCHEMA.names).cast(SCHEMA)


def _is_decided(answer: Answer) -> bool:
    return bool(answer.steps) and all(step.decision is not None and step.route is not None for step in answer.steps)


def _rows(record: Feedback) -> Iterable[dict[str, Any]]:
    answer = record.answer
    common = {name: getattr(record, name) for name in _OF_RECORD} | {name: getattr(answer, name) for name in _OF_ANSWER}
    for step in answer.steps:
        assert step.decision is not None
        assert step.route is not None
        yield common | {
            "answer": answer.text,
            "step": step.step,
            "step_wall_ms": step.wall_ms,
            "mass": step.mass,
            "right_probability": step.right_probability,
            "agents": step.decision.agents,
            "masked": step.decision.masked,
            "probability": step.decision.probability_A.tolist(),
            "active": step.active,
            "explored": [name for name, _ in step.explored],
            "propensity": [chance for _, chance in step.explored],
            "max_agents": step.route.max_agents,
            "summarizer": step.summarizer.mode,
            "verdict": step.summarizer.verdict,
            "input": step.route.input_X,
            "replies": list(map(flat_reply, step.replies)),
        }


def write_feedback(records: Iterable[Feedback]) -> bytes:
    """Return the snapshot of records: a Parquet file."""
    data = io.BytesIO()
    pq.write_table(table_of_feedback(records), data, compression="zstd", write_page_checksum=True)
    return data.getvalue()


def read_feedback(data: bytes, where: str) -> list[Feedback]:
    """Return the records of a snapshot, in its order. Raises ConfigError saying `where` it lies and what is wrong with it."""
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True).select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"{where}: not a whole snapshot of feedback: {reason}; remove the file to begin anew") from error
    rows = table.drop_columns(["input"]).to_pylist()
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for row, input_X in zip(rows, table["input"], strict=True):
            row["input"] = np.asarray(input_X.values.to_numpy(zero_copy_only=False), np.float32)
            if not np.isfinite([*row["probability"], *row["propensity"]]).all():
                raise ValueError(f"trace {row['trace_id']}: probability or propensity holds NaN or infinity")
            found.setdefault(row["trace_id"], []).append(row)
        return [_record(steps) for steps in found.values()]
    except (ValueError, TypeError, AttributeError) as error:  # nulls among them
        raise ConfigError(f"{where}: {' '.join(str(error).split())[:400]}; remove the file to begin anew") from error


def _record(rows: Sequence[dict[str, Any]]) -> Feedback:
    first = rows[0]
    answer = Answer(steps=tuple(map(_step, rows)), text=first["answer"], **{name: first[name] for name in _OF_ANSWER})
    return Feedback(answer=answer, **{name: first[name] for name in _OF_RECORD})


def _step(row: dict[str, Any]) -> StepRecord:
    return StepRecord(
        step=row["step"],
        replies=tuple(map(reply_of, row["replies"])),
        active=tuple(row["active"]),
        explored=tuple(zip(row["explored"], row["propensity"], strict=True)),
        summary="",
        summarizer=SummarizerRecord(mode=row["summarizer"], verdict=row["verdict"]),
        mass=row["mass"],
        right_probability=row["right_probability"],
        wall_ms=row["step_wall_ms"],
        decision=decision_of(
            row["agents"],
            row["probability"],
            masked=tuple(row["masked"]),
            k=max(1, len(row["active"])),
            mass=row["mass"],
            gate_version=row["gate_version"],
        ),
        route=RouteRequest(input_X=row["input"], max_agents=row["max_agents"]),
    )


quicken(vars(), __name__)
