"""What a client may send: the request bodies of the two completion routes, and how bytes become them.

First stop of a query over HTTP: bytes -> `parse` -> a checked request -> `serving/intake` (a Query) -> the swarm. The
same models are the request schemas of the OpenAPI document. Validation is strict (no "0.5" for 0.5), unknown fields
are refused, and every OpenAI field that would change an answer but is not supported is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from dmoa.errors import RequestError
from dmoa.validation import did_you_mean

MAX_NEW_TOKENS = 131072
"""Most tokens that a client may ask for."""
MAX_STOP_TEXTS = 64
"""Most stop texts that a client may send; OpenAI's own limit of 4 is below what evaluation harnesses send."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
"""One escape of a JSON text, a surrogate pair as one; `lone`: half of a pair."""
_RAW_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
"""A surrogate as lenient writers encode it; no bytes of UTF-8 look so."""


class Only:
    """Marks an OpenAI field of which nothing but the given values (and null) is supported; `way`: what to do instead."""

    def __init__(self, *allowed: Any, way: str = "") -> None:
        self.allowed = (*allowed, None)
        self.way = way

    def check(self, value: Any) -> Any:
        """Return the value if it is supported. Raises pydantic's custom error of type `unsupported`."""
        if any(value == one and _json_type(value) is _json_type(one) for one in self.allowed):
            return value
        shown = ", ".join(json.dumps(one) for one in self.allowed)
        way = f"; {self.way}" if self.way else ""
        raise PydanticCustomError(
            "unsupported", "not supported; allowed: {shown}; leave the field out{way}", {"shown": shown, "way": way}
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(self.allowed)}


def _json_type(value: Any) -> type:
    """Return the type of a JSON value: 1 and 1.0 are numbers alike, true is none."""
    return float if type(value) is int else type(value)


def _text_or_list(value: Any) -> str | None:
    """Say which side of a text-or-list union a value is on; the tags never reach an error's `param`."""
    if isinstance(value, str):
        return "<text>"
    return "<list>" if isinstance(value, list | tuple) else None


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Lets an integer be written as 5.0, as JSON Schema does."""


class RequestModel(BaseModel):
    """Base of every request record: strict, unknown fields refused, fields documented in place."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class TextPart(RequestModel):
    """A text part of a message; other kinds of part are not supported."""

    type: Literal["text"]
    text: str
    cache_control: Any = None
    """Ignored, as are annotations: prompts are cached anyway."""
    annotations: Any = None


Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Tag("<list>")], Discriminator(_text_or_list)]
"""A message's text, or its text parts, which are joined by line breaks."""
_OWN_TOOLS = "agents call the tools that the pool gives them (agents[].tools)"


class ChatMessage(RequestModel):
    """One message of the conversation. What else clients send back of a reply is ignored; in other messages it is refused."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    """Needed in every message but the assistant's."""
    refusal: str | None = None
    """What the assistant said where it has no content."""
    audio: Annotated[Any, Only()] = None
    images: Annotated[Any, Only([])] = None
    tool_calls: Annotated[Any, Only([], way=_OWN_TOOLS)] = None
    tool_call_id: Annotated[Any, Only(way=_OWN_TOOLS)] = None
    function_call: Annotated[Any, Only(way=_OWN_TOOLS)] = None
    parsed: Annotated[Any, Only()] = None
    type: Annotated[Any, Only("text", "message")] = None
    name: str | None = None
    """Ignored, as are the fields below: clients send back what they were shown, and hints that change no answer."""
    id: Any = None
    annotations: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    reasoning_details: Any = None
    thinking_blocks: Any = None
    provider_specific_fields: Any = None
    cache_control: Any = None

    @property
    def text(self) -> str:
        """The content as one text; the refusal where there is none."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content) if self.content else self.refusal or ""


class StreamOptions(RequestModel):
    """Options of a streamed reply."""

    include_usage: bool | None = None
    """End the stream with a chunk that carries `usage`."""
    include_obfuscation: bool | None = None
    """Ignored."""


class DmoaOptions(RequestModel):
    """What a client may ask of the swarm; limits may only be lower than the pool's."""

    max_steps: Annotated[int, Field(ge=1, le=1000), WHOLE] | None = None
    max_agents: Annotated[int, Field(ge=1, le=4096), WHOLE] | None = None
    """Most active agents of a step."""
    budget_tokens: Annotated[int, Field(ge=1, le=2**53), WHOLE] | None = None
    """Prompt and completion tokens of all agents and the summarizer."""
    deadline_s: float | None = Field(default=None, gt=0, le=86400)
    """Seconds after which the best answer so far is given."""
    policy: str | None = Field(default=None, max_length=128)
    """Name of a policy of this server; must agree with a `POOL/POLICY` model name."""
    trace: bool | None = None
    """Add every agent's text and every step's summary to the reply."""


class SharedRequest(RequestModel):
    """The fields that chat and plain completions have in common."""

    model: str = Field(max_length=256)
    """The pool's name, `POOL/POLICY`, or the name of one agent."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS), WHOLE] | None = None
    """Most new tokens of the call that writes the final answer (in `select` mode: of every agent call)."""
    stop: (
        Annotated[
            Annotated[str, Field(max_length=256), Tag("<text>")]
            | Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=MAX_STOP_TEXTS), Tag("<list>")],
            Discriminator(_text_or_list),
        ]
        | None
    ) = None
    """Texts that end a reply; empty ones are ignored."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = None
    user: str | None = Field(default=None, max_length=512)
    """Kept in the trace."""
    n: Annotated[Any, Only(1)] = None
    frequency_penalty: Annotated[Any, Only(0, 0.0)] = None
    presence_penalty: Annotated[Any, Only(0, 0.0)] = None
    logit_bias: Annotated[Any, Only({})] = None
    dmoa: DmoaOptions | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts that are not empty, none if the field was absent."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class ChatRequest(SharedRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    """The last one is the user's: the question that the gate reads."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS), WHOLE] | None = None
    """Newer name of `max_tokens`."""
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        default=None, max_length=16
    )
    """Kept in the trace."""
    logprobs: Annotated[Any, Only(False)] = None
    top_logprobs: Annotated[Any, Only(0)] = None
    response_format: Annotated[Any, Only({"type": "text"}, way="describe the wanted form in the question")] = None
    tools: Annotated[Any, Only([], way=_OWN_TOOLS)] = None
    tool_choice: Annotated[Any, Only("none", "auto", way=_OWN_TOOLS)] = None
    functions: Annotated[Any, Only([], way=_OWN_TOOLS)] = None
    function_call: Annotated[Any, Only("none", "auto", way=_OWN_TOOLS)] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    parallel_tool_calls: bool | None = None
    """Ignored, as are the fields below: they change nothing that this server does."""
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    cache_control: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class CompletionRequest(SharedRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[str], Field(min_length=1, max_length=1), Tag("<list>")],
        Discriminator(_text_or_list),
    ]
    """One prompt: a text, or a list of exactly one text."""
    best_of: Annotated[Any, Only(1)] = None
    echo: Annotated[Any, Only(False)] = None
    logprobs: Annotated[Any, Only()] = None
    suffix: Annotated[Any, Only("")] = None

    @property
    def text(self) -> str:
        """The prompt as one text."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


R = TypeVar("R", bound=SharedRequest)


def parse(model: type[R], body: bytes, content_type: str) -> R:
    """Turn the bytes of a body into a checked request.

    Raises RequestError (400) naming the first field that is wrong, the value seen and what is allowed. A declared JSON
    content type is required, because a page in a browser can post any other kind to a loopback server unasked.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"Content-Type: value seen: {kind[:80]!r}; allowed: application/json; send the body as JSON under that header",
            code="unsupported_content_type",
        )
    try:
        return model.model_validate_json(_plain(body))
    except ValidationError as error:
        raise request_error(error) from None


def _plain(body: bytes) -> bytes:
    """Return a body without a byte order mark and with U+FFFD for lone surrogates: harmless, but refused by strict readers."""
    body = _RAW_SURROGATE.sub("\ufffd".encode(), body.removeprefix(_BYTE_ORDER_MARK))
    if rb"\ud" not in body.lower():
        return body
    return _ESCAPE.sub(lambda escape: rb"\ufffd" if escape["lone"] else escape[0], body)


def request_error(error: ValidationError) -> RequestError:
    """Turn the first of pydantic's findings into the error that a client gets."""
    first = error.errors(include_url=False, include_context=False)[0]
    kind, seen = first["type"], first["input"]
    param = param_of(first["loc"])
    if kind == "json_invalid":
        return RequestError(f"body: {first['msg']}; send one JSON object in UTF-8", code="invalid_json")
    if param is None:
        return RequestError(f"body: value seen: {show(seen)}; allowed: a JSON object; send one", code="invalid_type")
    if kind == "missing":
        return RequestError(f"{param}: missing; add it", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return unknown_field(param, seen, did_you_mean(str(first["loc"][-1])[:200], _fields_beside(first["loc"])))
    if _is_other_part(first):
        message = f"{param}: value seen: {show(seen)}; allowed: text parts; other kinds of content are not supported"
        return RequestError(message, param=param, code="unsupported")
    if kind == "unsupported":
        return RequestError(f"{param}: value seen: {show(seen)}; {first['msg']}", param=param, code="unsupported")
    text = "input should be a text or a list" if kind.startswith("union_tag") else first["msg"][0].lower() + first["msg"][1:]
    return RequestError(f"{param}: value seen: {show(seen)}; {text}; change it", param=param, code="invalid_value")


def _fields_beside(loc: tuple[int | str, ...]) -> list[str]:
    """Return the fields of the record in which the last part of `loc` was found; those of both kinds of request at the top."""
    records: dict[int | str, type[RequestModel]] = {"dmoa": DmoaOptions, "stream_options": StreamOptions}
    if len(loc) == 1:
        return [*ChatRequest.model_fields, *CompletionRequest.model_fields]
    if len(loc) == 3 and loc[0] == "messages":
        return list(ChatMessage.model_fields)
    return list(records[loc[0]].model_fields) if len(loc) == 2 and loc[0] in records else []


def unknown_field(param: str, value: object, nearest: str = "") -> RequestError:
    """Return the error for a field that no request has; `nearest` ends it with the field that may have been meant."""
    message = f"{param}: unknown field, value seen: {show(value)}; remove it or check its spelling{nearest}"
    return RequestError(message, param=param, code="unknown_parameter")


def _is_other_part(item: Mapping[str, Any]) -> bool:
    return item["type"] == "literal_error" and item["loc"][-1] == "type" and "content" in item["loc"]


def param_of(loc: tuple[int | str, ...]) -> str | None:
    """Write a pydantic location the way OpenAI names parameters: `messages[0].content`; None for the whole body."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("<text>", "<list>", "[key]"):
            path += f".{part}" if path else part
    return path[:200] or None


def show(value: object) -> str:
    """Return a value for an error message, cut to 80 characters; numbers of any size are safe."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**40:
        return "an integer of more than 40 digits"
    text = repr(value[:80]) if isinstance(value, str | bytes) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
