"""Reads what an OpenAI-compatible endpoint sends back, leniently: whole replies, pieces of a stream, refusals.

`engines/openai` sends; here the bytes become a `Generation`. Endpoints differ in what they leave out, so every field may be
missing; what is there must have the right type. Shape letter: V listed log-probabilities.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from typing_extensions import TypedDict

from dmoa.answer_form import NEVER_NATS, new_call_id
from dmoa.core.entropy_scope import answer_tokens
from dmoa.core.reasoning import split_reasoning
from dmoa.core.truncated_entropy import listed_entropy
from dmoa.engines.thoughts import placed_split
from dmoa.errors import EngineError
from dmoa.reading import BYTE_ORDER_MARK
from dmoa.types import EntropySum, FinalCall, FinishReason, Generation, TextDelta, TokenUsage, ToolCall
from dmoa.validation import REDACTED, findings, storable

MAX_CALLS = 128
"""Most calls of tools that are told apart."""
CHARS_PER_TOKEN = 4
"""What estimates of token counts assume, the usual figure for English."""
_WHOLE = re.compile(
    r"stop|eos|eostoken|eosfound|eot|endturn|endofturn|end|stopsequence|stopsequencefound|stoptoken|stopstring"
    r"|stopword|stopstr|complete|completed|done|finish|finished|success|succeeded|normal"
)
"""What endpoints call the end of a whole text, without capitals and signs."""
_CUT = re.compile(
    r"length|maxlength|maxtokens|maxnewtokens|maxoutputtokens|maxtokensreached|maxpredictedtokensreached|modellength"
    r"|tokenlimit|contextlength|contextlengthreached|contextwindow|modelcontextwindowexceeded"
)
"""What they call the end of a text that a limit of tokens cut."""
_CALLED = re.compile(r"toolcalls?|tooluse|functioncall")
"""What they call the end of a turn that asks for a tool; text before the call is the reply, because no tool was offered."""
_FILTERED = re.compile(r"contentfilter(?:ed)?|safety|recitation|blocklist|prohibitedcontent|sensitive")
_MIN_KEY_CHARS = 12
_DONE = "[DONE]"


def _or_none(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


_T = TypeVar("_T")
_Extra = Annotated[_T | None, WrapValidator(_or_none)]
"""What a reply is whole without: in a shape that is not understood it counts as absent."""


class _Part(BaseModel):
    """Base of what is read: unknown fields are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Listed(TypedDict, total=False):  # there are dozens a reply, and an object of a model costs twice as much
    token: str
    logprob: float | None


class _Row(_Listed, total=False):
    top_logprobs: list[_Listed] | None
    bytes: Any


class _Logprobs(_Part):
    content: list[_Row] | None = None
    reasoning_content: _Extra[list[_Row]] = None


_THOUGHTS = ("thinking", "reasoning", "reasoning_text", "reasoning_content")
"""Types of a part of content that is a thought, and the names under which its text may stand."""


def _is_thought(part: dict[str, Any]) -> bool:
    return part.get("type") in _THOUGHTS


def _joined(value: Any) -> Any:
    """Return the text of content that comes in parts, without parts that are thoughts; anything else as it is."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return "".join(part["text"] for part in value if isinstance(part.get("text"), str) and not _is_thought(part))
    return value


def _thought(value: Any) -> str:
    """Return the text of a thought: a string, a part, or parts that may hold parts; empty for anything else."""
    if isinstance(value, list):
        return "".join(map(_thought, value))
    if isinstance(value, dict):
        return next((text for name in ("text", "content", *_THOUGHTS) if (text := _thought(value.get(name)))), "")
    return value if isinstance(value, str) else ""


class _Function(_Part):
    name: _Extra[str] = None
    arguments: Any = None


class _Call(_Part):
    index: _Extra[int] = None
    id: _Extra[str] = None
    function: _Extra[_Function] = None


class _Words(_Part):
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    reasoning: Annotated[str, BeforeValidator(_thought)] = ""
    refusal: _Extra[str] = None
    tool_calls: _Extra[list[_Call]] = None
    function_call: Any = None

    @model_validator(mode="before")
    @classmethod
    def _one_thought(cls, tree: Any) -> Any:
        """Put what was thought under one name; endpoints that use two send the same by both."""
        if not isinstance(tree, dict):
            return tree
        content = tree.get("content")
        parts = [part for part in content if isinstance(part, dict) and _is_thought(part)] if isinstance(content, list) else []
        if tree.get("dmoa_step") is not None:  # the line of a finished step of another swarm is nobody's thought
            return tree | {"reasoning": ""}
        return tree | {"reasoning": _thought(tree.get("reasoning_content")) or _thought(tree.get("reasoning")) or _thought(parts)}


class _Choice(_Part):
    index: _Extra[int] = None
    message: _Words | None = None
    delta: _Words | None = None
    logprobs: _Extra[_Logprobs] = None
    finish_reason: Any = None
    error: Any = None


_Count = Annotated[int, Field(ge=0, le=1 << 40)]


class _Details(_Part):
    cached_tokens: _Extra[_Count] = None
    reasoning_tokens: _Extra[_Count] = None


class _Usage(_Part):
    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0
    total_tokens: _Extra[int] = None
    prompt_tokens_details: _Extra[_Details] = None
    completion_tokens_details: _Extra[_Details] = None

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of the thought; None where the endpoint does not tell."""
        return self.completion_tokens_details.reasoning_tokens if self.completion_tokens_details else None

    @property
    def generated_tokens(self) -> int:
        """Tokens of thought and text."""
        is_apart = self.total_tokens == self.prompt_tokens + self.completion_tokens + (self.reasoning_tokens or 0)
        return generated_tokens(self.completion_tokens, self.reasoning_tokens or 0, is_apart=is_apart)


class _Reply(_Part):
    choices: list[_Choice] | None = None
    usage: _Extra[_Usage] = None
    object: Any = None
    error: Any = None


def generated_tokens(said: int, thought: int, *, is_apart: bool = False) -> int:
    """Return the tokens of thought and text; some endpoints leave those of the thought out of completion_tokens, `said`."""
    return said + thought if is_apart or thought > said else said


class _Shown:
    """A text as it may be shown, without the endpoint's key."""

    def __init__(self, key: str) -> None:
        """A key that is short is as good as a word, and stays."""
        self._key = key if len(key) >= _MIN_KEY_CHARS else ""
        self._held = ""
        self.pieces: list[str] = []

    def add(self, text: str) -> str:
        """Return the text that may be shown now: what could be the beginning of the key is held back."""
        text = self.conceal(self._held + text)
        size = next((n for n in range(min(len(self._key) - 1, len(text)), 0, -1) if self._key.startswith(text[-n:])), 0)
        text, self._held = text[: len(text) - size], text[len(text) - size :]
        return self._keep(text)

    def rest(self) -> str:
        """Return what is still held back."""
        text, self._held = self._held, ""
        return self._keep(text)

    def conceal(self, text: str) -> str:
        """Return a whole text without the key."""
        return text.replace(self._key, REDACTED) if self._key else text

    def _keep(self, text: str) -> str:
        if text:
            self.pieces.append(text)
        return text

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)


class _Token(NamedTuple):
    """A token whose log-probabilities were listed."""

    said: str
    """One character a byte."""
    entropy: EntropySum
    is_thought: bool
    """Whether it came beside a piece of a thought alone."""


class Draft:
    """What an endpoint has said so far of one reply."""

    def __init__(
        self,
        vocab_size: int,
        key: str,
        fault: Callable[[str], EngineError],
        on_text: Callable[[TextDelta], None],
        *,
        final: FinalCall | None = None,
    ) -> None:
        """`key` is the endpoint's, which no text may hold.

        `fault` makes the error of what is wrong with the reply; `on_text` gets each piece of text and of its thought. `final`: as
        the request's.
        """
        self._final = final or FinalCall()
        self._calls: dict[int, list[str]] = {}
        """Id, name and arguments of the calls of tools, by their places."""
        self._open: dict[int | None, int] = {}
        """The place of the call that was begun last, by the index that its pieces come with."""
        self._rows: list[_Row] = []
        self._vocab_size = vocab_size
        self._fault = fault
        self._on_text = on_text
        self._said, self._thought = _Shown(key), _Shown(key)
        self._refusal = ""
        self._has_called = False
        self._has_choice = False
        self._tokens: list[_Token] = []
        self._finish: FinishReason | None = None
        self._usage: _Usage | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return self._said.text

    @property
    def is_begun(self) -> bool:
        """Whether some of the text or of its thought is there."""
        return bool(self._said.pieces or self._thought.pieces)

    @property
    def is_ended(self) -> bool:
        """Whether the endpoint has said how the reply ended."""
        return self._finish is not None

    @property
    def has_entropy(self) -> bool:
        """Whether log-probabilities were listed for at least one token."""
        return any(token.entropy.tokens for token in self._tokens)

    def take(self, data: bytes | str) -> None:
        """Add a whole reply or a piece of a stream, as JSON.

        Raises EngineError for what is not a reply, for an error that the endpoint reports in its place, and for an ending other
        than that of a whole text or of one cut by a limit of tokens.
        """
        try:
            reply = _Reply.model_validate_json(data.removeprefix(BYTE_ORDER_MARK) if isinstance(data, bytes) else data)
        except ValidationError as error:
            item = findings(error)[0]
            where = ".".join(map(str, item["loc"])) or "the whole"
            raise self._fault(f"its reply is not understood ({where}: {item['msg']})") from None
        choice = next((choice for choice in reply.choices or [] if not choice.index), None)
        problem = reply.error or (choice.error if choice else None) or (json.loads(data) if reply.object == "error" else None)
        if problem:
            raise self._fault(f"it reported an error: {error_message({'error': problem})}")
        self._usage = reply.usage or self._usage
        if choice:
            self._choose(choice)

    def _choose(self, choice: _Choice) -> None:
        self._has_choice = True
        words = choice.message or choice.delta or _Words()
        said, thought = words.content or "", words.reasoning
        self._refusal += words.refusal or ""
        self._has_called = self._has_called or bool(words.tool_calls or words.function_call)
        for place, call in enumerate(words.tool_calls or () if self._final.tools else ()):
            self._call(call, place if choice.message else self._place(call))
        if choice.logprobs:
            self._list(choice.logprobs.reasoning_content or (), is_thought=True)
            self._list(choice.logprobs.content or (), is_thought=bool(thought) and not said)
        self._end(choice.finish_reason)
        self._tell(self._thought.add(thought), self._said.add(said))

    def _place(self, call: _Call) -> int:
        """Return the place of a piece of a call; not every endpoint counts them, or tells an index at all."""
        place = self._open.get(call.index, len(self._calls))
        number, name, _ = self._calls.get(place, ("", "", ""))
        is_named = call.function is not None and bool(call.function.name)
        if name and is_named and (call.id != number if call.id and number else call.index is None):
            place = len(self._calls)  # another one begins
        self._open[call.index] = place
        return place

    def _call(self, call: _Call, place: int) -> None:
        """Add a call of a tool, or a piece of one."""
        held = self._calls.setdefault(place if place < MAX_CALLS else MAX_CALLS, ["", "", ""])
        function = call.function or _Function()
        arguments = function.arguments
        said = arguments if isinstance(arguments, str) else "" if arguments is None else json.dumps(arguments)
        held[:] = [held[0] or call.id or "", held[1] or function.name or "", held[2] + said]

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls of the client's tools so far, without the endpoint's key."""
        return tuple(
            ToolCall(call_id=number or new_call_id(), name=name, arguments=self._said.conceal(said or "{}"))
            for _, (number, name, said) in sorted(self._calls.items())
            if name
        )

    def _list(self, rows: Iterable[_Row], *, is_thought: bool) -> None:
        for row in rows:
            if self._final.top_logprobs is not None and not is_thought:
                self._rows.append(row)
            data = _data_of(row)
            said = data.decode("latin-1") if data else _as_bytes(row.get("token", ""))
            self._tokens.append(_Token(said, listed_entropy(_listed(row), self._vocab_size), is_thought))

    def _tell(self, thought: str, said: str) -> None:
        if thought:
            self._on_text(TextDelta(text=thought, is_reasoning=True))
        if said:
            self._on_text(TextDelta(text=said))

    def _end(self, said: Any) -> None:
        """Take how the reply ended; raises EngineError where what is there is not a reply of its own."""
        said = said.get("type") if isinstance(said, dict) else said
        word = re.sub(r"[^a-z]", "", str(said).lower()) if said else ""
        if word in ("", "null", "none"):
            return
        if _FILTERED.fullmatch(word):
            raise self._fault("its content filter ended the reply; ask in other words, or ask another agent")
        if not any(known.fullmatch(word) for known in (_WHOLE, _CUT, _CALLED)):
            raise self._fault(f"its reply ended with finish_reason {str(said)[:40]!r}, so the text is not whole; ask again")
        self._has_called = self._has_called or _CALLED.fullmatch(word) is not None
        self._finish = "length" if _CUT.fullmatch(word) else "stop"

    def finish(self) -> None:
        """Take the reply as ended. Raises EngineError for one without a text of its own: what stands in its place."""
        if not self._has_choice:
            raise self._fault("its reply holds no choice; check base_url and model, and that chat completions are served there")
        self._tell(self._thought.rest(), self._said.rest())
        if self.text.strip() or self.tool_calls:
            return
        if self._refusal:
            raise self._fault(f"it refused to answer: {self._refusal}")
        if self._has_called:
            raise self._fault("it called a tool in place of an answer, and none was offered; set its tool choice to none there")

    def generation(self, *, prompt_tokens: int, engine_ms: float, queue_ms: float, is_late: bool = False) -> Generation:
        """Return the reply as it stands. `is_late`: the deadline ended it.

        Token counts that the endpoint did not tell are estimated: the prompt's is `prompt_tokens`, the reply's the number of
        tokens whose log-probabilities were listed, else by its length.
        """
        usage, text, thought = self._usage, self.text, self._thought.text
        entropy, its_entropy, num_listed = self._entropies(text, has_thought=bool(thought))
        if usage:
            completion = usage.generated_tokens
        else:  # what is not listed is estimated
            completion = len(self._tokens) or estimated_tokens(len(text))
            completion += estimated_tokens(len(thought)) if not num_listed else 0
        told = usage.reasoning_tokens if usage else None
        reasoning = told if told is not None else num_listed or round(completion * len(thought) / max(1, len(thought + text)))
        details = usage.prompt_tokens_details if usage else None
        is_cut = is_late or bool(thought and not text.strip())  # a thought without an answer never ended
        return Generation(
            text=text,
            reasoning=thought,
            finish_reason="length" if is_cut else self._finish or "stop",
            entropy=entropy,
            reasoning_entropy=its_entropy,
            usage=TokenUsage(
                prompt_tokens=usage.prompt_tokens if usage else prompt_tokens,
                cached_tokens=(details.cached_tokens if details else None) or 0,
                completion_tokens=completion,
                reasoning_tokens=min(reasoning, completion),
            ),
            are_tokens_estimated=usage is None or (told is None and not num_listed and reasoning > 0),
            tool_calls=self.tool_calls,
            logprobs=None
            if self._final.top_logprobs is None
            else tuple(_told(row, self._final.top_logprobs) for row in self._rows),
            engine_ms=engine_ms,
            queue_ms=queue_ms,
        )

    def _entropies(self, text: str, *, has_thought: bool) -> tuple[EntropySum, EntropySum, int]:
        """Return the entropies of answer and thought, and how many tokens of the thought were listed."""
        told = [token for token in self._tokens if not token.is_thought]
        split = split_reasoning(text)
        is_answer = [True] * len(told)
        if has_thought or split.reasoning or split.is_open:
            spans = tuple((len(text[:start].encode()), len(text[:end].encode())) for start, end in split.spans)
            placed = placed_split("".join(token.said for token in told), _as_bytes(text), replace(split, spans=spans))
            # Where the two cannot be told apart all counts as the thought's.
            is_answer = answer_tokens([token.said for token in told], placed) if placed else [False] * len(told)
        answer = [token for token, is_in in zip(told, is_answer, strict=True) if is_in]
        thought = [token for token, is_in in zip(told, is_answer, strict=True) if not is_in]
        thought += [token for token in self._tokens if token.is_thought]
        none = EntropySum(kind="truncated")
        return _added(answer, none), _added(thought, none if thought else EntropySum()), len(thought)


def _told(row: _Row, most: int) -> dict[str, Any]:
    """Return a token's row as OpenAI's object, with at most so many others listed; what JSON cannot carry is as good as never."""

    def part(item: _Listed) -> dict[str, Any]:
        token, nats = item.get("token", ""), item.get("logprob")
        data = _data_of(item)
        data = token.encode(errors="replace") if data is None else data
        is_number = nats is not None and math.isfinite(nats)
        return {"token": token, "logprob": nats if is_number else NEVER_NATS, "bytes": list(data)}

    return part(row) | {"top_logprobs": [part(item) for item in (row.get("top_logprobs") or [])[:most]]}


def _data_of(item: Mapping[str, object]) -> bytes | None:
    """Return the bytes of a token as they were told; None where they were not, or are none."""
    data = item.get("bytes")
    try:
        return bytes(data) if isinstance(data, list) else None
    except (ValueError, TypeError):
        return None


def _as_bytes(text: str) -> str:
    """Return a text with one character a byte: the bytes of one may be several tokens'."""
    return text.encode(errors="replace").decode("latin-1")


def _added(tokens: Sequence[_Token], start: EntropySum) -> EntropySum:
    return sum((token.entropy for token in tokens), start)


def _listed(row: _Row) -> list[float]:
    """Return the log-probabilities of a token's row: the listed ones, and the chosen token's where it is not among them."""
    near, token, own = row.get("top_logprobs") or [], row.get("token", ""), row.get("logprob")
    listed_V = [nats for item in near if (nats := item.get("logprob")) is not None]
    is_apart = own is not None and all(item.get("token", "") != token for item in near)
    # Tokens whose bytes are not a text of their own may share a name; only a less probable one can have been left out.
    if own is not None and is_apart and not own > min(listed_V, default=math.inf):  # NaN is not above anything
        listed_V.append(own)
    return listed_V


def listed_logprobs(rows: list[Any]) -> list[list[float]]:
    """Return the log-probabilities that rows of `logprobs.content` list, a list a token; empty where one is not understood."""
    try:
        return [_listed(row) for row in _Logprobs.model_validate({"content": rows}).content or []]
    except ValidationError:
        return []


def estimated_tokens(num_chars: int) -> int:
    """Return how many tokens a text of that length may have."""
    return math.ceil(num_chars / CHARS_PER_TOKEN)


def error_message(body: Any) -> str:
    """Return the message in an error's body as plain values: OpenAI's object, its usual variants, or the body itself."""
    while isinstance(body, dict) and body.get("error"):
        body = body["error"]
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or json.dumps(body)
    return storable(str(body))


async def events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """Yield the data of each server-sent event, JSON or `[DONE]`, as the HTML standard reads them.

    Lines end with LF, CR LF or CR, and not at U+0085 and U+2028, which JSON holds as they are. The lines of an event that has
    several are put together. One whose first line is whole comes at once, also where no blank line follows. What comes as
    `event: error` is the `error` of an object.
    """
    held, kind = list[str](), ""
    async for line in _lines(chunks):
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            kind = value.strip()
        elif name == "data":
            held.append(value)
        text = "\n".join(held).strip() if not line or len(held) == 1 else ""  # not for every line of an event that does not end
        if text and (not line or (name == "data" and _is_whole(text))):
            yield text if kind != "error" or text == _DONE else json.dumps({"error": plain(text)})
            held = []
        if not line:
            held, kind = [], ""


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """Yield the lines of a stream without their ends and without its byte order mark, and last an empty one."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")("replace"), translate=True)
    rest = [""]  # of a line, in pieces: one that comes byte by byte is put together once
    async for chunk in chunks:
        first, *others = decoder.decode(chunk).split("\n")
        rest.append(first)
        for line in others:
            yield "".join(rest)
            rest = [line]
    yield ("".join(rest) + decoder.decode(b"", final=True)).rstrip("\n")
    yield ""


def plain(text: str) -> Any:
    """Return JSON as plain values, and any other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _is_whole(text: str) -> bool:
    return text == _DONE or isinstance(plain(text), dict)
