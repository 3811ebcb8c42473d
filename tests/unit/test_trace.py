"""Traces: what they keep of a query, and that JSON carries every float exactly."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dmoa import __version__
from dmoa.errors import TraceError
from dmoa.orchestrator import advance, begin, finish
from dmoa.testing import decision, query
from dmoa.trace import SCHEMA_VERSION, AnsweredQuery, Trace, read_traces, write_traces
from dmoa.types import AgentReply, EntropySum, Limits, Message, Query, RouteDecision, RouteRequest, StepRecord, SummarizerRecord
from tests.examples import examples

TEXT = "line\u2028one\u2029two\x85three\x0bfour\r\n\N{SNOWMAN}"
"""Line separators that are none in a JSON Lines file."""


def step_of(number: int, decided: RouteDecision | None, input_X: Any = (1.0,), text: str = "19") -> StepRecord:
    request = RouteRequest(input_X=np.asarray(input_X, np.float32), max_agents=2) if decided else None
    return StepRecord(
        step=number,
        replies=(AgentReply(agent="a", status="ok", text=text, entropy=EntropySum(sum_nats=1.0, tokens=4)),),
        active=("a",),
        summary=text,
        summarizer=SummarizerRecord(mode="select", verdict="rule"),
        decision=decided,
        route=request,
    )


def trace_with(*steps: StepRecord, asked: Query | None = None) -> Trace:
    asked = asked or query()
    state = begin(asked)
    for step in steps:
        state = advance(state, step)
    answer = finish(state, "dmoa", "max_steps", wall_ms=12.5)
    return AnsweredQuery(query=asked, answer=answer, pool="pool", fingerprint="f" * 64).trace()


def test_what_the_client_says_of_itself_is_kept_without_secrets() -> None:
    asked = query()
    answer = finish(advance(begin(asked), step_of(0, None)), "dmoa", "max_steps", wall_ms=1.0)
    words = {"team": "a", "auth_token": "s3cr3t", "note": "api_key: s3cr3t"}
    trace = AnsweredQuery(query=asked, answer=answer, user="u Bearer s3cr3t", metadata=words).trace()
    assert trace.metadata == {"team": "a", "auth_token": "[redacted]", "note": "api_key: [redacted]"}
    assert trace.user == "u Bearer [redacted]"


def test_traces_from_before_sure_was_called_so_are_read(tmp_path: Path) -> None:
    trace = trace_with(step_of(0, None))
    old = trace.model_dump_json().replace('"stop_reason":"max_steps"', '"stop_reason":"entropy"')
    assert old != trace.model_dump_json()
    (tmp_path / "t.jsonl").write_text(old)
    (found,) = read_traces(tmp_path / "t.jsonl")
    assert found.dmoa.stop_reason == "sure"
    (tmp_path / "t.jsonl").write_text(old.replace('"entropy"', '"entropies"'))
    with pytest.raises(TraceError, match="stop_reason"):
        read_traces(tmp_path / "t.jsonl")


def test_a_trace_keeps_what_repeats_the_query() -> None:
    asked = Query(
        trace_id="t1",
        text="What?",
        system="Be kind.",
        turns=(Message(role="user", content="Hi"),),
        sampling={"seed": 3, "stop": ("END",)},
        limits=Limits(max_steps=2, deadline_s=1.5),
    )
    decided = decision({"a": 0.75, "b": 0.25}, 1, masked=("b",))
    trace = trace_with(step_of(0, decided, (0.1, 0.2)), step_of(1, decided), asked=asked)
    assert (trace.trace_id, trace.answer, trace.finish_reason, trace.wall_ms) == ("t1", "19", "stop", 12.5)
    assert (trace.dmoa_version, trace.schema_version, trace.pool_fingerprint) == (__version__, SCHEMA_VERSION, "f" * 64)
    assert trace.query["text"] == "What?"
    assert trace.query["turns"] == ({"role": "user", "content": "Hi"},)
    assert trace.query["sampling"] == {"seed": 3, "stop": ("END",)}
    assert trace.query["limits"] == {
        "max_steps": 2,
        "max_agents": None,
        "budget_tokens": None,
        "budget_price": None,
        "budget_calls": None,
        "within_steps": False,
        "deadline_s": 1.5,
        "max_tokens": None,
        "quorum": None,
        "hedge_after_ms": None,
    }
    assert trace.agents == ["a", "b"]
    first = trace.routes[0]
    assert (first.step, first.gate_version, first.max_agents, first.masked) == (0, "v1", 2, ["b"])
    assert (first.probability_A, first.ranking, first.k, first.mass) == ([0.75, 0.25], [0], 1, 0.75)
    assert first.input_X == [float(np.float32(0.1)), float(np.float32(0.2))]
    assert (trace.dmoa.pool, trace.dmoa.stop_reason) == ("pool", "max_steps")
    assert [agent.text for agent in trace.dmoa.steps[0].agents] == ["19", None]


def test_a_query_without_a_gate_has_no_routes() -> None:
    trace = trace_with(step_of(0, None))
    assert (trace.agents, trace.routes) == ([], [])


def test_files_hold_one_line_per_query_whatever_the_texts(tmp_path: Path) -> None:
    traces = [trace_with(step_of(0, decision({"a": 1.0}, 1), text=f"{i} {TEXT}"), asked=query(TEXT)) for i in range(3)]
    path = write_traces(tmp_path / "new" / "traces.jsonl", traces)
    assert path.read_bytes().count(b"\n") == 3
    assert [trace.model_dump_json() for trace in read_traces(path)] == [trace.model_dump_json() for trace in traces]
    assert [trace.answer for trace in read_traces(path)] == [f"{i} {TEXT}" for i in range(3)]
    assert [entry.name for entry in path.parent.iterdir()] == ["traces.jsonl"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_draft(tmp_path: Path) -> None:
    path = write_traces(tmp_path / "traces.jsonl", [trace_with(step_of(0, None))])
    before = path.read_bytes()
    unwritable = trace_with(step_of(0, None)).model_copy(update={"answer": object()})
    with pytest.raises(ValueError, match="serialize"):
        write_traces(path, [trace_with(step_of(0, None)), unwritable])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["traces.jsonl"]


FLOATS = hnp.arrays(np.float32, st.integers(1, 8), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(max_examples=examples(60))
@given(FLOATS, FLOATS, FLOATS)
def test_json_carries_every_float32_exactly(input_X: Any, probability_A: Any, hidden_H: Any) -> None:
    names = [f"a{i}" for i in range(len(probability_A))]
    decided = decision(dict.fromkeys(names, 0.5), 1, probability_A=probability_A, hidden_H=hidden_H, mass=float(probability_A[0]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traces.jsonl"
        written = trace_with(step_of(0, decided, input_X))
        (back,) = read_traces(write_traces(path, [written]))
    route = back.routes[0]
    for name, before in (("input_X", input_X), ("probability_A", probability_A), ("hidden_H", hidden_H)):
        assert np.asarray(getattr(route, name), dtype=np.float32).tobytes() == before.tobytes(), name
    assert route.mass == float(probability_A[0])


GOOD = json.loads(trace_with(step_of(0, decision({"a": 1.0}, 1))).model_dump_json())
BAD_LINES = [
    ("{", "not valid JSON"),
    ("nonsense", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("[1]", "dictionary"),
    (json.dumps({k: v for k, v in GOOD.items() if k != "routes"}), "routes: missing; add it"),
    (json.dumps(GOOD | {"colour": 1}), "colour: unknown key (value 1); expected one of schema_version, trace_id"),
    (json.dumps(GOOD | {"wall_ms": "long"}), "wall_ms is 'long'"),
    (json.dumps(GOOD | {"routes": [GOOD["routes"][0] | {"k": 1.5}]}), "routes.0.k is 1.5"),
    (json.dumps(GOOD | {"schema_version": 2, "colour": 1}), "schema_version is 2, this dmoa reads 1; use the dmoa that wrote it"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_refused_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(TraceError) as caught:
        read_traces(path)
    assert str(caught.value).startswith(f"trace {str(path)!r}, line 3: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "binary"):
        with pytest.raises(TraceError, match="give a file of JSON lines that dmoa wrote"):
            read_traces(path)
