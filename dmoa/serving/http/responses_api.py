"""OpenAI's Responses API, stateless: its requests become chat requests, and answers its objects and `response.*` events.

Nothing is stored, so whoever goes on sends the whole conversation again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError

from dmoa.errors import RequestError
from dmoa.serving.http.errors import described, encode_json
from dmoa.serving.http.fields import MAX_TOOLS, WHOLE, LenientModel, Only, Tokens, refused, text_or_list
from dmoa.serving.http.requests import (
    MAX_IGNORED,
    AskedOfDmoa,
    ChatRequest,
    ParsedRequest,
    chat_order,
    model_names,
    request_error,
    unknown_in,
    unknown_model,
)
from dmoa.serving.http.responses import Rendering, check_not_empty, choices_of, sent, step_line
from dmoa.serving.http.service import SwarmService
from dmoa.types import Answer, Choice, StepRecord, TokenUsage

_STATELESS = "this server stores no responses; send the whole conversation as input"
_TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text")
_PIECE = 64
_Kind = Literal["reasoning", "message"]
"""Items that come in pieces: how their ids begin, where their parts are, and the events that tell of text and parts."""
_IDS = {"reasoning": "rs", "message": "msg"}
_PARTS = {"reasoning": "summary", "message": "content"}
_TEXT_EVENTS = {"reasoning": "response.reasoning_summary_text", "message": "response.output_text"}
_PART_EVENTS = {"reasoning": "response.reasoning_summary_part", "message": "response.content_part"}


class Part(LenientModel):
    """A part of a message."""

    type: str = Field(max_length=64)
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None


Texts = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")], Discriminator(text_or_list)]


class InputItem(LenientModel):
    """One item of the conversation: a message, a call of a tool, its result, or a thought, which is passed over."""

    type: str | None = Field(default=None, max_length=64)
    """message (also where absent), function_call, function_call_output, or reasoning."""
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Texts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Texts | None = None
    id: Any = None
    """Ignored, as are the fields below."""
    status: Any = None
    phase: Any = None
    summary: Any = None
    encrypted_content: Any = None


class FlatTool(LenientModel):
    """A function of the client's that an answer may call."""

    type: str
    """function; other kinds are not supported."""
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Reasoning(LenientModel):
    """What is told of thoughts."""

    effort: str | None = None
    """Ignored, and named among the ignored fields."""
    summary: str | None = None
    """With any: the lines of the steps come as a summary of the reasoning."""


class TextFormat(LenientModel):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    form: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class TextOptions(LenientModel):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: str | None = None
    """As `reasoning.effort`."""


class ResponsesRequest(LenientModel):
    """Body of POST /v1/responses."""

    model: str = Field(max_length=256)
    """The pool's name, `POOL/POLICY`, or the name of one agent."""
    input: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[InputItem], Field(min_length=1), Tag("<list>")],
        Discriminator(text_or_list),
    ]
    """A question, or the conversation, which ends with the user's message or the result of a tool."""
    instructions: str | None = None
    """The system message."""
    tools: list[FlatTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Any = None
    """none, auto, required, or an object that names a function."""
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    max_output_tokens: Tokens = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Any] | None = Field(default=None, max_length=16)
    user: str | None = Field(default=None, max_length=512)
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    store: Annotated[Any, Only(False, way=_STATELESS)] = None
    """false: as in a chat completion, no text is kept and nothing is learnt either."""
    previous_response_id: Annotated[Any, Only(way=_STATELESS)] = None
    conversation: Annotated[Any, Only(way=_STATELESS)] = None
    background: Annotated[Any, Only(False)] = None
    prompt: Annotated[Any, Only()] = None
    dmoa: AskedOfDmoa = None
    """false leaves the `dmoa` object out of the reply."""
    include: Any = None
    """`message.output_text.logprobs` in the list asks for log-probabilities; all else is ignored, as are the fields below."""
    truncation: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    max_tool_calls: Any = None
    stream_options: Any = None


def responses_order(request: ResponsesRequest, service: SwarmService) -> ParsedRequest:
    """Return the order of a request. Raises RequestError, whose fields are named as in the request."""
    if request.model not in model_names(service):
        raise unknown_model(request.model, service)
    messages, places = _messages(request)
    includes_logprobs = isinstance(request.include, list) and "message.output_text.logprobs" in request.include
    tree = {
        "model": request.model,
        "messages": messages,
        "tools": [_tool(tool, f"tools[{number}]") for number, tool in enumerate(request.tools or [])] or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "response_format": _format(request.text.format if request.text else None),
        "logprobs": True if request.top_logprobs or includes_logprobs else None,
        "max_tokens": request.max_output_tokens,
        "dmoa": request.dmoa.model_dump() if request.dmoa else request.dmoa,
    }
    same = ("parallel_tool_calls", "top_logprobs", "temperature", "top_p", "stream", "metadata", "user", "store")
    tree |= {name: getattr(request, name) for name in same}
    also = {name: value for name, value in (request.model_extra or {}).items() if name in _ALSO}
    unknown = [param for param, _, _ in unknown_in(request) if param not in also]
    try:
        chat = ChatRequest.model_validate(also | {name: value for name, value in tree.items() if value is not None})
        order = chat_order(chat, service, unknown)
    except ValidationError as error:
        raise _renamed(request_error(error), request, places) from None
    except RequestError as error:
        raise _renamed(error, request, places) from None
    effort, verbosity = request.reasoning and request.reasoning.effort, request.text and request.text.verbosity
    hints = [name for name, value in (("reasoning.effort", effort), ("text.verbosity", verbosity)) if value is not None]
    return replace(order, ignored=(*order.ignored, *hints)[:MAX_IGNORED])


_ALSO = frozenset(ChatRequest.model_fields) - {"messages", "n"}
"""Fields of chat requests, `seed` say, that are taken here too, where none of this route's own says the same."""
_NAMES = (
    ("response_format", r"response_format(\.json_schema)?", "text.format"),
    ("max_tokens", r"max_tokens", "max_output_tokens"),
    ("logprobs", r"logprobs", "top_logprobs"),
    ("tools", r"(tools\[\d+\])\.function", r"\1"),
    ("tool_choice", r"tool_choice\.function", "tool_choice"),
)
"""Fields of chat requests, patterns that their names begin with, and what stands for that here."""
_MESSAGE = re.compile(r"messages(?:\[(\d+)\](?:\.tool_calls\[(\d+)\])?(.*))?", re.DOTALL)
_Places = Sequence[tuple[str, Sequence[str]]]
"""Of every message what it was made of, and where that stands in the request: calls of one message in several places."""
_FIELDS = {
    "message": {},
    "calls": {".id": ".call_id", ".function.name": ".name", ".function.arguments": ".arguments", ".role": "", ".content": ""},
    "output": {".tool_call_id": ".call_id", ".content": ".output", ".role": ""},
}
"""Fields of messages as their items have them, where the names differ."""


def _renamed(error: RequestError, request: ResponsesRequest, places: _Places = ()) -> RequestError:
    """Return an error with the names that fields have here."""
    old = error.param or ""
    new, message = old, _MESSAGE.fullmatch(old)
    for name, pattern, here in _NAMES:
        here = "include" if name == "logprobs" and not request.top_logprobs else here
        if name not in (request.model_extra or {}):  # else the client wrote it so
            new = re.sub(rf"^{pattern}(?![\w])", here, new)
    if message:
        new = _place(message, places)
    if new == old:
        return error
    text = str(error)
    text = f"{new}{text[len(old) :]}" if text.startswith(old) else text
    return RequestError(text, param=new, code=error.code, status=error.status)


def _place(message: re.Match[str], places: _Places) -> str:
    """Return where a message, or a field of it, stands in the request; `input` for what stands nowhere."""
    number, call, field = message.groups()
    kind, own = places[int(number)] if number is not None and int(number) < len(places) else ("text", ("input",))
    if kind == "instructions":  # nothing but their text can be wrong with them
        return kind if field == ".content" else "input"
    return own[-1 if call is None else int(call)] + ("" if kind == "text" else _FIELDS[kind].get(field, field))


def _messages(request: ResponsesRequest) -> tuple[list[dict[str, Any]], _Places]:
    """Return the conversation as messages, and where each of them stands in the request."""
    found: list[dict[str, Any]] = [{"role": "system", "content": request.instructions}] if request.instructions else []
    places: list[tuple[str, list[str]]] = [("instructions", ["instructions"]) for _ in found]
    if isinstance(request.input, str):
        return [*found, {"role": "user", "content": request.input}], [*places, ("text", ["input"])]
    for number, item in enumerate(request.input):
        place, kind = f"input[{number}]", item.type or "message"
        if kind == "message":
            text = _text(item.content, f"{place}.content")
            found.append({"role": item.role or "user", "content": text})
            places.append(("message", [place]))
        elif kind == "function_call":
            call = {"id": item.call_id, "type": "function", "function": {"name": item.name or "", "arguments": item.arguments}}
            if found and found[-1].get("tool_calls"):
                found[-1]["tool_calls"].append(call)
                places[-1][1].append(place)
            else:
                places.append(("calls", [place]))
                found.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            output = _text(item.output, f"{place}.output")
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
            places.append(("output", [place]))
        elif kind != "reasoning":
            raise refused(f"{place}.type", f"is {kind!r}; expected message, function_call or function_call_output", "unsupported")
    return found, places


def _text(content: str | Sequence[Part] | None, place: str) -> str:
    if content is None:
        raise refused(place, "missing; add it", "missing_required_parameter")
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        if part.type not in _TEXTS:
            what = "images are" if "image" in part.type else "other kinds of content are"
            seen = f"is {part.type!r}; expected text parts; {what} not supported"
            raise refused(f"{place}[{number}].type", seen, "unsupported")
    return "\n".join(part.text or part.refusal or "" for part in content)


def _tool(tool: FlatTool, place: str) -> dict[str, Any]:
    if tool.type != "function":
        seen = f"is {tool.type[:80]!r}; expected function; tools of other kinds are not here"
        raise refused(f"{place}.type", seen, "unsupported")
    known = {"name", "description", "parameters", "strict"}
    return {"type": "function", "function": tool.model_dump(include=known, exclude_none=True)}


def _tool_choice(choice: Any) -> Any:
    is_named = isinstance(choice, Mapping) and choice.get("type") == "function" and "name" in choice
    return {"type": "function", "function": {"name": choice["name"]}} if is_named else choice


def _format(wanted: TextFormat | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    form = {"name": wanted.name or "answer", "description": wanted.description, "schema": wanted.form, "strict": wanted.strict}
    return {"type": wanted.type, **({"json_schema": form} if wanted.type == "json_schema" else {})}


def _usage(usage: TokenUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total,
    }


def _part(kind: _Kind, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "summary_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponseRendering(Rendering):
    """Renders one order's answer as a response, in one piece or as events."""

    def __init__(self, order: ParsedRequest, pool: str, request: ResponsesRequest, trace_url: str | None = None) -> None:
        super().__init__(order, pool, is_chat=True, trace_url=trace_url)
        self._request = request
        self._number = 0
        self._output: list[dict[str, Any]] = []
        """Items that are done."""
        self._open: _Kind | None = None
        """Kind of the item that is under way: reasoning or message."""
        self._shown = ""
        """What of it was sent."""
        self._created = int(time.time())

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the response of a request that does not stream. Raises EmptyAnswerError."""
        check_not_empty(answer)
        choice = choices_of(answer)[0]
        steps = "".join(map(step_line, answer.steps)) if self._tells_steps else ""
        items = [self._item("reasoning", sent(steps + choice.reasoning))] if steps or choice.reasoning else []
        items += [self._item("message", sent(choice.text), choice)] if choice.text.strip() else []
        return self._response(self._status(choice), [*items, *self._calls_of(choice)], answer)

    def opening(self) -> bytes:
        """Return the events that open a stream."""
        started = self._response("in_progress", [])
        return self._tell("response.created", response=started) + self._tell("response.in_progress", response=started)

    def step(self, step: StepRecord) -> bytes:
        """Return the events of a finished step: none unless a summary of the reasoning was asked for, or behind the answer."""
        is_told = self._tells_steps and not self._sent
        return self._add("reasoning", step_line(step)) if is_told else b""

    def thought(self, text: str) -> bytes:
        """Return the events of a piece of the final call's thought."""
        self._thought += text
        return self._add("reasoning", text) if text else b""

    def delta(self, text: str) -> bytes:
        """Return the events of a piece of the answer."""
        piece = self.piece(text)
        return self._add("message", piece) if piece else b""

    def closing(self, answer: Answer) -> bytes:
        """Return the events that end a stream. Raises EmptyAnswerError."""
        check_not_empty(answer)
        choice, events = choices_of(answer)[0], b""
        if answer.reasoning.startswith(self._thought) and not self._sent:
            events += self.thought(answer.reasoning[len(self._thought) :])
        if answer.text != self._sent and answer.text.startswith(self._sent):
            events += self._add("message", answer.text[len(self._sent) :])
        events += self._close(choice)
        for call in self._calls_of(choice):
            place = len(self._output)
            begun = call | {"arguments": "", "status": "in_progress"}
            events += self._tell("response.output_item.added", output_index=place, item=begun)
            where = {"item_id": call["id"], "output_index": place}
            for start in range(0, len(call["arguments"]), _PIECE):
                piece = call["arguments"][start : start + _PIECE]
                events += self._tell("response.function_call_arguments.delta", delta=piece, **where)
            named = {"name": call["name"], "arguments": call["arguments"]}
            events += self._tell("response.function_call_arguments.done", **named, **where)
            self._output.append(call)
            events += self._tell("response.output_item.done", output_index=place, item=call)
        status = self._status(choice)
        return events + self._tell(f"response.{status}", response=self._response(status, self._output, answer))

    def failure(self, error: Exception) -> bytes:
        """Return the event of an error in mid-stream."""
        found = described(error)[1].error
        return self._tell("error", code=found.code, message=found.message, param=found.param)

    def renamed(self, error: RequestError) -> RequestError:
        """Return an error with the names that fields have in the request."""
        return _renamed(error, self._request)

    @property
    def _tells_steps(self) -> bool:
        return bool(self._request.reasoning and self._request.reasoning.summary)

    def _status(self, choice: Choice) -> str:
        return "incomplete" if choice.finish_reason == "length" else "completed"

    def _id(self, kind: str, number: int = 0) -> str:
        return f"{kind}_{self._order.query.trace_id}{f'_{number}' if number else ''}"

    def _item_id(self, kind: _Kind) -> str:
        """Return an id that comes once: thoughts may come between pieces of a text, so those that are done are counted."""
        return self._id(_IDS[kind], sum(item["type"] == kind for item in self._output))

    def _item(self, kind: _Kind, text: str, choice: Choice | None = None, status: str = "completed") -> dict[str, Any]:
        item: dict[str, Any] = {"type": kind, "id": self._item_id(kind)}
        if kind == "reasoning":
            return item | {"summary": [_part(kind, text)]}
        part = _part(kind, text) | {"logprobs": list((choice and choice.logprobs) or [])}
        return item | {"status": status, "role": "assistant", "content": [part]}

    def _calls_of(self, choice: Choice) -> list[dict[str, Any]]:
        return [
            {
                "type": "function_call",
                "id": self._id("fc", number),
                "call_id": sent(call.call_id),
                "name": sent(call.name),
                "arguments": sent(call.arguments),
                "status": "completed",
            }
            for number, call in enumerate(choice.tool_calls, 1)
        ]

    def _add(self, kind: _Kind, text: str) -> bytes:
        """Return the events of a piece of an item, which is begun where another is under way."""
        events = b"" if self._open in (None, kind) else self._close(None)
        if self._open is None:
            self._open = kind
            item = self._item(kind, "", status="in_progress") | {_PARTS[kind]: []}
            events += self._tell("response.output_item.added", output_index=len(self._output), item=item)
            events += self._tell(f"{_PART_EVENTS[kind]}.added", part=_part(kind, ""), **self._place(kind))
        self._shown += sent(text)
        more: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
        return events + self._tell(f"{_TEXT_EVENTS[kind]}.delta", delta=sent(text), **self._place(kind), **more)

    def _close(self, choice: Choice | None) -> bytes:
        """Return the events that end the item under way, none where none is."""
        kind, text = self._open, self._shown
        if kind is None:
            return b""
        self._open, self._shown = None, ""
        item, place = self._item(kind, text, choice), self._place(kind)
        more = {} if kind == "reasoning" else {"logprobs": item["content"][0]["logprobs"]}
        self._output.append(item)
        return (
            self._tell(f"{_TEXT_EVENTS[kind]}.done", text=text, **place, **more)
            + self._tell(f"{_PART_EVENTS[kind]}.done", part=_part(kind, text), **place)
            + self._tell("response.output_item.done", output_index=place["output_index"], item=item)
        )

    def _place(self, kind: _Kind) -> dict[str, Any]:
        """Return where the item under way is, and the part of it that is its text."""
        return {"output_index": len(self._output), "item_id": self._item_id(kind), f"{_PARTS[kind]}_index": 0}

    def _tell(self, kind: str, **content: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + encode_json(event) + b"\n\n"

    def _response(self, status: str, output: Iterable[dict[str, Any]], answer: Answer | None = None) -> dict[str, Any]:
        asked = self._request
        told = self._dmoa(answer) if answer else None
        given = asked.text.format if asked.text and asked.text.format else None
        return {
            "id": self._id("resp"),
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": asked.model,
            "output": list(output),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": (asked.reasoning or Reasoning()).model_dump(include={"effort", "summary"}),
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": given.model_dump(by_alias=True, exclude_none=True) if given else {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools or []],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": _usage(answer.usage) if answer else None,
            "user": asked.user,
            "metadata": self._order.body.labels,
            **({"dmoa": told.model_dump(mode="json")} if told else {}),
        }
