"""Spans of answered queries for an OpenTelemetry collector, over OTLP/HTTP, made after the reply in the trace store's process.

query = `invoke_workflow POOL`, decision = `plan`, agent = `invoke_agent NAME`, its generation = `chat ENGINE`; the caller's
`traceparent` is the parent. Source: OpenTelemetry's conventions for generative AI, version `SCHEMA`; names that begin with
`dmoa.` and the operation `plan` are ours.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any
from urllib.parse import unquote

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

from dmoa import __version__
from dmoa.config import SUMMARIZER, TracingConfig
from dmoa.loopback import uses_proxies
from dmoa.serving.trace_list import WELL
from dmoa.trace import AnsweredQuery, finite
from dmoa.types import AgentReply, Message, StepRecord, SummarizerRecord
from dmoa.validation import storable

SCHEMA = "https://opentelemetry.io/schemas/1.44.0"
SEND_S = 2.0
"""How often spans are sent."""
MAX_PENDING = 512
"""Queries whose spans may wait; the spans of one more are given up."""
_TIMEOUT_S = 10.0
_NICENESS = 10
"""Of the thread that makes and sends spans: whoever answers queries on the same cores goes first."""
_KEPT_CHARS = 64
"""Longest text of an attribute that is kept for the next span."""
_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_HEX = re.compile(r"[0-9a-f]{32}")
_LOG = logging.getLogger("dmoa.tracing")


def spans_of(answered: AnsweredQuery, *, content: bool) -> list[Span]:
    """Return the spans of an answered query, the whole one first; `content`: with prompts and texts.

    Of one that is not to be stored they carry no text of any kind: words of errors may quote a prompt too.
    """
    return list(_Spans(answered, content).all())


class _Spans:
    def __init__(self, answered: AnsweredQuery, content: bool) -> None:
        self._query, self._answer, self._pool, self._is_stored = answered.query, answered.own, answered.pool, answered.is_stored
        self._content, query = content and answered.is_stored, answered.query
        parent = _PARENT.fullmatch(query.traceparent.strip().lower())
        is_parent = parent is not None and set(parent[1]) != {"0"} and set(parent[2]) != {"0"}
        own = query.trace_id if _HEX.fullmatch(query.trace_id) else secrets.token_hex(16)
        self._trace = bytes.fromhex(parent[1] if parent and is_parent else own)
        self._parent = bytes.fromhex(parent[2]) if parent and is_parent else b""
        self._root = secrets.token_bytes(8)
        self._end_unix_s = answered.created_unix_s
        self._start_unix_s = self._end_unix_s - self._answer.wall_ms / 1e3

    def all(self) -> Iterator[Span]:
        answer, usage = self._answer, self._answer.usage
        attributes = {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.provider.name": "dmoa",
            "gen_ai.workflow.name": self._pool,
            "gen_ai.request.model": self._pool,
            "gen_ai.conversation.id": self._query.conversation,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.response.finish_reasons": (answer.finish_reason,),
            "dmoa.trace_id": answer.trace_id,
            "dmoa.policy": answer.policy,
            "dmoa.gate_version": answer.gate_version,
            "dmoa.stop_reason": answer.stop_reason,
            "dmoa.steps": len(answer.steps),
            "dmoa.degraded": answer.degraded,
            "dmoa.price": answer.price,
        }
        asked = (*self._query.turns, Message(role="user", content=self._query.text))
        attributes |= self._texts(self._query.system, asked, answer.text)
        name = f"invoke_workflow {self._pool}"
        yield self._span(name, self._root, self._parent, self._start_unix_s, self._end_unix_s, attributes)
        start_unix_s = self._start_unix_s
        for step in answer.steps:
            yield from self._step(step, start_unix_s)
            start_unix_s += step.wall_ms / 1e3

    def _step(self, step: StepRecord, start_unix_s: float) -> Iterator[Span]:
        if step.decision is not None:
            decision, sent = step.decision, [reply.sent_unix_s for reply in step.replies if reply.sent_unix_s]
            attributes = {
                "gen_ai.operation.name": "plan",
                "dmoa.step": step.step,
                "dmoa.k": len(step.active),
                "dmoa.mass": finite(step.mass, 6),
                "dmoa.active": step.active,
                "dmoa.agents": decision.agents,
                "dmoa.probabilities": tuple(finite(p, 6) for p in decision.probability_A.tolist()),
                "dmoa.gate_version": decision.gate_version,
                "dmoa.routed_by": decision.routed_by,
                "dmoa.masked": decision.masked,
            }
            end_unix_s = min(sent, default=start_unix_s)
            yield self._span("plan", secrets.token_bytes(8), self._root, start_unix_s, end_unix_s, attributes)
        for reply in step.replies:
            own = {
                "dmoa.status": reply.status,
                "dmoa.explored": any(name == reply.agent for name, _ in step.explored),
                "dmoa.right_probability": reply.right_probability,
                "dmoa.entropy_nats": reply.entropy.mean_nats,
            }
            lost = (self._is_stored and reply.error) or reply.status if reply.status not in WELL else None
            yield from self._call(step, reply.agent, reply, own, start_unix_s, text=reply.text, engine=reply.engine, lost=lost)
        fold = step.summarizer
        if fold.usage.total:
            verdict = {"dmoa.verdict": fold.verdict}
            lost = fold.error and (fold.error if self._is_stored else "failed")
            yield from self._call(step, SUMMARIZER, fold, verdict, start_unix_s, text=step.summary, engine="", lost=lost)

    def _call(
        self,
        step: StepRecord,
        agent: str,
        call: AgentReply | SummarizerRecord,
        own: dict[str, Any],
        start_unix_s: float,
        *,
        text: str,
        engine: str,
        lost: str | None,
    ) -> Iterator[Span]:
        """Yield the span of an agent and, where anything was generated, that of its generation."""
        begin, span = call.sent_unix_s or start_unix_s, secrets.token_bytes(8)
        end = begin + call.latency_ms / 1e3
        tokens = {
            "gen_ai.usage.input_tokens": call.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": call.usage.completion_tokens,
            "gen_ai.response.finish_reasons": (call.finish_reason,) if call.usage.completion_tokens else None,
        }
        head = {"gen_ai.operation.name": "invoke_agent", "gen_ai.provider.name": "dmoa", "gen_ai.agent.name": agent}
        attributes = head | {"dmoa.step": step.step, "dmoa.price": call.price} | own | tokens
        yield self._span(f"invoke_agent {agent}", span, self._root, begin, end, attributes, lost)
        if not call.usage.total:
            return
        head = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": engine.partition("/")[0] or "dmoa"}
        chat = head | {"gen_ai.request.model": engine or agent, "dmoa.cached_tokens": call.usage.cached_tokens} | tokens
        chat |= self._texts("", call.prompt, text)
        begin = max(begin, end - call.engine_ms / 1e3) if call.engine_ms else begin
        yield self._span(f"chat {engine or agent}", secrets.token_bytes(8), span, begin, end, chat, lost, Span.SPAN_KIND_CLIENT)

    def _texts(self, system: str, asked: Sequence[Message], said: str) -> dict[str, Any]:
        if not self._content:
            return {}
        inputs = [_message(message.role, message.content) for message in asked]
        texts = {"gen_ai.input.messages": json.dumps(inputs), "gen_ai.output.messages": json.dumps([_message("assistant", said)])}
        return texts | ({"gen_ai.system_instructions": json.dumps([{"type": "text", "content": system}])} if system else {})

    def _span(
        self,
        name: str,
        span_id: bytes,
        parent: bytes,
        start_unix_s: float,
        end_unix_s: float,
        attributes: dict[str, Any],
        lost: str | None = None,
        kind: Any = Span.SPAN_KIND_INTERNAL,
    ) -> Span:
        # Clocks of one process, but two of its clocks: no span may end before it begins, or outlast the whole.
        start = min(max(start_unix_s, self._start_unix_s), self._end_unix_s)
        end = min(max(end_unix_s, start), self._end_unix_s)
        return Span(
            trace_id=self._trace,
            span_id=span_id,
            parent_span_id=parent,
            name=name,
            kind=kind,
            start_time_unix_nano=int(start * 1e9),
            end_time_unix_nano=int(end * 1e9),
            attributes=[_attribute(key, value) for key, value in attributes.items() if value is not None],
            status=Status(code=Status.STATUS_CODE_ERROR, message=storable(lost[:500])) if lost else None,
        )


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def _attribute(key: str, value: Any) -> KeyValue:
    """Return an attribute, kept from an earlier span but for fractions and long texts, which seldom come again."""
    first = value[0] if isinstance(value, tuple) and value else value
    is_seldom = isinstance(first, float) or (isinstance(value, str) and len(value) > _KEPT_CHARS)
    return (_made if is_seldom else _kept)(key, value)


def _made(key: str, value: Any) -> KeyValue:
    return KeyValue(key=key, value=_value(value))


_kept = lru_cache(maxsize=1024, typed=True)(_made)  # typed: true is not 1


def _value(value: Any) -> Any:
    """Return an AnyValue as the fields that it is made of, which is quicker."""
    if isinstance(value, bool):
        return {"bool_value": value}
    if isinstance(value, int):
        return {"int_value": value}
    if isinstance(value, float):
        return {"double_value": value}
    if isinstance(value, tuple):
        return {"array_value": {"values": [_value(one) for one in value]}}
    return {"string_value": storable(str(value))}


def packed(spans: Sequence[Span]) -> bytes:
    """Return the body of a request to a collector."""
    named = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "dmoa"), "service.version": __version__}
    resource = Resource(attributes=[_attribute(key, value) for key, value in named.items()])
    scope = ScopeSpans(scope=InstrumentationScope(name="dmoa", version=__version__), spans=spans, schema_url=SCHEMA)
    body = ExportTraceServiceRequest(resource_spans=[ResourceSpans(resource=resource, scope_spans=[scope], schema_url=SCHEMA)])
    return bytes(body.SerializeToString())


class Exporter:
    """Sends spans every two seconds; what a collector does not take is given up with a warning, and nobody waits for it.

    All of it, the spans' making too, is the work of one thread that gives way to others.
    """

    def __init__(self, tracing: TracingConfig, *, send_s: float = SEND_S) -> None:
        self._tracing, self._send_s = tracing, send_s
        self._waiting: list[AnsweredQuery] = []
        self._sender: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "dmoa-otlp", initializer=_give_way)
        self._client: tuple[str, httpx.Client] | None = None
        """The URL that spans were last sent to, and the client: to make one takes longer than to make spans. It keeps no
        connection, which would idle for longer than collectors like."""

    def configure(self, tracing: TracingConfig) -> None:
        """Take the settings of a configuration."""
        self._tracing = tracing

    def put(self, answered: AnsweredQuery) -> None:
        """Take an answered query; returns at once. One that is not to be stored is exported without texts."""
        if self._tracing.otlp_endpoint is None or len(self._waiting) >= MAX_PENDING:
            return
        self._waiting.append(answered)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.get_running_loop().create_task(self._send_often())

    async def _send_often(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._send_s)
            await self.flush()

    async def flush(self) -> None:
        """Send what waits."""
        waiting, self._waiting = self._waiting, []
        if waiting and self._tracing.otlp_endpoint is not None:
            send = partial(self._send, waiting, self._tracing.otlp_endpoint, self._tracing.content)
            await asyncio.get_running_loop().run_in_executor(self._thread, send)

    def _send(self, waiting: Sequence[AnsweredQuery], endpoint: str, content: bool) -> None:
        spans = [span for answered in waiting for span in spans_of(answered, content=content)]
        url = endpoint.rstrip("/")
        url = url if url.endswith("/v1/traces") else f"{url}/v1/traces"
        headers = {b"Content-Type": b"application/x-protobuf"} | _own_headers(os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", ""))
        try:
            self._client_of(url).post(url, content=packed(spans), headers=headers).raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            _LOG.warning("%d spans were not taken by %s: %s", len(spans), url, type(error).__name__)

    def _client_of(self, url: str) -> httpx.Client:
        if self._client is None or self._client[0] != url:
            unkept = httpx.Limits(max_keepalive_connections=0)
            self._client = url, httpx.Client(timeout=_TIMEOUT_S, trust_env=uses_proxies(url), limits=unkept)
        return self._client[1]


def _give_way() -> None:
    with suppress(OSError):  # only Linux knows threads by such numbers
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _own_headers(text: str) -> dict[bytes, bytes]:
    """Return headers from `name=value,name=value`, percent-encoded, as OpenTelemetry's variable has them."""
    pairs = (pair.partition("=") for pair in text.split(",") if "=" in pair)
    return {name.strip().encode(): unquote(value.strip()).encode() for name, _, value in pairs}
