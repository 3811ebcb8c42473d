"""The trace store: a bounded, shared memory of recent queries, off the critical path.

It keeps what an ingress knows of a query as it came; the trace itself, hundreds of kilobytes of JSON after twenty steps,
is written only for those who ask for it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import ray

from dmoa.serving.actors import detached, traces_name, unpack_record
from dmoa.serving.feedback import FeedbackSender
from dmoa.trace import trace_of
from dmoa.types import Answer, Query


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredQuery:
    """An answered query, with all that its trace needs."""

    query: Query
    answer: Answer
    pool: str
    fingerprint: str
    user: str | None
    metadata: dict[str, str]
    created_unix_s: float


class TraceStore:
    """Keeps the newest queries of an app, each with the hash of the key that made it."""

    def __init__(self, max_traces: int) -> None:
        self._max_traces = max_traces
        self._answered: OrderedDict[str, tuple[bytes, str]] = OrderedDict()
        self._sender: FeedbackSender | None = None

    async def put(self, trace_id: str, packed: bytes, key_hash: str, learner: str | None = None) -> None:
        """Keep one packed `Answered`; the oldest goes when there are too many.

        `learner` is the app whose feedback gets a record of it, without texts; it is there when this returns.
        """
        self._answered[trace_id] = (packed, key_hash)
        while len(self._answered) > self._max_traces:
            self._answered.popitem(last=False)
        if learner is not None:
            self._sender = self._sender or FeedbackSender(learner)
            kept: AnsweredQuery = unpack_record(packed)
            await self._sender.send(
                kept.query,
                kept.answer,
                key_hash=key_hash,
                fingerprint=kept.fingerprint,
                created_unix_s=kept.created_unix_s,
            )

    async def get(self, trace_id: str, key_hash: str) -> str | None:
        """Return the trace of a query made with the same key as JSON, else None."""
        packed, maker = self._answered.get(trace_id, (b"", ""))
        if not packed or maker != key_hash:
            return None
        kept: AnsweredQuery = unpack_record(packed)
        trace = trace_of(
            kept.query,
            kept.answer,
            pool=kept.pool,
            fingerprint=kept.fingerprint,
            user=kept.user,
            metadata=kept.metadata,
            created_unix_s=kept.created_unix_s,
        )
        return trace.model_dump_json()


def ensure_traces(app: str, max_traces: int) -> Any:
    """Return the app's trace store actor, created if it is not there yet."""
    return ray.remote(TraceStore).options(**detached(traces_name(app))).remote(max_traces)
