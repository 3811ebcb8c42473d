"""Turns an Answer into OpenAI's objects: replies, stream chunks, usage, the line of a step. The document is made of the same.

Last stop of a query over HTTP. The reply's own `dmoa` object is made in `dmoa.trace`, because traces keep it too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal
from urllib.parse import quote

from fastapi import FastAPI
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from dmoa.errors import EmptyAnswerError, RequestError
from dmoa.serving.http.errors import RETRY_AFTER_S, ErrorReply, described, encode_json
from dmoa.serving.http.middleware import OPEN_PATHS
from dmoa.serving.http.requests import ParsedRequest
from dmoa.trace import ReplyDmoa, ReplyModel, finite, reply_dmoa, step_probabilities
from dmoa.types import Answer, Choice, StepRecord, ToolCall

_REF = "#/components/schemas/{model}"
DONE = b"data: [DONE]\n\n"
_SUMMARY_CHARACTERS = 500
IGNORED_HEADER = "x-dmoa-ignored"
Finish = Literal["stop", "length", "tool_calls"]
_PIECE = 64
"""Characters of a tool's arguments in one chunk."""


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


def _is_none(value: object) -> bool:
    return value is None


class CalledFunctionReply(ReplyModel):
    """The function that is to be called."""

    name: str
    arguments: str
    """A JSON object as text."""


class ToolCallReply(ReplyModel):
    """A call of one of the client's tools."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunctionReply


class TokenLogprob(ReplyModel):
    """Log-probabilities at one token."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[dict[str, Any]]


class ChoiceLogprobs(ReplyModel):
    """Log-probabilities of the final call's text."""

    content: list[TokenLogprob]
    refusal: None = None


class ReplyMessage(ReplyModel):
    """The answer as a message."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(min_length=1)
    """null where tools are called and nothing is said."""
    tool_calls: list[ToolCallReply] | None = Field(default=None, exclude_if=_is_none)
    """What the client is to run, and send back in messages of the role tool."""
    reasoning_content: str | None = Field(default=None, exclude_if=_is_none)
    """What the model of the final call thought before; left out where it did not think."""
    refusal: None = None


class ChatChoice(ReplyModel):
    """An answer of a chat reply."""

    index: int = 0
    message: ReplyMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Finish
    """length where a token limit cut the text; why the query ended is `dmoa.stop_reason`."""


class TextChoice(ReplyModel):
    """An answer of a plain completion."""

    index: int = 0
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
    dmoa: ReplyDmoa | None = Field(default=None, exclude_if=_is_none)


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

    def __init__(self, order: ParsedRequest, pool: str, *, is_chat: bool, trace_url: str | None = None) -> None:
        self._trace_url = trace_url
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

    def whole(self, answer: Answer) -> CompletionReply | dict[str, Any]:
        """Return the reply of a request that does not stream. Raises EmptyAnswerError."""
        check_not_empty(answer)
        shared = {**self._head, "usage": usage_of(answer), "dmoa": self._dmoa(answer)}
        choices = list(enumerate(choices_of(answer)))
        if not self._is_chat:
            texts = [TextChoice(index=i, text=sent(one.text), finish_reason=one.finish_reason) for i, one in choices]
            return TextReply(choices=texts, **shared)
        return ChatReply(
            choices=[
                ChatChoice(
                    index=i,
                    message=ReplyMessage(
                        content=sent(one.text) or None,
                        reasoning_content=sent(one.reasoning) or None,
                        tool_calls=[_call_reply(call) for call in one.tool_calls] or None,
                    ),
                    logprobs=None if one.logprobs is None else ChoiceLogprobs.model_validate({"content": list(one.logprobs)}),
                    finish_reason=one.finish_reason,
                )
                for i, one in choices
            ],
            **shared,
        )

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
        piece = self.piece(text)
        return self._chunk({"content": piece}) if piece else b""

    def piece(self, text: str) -> str:
        """Return what may be sent of the answer now that a piece of it came."""
        self._held += text
        if not self._held or not (self._sent or self._held.strip()):
            return ""
        piece, self._held = self._held, ""
        self._sent += piece
        return piece

    def renamed(self, error: RequestError) -> RequestError:
        """Return an error with the names that fields have in the request: those of a chat request, or of a plain one."""
        if self._is_chat or error.param != "messages":
            return error
        return RequestError(re.sub(r"^messages\b", "prompt", str(error)), param="prompt", code=error.code, status=error.status)

    def failure(self, error: Exception) -> bytes:
        """Return the events of an error in mid-stream: the error object, then `[DONE]`."""
        return _event(described(error)[1]) + DONE

    def closing(self, answer: Answer) -> bytes:
        """Return the chunks that end a stream: the rest of the text, the reason, usage, `[DONE]`. Raises EmptyAnswerError."""
        events = b""
        check_not_empty(answer)
        first, *others = choices_of(answer)
        if answer.reasoning.startswith(self._thought):
            events += self.thought(answer.reasoning[len(self._thought) :])
        if answer.text != self._sent and answer.text.startswith(self._sent):
            events += self._chunk({"content": answer.text[len(self._sent) :]}, logprobs=first.logprobs)
        events += self._calls(first)
        for index, choice in enumerate(others, 1):
            delta = {"role": "assistant", "content": choice.text} if self._is_chat else {"content": choice.text}
            events += self._chunk(delta, index=index, logprobs=choice.logprobs) + self._calls(choice, index)
            events += self._chunk({}, choice.finish_reason, index=index)
        told = self._dmoa(answer)
        more: dict[str, Any] = {"dmoa": told.model_dump(mode="json")} if told else {}
        events += self._chunk({}, first.finish_reason, **more)
        if self._order.body.wants_usage:
            events += self._event([], usage=usage_of(answer).model_dump())
        return events + DONE

    def _calls(self, choice: Choice, index: int = 0) -> bytes:
        """Return the chunks of a choice's calls of tools: each call's name first, then its arguments in pieces."""
        events = b""
        for place, call in enumerate(choice.tool_calls if self._is_chat else ()):
            opened = _call_reply(call).model_dump() | {"index": place, "function": {"name": call.name, "arguments": ""}}
            events += self._chunk({"tool_calls": [opened]}, index=index)
            for start in range(0, len(call.arguments), _PIECE):
                piece = {"index": place, "function": {"arguments": call.arguments[start : start + _PIECE]}}
                events += self._chunk({"tool_calls": [piece]}, index=index)
        return events

    def _dmoa(self, answer: Answer) -> ReplyDmoa | None:
        if self._order.body.dmoa is False:
            return None
        told = reply_dmoa(answer, pool=self._pool, with_texts=bool(self._order.body.options.trace), trace_url=self._trace_url)
        return told.model_copy(update={"ignored": list(self._order.ignored)}) if self._order.ignored else told

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the reply."""
        named = ", ".join(quote(name, safe="[]._-") for name in self._order.ignored)
        return {IGNORED_HEADER: named} if named else {}

    def _chunk(
        self,
        delta: Mapping[str, Any],
        finish_reason: Finish | None = None,
        *,
        index: int = 0,
        logprobs: Sequence[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> bytes:
        said = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        if self._order.body.wants_usage:
            more["usage"] = None
        listed = None if logprobs is None else {"content": logprobs, "refusal": None}
        return self._event([{"index": index, **said, "logprobs": listed, "finish_reason": finish_reason}], **more)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return _event({"id": self._head["id"], "object": kind, **self._head, "choices": choices, **more})


def choices_of(answer: Answer) -> tuple[Choice, ...]:
    """Return the answers of a query: what a final call wrote, else the one text."""
    return answer.choices or (Choice(text=answer.text, reasoning=answer.reasoning, finish_reason=answer.finish_reason),)


def sent(text: str) -> str:
    """Return a text as it can be sent: what UTF-8 cannot carry becomes `?`."""
    return text.encode("utf-8", "replace").decode()


def _call_reply(call: ToolCall) -> ToolCallReply:
    function = CalledFunctionReply(name=sent(call.name), arguments=sent(call.arguments))
    return ToolCallReply(id=sent(call.call_id), function=function)


def check_not_empty(answer: Answer) -> None:
    """Raise EmptyAnswerError for an answer without text or calls of tools: it is never sent as a success."""
    if not answer.text.strip() and not any(choice.tool_calls for choice in answer.choices):
        raise EmptyAnswerError("every contribution was empty; ask again, or raise max_tokens")


def _event(content: object) -> bytes:
    return b"data: " + encode_json(content) + b"\n\n"


class NotReadyReply(ErrorReply):
    """Body of /readyz while agents are down."""

    agents: dict[str, str]
    """Why they are; empty where keys are set and the request has none."""


class ReadyReply(BaseModel):
    """Body of /readyz when every agent is up, or cold: scaled to zero, and started when it is asked."""

    status: Literal["ready"]
    agents: dict[str, str]
    """up or cold; empty where keys are set and the request has none."""


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
    422: "The answer is not in the form that was asked for; its text is in the message.",
    404: "There is no such model, trace or route.",
    413: "The body is over server.max_body_bytes.",
    415: "The body is packed: it has a Content-Encoding.",
    429: "Too many queries are in flight, or too many outcomes; try again after Retry-After.",
    500: "An unexpected error; the server's log has the details.",
    503: "No agent is left (`no_agent`), or every contribution was empty (`empty_answer`).",
    504: "The deadline passed before any contribution existed.",
}
_BODIES: dict[str, type[BaseModel]] = {}
_REPLIES: dict[str, type[BaseModel]] = {}
"""Records that the routes take and answer with, by the names under which the document has them."""
_OF_BODIES = (400, 401, 404, 413, 415)
_OF_QUERIES = (422, 429, 503, 504)


def shown(model: type[BaseModel], description: str = "Done.") -> dict[str, Any]:
    """Return FastAPI's description of a reply; `install_document` adds the record.

    Given as `model` FastAPI would build a validator of its own for each status of each route, which no reply of ours needs.
    """
    _REPLIES[model.__name__] = model
    return {"description": description, "content": {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` of a route that may fail with these statuses, and unexpectedly."""
    found: dict[int | str, dict[str, Any]] = {status: shown(ErrorReply, _ERRORS[status]) for status in sorted({*statuses, 500})}
    if 429 in found:
        found[429]["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": RETRY_AFTER_S}}}
    return found


def replied(reply: type[BaseModel] | None, *statuses: int) -> dict[str, Any]:
    """Return FastAPI's arguments for a route that answers with a reply, any JSON object for None, or fails with these."""
    if reply is None:
        return {"response_model": dict[str, Any], "responses": failures(*statuses)}
    return {"response_model": None, "responses": {200: shown(reply)} | failures(*statuses)}


def completions(request: type[BaseModel], reply: type[BaseModel] | None) -> dict[str, Any]:
    """Return FastAPI's arguments for a route that takes a request of ours and answers with a reply or a stream."""
    data = {"type": "string", "description": "One chunk as JSON, an error object as JSON, or `[DONE]`."}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"], "description": "With `stream: true`."}
    document = posted(reply, request, *_OF_QUERIES)
    document["responses"].setdefault(200, {}).setdefault("content", {})["text/event-stream"] = {"schema": event}
    return document


def posted(reply: type[BaseModel] | None, body: type[BaseModel], *statuses: int) -> dict[str, Any]:
    """Return FastAPI's arguments for a route that takes a body of ours."""
    _BODIES[body.__name__] = body
    content = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}
    extra = {"requestBody": {"required": True, "content": content}}
    return replied(reply, *_OF_BODIES, *statuses) | {"openapi_extra": extra}


def install_document(app: FastAPI, *, has_keys: bool) -> None:
    """Complete the document that FastAPI makes of the routes: schemas of requests and replies, which it is not told, and keys."""
    make = app.openapi

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(make(), has_keys)
        return make()

    app.openapi = build  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _complete(document: dict[str, Any], has_keys: bool) -> None:
    components = document["components"]
    _, sent = models_json_schema([(kind, "serialization") for kind in _REPLIES.values()], ref_template=_REF)
    for about in (one for schema in sent["$defs"].values() for one in schema.get("properties", {}).values()):
        if about.get("default", "") is None:
            del about["default"]  # as FastAPI's own: what is null in a reply stands there, or is left out
    _, requests = models_json_schema([(kind, "validation") for kind in _BODIES.values()], ref_template=_REF)
    components["schemas"] = dict(sorted((components["schemas"] | sent["$defs"]).items())) | requests["$defs"]
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if operation["responses"].get("422", {}).get("description") == "Validation Error":
                del operation["responses"]["422"]  # FastAPI adds it for path parameters; ours answer 404
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
