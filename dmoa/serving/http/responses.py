"""Turns an Answer into OpenAI's objects: replies, stream chunks, usage, the line of a step. The document is made of the same.

Last stop of a query over HTTP. The reply's own `dmoa` object is made in `dmoa.trace`, because traces keep it too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from html import escape
from typing import Any, Literal
from urllib.parse import quote

from fastapi import FastAPI
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from dmoa.errors import EmptyAnswerError
from dmoa.serving.http.errors import RETRY_AFTER_S, ErrorReply, described, encode_json
from dmoa.serving.http.middleware import OPEN_PATHS
from dmoa.serving.http.requests import ChatRequest, CompletionRequest, OutcomeRequest, ParsedRequest
from dmoa.trace import ReplyDmoa, ReplyModel, finite, reply_dmoa, step_probabilities
from dmoa.types import Answer, StepRecord

_REF = "#/components/schemas/{model}"
DONE = b"data: [DONE]\n\n"
_SUMMARY_CHARACTERS = 500
IGNORED_HEADER = "x-dmoa-ignored"
MAX_IGNORED = 16
"""Most passed-over fields that a reply names."""
Finish = Literal["stop", "length"]


class PromptTokensDetails(ReplyModel):
    """Parts of the prompt tokens."""

    cached_tokens: int


class CompletionTokensDetails(ReplyModel):
    """Parts of the completion tokens."""

    reasoning_tokens: int
    """What models thought before they answered."""


class Usage(ReplyModel):
    """Tokens over all agents and the summarizer, lost calls included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ReplyMessage(ReplyModel):
    """The answer as a message."""

    role: Literal["assistant"] = "assistant"
    content: str = Field(min_length=1)
    reasoning_content: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """What the model of the final call thought before; left out where it did not think."""
    refusal: None = None


class ChatChoice(ReplyModel):
    """The one choice of a chat reply."""

    index: Literal[0] = 0
    message: ReplyMessage
    logprobs: None = None
    finish_reason: Finish
    """length where a token limit cut the text; why the query ended is `dmoa.stop_reason`."""


class TextChoice(ReplyModel):
    """The one choice of a plain completion."""

    index: Literal[0] = 0
    text: str = Field(min_length=1)
    logprobs: None = None
    finish_reason: Finish


class CompletionReply(ReplyModel):
    """What the replies to both kinds of request have in common."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage
    dmoa: ReplyDmoa | None = Field(default=None, exclude_if=lambda value: value is None)


class ChatReply(CompletionReply):
    """Body of the answer to POST /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextReply(CompletionReply):
    """Body of the answer to POST /v1/completions."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


def usage_of(answer: Answer) -> Usage:
    """Return the tokens of a query, summed over all agents and the summarizer."""
    usage = answer.usage
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=usage.reasoning_tokens),
    )


def step_line(step: StepRecord) -> str:
    """Return a finished step as one readable line: who was active, how sure, and the new summary."""
    chance = step_probabilities(step)
    replies = {reply.agent: reply for reply in step.replies}
    parts = []
    for name in step.active:
        entropy = replies[name].entropy.mean_nats if name in replies else None
        sure = "" if entropy is None else f", entropy {finite(entropy):.3f} nats"
        parts.append(f"{name} (p {finite(chance.get(name, 1.0)):.3f}{sure})")
    explored = {name for name, _ in step.explored}
    lost = [f"{reply.agent} {reply.status}" for reply in step.replies if reply.status != "ok" and reply.agent not in explored]
    summary = " ".join(step.summary.split())
    if len(summary) > _SUMMARY_CHARACTERS:
        summary = summary[: _SUMMARY_CHARACTERS - 3] + "..."
    note = f"; lost: {', '.join(lost)}" if lost else ""
    return f"Step {step.step + 1}: {', '.join(parts) or 'nobody'}{note} -> {summary}\n"


class Rendering:
    """Renders one order's answer, in one piece or as stream chunks; chat and plain completions differ only here."""

    def __init__(self, order: ParsedRequest, pool: str, *, is_chat: bool) -> None:
        self._order = order
        self._pool = pool
        self._is_chat = is_chat
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{order.query.trace_id}",
            "created": int(time.time()),
            "model": order.body.model,
        }
        self._sent = ""
        """Text of the answer that was streamed."""
        self._thought = ""
        """What was streamed of the thought before it."""
        self._held = ""
        """White space at its start, which is not an answer as long as nothing follows."""

    def whole(self, answer: Answer) -> CompletionReply:
        """Return the reply of a request that does not stream. Raises EmptyAnswerError."""
        check_not_empty(answer)
        text, reason = answer.text.encode("utf-8", "replace").decode(), answer.finish_reason
        shared = {**self._head, "usage": usage_of(answer), "dmoa": self._dmoa(answer)}
        if self._is_chat:
            thought = answer.reasoning.encode("utf-8", "replace").decode() or None
            message = ReplyMessage(content=text, reasoning_content=thought)
            return ChatReply(choices=[ChatChoice(message=message, finish_reason=reason)], **shared)
        return TextReply(choices=[TextChoice(text=text, finish_reason=reason)], **shared)

    def opening(self) -> bytes:
        """Return the chunk that opens a chat stream; plain completions have none."""
        return self._chunk({"role": "assistant", "content": ""}) if self._is_chat else b""

    def step(self, step: StepRecord) -> bytes:
        """Return the chunk of a finished step, `dmoa_step` tells it from a thought; plain completions have none."""
        said = {"reasoning_content": step_line(step), "dmoa_step": step.step}
        return self._chunk(said) if self._is_chat and self._order.body.dmoa is not False else b""

    def thought(self, text: str) -> bytes:
        """Return the chunk of a piece of the final call's thought; plain completions have none."""
        self._thought += text
        return self._chunk({"reasoning_content": text}) if self._is_chat and text else b""

    def delta(self, text: str) -> bytes:
        """Return the chunk of a piece of the answer; nothing while all is white space, which goes with the first word."""
        self._held += text
        if not self._held or not (self._sent or self._held.strip()):
            return b""
        piece, self._held = self._held, ""
        self._sent += piece
        return self._chunk({"content": piece})

    def closing(self, answer: Answer) -> bytes:
        """Return the chunks that end a stream: what was not sent of the text, the reason, usage, `[DONE]`.

        Raises EmptyAnswerError.
        """
        events = b""
        check_not_empty(answer)
        if answer.reasoning.startswith(self._thought):
            events += self.thought(answer.reasoning[len(self._thought) :])
        if answer.text != self._sent and answer.text.startswith(self._sent):
            events += self._chunk({"content": answer.text[len(self._sent) :]})
        told = self._dmoa(answer)
        events += self._chunk({}, answer.finish_reason, **({"dmoa": told.model_dump(mode="json")} if told else {}))
        if self._order.body.wants_usage:
            events += self._event([], usage=usage_of(answer).model_dump())
        return events + DONE

    def _dmoa(self, answer: Answer) -> ReplyDmoa | None:
        """Return the reply's `dmoa` object, None where the client wants none."""
        if self._order.body.dmoa is False:
            return None
        told = reply_dmoa(answer, pool=self._pool, with_texts=self._order.body.wants_texts)
        return told.model_copy(update={"ignored": list(self._order.ignored[:MAX_IGNORED])}) if self._order.ignored else told

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the reply."""
        named = ", ".join(quote(name, safe="[]._-") for name in self._order.ignored[:MAX_IGNORED])
        return {IGNORED_HEADER: named} if named else {}

    def _chunk(self, delta: Mapping[str, Any], finish_reason: Finish | None = None, **more: Any) -> bytes:
        said = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        if self._order.body.wants_usage:
            more["usage"] = None
        return self._event([{"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}], **more)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return _event({"id": self._head["id"], "object": kind, **self._head, "choices": choices, **more})


def check_not_empty(answer: Answer) -> None:
    """Raise EmptyAnswerError for an answer without text: it is never sent as a success."""
    if not answer.text.strip():
        raise EmptyAnswerError("every contribution was empty; ask again, or raise max_tokens")


def failure(error: Exception) -> bytes:
    """Return the events of an error in mid-stream: the error object, then `[DONE]`."""
    return _event(described(error)[1]) + DONE


def _event(content: object) -> bytes:
    return b"data: " + encode_json(content) + b"\n\n"


class NotReadyReply(ErrorReply):
    """Body of /readyz while agents are down."""

    agents: dict[str, str]


class ReadyReply(BaseModel):
    """Body of /readyz when every agent is up, or cold: scaled to zero, and started when it is asked."""

    status: Literal["ready"]
    agents: dict[str, str]


class AliveReply(BaseModel):
    """Body of /healthz."""

    status: Literal["alive"]


class ModelReply(BaseModel):
    """One name that `model` may hold."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelListReply(BaseModel):
    """Body of /v1/models."""

    object: Literal["list"]
    data: list[ModelReply] = Field(min_length=1)


class OutcomeReply(BaseModel):
    """Body of /v1/dmoa/outcomes."""

    trace_id: str
    kept: Literal["new", "same", "changed"]
    """changed: another word of the same source was there."""


_ERRORS: dict[int, str] = {
    400: "A field is wrong; `param` names it.",
    401: "The API key is missing or not known.",
    403: "Only an admin key may do this.",
    404: "There is no such model, trace or route.",
    413: "The body is over server.max_body_bytes.",
    429: "Too many queries are in flight, or too many outcomes; try again after Retry-After.",
    500: "An unexpected error; the server's log has the details.",
    503: "No agent is left (`no_agent`), or every contribution was empty (`empty_answer`).",
    504: "The deadline passed before any contribution existed.",
}
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": NotReadyReply, "description": "Agents are down."}}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` of a route that may fail with these statuses, and unexpectedly."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": _ERRORS[status]} for status in sorted({*statuses, 500})
    }
    if 429 in found:
        found[429]["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": RETRY_AFTER_S}}}
    return found


def completions(request: type[BaseModel], reply: type[CompletionReply]) -> dict[str, Any]:
    """Return FastAPI's arguments for a route that takes a request of ours and answers with a reply or a stream."""
    data = {"type": "string", "description": "One chunk as JSON, an error object as JSON, or `[DONE]`."}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"], "description": "With `stream: true`."}
    body = {"application/json": {"schema": {"$ref": _REF.format(model=request.__name__)}}}
    return {
        "response_model": reply,
        "responses": {200: {"content": {"text/event-stream": {"schema": event}}}} | failures(400, 401, 404, 413, 429, 503, 504),
        "openapi_extra": {"requestBody": {"required": True, "content": body}},
    }


def outcomes() -> dict[str, Any]:
    """Return FastAPI's arguments for the route that takes outcomes."""
    body = {"application/json": {"schema": {"$ref": _REF.format(model=OutcomeRequest.__name__)}}}
    return {
        "response_model": OutcomeReply,
        "responses": failures(400, 401, 404, 413, 429, 503),
        "openapi_extra": {"requestBody": {"required": True, "content": body}},
    }


def install_document(app: FastAPI, *, has_keys: bool, bodies: tuple[type[BaseModel], ...] = ()) -> None:
    """Complete the document that FastAPI makes of the routes: the schemas of requests, which are not read by it, and keys.

    `bodies`: records of requests beside those of the completions and outcomes.
    """
    make = app.openapi

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(make(), has_keys, bodies)
        return make()

    app.openapi = build  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _complete(document: dict[str, Any], has_keys: bool, bodies: tuple[type[BaseModel], ...]) -> None:
    components = document["components"]
    kinds: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, OutcomeRequest, *bodies)
    _, requests = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
    components["schemas"] |= requests["$defs"]
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI adds it for path parameters; ours answer 404
            if has_keys and path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)


def docs_page(document: dict[str, Any]) -> str:
    """Return the OpenAPI document as a page of HTML that loads nothing: routes, then the fields of every record."""
    parts = [
        f"<h1>dmoa {escape(document['info']['version'])}</h1>",
        "<p>The document itself: <code>/openapi.json</code></p><h2>Routes</h2>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            codes = ", ".join(operation["responses"])
            said = escape(operation.get("description", operation.get("summary", "")))
            parts.append(f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{said} Answers: {codes}.</p>")
    parts.append("<h2>Records</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        rows = "".join(
            f"<tr><td><code>{escape(field)}</code></td><td>{escape(about.get('description', ''))}</td></tr>"
            for field, about in schema.get("properties", {}).items()
        )
        parts.append(f"<h3>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p><table>{rows}</table>")
    style = "body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto}td{padding:.1rem .8rem .1rem 0;vertical-align:top}"
    return f"<!doctype html><meta charset=utf-8><title>dmoa</title><style>{style}</style>{''.join(parts)}"
