"""The trace store: a bounded, shared memory of recent queries, off the critical path."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import ray

from dmoa.serving.actors import detached, traces_name


class TraceStore:
    """Keeps the newest traces of an app, each with the hash of the key that made it."""

    def __init__(self, max_traces: int) -> None:
        self._max_traces = max_traces
        self._traces: OrderedDict[str, tuple[str, str]] = OrderedDict()

    async def put(self, trace_id: str, trace_json: str, key_hash: str) -> None:
        """Keep one trace; the oldest goes when there are too many."""
        self._traces[trace_id] = (trace_json, key_hash)
        while len(self._traces) > self._max_traces:
            self._traces.popitem(last=False)

    async def get(self, trace_id: str, key_hash: str) -> str | None:
        """Return a trace made with the same key, else None."""
        found = self._traces.get(trace_id)
        return found[0] if found and found[1] == key_hash else None


def ensure_traces(app: str, max_traces: int) -> Any:
    """Return the app's trace store actor, created if it is not there yet."""
    return ray.remote(TraceStore).options(**detached(traces_name(app))).remote(max_traces)
