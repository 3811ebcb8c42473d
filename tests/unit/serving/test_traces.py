"""The trace store: bounded, one key's queries are no other key's, traces written when asked for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dmoa.orchestrator import advance, begin, finish
from dmoa.serving.actors import pack_record
from dmoa.serving.traces import AnsweredQuery, TraceStore
from dmoa.testing import decision
from dmoa.trace import Trace, trace_of
from dmoa.types import AgentReply, Answer, EntropySum, Query, RouteRequest, StepRecord, SummarizerRecord


def answered(trace_id: str) -> AnsweredQuery:
    asked = Query(trace_id=trace_id, text="What is 12 + 7?")
    step = StepRecord(
        step=0,
        replies=(AgentReply(agent="a", status="ok", text="19", entropy=EntropySum(sum_nats=1.0, tokens=4)),),
        active=("a",),
        summary="19",
        summarizer=SummarizerRecord(mode="select", verdict="rule"),
        decision=decision({"a": 0.75, "b": 0.25}, 1),
        route=RouteRequest(input_X=np.array([0.1, 0.2], np.float32)),
    )
    answer: Answer = finish(advance(begin(asked), step), "dmoa", "max_steps", wall_ms=12.5)
    return AnsweredQuery(
        query=asked, answer=answer, pool="pool", fingerprint="f" * 64, user="me", metadata={"run": "7"}, created_unix_s=1.5
    )


async def put(store: TraceStore, trace_id: str, key_hash: str = "k") -> None:
    await store.put(trace_id, pack_record(answered(trace_id)), key_hash)


async def test_a_trace_is_that_of_the_query_when_it_was_answered() -> None:
    store = TraceStore(2)
    await put(store, "t1")
    found: Any = json.loads(await store.get("t1", "k") or "null")
    kept = answered("t1")
    expected = trace_of(
        kept.query, kept.answer, pool="pool", fingerprint="f" * 64, user="me", metadata={"run": "7"}, created_unix_s=1.5
    )
    assert Trace.model_validate(found) == Trace.model_validate_json(expected.model_dump_json())
    assert (found["created_unix_s"], found["answer"], found["routes"][0]["input_X"][0]) == (1.5, "19", float(np.float32(0.1)))


async def test_only_the_key_that_asked_gets_the_trace() -> None:
    store = TraceStore(2)
    await put(store, "t1", "mine")
    assert await store.get("t1", "other") is None
    assert await store.get("t1", "") is None
    assert await store.get("t2", "mine") is None
    assert await store.get("t1", "mine") is not None


async def test_the_oldest_goes_when_there_are_too_many() -> None:
    store = TraceStore(2)
    for trace_id in ("t1", "t2", "t3"):
        await put(store, trace_id)
    assert [await store.get(trace_id, "k") is not None for trace_id in ("t1", "t2", "t3")] == [False, True, True]
