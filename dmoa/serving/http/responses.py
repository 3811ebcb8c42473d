"""Turns an Answer into OpenAI's objects (replies, stream chunks, usage, the line of a step), and documents them in OpenAPI.

Last stop of a query over HTTP. The reply's own `dmoa` object is made in `dmoa.trace`, because traces keep it too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from dmoa.errors import EmptyAnswerError
from dmoa.serving.http.errors import RETRY_AFTER_S, encode_json, error_object
from dmoa.serving.http.requests import ChatRequest, CompletionRequest, ParsedRequest
from dmoa.trace import ReplyDmoa, ReplyModel, dump, finite, reply_dmoa, step_probabilities
from dmoa.types import Answer, StepRecord

DONE = b"data: [DONE]\n\n"
_SUMMARY_CHARACTERS = 500
Finish = Literal["stop", "length"]


class PromptTokensDetails(ReplyModel):
    """Parts of the prompt tokens."""

    cached_tokens: int


class Usage(ReplyModel):
    """Tokens over all agents and the summarizer, lost calls included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ReplyMessage(ReplyModel):
    """The answer as a message."""

    role: Literal["assistant"] = "assistant"
    content: str = Field(min_length=1)
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


class ChatReply(ReplyModel):
    """Body of the answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    dmoa: ReplyDmoa


class TextReply(ReplyModel):
    """Body of the answer to POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    dmoa: ReplyDmoa


def usage_of(answer: Answer) -> Usage:
    """Return the tokens of a query, summed over all agents and the summarizer."""
    usage = answer.usage
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
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
        self._created = int(time.time())
        self._sent = ""
        """Text of the answer that was streamed."""
        self._held = ""
        """White space at its start, which is not an answer as long as nothing follows."""

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the reply of a request that does not stream. Raises EmptyAnswerError."""
        check_not_empty(answer)
        choice: dict[str, Any] = {"index": 0}
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        choice |= {"logprobs": None, "finish_reason": answer.finish_reason}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._envelope(kind, [choice], usage=usage_of(answer).model_dump(), dmoa=self._dmoa(answer))

    def opening(self) -> bytes:
        """Return the chunk that opens a chat stream; plain completions have none."""
        return self._chunk({"role": "assistant", "content": ""}) if self._is_chat else b""

    def step(self, step: StepRecord) -> bytes:
        """Return the chunk of a finished step; plain completions have none."""
        return self._chunk({"reasoning_content": step_line(step)}) if self._is_chat else b""

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
        if answer.text != self._sent and answer.text.startswith(self._sent):
            events += self._chunk({"content": answer.text[len(self._sent) :]})
        events += self._chunk({}, answer.finish_reason, dmoa=self._dmoa(answer))
        if self._order.has_usage_chunk:
            events += _event(self._envelope(self._kind, [], usage=usage_of(answer).model_dump()))
        return events + DONE

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _dmoa(self, answer: Answer) -> dict[str, Any]:
        return dump(reply_dmoa(answer, pool=self._pool, with_texts=self._order.with_texts))

    def _chunk(self, delta: Mapping[str, str], finish_reason: Finish | None = None, **more: Any) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        choice |= {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        choice |= {"logprobs": None, "finish_reason": finish_reason}
        if self._order.has_usage_chunk:
            more["usage"] = None
        return _event(self._envelope(self._kind, [choice], **more))

    def _envelope(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self._order.query.trace_id}",
            "object": kind,
            "created": self._created,
            "model": self._order.model,
            "choices": choices,
            **more,
        }


def check_not_empty(answer: Answer) -> None:
    """Raise EmptyAnswerError for an answer without text: it is never sent as a success."""
    if not answer.text.strip():
        raise EmptyAnswerError("every contribution was empty; ask again, or raise max_tokens")


def failure(error: Exception) -> bytes:
    """Return the events of an error in mid-stream: the error object, then `[DONE]`."""
    return _event(error_object(error)) + DONE


def _event(content: object) -> bytes:
    return b"data: " + encode_json(content) + b"\n\n"


_REF = "#/components/schemas/{model}"


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None


class ErrorReply(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail


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


_ERRORS: dict[int, str] = {
    400: "A field is wrong; `param` names it.",
    401: "The API key is missing or not known.",
    404: "There is no such model, trace or route.",
    413: "The body is over server.max_body_bytes.",
    429: "Too many queries are in flight; try again after Retry-After.",
    500: "An unexpected error; the server's log has the details.",
    503: "No agent is left (`no_agent`), or every contribution was empty (`empty_answer`).",
    504: "The deadline passed before any contribution existed.",
}


def _responses(success: type[BaseModel] | dict[str, Any], *statuses: int) -> dict[int | str, dict[str, Any]]:
    whole = {"content": {"application/json": {"schema": _ref(success)}}} if isinstance(success, type) else success
    found: dict[int | str, dict[str, Any]] = {200: {"description": "Done.", **whole}}
    for status in sorted({*statuses, 500}):
        found[status] = {"description": _ERRORS[status], "content": {"application/json": {"schema": _ref(ErrorReply)}}}
    if 429 in found:
        found[429]["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": RETRY_AFTER_S}}}
    return found


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref(model)}}}}


def _completions(request: type[BaseModel], reply: type[BaseModel]) -> dict[str, Any]:
    data = {"type": "string", "description": "One chunk as JSON, an error object as JSON, or `[DONE]`."}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"], "description": "With `stream: true`."}
    success = {"content": {"application/json": {"schema": _ref(reply)}, "text/event-stream": {"schema": event}}}
    return {"openapi_extra": _body(request), "responses": _responses(success, 400, 401, 404, 413, 429, 503, 504)}


CHAT = _completions(ChatRequest, ChatReply)
COMPLETION = _completions(CompletionRequest, TextReply)
MODELS: dict[str, Any] = {"responses": _responses(ModelListReply, 401)}
MODEL: dict[str, Any] = {"responses": _responses(ModelReply, 401, 404)}
TRACE: dict[str, Any] = {"responses": _responses({"content": {"application/json": {"schema": {"type": "object"}}}}, 401, 404)}
HEALTHZ: dict[str, Any] = {"responses": _responses(AliveReply)}
METRICS: dict[str, Any] = {"responses": _responses({"content": {"text/plain": {"schema": {"type": "string"}}}}, 401)}
_NOT_READY = {"description": "Agents are down.", "content": {"application/json": {"schema": _ref(NotReadyReply)}}}
READYZ: dict[str, Any] = {"responses": {**_responses(ReadyReply), 503: _NOT_READY}}
_MODELS = (ChatRequest, CompletionRequest)
_REPLIES = (ChatReply, TextReply, ErrorReply, NotReadyReply, ReadyReply, AliveReply, ModelReply, ModelListReply)


def install_document(app: FastAPI, *, has_keys: bool) -> None:
    """Make the app serve its document with the schemas above; with keys, every route but the probes asks for one."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, has_keys)
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _document(app: FastAPI, has_keys: bool) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = models_json_schema(
        [*((model, "validation") for model in _MODELS), *((model, "serialization") for model in _REPLIES)],
        ref_template=_REF,
    )
    components = document.setdefault("components", {})
    components["schemas"] = schemas["$defs"]
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI adds it for path parameters; ours answer 404
            if has_keys and path not in ("/healthz", "/readyz"):
                operation["security"] = [{"key": []}]
    return document
