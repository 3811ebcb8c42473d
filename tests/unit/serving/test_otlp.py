"""Spans: they nest, carry the conventions' attributes, follow the caller's trace, and hold no texts unless told to."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from dmoa.config import RouterConfig, TracingConfig
from dmoa.serving import otlp
from dmoa.serving.actors import pack_record
from dmoa.serving.otlp import SCHEMA, Exporter, spans_of
from dmoa.serving.traces import TraceStore
from dmoa.trace import AnsweredQuery
from dmoa.types import Answer, Message, Query, SummarizerRecord
from tests.logged import Logged
from tests.unit.serving.fake_service import make_answer, make_step, reply

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
NOW = 1_790_000_000.0


def asked(traceparent: str = "", trace_id: str = "t1") -> Query:
    return Query(trace_id=trace_id, text="What is secret?", system="Be kind.", traceparent=traceparent)


def answer() -> Answer:
    """Two steps; an agent of the second was lost."""
    prompt = (Message(role="user", content="What is secret?"),)
    first = make_step(0, "18", replies=(reply("adder", prompt=prompt, sent_unix_s=NOW - 0.09, engine="scripted"),))
    lost = reply("sorter", status="failed", error="out of memory", completion_tokens=0, prompt_tokens=0, cached_tokens=0)
    second = make_step(1, "19", replies=(reply("adder", engine="scripted"), lost))
    return make_answer("t1", steps=(first, second), wall_ms=100.0)


def answered(query: Query | None = None, **more: Any) -> AnsweredQuery:
    values: dict[str, Any] = {"query": query or asked(), "answer": answer(), "pool": "tiny", "created_unix_s": NOW}
    return AnsweredQuery(**(values | more))


def spans(query: Query, *, content: bool = False) -> list[Any]:
    return spans_of(answered(query), content=content)


def value_of(span: Any, key: str) -> Any:
    found = next((one.value for one in span.attributes if one.key == key), None)
    if found is None:
        return None
    kind = found.WhichOneof("value")
    value = getattr(found, kind)
    return [getattr(one, one.WhichOneof("value")) for one in value.values] if kind == "array_value" else value


def test_spans_nest_under_the_query_in_time_and_by_parent() -> None:
    found = spans(asked())
    root = found[0]
    assert [span.name for span in found] == [
        "invoke_workflow tiny",
        *("plan", "invoke_agent adder", "chat scripted", "invoke_agent summarizer", "chat summarizer"),
        *("plan", "invoke_agent adder", "chat scripted", "invoke_agent sorter", "invoke_agent summarizer", "chat summarizer"),
    ]
    by_id = {span.span_id: span for span in found}
    assert len(by_id) == len(found)
    assert root.parent_span_id == b""
    for span in found[1:]:
        parent = by_id[span.parent_span_id]
        assert parent.name.startswith("invoke_agent" if span.name.startswith("chat") else "invoke_workflow"), span.name
        assert parent.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= parent.end_time_unix_nano
    assert {span.trace_id for span in found} == {root.trace_id}
    assert root.end_time_unix_nano - root.start_time_unix_nano == pytest.approx(100e6, rel=1e-3)


def test_spans_carry_the_conventions_attributes_and_our_own() -> None:
    root, plan, agent, chat, *_ = spans(asked())
    assert value_of(root, "gen_ai.operation.name") == "invoke_workflow"
    assert (value_of(root, "gen_ai.usage.input_tokens"), value_of(root, "gen_ai.usage.output_tokens")) == (30, 12)
    assert (value_of(root, "dmoa.stop_reason"), value_of(root, "dmoa.steps")) == ("agreement", 2)
    assert value_of(plan, "dmoa.agents") == ["adder", "sorter", "dater"]
    assert value_of(plan, "dmoa.probabilities") == [0.625, 0.25, 0.125]
    assert (value_of(agent, "gen_ai.agent.name"), value_of(agent, "dmoa.entropy_nats")) == ("adder", 0.5)
    assert (value_of(chat, "gen_ai.operation.name"), value_of(chat, "gen_ai.usage.output_tokens")) == ("chat", 4)
    failed = next(span for span in spans(asked()) if span.name == "invoke_agent sorter")
    assert (failed.status.code, failed.status.message) == (2, "out of memory")


@pytest.mark.parametrize(
    ("header", "trace", "parent"),
    [
        (f"00-{TRACE}-{PARENT}-01", TRACE, PARENT),
        (f"00-{TRACE.upper()}-{PARENT}-00", TRACE, PARENT),
        (f"00-{'0' * 32}-{PARENT}-01", None, ""),
        (f"00-{TRACE}-{'0' * 16}-01", None, ""),
        ("nonsense", None, ""),
        ("", None, ""),
    ],
)
def test_the_callers_trace_is_gone_on_with(header: str, trace: str | None, parent: str) -> None:
    root = spans(asked(header))[0]
    assert root.parent_span_id.hex() == parent
    assert len(root.trace_id) == 16
    assert trace is None or root.trace_id.hex() == trace


def test_without_a_caller_the_trace_is_named_as_ours() -> None:
    assert spans(asked(trace_id=TRACE))[0].trace_id.hex() == TRACE


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *((1, "int_value"), (True, "bool_value"), (1.0, "double_value"), ("1", "string_value")),
        *((0, "int_value"), (False, "bool_value"), (0.0, "double_value"), ("", "string_value"), ((1,), "array_value")),
    ],
)
def test_attributes_keep_their_kind_from_span_to_span(value: Any, kind: str) -> None:
    """They are kept by their values, and to Python 1 is true and 1.0."""
    for other in (True, 1, 1.0, 0, False, 0.0):
        otlp._attribute("x", other)
    found = otlp._attribute("x", value).value
    assert found.WhichOneof("value") == kind
    assert kind == "array_value" or getattr(found, kind) == value


def test_texts_are_in_spans_only_where_they_are_wanted() -> None:
    plain, full = (b"".join(span.SerializeToString() for span in spans(asked(), content=content)) for content in (False, True))
    for text in (b"What is secret?", b"The answer is 19.", b"Be kind."):
        assert text not in plain
        assert text in full
    chat = next(span for span in spans(asked(), content=True) if span.name == "chat scripted")
    (message,) = json.loads(value_of(chat, "gen_ai.input.messages"))
    assert message == {"role": "user", "parts": [{"type": "text", "content": "What is secret?"}]}


def test_only_what_was_lost_is_an_error() -> None:
    """An examiner's word is not; of one that wrote nothing no way of ending is told; half a character breaks nothing."""
    lost = reply("adder", status="failed", error="no \ud83d", completion_tokens=0, prompt_tokens=0, cached_tokens=0)
    step = make_step(
        0, "19", replies=(reply("sorter", status="examiner"), lost), summarizer=SummarizerRecord(mode="select", verdict="rule")
    )
    found = spans_of(answered(answer=make_answer("t1", steps=(step,))), content=False)
    told = {span.name: (span.status.message, value_of(span, "gen_ai.response.finish_reasons")) for span in found}
    assert (told["invoke_agent sorter"], told["invoke_agent adder"]) == (("", ["stop"]), ("no ?", None))


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, str | None, bytes]], threading.Event]]:
    """A collector on a free port: its URL, what it was sent as (path, x-key, body), and whether it answers."""
    taken: list[tuple[str, str | None, bytes]] = []
    answers = threading.Event()
    answers.set()

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            taken.append((self.path, self.headers.get("x-key"), body))
            answers.wait(10)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", taken, answers
        server.shutdown()
        thread.join()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - the collector's own threads
            await asyncio.sleep(0.02)


async def test_a_collector_gets_the_spans_of_a_query(collector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, taken, *_ = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=a%20b,x-name=J%C3%BCrgen")
    store = TraceStore(RouterConfig(), TracingConfig(otlp_endpoint=url))
    await store.put_all([(pack_record(answered(created_unix_s=time.time())), "k")])
    await until(lambda: bool(taken))
    ((path, key, body),) = taken
    request = ExportTraceServiceRequest.FromString(body)
    (part,) = request.resource_spans
    assert (path, key, part.schema_url) == ("/v1/traces", "a b", SCHEMA)
    assert part.scope_spans[0].spans[0].name == "invoke_workflow tiny"
    assert part.resource.attributes[0].value.string_value == "dmoa"


async def test_a_store_that_ends_sends_the_spans_that_wait(collector: Any) -> None:
    url, taken, *_ = collector
    store = TraceStore(RouterConfig(), TracingConfig(otlp_endpoint=url))
    await store.put_all([(pack_record(answered(created_unix_s=time.time())), "k")])
    await store.end()
    assert [path for path, *_ in taken] == ["/v1/traces"]


async def test_what_is_answered_while_spans_are_sent_is_sent_too(collector: Any) -> None:
    url, taken, answers = collector
    answers.clear()
    exporter = Exporter(TracingConfig(otlp_endpoint=url), send_s=0.01)
    exporter.put(answered(pool="first"))
    await until(lambda: len(taken) == 1)
    exporter.put(answered(pool="second"))
    answers.set()
    await until(lambda: len(taken) == 2)
    assert b"invoke_workflow second" in taken[1][2]


async def test_texts_of_a_query_that_may_not_be_stored_are_not_sent(collector: Any) -> None:
    url, taken, *_ = collector
    exporter = Exporter(TracingConfig(otlp_endpoint=url, content=True))
    for is_stored in (False, True):
        exporter.put(answered(is_stored=is_stored))
        await exporter.flush()
    for text in (b"What is secret?", b"out of memory"):  # an error may quote a prompt
        assert [text in body for _, _, body in taken] == [False, True]


async def test_a_collector_that_is_away_costs_a_warning(logged: Logged) -> None:
    exporter = Exporter(TracingConfig(otlp_endpoint="http://127.0.0.1:9"))
    exporter.put(answered())
    await exporter.flush()
    assert "12 spans were not taken by http://127.0.0.1:9/v1/traces" in logged.text


async def test_it_is_off_unless_an_endpoint_is_named() -> None:
    exporter = Exporter(TracingConfig())
    exporter.put(answered())
    await exporter.flush()
    assert exporter._sender is None
