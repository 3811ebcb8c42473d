"""The `openai` engine: calls to an OpenAI-compatible endpoint, asked again where that helps, with deadlines and a bound on calls.

Waits fit into a deadline, fields that an endpoint refuses are left out, errors keep secrets, and headers come from the pool file
alone. Prompts go out with the names of control tokens broken up, because an endpoint may read them as real ones; `connections`
carries them, `openai_replies` reads what comes back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr

from dmoa import __version__
from dmoa.engine_options import OpenaiOptions, read_key
from dmoa.engines.connections import FAILURES, Connections, failure_of, read_error
from dmoa.engines.openai_replies import Draft, error_message, estimated_tokens, events, plain
from dmoa.errors import AgentOverloadedError, DeadlineError, EngineError, PromptTooLongError
from dmoa.loopback import asked_wait_s, uses_proxies
from dmoa.types import FinalCall, Generation, GenerationRequest, TextDelta
from dmoa.validation import Conceal, redact_text

_NAMES = re.compile(
    # ChatML, Qwen, Llama 3, Phi, GPT-OSS's harmony, Zephyr, Command, Granite, Kimi: a word between <| and |>, or beside one.
    r"<\|[^\s<>|]{1,64}\|>|<\|[A-Za-z_]{1,40}>|<[A-Za-z_]{1,40}\|>"
    # DeepSeek and Hunyuan, with fullwidth bars.
    r"|<\uff5c[^<>\uff5c\n]{1,64}\uff5c>"
    # EXAONE.
    r"|\[\|[^\s\[\]|]{1,64}\|\]"
    # Llama 2 and Mistral.
    r"|</?s>|\[/?INST\]|<</?SYS>>"
    r"|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|SYSTEM_PROMPT|ARGS|CALL_ID|PREFIX|MIDDLE|SUFFIX|IMG)\]"
    # Gemma, and names that many share.
    r"|<(?:start|end)_of_(?:turn|image|audio)>|</?(?:bos|eos|pad|unk|sep|cls|mask|eod|eot|sop|eop)>"
    # Qwen's tools.
    r"|</?tool_(?:call|calls|response|responses)>"
    # GLM, BERT, MiniMax, Seed.
    r"|\[(?:gMASK|sMASK|MASK|CLS|SEP|PAD|UNK)\]|\]~[!b]\[|\]~b\]|\[e~\[|<seed:\w{1,40}>",
    re.IGNORECASE,
)


def break_names(text: str) -> str:
    """Return a text in which no control token of a common family is named; others come back as they are.

    An endpoint that puts messages into its template as text takes such a name in a message for the token itself, so a user's
    text, a tool's result or another agent's reply could end its turn and open a system turn. Engines that we tokenise for need
    none of this (`engines/chat_template`).
    """
    # A space that one can see: servers that clean texts remove characters without width, and the name would stand again.
    # Again, because what overlapped the name may be one itself.
    while _NAMES.search(text):
        text = _NAMES.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


_LOG = logging.getLogger("dmoa.openai")
CONNECT_TIMEOUT_S = 10.0
BROKEN_OFF_S = 0.4
"""How long to wait after a stream broke off."""
LEAST_REPLY_BYTES, BYTES_PER_TOKEN = 1 << 20, 8192
"""Bound of a reply: a token with twenty alternatives takes some 3 kB of JSON."""
FIRST_BACKOFF_S, MAX_BACKOFF_S, MAX_WAIT_S = 0.5, 8.0, 120.0
"""The wait before a call is sent again: at first, at most, and at most where the endpoint asks for one. As OpenAI's client."""
REDIRECTS = 300
"""Statuses from here on are no replies."""
LEAST_CHARS, CHARS_PER_TOKEN = 16_384, 64
"""Bound of a text, many times what its tokens are in any language: who reads it on has to compare and quote all of it."""
_MAX_READ_CHARS = 4000
_MAX_QUOTED_CHARS = 300
_MOST_LISTED = 20
"""Log-probabilities a token that OpenAI's protocol lists at most."""
_TEMPLATE_CHARS = 16
"""What a chat template adds to a message, in an estimate of its length."""
_HINTS = ("top_k", "min_p", "repetition_penalty", "chat_template_kwargs")
_OPTIONAL = {name: name for name in ("stream_options", "seed", "temperature", *_HINTS)} | {
    "logprobs": "(?:top_)?logprobs",
    "max_tokens": "max_completion_tokens",
}
"""Fields that an endpoint may refuse, and the word of its refusal: max_tokens is then sent by that name, the others not."""
_NO_OTHER = re.compile(r"unsupported|not support|only the default", re.IGNORECASE)
"""How reasoning models refuse any temperature but their own, rather than one that no model takes."""
_UNKNOWN = (
    r"(?:(?:unknown|unrecogni[sz]ed|unexpected|unsupported)(?: \w+){0,2} (?:argument|parameter|field|property)"
    r"|extra inputs|property \S+ is unsupported)"
)
"""How a refusal says that a field itself is not known, rather than that its value is not taken."""
OnText = Callable[[TextDelta], None]


class _FieldRefusedError(Exception):
    """The endpoint does not take an optional field as it was sent; the call is sent again without it."""


class _AgainError(Exception):
    """A call that may be sent again: what to raise if it is not, and after what wait; None: the longer, the more often."""

    def __init__(self, error: Exception, wait_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s


@dataclass(slots=True)
class _Left:
    """What is left out of one call, because the endpoint refused it."""

    fields: set[str]
    """Names of `_OPTIONAL`, of max_tokens it is the name alone; top_p where it is 1."""
    most_listed: int
    """Most log-probabilities a token that are asked for: what the endpoint said that it lists."""
    learnt: list[str] = field(default_factory=list)
    """Fields that no later call needs to send, if the endpoint answers this one without them."""


def _seed(request: GenerationRequest) -> int:
    """Return the request's seed, or one that its id always gives, 31 bits."""
    if request.sampling.seed is not None:
        return request.sampling.seed
    return int.from_bytes(hashlib.sha256(request.call_id.encode()).digest()[:4], "little") >> 1


def _has_wishes(request: GenerationRequest) -> bool:
    """Whether a call holds what its client asked for and other calls do not: a refusal may be due to that."""
    sampling = request.sampling
    wished = (request.final, sampling.seed, sampling.top_k, sampling.min_p, sampling.repetition_penalty)
    return bool(sampling.template) or any(value is not None for value in wished)


@dataclass(slots=True)
class _Room:
    """What belongs to one event loop: the connections, and the places of calls in flight."""

    loop: asyncio.AbstractEventLoop
    client: Connections
    places: asyncio.Semaphore
    limits: set[asyncio.Timeout] = field(default_factory=set)
    """What ends the calls in flight: at their deadlines, or at once when the engine closes."""


class OpenaiEngine:
    """Asks one model of an endpoint; implements `protocols.Engine`. Serves one event loop at a time."""

    def __init__(self, model: str, options: OpenaiOptions, *, max_num_seqs: int) -> None:
        """`model` is the name that the endpoint knows. Sends nothing yet; raises ConfigError where the key is not set."""
        self._model = model
        self._options = options
        self._max_num_seqs = max_num_seqs
        self._key = SecretStr(read_key(options.api_key_env))
        self._conceal = Conceal(self._key.get_secret_value())
        self._url = options.base_url
        self._refused: set[str] = set()
        """Fields that the endpoint does not know."""
        self._most_listed = _MOST_LISTED
        self._noted: set[str] = set()
        """What the log was told: of fields that one call or another went without, and of unknown entropies."""
        self._is_closed = False
        self._room: _Room | None = None
        # Made here, because reading the certificates takes a while, which a first call's deadline should not pay for.
        is_secure = self._url.startswith("https")
        self._tls = ssl.create_default_context() if is_secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    @property
    def label(self) -> str:
        """Engine and the options that may change numbers, such as `openai/top20/vocab128000`."""
        return f"openai/top{self._options.top_logprobs}/vocab{self._options.vocab_size}"

    @property
    def num_running(self) -> int:
        """Calls in flight at this moment, those that wait for a place included."""
        return len(self._room.limits) if self._room else 0

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate one continuation. Cancelling closes the connection.

        Raises EngineError for what the endpoint refuses or garbles, PromptTooLongError, AgentOverloadedError where it stays
        busy, DeadlineError where the deadline passes first.
        """
        return await self._answer(request, None)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta | Generation, None]:
        """Generate one continuation, yielding pieces of text as they come and last the Generation.

        A deadline in mid-text ends it with what is there, as `length`. Closing the iterator closes the connection. Raises as
        `generate`; a connection lost in mid-text is not opened again.
        """
        pieces: asyncio.Queue[TextDelta | None] = asyncio.Queue()
        answering = asyncio.create_task(self._answer(request, pieces.put_nowait))
        answering.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await answering
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def close(self) -> None:
        """Close the connections; requests in flight fail with EngineError."""
        self._is_closed = True
        room, self._room = self._room, None
        if room is not None and room.loop is asyncio.get_running_loop():
            for limit in room.limits:
                if not limit.expired():
                    limit.reschedule(room.loop.time())
            for _ in range(self._max_num_seqs):  # once every place is free nobody uses the connections any more
                await room.places.acquire()
            await room.client.close()

    async def _answer(self, request: GenerationRequest, on_text: OnText | None) -> Generation:
        """Return the reply to one call, as a stream where `on_text` listens."""
        started = time.perf_counter()
        if self._is_closed:
            raise self._error("the engine is closed; build a new one")
        room, drafts, deadline = self._room_here(), list[Draft](), request.deadline_unix_s
        placed: float | None = None
        is_late = False
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.time())) as limit:
                room.limits.add(limit)
                try:
                    async with room.places:
                        placed = time.perf_counter()
                        await self._ask(room.client, request, on_text, drafts)
                finally:
                    room.limits.discard(limit)
        except TimeoutError:
            if self._is_closed:
                raise self._error("the engine was closed") from None
            if not drafts or not drafts[-1].is_begun:
                raise DeadlineError(self._named("the deadline passed before the endpoint's reply")) from None
            is_late = not drafts[-1].is_ended
        self._tell_if_unlisted(drafts[-1])
        most, seen = LEAST_CHARS + CHARS_PER_TOKEN * request.sampling.max_tokens, len(drafts[-1].text)
        if seen > most and on_text is None:  # a text that is handed on as it comes goes into nobody's prompt
            what = f"its reply has {seen} characters for max_tokens {request.sampling.max_tokens}"
            raise self._error(f"{what}; expected at most {most}")
        return drafts[-1].generation(
            prompt_tokens=estimated_tokens(sum(len(message.content) + _TEMPLATE_CHARS for message in request.messages)),
            engine_ms=(time.perf_counter() - started) * 1e3,
            queue_ms=((placed or started) - started) * 1e3,
            is_late=is_late,
        )

    def _room_here(self) -> _Room:
        """Return what belongs to the running event loop; connections of a loop that has ended went with it."""
        loop = asyncio.get_running_loop()
        if self._room is None or self._room.loop is not loop:
            self._room = _Room(loop=loop, client=self._connect(), places=asyncio.Semaphore(self._max_num_seqs))
        return self._room

    def _connect(self) -> Connections:
        timeout_s, key = self._options.timeout_s, self._key.get_secret_value()
        return Connections(
            f"{self._url}/chat/completions",
            {"User-Agent": f"dmoa/{__version__}"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            tls=self._tls,
            most=self._max_num_seqs,
            connect_s=min(CONNECT_TIMEOUT_S, timeout_s),
            silent_s=timeout_s,
            is_proxied=uses_proxies(self._url),
        )

    async def _ask(self, client: Connections, request: GenerationRequest, on_text: OnText | None, drafts: list[Draft]) -> None:
        """Read the reply into the last of `drafts`, one for each asking; text that was handed on is never asked for again."""
        key, retries, left = self._key.get_secret_value(), 0, _Left(fields=set(self._refused), most_listed=self._most_listed)
        while True:
            drafts.append(Draft(self._options.vocab_size, key, self._fault, on_text or _drop, final=request.final))
            try:
                await self._exchange(client, request, drafts[-1], left, is_stream=on_text is not None)
                return self._remember(left)
            except _FieldRefusedError:
                continue
            except _AgainError as again:
                await self._wait(again, retries, request.deadline_unix_s, can_repeat=not drafts[-1].is_begun)
            retries += 1

    async def _wait(self, again: _AgainError, retries: int, deadline_unix_s: float | None, *, can_repeat: bool) -> None:
        """Wait until a call may be sent again after so many retries. Raises what it is to end with where there is no time."""
        wait_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0**retries) if again.wait_s is None else again.wait_s
        has_time = again.wait_s == BROKEN_OFF_S or self._has_time(wait_s, deadline_unix_s)
        if retries >= self._options.max_retries or not can_repeat or not has_time:
            raise again.error from None
        jitter = 1.0 - random.random() / 4 if again.wait_s is None else 1.0  # noqa: S311 -- no secret
        await asyncio.sleep(wait_s * jitter)

    def _has_time(self, wait_s: float, deadline_unix_s: float | None) -> bool:
        """Tell whether a call may wait so long: until its deadline, without one as long as an endpoint may be silent."""
        if deadline_unix_s is None:
            return wait_s <= min(self._options.timeout_s, MAX_WAIT_S)
        return wait_s <= MAX_WAIT_S and time.time() + wait_s < deadline_unix_s

    async def _exchange(
        self, client: Connections, request: GenerationRequest, draft: Draft, left: _Left, *, is_stream: bool
    ) -> None:
        """Ask, and read the reply into the draft."""
        body = self._body(request, left, is_stream=is_stream)
        data = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
        response, is_whole, has_reply = None, True, False
        try:
            response = await client.post(data)
            if response.status >= REDIRECTS:
                data = await read_error(response)
                if response.status in (400, 422) and self._leave_out(data, body, request, left):
                    raise _FieldRefusedError
                raise self._refusal(response.status, data, response.headers)
            has_reply, kind = True, response.headers.get("content-type", "").lower()
            if kind.startswith("text/html"):
                raise self._error("a web page (text/html) came in place of a reply; check base_url, which often ends in /v1")
            if kind.startswith("application/json") or not (is_stream or kind.startswith("text/event-stream")):
                draft.take(b"".join([chunk async for chunk in self._within(response, request)]))
            else:
                is_whole = await _read_events(self._within(response, request), draft)
        except FAILURES as error:
            if not draft.is_ended:  # else what was lost came after the end of the reply
                raise self._failure(error, has_reply=has_reply) from None
        finally:
            if response is not None:
                response.close()  # which keeps the connection of a reply that was read to its end
        if not is_whole:
            raise _AgainError(self._error("its stream broke off before the end of the reply; ask again"), BROKEN_OFF_S)
        draft.finish()

    def _body(self, request: GenerationRequest, left: _Left, *, is_stream: bool) -> dict[str, Any]:
        sampling, options = request.sampling, self._options
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": message.role, "content": break_names(message.content)} for message in request.messages],
            "max_completion_tokens" if "max_tokens" in left.fields else "max_tokens": sampling.max_tokens,
            "stream": is_stream,
        }
        if "temperature" not in left.fields:
            body["temperature"] = sampling.temperature
        if sampling.top_p < 1.0 or ("top_p" in sampling.given and "top_p" not in left.fields):
            body["top_p"] = sampling.top_p
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.temperature > 0.0 and "seed" not in left.fields:
            body["seed"] = _seed(request)
        wished = 0 if request.final is None else request.final.top_logprobs or 0
        listed = min(max(options.top_logprobs, wished), left.most_listed)
        if listed and "logprobs" not in left.fields:
            body |= {"logprobs": True, "top_logprobs": listed}
        if request.final is not None:
            body |= _form(request.final)
        template = dict(sampling.template) or None
        hints = dict(zip(_HINTS, (sampling.top_k, sampling.min_p, sampling.repetition_penalty, template), strict=True))
        body |= {name: value for name, value in hints.items() if value is not None and name not in left.fields}
        if is_stream and "stream_options" not in left.fields:
            body["stream_options"] = {"include_usage": True}
        if options.continue_final_message and request.messages[-1].role == "assistant":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body

    def _failure(self, error: BaseException, *, has_reply: bool) -> Exception:
        """Return what a lost or silent connection stands for; `has_reply`: the endpoint had begun to answer."""
        kind = failure_of(error)
        said = f"{kind}: {self._quoted(str(error)) or 'the server closed the connection'}"
        if kind == "ConnectTimeout":
            return _AgainError(self._error("no connection in time; check base_url, or raise timeout_s"))
        if kind == "ReadTimeout":  # a silent endpoint is at work on a long reply, which it would begin anew
            return self._error(f"nothing came for {self._options.timeout_s:g} s; raise timeout_s, or lower max_tokens")
        if kind == "DecodingError":
            return self._error(f"its reply cannot be decoded ({said})")
        if has_reply:
            return _AgainError(self._error(f"the connection failed in mid-reply ({said}); ask again"), BROKEN_OFF_S)
        if kind == "ConnectError":
            return _AgainError(self._error(f"the connection failed ({said}); check base_url"))
        advice = "ask again; where that never helps, check base_url, http or https"
        return _AgainError(self._error(f"the connection failed before the reply ({said}); {advice}"))

    def _refusal(self, status: int, data: bytes, headers: Mapping[str, str]) -> Exception:
        """Return what a status of the endpoint stands for."""
        message, code, _ = _told(data)
        said = self._quoted(message) or "no details"
        if _is_too_long(message, code):
            return PromptTooLongError(self._named(f"the prompt does not fit: {said}"))
        if status in (401, 403):
            variable = self._options.api_key_env
            whose = f"the key in {variable}" if variable else "a call without a key (api_key_env)"
            return self._error(f"it refuses {whose} with status {status}: {said}")
        text = self._named(f"it answered with status {status}: {said}")
        refused = AgentOverloadedError(text) if status == 429 else EngineError(text)
        return _AgainError(refused, asked_wait_s(headers)) if status in (408, 429) or status >= 500 else refused

    def _leave_out(self, data: bytes, body: dict[str, Any], request: GenerationRequest, left: _Left) -> bool:
        """Leave an optional field that a refusal names, and the call held, out of that call; tells whether there was one."""
        message, code, param = _told(data)
        said = f"{param or ''} {message}"
        if _is_too_long(message, code):
            return False
        listed = body.get("top_logprobs", 0)
        if (
            listed
            and re.search(r"\b(?:top_)?logprobs\b", said)
            and (most := _most_listed(said, listed, self._options.top_logprobs))
        ):
            left.most_listed = most
            return True
        if "temperature" in body and re.search(r"\btemperature\b", said) and not _NO_OTHER.search(said):
            return False
        if body.get("top_p") == 1.0 and re.search(r"\btop_p\b", said):  # as good as absent; any other is what the client wants
            left.fields.add("top_p")
            return True
        for name, word in _OPTIONAL.items():
            if name in body and re.search(rf"\b{word}\b", said):
                left.fields.add(name)
                # Later calls hold it where the fault may lie in what this call's client wished for.
                if not _has_wishes(request) or (name != "chat_template_kwargs" and _is_unknown(word, said)):
                    left.learnt.append(name)
                elif name not in self._noted:
                    self._noted.add(name)
                    _LOG.warning("openai:%s refused %s as one call held it; such calls go without it", self._model, name)
                return True
        return False

    def _remember(self, left: _Left) -> None:
        """Remember what the endpoint does not take, now that it has answered a call without it."""
        if left.most_listed < self._most_listed and left.most_listed < self._options.top_logprobs:
            self._most_listed = left.most_listed
            _LOG.warning("openai:%s lists %d log-probabilities at most; set top_logprobs so", self._model, left.most_listed)
        for name in left.learnt:
            if name not in self._refused:
                self._refused.add(name)
                _LOG.warning("openai:%s refuses %s, which is no longer sent", self._model, name)

    def _tell_if_unlisted(self, draft: Draft) -> None:
        """Warn, once, of an endpoint that gives the gate nothing to learn from."""
        if draft.is_begun and not draft.has_entropy and "entropy" not in self._noted:
            self._noted.add("entropy")
            _LOG.warning(
                "openai:%s lists no log-probabilities: the entropy of its replies is unknown, so they never count as sure, and "
                "the gate learns nothing of its agents",
                self._model,
            )

    def _error(self, text: str) -> EngineError:
        return EngineError(self._named(text))

    def _fault(self, text: str) -> EngineError:
        return self._error(self._quoted(text))

    async def _within(self, response: Any, request: GenerationRequest) -> AsyncIterator[bytes]:
        """Pass a reply's bytes on. Raises EngineError where they are more than its tokens can need, or said to be."""
        most, seen = LEAST_REPLY_BYTES + BYTES_PER_TOKEN * request.sampling.max_tokens, 0
        async for chunk in response.content.iter_any():
            seen += len(chunk)
            if max(seen, response.content_length or 0) > most:
                raise self._error(
                    f"its reply has more than {most} bytes for max_tokens {request.sampling.max_tokens}; it was not read"
                )
            yield chunk

    def _named(self, text: str) -> str:
        return f"openai:{self._model}: {text}"

    def _quoted(self, text: str) -> str:
        """Return a text of the endpoint or about it, on one line, short, without the key or a part of it."""
        clean = " ".join(self._conceal(text[:_MAX_READ_CHARS]).split())
        return redact_text(clean)[:_MAX_QUOTED_CHARS]


def _told(data: bytes) -> tuple[str, Any, Any]:
    """Return message, code and parameter of an error's body."""
    told = plain(data.decode("utf-8", "replace").strip())
    error = told.get("error", told) if isinstance(told, dict) else None
    return error_message(told), *((error.get("code"), error.get("param")) if isinstance(error, dict) else (None, None))


def _is_too_long(message: str, code: Any) -> bool:
    return code == "context_length_exceeded" or re.search(r"maximum context length|context window", message) is not None


def _most_listed(said: str, asked: int, own: int) -> int | None:
    """Return how many log-probabilities a token a refusal allows, fewer than were asked for; None where it says nothing."""
    behind = re.search(r"\b(?:top_)?logprobs\b(.{0,100})", said[:_MAX_READ_CHARS], re.DOTALL)
    named = [int(number) for number in re.findall(r"(?<![\w.])\d{1,3}(?!\w)", behind[1] if behind else "")]
    fewer = [number for number in named if 0 < number < asked]
    if fewer:
        return fewer[-1]
    return own if 0 < own < asked else None  # a client asked for more than the pool's own number


def _is_unknown(word: str, said: str) -> bool:
    """Whether a refusal says of a field, by its word, that it is not known."""
    near = rf"{_UNKNOWN}.{{0,60}}\b{word}\b|\b{word}\b.{{0,60}}{_UNKNOWN}"
    return re.search(near, said[:_MAX_READ_CHARS], re.IGNORECASE | re.DOTALL) is not None


async def _read_events(chunks: AsyncIterator[bytes], draft: Draft) -> bool:
    """Read a stream into the draft; tells whether the endpoint has ended it."""
    async with aclosing(events(chunks)) as found:
        async for data in found:
            if data == "[DONE]":
                return True
            draft.take(data)
    return draft.is_ended


def _form(final: FinalCall) -> dict[str, Any]:
    """Return the fields by which a client's wishes are passed on."""
    body: dict[str, Any] = {}
    if final.tools:
        body["tools"] = [{"type": "function", "function": tool} for tool in final.tools]
        named = {"type": "function", "function": {"name": final.tool_choice[1:]}}
        body["tool_choice"] = named if final.tool_choice.startswith("=") else final.tool_choice
        if not final.is_parallel:
            body["parallel_tool_calls"] = False
    if final.schema is not None and final.schema_name:
        strict = {} if final.is_strict is None else {"strict": final.is_strict}
        told = {"description": final.schema_description} if final.schema_description else {}
        form = {"name": final.schema_name, **told, "schema": final.schema, **strict}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    elif final.schema is not None:
        body["response_format"] = {"type": "json_object"}
    return body


def _drop(text: TextDelta) -> None:
    """Take a piece of text that nobody listens for."""
