"""Request bodies of the two completion routes, checked and turned into a Query for the swarm.

First stop of a query over HTTP; the models are the request schemas of the OpenAPI document too. Validation is strict (no "0.5"
for 0.5), and every OpenAI field that would change an answer but is not supported is refused by name. Fields that nobody knows are
passed over and named, or refused where the server is so set.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError
from starlette.requests import Request

from dmoa.errors import RequestError
from dmoa.policies.registry import EXPLORING, is_gated
from dmoa.reading import BYTE_ORDER_MARK, read_json
from dmoa.serving.feedback_buffer import KeptOutcome
from dmoa.serving.http.fields import (
    MAX_CHOICES,
    MAX_TOOLS,
    WHOLE,
    LenientModel,
    Only,
    RequestModel,
    ResponseFormat,
    Tokens,
    ToolChoice,
    ToolSpec,
    check_parts,
    final_call,
    refused,
    text_or_list,
)
from dmoa.serving.http.service import SwarmService
from dmoa.types import FinalCall, Limits, Message, Query, Role
from dmoa.validation import did_you_mean, expectation

MAX_IGNORED = 16
"""Most passed-over fields that a reply names."""
MAX_STOP_TEXTS = 64
"""Most stop texts that a client may send; OpenAI's own limit of 4 is below what evaluation harnesses send."""
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
"""One escape of a JSON text, a surrogate pair as one; `lone`: half of a pair."""
_ODD_NUMBER = re.compile(rb"NaN|Infinity|\d[eE]\+?\d{3}|(?<!\d)\d{200}")
"""What may be a number that JSON has not, or no float holds; pydantic takes such ones where any value may stand."""
_RAW_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
"""A surrogate as lenient writers encode it; no bytes of UTF-8 look so."""


class RefusalPart(LenientModel):
    """A part of an assistant's message: why it did not answer."""

    type: Literal["refusal"]
    text: str = Field(alias="refusal")


class TextPart(LenientModel):
    """A text part of a message; other kinds of part, but for refusals, are not supported."""

    type: Literal["text"]
    text: str
    cache_control: Any = None
    """Ignored, as are annotations: prompts are cached anyway."""
    annotations: Any = None


def _part_kind(value: Any) -> str:
    return "<refusal>" if isinstance(value, dict) and value.get("type") == "refusal" else "<part>"


Part = Annotated[Annotated[TextPart, Tag("<part>")] | Annotated[RefusalPart, Tag("<refusal>")], Discriminator(_part_kind)]
Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")], Discriminator(text_or_list)]
"""A message's text, or its text parts, which are joined by line breaks."""
_OLD_TOOLS = "send tools and tool_choice"


class CalledFunction(LenientModel):
    """The function that an answer called."""

    name: str = Field(max_length=256)
    arguments: str | None = None


class CalledTool(LenientModel):
    """A call of a tool, as an earlier answer held it."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(LenientModel):
    """One message of the conversation. What else clients send back of a reply, in an assistant's message, is ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    """Needed in every message but the assistant's."""
    refusal: str | None = None
    """What the assistant said where it has no content."""
    audio: Annotated[Any, Only()] = None
    images: Annotated[Any, Only([])] = None
    tool_calls: list[CalledTool] | None = Field(default=None, max_length=MAX_TOOLS)
    """Of an assistant's message: the calls whose results follow in messages of the role tool."""
    tool_call_id: str | None = None
    """Of a message of the role tool: the call that it answers."""
    function_call: Annotated[Any, Only(way=_OLD_TOOLS)] = None
    type: Annotated[Any, Only("text", "message")] = None
    name: str | None = None
    """Ignored, as are the fields below: clients send back what they were shown, and hints that change no answer."""
    id: Any = None
    annotations: Any = None
    parsed: Any = None
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


class StreamOptions(LenientModel):
    """Options of a streamed reply."""

    include_usage: bool | None = None
    """End the stream with a chunk that carries `usage`."""
    include_obfuscation: bool | None = None
    """Ignored."""


class DmoaOptions(RequestModel):
    """What a client may ask of the swarm; limits may only be lower than the pool's."""

    max_steps: Annotated[int, Field(ge=1, le=1000), WHOLE] | None = None
    max_agents: Annotated[int, Field(ge=1, le=4096), WHOLE] | None = None
    """Most active agents of a step, for policies with a gate; the others name it among the ignored fields."""
    budget_tokens: Annotated[int, Field(ge=1, le=2**53), WHOLE] | None = None
    """Prompt and completion tokens of all agents and the summarizer."""
    budget_price: float | None = Field(default=None, gt=0, le=1e9)
    """What all agents and the summarizer may cost, in the currency of the pool's prices."""
    deadline_s: float | None = Field(default=None, gt=0, le=86400)
    """Seconds after which the best answer so far is given."""
    policy: str | None = Field(default=None, max_length=128)
    """Name of a policy of this server; must agree with a `POOL/POLICY` model name."""
    epsilon: float | None = Field(default=None, gt=0, le=1)
    """With policy `exploring`: probability with which a step asks one agent beside the active ones; null: all others."""
    trace: bool | None = None
    """Add every agent's text and every step's summary to the reply."""


def _dmoa_kind(value: Any) -> str:
    return "<off>" if value is False else "<options>"


AskedOfDmoa = (
    Annotated[Annotated[DmoaOptions, Tag("<options>")] | Annotated[Literal[False], Tag("<off>")], Discriminator(_dmoa_kind)]
    | None
)


class SharedRequest(LenientModel):
    """The fields that chat and plain completions have in common."""

    model: str = Field(max_length=256)
    """The pool's name, `POOL/POLICY`, or the name of one agent."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: Tokens = None
    """Most new tokens of the call that writes the final answer (in `select` mode: of every agent call)."""
    stop: (
        Annotated[
            Annotated[str, Field(max_length=256), Tag("<text>")]
            | Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=MAX_STOP_TEXTS), Tag("<list>")],
            Discriminator(text_or_list),
        ]
        | None
    ) = None
    """Texts that end a reply; empty ones are ignored."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 2**20), WHOLE] | None = None
    """Each of several answers or samples of an agent gets one of the numbers from here on, in 64 bits."""
    user: str | None = Field(default=None, max_length=512)
    """Kept in the trace."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    """Answers, each of a final call with its own seed; the agents work once."""
    frequency_penalty: Annotated[Any, Only(0, 0.0)] = None
    presence_penalty: Annotated[Any, Only(0, 0.0)] = None
    logit_bias: Annotated[Any, Only({})] = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = None
    """Most probable tokens that are kept, 0 or -1: all. For engines that know it, as are the next five."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    chat_template_kwargs: dict[str, Any] | None = None
    """Settings of the models' chat templates: booleans, numbers and words."""
    enable_thinking: bool | None = None
    """The setting of that name."""
    skip_special_tokens: bool | None = None
    """Ignored: control tokens are never part of a text."""
    dmoa: AskedOfDmoa = None
    """What is asked of the swarm; false leaves the `dmoa` object out of the reply."""

    @property
    def options(self) -> DmoaOptions:
        """What is asked of the swarm."""
        return self.dmoa or DmoaOptions()

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that carries `usage`."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def labels(self) -> dict[str, str]:
        """The client's own words about the query; a plain completion has none."""
        return {}

    @property
    def is_stored(self) -> bool:
        """Whether the query may be kept and learnt from; a plain completion cannot say."""
        return True


class ChatRequest(SharedRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    """The last one but for system messages is the user's, which the gate reads as the question, or the result of a tool."""
    max_completion_tokens: Tokens = None
    """Newer name of `max_tokens`."""
    metadata: dict[Annotated[str, Field(max_length=64)], Any] | None = Field(default=None, max_length=16)
    """Kept in the trace, the first 512 characters of each value; what is no text as JSON."""
    logprobs: bool | None = None
    """Of the final call, on engines that tell."""
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    """Only with `logprobs`."""
    response_format: ResponseFormat | None = None
    """With anything but text, the final call writes JSON."""
    tools: list[ToolSpec] | None = Field(default=None, max_length=MAX_TOOLS)
    """Functions that the final call may call; the agents work without them."""
    tool_choice: ToolChoice | None = None
    functions: Annotated[Any, Only([], way=_OLD_TOOLS)] = None
    function_call: Annotated[Any, Only("none", "auto", way=_OLD_TOOLS)] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    parallel_tool_calls: bool | None = None
    """false: one call of a tool at most."""
    store: bool | None = None
    """false: nothing is learnt from the query and no text of it is kept; it is counted, and listed without its trace."""
    service_tier: str | None = None
    """Ignored, as are the fields below: they change nothing that this server does."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    cache_control: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: Any = None
    """Of the answer's text, so that it is written faster."""

    @property
    def is_stored(self) -> bool:
        """Whether the query may be kept and learnt from."""
        return self.store is not False

    @property
    def labels(self) -> dict[str, str]:
        """The client's `metadata`."""
        given = (self.metadata or {}).items()
        return {name: (value if isinstance(value, str) else json.dumps(value))[:_METADATA_CHARS] for name, value in given}


class CompletionRequest(SharedRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[str], Field(min_length=1, max_length=1), Tag("<list>")],
        Discriminator(text_or_list),
    ]
    """One prompt: a text, or a list of exactly one text."""
    best_of: Annotated[Any, Only(1)] = None
    echo: Annotated[Any, Only(False)] = None
    logprobs: Annotated[Any, Only()] = None
    suffix: Annotated[Any, Only("")] = None


class OutcomeRequest(RequestModel):
    """What a client knows of one of its queries."""

    trace_id: str = Field(min_length=1, max_length=64)
    """Of the reply (`dmoa.trace_id`)."""
    reward: float | None = Field(default=None, ge=0, le=1)
    """How good it was: 1 right, 0 wrong."""
    verdict: Literal["right", "wrong"] | None = None
    """In place of `reward`."""
    agent: str | None = Field(default=None, max_length=64)
    """Whose reply is meant; null: the final answer."""
    step: Annotated[int, Field(ge=0, le=1000), WHOLE] | None = None
    """Which step's reply of that agent; null: the first's."""
    source: str = Field(default="", max_length=64)
    """Who or what judged, such as `users` or `unit tests`; the last word of each source counts."""


R = TypeVar("R", bound=RequestModel)


async def parsed(model: type[R], request: Request, *, refuses_unknown: bool = False) -> R:
    """Return the checked body of a request. Raises RequestError as `parse_body`."""
    content_type = request.headers.get("content-type", "")
    return parse_body(model, await request.body(), content_type, refuses_unknown=refuses_unknown)


def parse_body(model: type[R], body: bytes, content_type: str, *, refuses_unknown: bool = False) -> R:
    """Turn the bytes of a body into a checked request.

    Raises RequestError (400) naming the first field that is wrong, its value and what is expected; with `refuses_unknown` also
    for one that nobody knows. A declared JSON content type is required, because a page in a browser can post any other kind to a
    loopback server unasked.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"Content-Type is {kind[:80]!r}; expected application/json; send the body as JSON under that header",
            code="unsupported_content_type",
        )
    check_parts(body)
    body = _plain(body)
    try:
        request = model.model_validate_json(body)
        if _ODD_NUMBER.search(body):
            read_json(body)
    except ValidationError as error:
        raise request_error(error) from None
    except ValueError as error:
        raise RequestError(f"body: {error}; send one JSON object in UTF-8", code="invalid_json") from None
    for param, value, near in unknown_in(request) if refuses_unknown else ():
        raise unknown_field(param, value, did_you_mean(param.rpartition(".")[2], near))
    return request


def unknown_in(record: BaseModel, at: str = "") -> Iterator[tuple[str, Any, list[str]]]:
    """Yield path, value and known neighbours of every field that no record of a request has; an assistant's words are no such."""
    known = list(type(record).model_fields)
    is_echo = getattr(record, "role", "") == "assistant" or getattr(record, "type", "") in ("reasoning", "function_call")
    for name, value in ({} if is_echo else record.model_extra or {}).items():
        yield f"{at}{name}"[:200], value, known
    for name in known if not is_echo else ():
        value = getattr(record, name)
        if isinstance(value, BaseModel):
            yield from unknown_in(value, f"{at}{name}.")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from unknown_in(item, f"{at}{name}[{number}].")


def _ignored(request: SharedRequest, abilities: frozenset[str], unknown: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the first fields of a request that change nothing here: unknown ones, and those that no engine of the pool knows."""
    unknown = [*unknown, *(param for param, _, _ in islice(unknown_in(request), MAX_IGNORED))][:MAX_IGNORED]
    wished = {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty"}
    wished |= {"chat_template_kwargs": "template", "enable_thinking": "template", "skip_special_tokens": ""}
    wished |= {"reasoning_effort": "", "verbosity": "", "prediction": ""}
    unused = [name for name, ability in wished.items() if getattr(request, name, None) is not None and ability not in abilities]
    for param in unknown:
        if param not in _TOLD and len(_TOLD) < _MAX_TOLD:
            _TOLD.add(param)
            _LOG.warning("request field %r is not known here and is passed over (server.unknown_fields is warn)", param)
    return (*unknown, *unused)[:MAX_IGNORED]


def _unread(options: DmoaOptions, policy: str) -> tuple[str, ...]:
    """Return those of a client's options that its policy does not read."""
    unread = {"dmoa.max_agents": options.max_agents is not None and not is_gated(policy)}
    unread |= {"dmoa.epsilon": options.epsilon is not None and policy != EXPLORING}
    return tuple(name for name, is_unread in unread.items() if is_unread)


_LOG = logging.getLogger("dmoa.http")
_TOLD: set[str] = set()
"""Unknown fields that the log of this process has named."""
_MAX_TOLD = 256
_METADATA_CHARS = 512
_TEMPLATE_SETTING = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_OWN_SETTINGS = re.compile(
    r"chat_template|tokenize|tools|documents|messages|conversation|return_.*|add_.*|continue_.*|padding|.*token.*"
)
"""What a chat template is given by others than clients, or is no setting of it."""
_MAX_TEMPLATE_SETTINGS = 16


def _template(request: SharedRequest) -> tuple[tuple[str, Any], ...]:
    """Return the settings of chat templates that a client asks for. Raises RequestError."""
    found = dict(request.chat_template_kwargs or {})
    if request.enable_thinking is not None:
        found.setdefault("enable_thinking", request.enable_thinking)
    if len(found) > _MAX_TEMPLATE_SETTINGS:
        raise refused("chat_template_kwargs", f"is of {len(found)} settings; expected at most {_MAX_TEMPLATE_SETTINGS}")
    for name, value in found.items():
        param = f"chat_template_kwargs.{name}"[:200]
        if not _TEMPLATE_SETTING.fullmatch(name) or _OWN_SETTINGS.fullmatch(name):
            raise refused(param, f"is {shown_value(value)}; the name is not one of a template's settings; leave it out")
        is_word = isinstance(value, str) and _TEMPLATE_SETTING.fullmatch(value)
        if not (is_word or isinstance(value, bool | int | float)):
            raise refused(param, f"is {shown_value(value)}; expected a boolean, a number or a word")
    return tuple(found.items())


def _plain(body: bytes) -> bytes:
    """Return a body without a byte order mark and with U+FFFD for lone surrogates: harmless, but refused by strict readers."""
    body = _RAW_SURROGATE.sub("\ufffd".encode(), body.removeprefix(BYTE_ORDER_MARK))
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
        return RequestError(f"body is {shown_value(seen)}; expected a JSON object; send one", code="invalid_type")
    if kind == "missing":
        return refused(param, "missing; add it", "missing_required_parameter")
    if kind == "extra_forbidden":  # all other records take unknown fields
        found = DmoaOptions if first["loc"][0] == "dmoa" else OutcomeRequest
        return unknown_field(param, seen, did_you_mean(str(first["loc"][-1])[:200], list(found.model_fields)))
    code, why = "invalid_value", f"; {expectation(first['msg'])}"
    if kind == "literal_error" and first["loc"][-1] == "type" and "content" in first["loc"]:
        what = "images are" if "image" in str(seen) else "other kinds of content are"
        code, why = "unsupported", f"; expected text parts; {what} not supported"
    elif kind == "unsupported":
        code, why = kind, f", {first['msg']}"
    elif kind.startswith("union_tag"):
        why = "; expected a text or a list"
    return refused(param, f"is {shown_value(seen)}{why}", code)


def unknown_field(param: str, value: object, nearest: str = "") -> RequestError:
    """Return the error for a field that no request has; `nearest` ends it with the field that may have been meant."""
    why = f"unknown field (value {shown_value(value)}); remove it or check its spelling{nearest}"
    return refused(param, why, "unknown_parameter")


def param_of(loc: tuple[int | str, ...]) -> str | None:
    """Write a pydantic location the way OpenAI names parameters: `messages[0].content`; None for the whole body."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("<text>", "<list>", "<part>", "<refusal>", "<options>", "<off>", "<tool>", "[key]"):
            path += f".{part}" if path else part
    return path[:200] or None


def shown_value(value: object) -> str:
    """Return a value for an error message, cut to 80 characters; numbers of any size are safe."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**40:
        return "an integer of more than 40 digits"
    text = repr(value[:80]) if isinstance(value, str | bytes | list) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


SINGLE = "single"
"""The policy that answers for an agent's own name."""
N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """One checked request: the query, who answers it, and the body, which says how the client wants its answer."""

    query: Query
    policy: str
    agent: str | None
    """The one agent of the `single` policy where the client named one."""
    body: SharedRequest
    ignored: tuple[str, ...] = ()
    """Fields of the request that change nothing here, `MAX_IGNORED` of them."""


def chat_order(request: ChatRequest, service: SwarmService, unknown: Sequence[str] = ()) -> ParsedRequest:
    """Return the order of a chat request. Raises RequestError (400, 404).

    System and developer messages ahead of the first turn, and behind the last one, become the query's system text; others stay in
    place. `unknown`: what nobody knows of a body of another kind, which was made into this request.
    """
    policy, agent = resolve(request, service)
    _check_messages(request)
    is_system = [message.role in ("system", "developer") for message in request.messages]
    end = len(is_system) - (is_system[::-1].index(False) if False in is_system else 0)
    last = request.messages[end - 1]
    asked = next((i for i in reversed(range(len(request.messages))) if request.messages[i].role == "user"), None)
    if last.role not in ("user", "tool") or asked is None:
        seen = f"is {last.role!r}; expected 'user' for the last message; end the conversation with the question"
        raise refused(f"messages[{end - 1}].role", seen)
    place, question = f"messages[{asked}]", request.messages[asked]
    num_system = is_system.index(False)
    names = {call.id: call.function.name for message in request.messages for call in message.tool_calls or []}
    tokens, older = request.max_completion_tokens, request.max_tokens
    if None not in (tokens, older) and tokens != older:
        seen = f"is {older}, and max_completion_tokens is {tokens}; they mean the same; send one"
        raise refused("max_tokens", seen)
    query = _query(
        request,
        service,
        text=_question(question.text, f"{place}.content"),
        max_tokens=tokens or older,
        system="\n\n".join(message.text for message in (*request.messages[:num_system], *request.messages[end:])),
        turns=tuple(_turn(message, names) for message in request.messages[num_system:asked]),
        exchange="\n".join(_turn(message, names).content for message in request.messages[asked + 1 : end]),
        final=final_call(
            tools=request.tools,
            tool_choice=request.tool_choice,
            is_parallel=request.parallel_tool_calls,
            response_format=request.response_format,
            logprobs=request.logprobs,
            top_logprobs=request.top_logprobs,
            n=request.n,
        ),
    )
    ignored = (*_ignored(request, service.abilities, unknown), *_unread(request.options, policy))
    return ParsedRequest(query=query, policy=policy, agent=agent, body=request, ignored=ignored)


def _turn(message: ChatMessage, names: Mapping[str | None, str]) -> Message:
    """Return a message as agents see it: calls of tools and their results as text. `names`: of the tools, by the ids of calls."""
    if message.role == "tool":
        return Message(role="user", content=f"Result of {names.get(message.tool_call_id, 'a tool')}: {message.text}")
    calls = [f"Called {call.function.name} with {call.function.arguments or '{}'}" for call in message.tool_calls or []]
    role: Role = "system" if message.role == "developer" else message.role
    return Message(role=role, content="\n".join([message.text, *calls] if message.text or not calls else calls))


def completion_order(request: CompletionRequest, service: SwarmService) -> ParsedRequest:
    """Return the order of a plain completion. Raises RequestError (400, 404)."""
    policy, agent = resolve(request, service)
    final, prompt = final_call(n=request.n), request.prompt if isinstance(request.prompt, str) else request.prompt[0]
    query = _query(request, service, text=_question(prompt, "prompt"), max_tokens=request.max_tokens, final=final)
    ignored = (*_ignored(request, service.abilities), *_unread(request.options, policy))
    return ParsedRequest(query=query, policy=policy, agent=agent, body=request, ignored=ignored)


def outcome_of(request: OutcomeRequest, agents: Sequence[str]) -> KeptOutcome:
    """Return the outcome that a client posts. Raises RequestError (400)."""
    if (request.reward is None) == (request.verdict is None):
        seen = "missing; send it, or verdict" if request.reward is None else "is sent with verdict; they mean the same; send one"
        raise refused("reward", seen)
    if request.agent is not None and request.agent not in agents:
        raise refused("agent", f"is {shown_value(request.agent)}; expected one of {', '.join(agents)}, or null")
    if request.step is not None and request.agent is None:
        raise refused("step", f"is {request.step} without agent; the final answer is of no step; send agent too")
    reward = request.reward if request.reward is not None else float(request.verdict == "right")
    # A first step that is named is the same as none, and -0.0 as 0: what is sent again is then known again.
    step, reward = request.step or None, abs(reward)
    return KeptOutcome(trace_id=request.trace_id, agent=request.agent, step=step, reward=reward, source=request.source)


def _check_messages(request: ChatRequest) -> None:
    """Raise RequestError for a message without content, which only an assistant's may be."""
    for number, message in enumerate(request.messages):
        if message.role == "assistant" or isinstance(message.content, str) or message.content:
            continue
        param = f"messages[{number}].content"
        if "content" not in message.model_fields_set:
            raise refused(param, "missing; add it", "missing_required_parameter")
        seen = "null" if message.content is None else "[]"
        raise refused(param, f"is {seen}; expected a text, or text parts")


def _question(text: str, param: str) -> str:
    if not text.strip():
        raise refused(param, f"is {shown_value(text)}; expected a text; ask something")
    return text


def _query(
    request: SharedRequest,
    service: SwarmService,
    *,
    text: str,
    max_tokens: int | None,
    system: str = "",
    turns: tuple[Message, ...] = (),
    exchange: str = "",
    final: FinalCall | None = None,
) -> Query:
    if request.stream_options is not None and not request.stream:
        raise refused("stream_options", "given without stream; set stream: true, or leave it out")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    sampling: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": max_tokens,
        "stop": tuple(text for text in stop if text) or None,
        "seed": request.seed,
        "top_k": -1 if request.top_k == 0 else request.top_k,  # for all tokens, as vLLM writes it; others refuse 0
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "template": _template(request) or None,
    }
    return Query(
        trace_id=uuid.uuid4().hex,
        text=text,
        system=system,
        turns=turns,
        exchange=exchange,
        final=final,
        sampling={name: value for name, value in sampling.items() if value is not None},
        limits=_limits(request.options, service),
        epsilon=request.options.epsilon,
        is_streamed=bool(request.stream),
    )


def model_names(service: SwarmService) -> tuple[str, ...]:
    """Return every name that `model` may hold: the pool, the pool under each policy, each agent."""
    return (service.pool, *(f"{service.pool}/{policy}" for policy in service.policies), *service.agents)


def resolve(request: SharedRequest, service: SwarmService) -> tuple[str, str | None]:
    """Return the policy and the agent that a request's `model` and `dmoa.policy` mean together.

    Raises RequestError: 404 `model_not_found` for an unknown name, 400 for an unknown policy or two that disagree.
    """
    model, asked = request.model, request.options.policy
    if model not in model_names(service):
        raise unknown_model(model, service)
    if asked is not None and asked not in service.policies:
        allowed = f"expected one of {', '.join(service.policies)}{did_you_mean(asked, service.policies)}"
        raise refused("dmoa.policy", f"is {shown_value(asked)}; {allowed}", "unknown_policy")
    if model == service.pool:
        return asked or service.policies[0], None
    agent = model if model in service.agents else None
    named = SINGLE if agent else model.removeprefix(f"{service.pool}/")
    if asked not in (None, named):
        seen = f"is {asked!r}, but model {model!r} means {named!r}; make them agree, or leave one out"
        raise refused("dmoa.policy", seen)
    return named, agent


def unknown_model(model: str, service: SwarmService) -> RequestError:
    """Return the 404 of a model name that this server does not have."""
    names = model_names(service)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    allowed = f"expected {shown}; GET /v1/models lists them{did_you_mean(model[:200], names)}"
    return refused("model", f"is {shown_value(model)}; {allowed}", "model_not_found", 404)


def _limits(options: DmoaOptions, service: SwarmService) -> Limits:
    pool = service.limits
    return Limits(
        max_steps=_lower(options.max_steps, pool.max_steps) or pool.max_steps,
        max_agents=options.max_agents,
        budget_tokens=_lower(options.budget_tokens, pool.budget_tokens),
        budget_price=_lower(options.budget_price, pool.budget_price),
        deadline_s=_lower(options.deadline_s, pool.deadline_s),
        quorum=pool.quorum,
        hedge_after_ms=pool.hedge_after_ms,
    )


def _lower(asked: N | None, allowed: N | None) -> N | None:
    given = [value for value in (asked, allowed) if value is not None]
    return min(given) if given else None
