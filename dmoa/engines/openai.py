"""The `openai` engine: calls to an OpenAI-compatible endpoint, with deadlines, retries and a bound on calls under way.

Prompts go out with the names of control tokens broken up, because an endpoint may read them as real ones; `openai_replies` reads
what comes back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from random import SystemRandom
from typing import Any

import httpx

from dmoa import __version__
from dmoa.engine_options import OpenaiOptions
from dmoa.engines.openai_replies import Draft, error_field, error_message, estimated_tokens, events
from dmoa.errors import AgentOverloadedError, ConfigError, DeadlineError, DmoaError, EngineError, PromptTooLongError
from dmoa.loopback import uses_proxies
from dmoa.types import Generation, GenerationRequest, Message, TextDelta
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
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 8.0
_MAX_READ_CHARS = 4000
_MAX_QUOTED_CHARS = 300
_OPTIONAL = {name: name for name in ("logprobs", "stream_options", "seed")} | {"max_tokens": "max_completion_tokens"}
"""Fields that an endpoint may refuse, and the word of its refusal: max_tokens is then sent by that name, the others not."""
_RANDOM = SystemRandom()
OnText = Callable[[str], None]


class _PassingError(Exception):
    """A failure that may be gone a moment later: what to raise if it stays, and when the endpoint wants to be asked again."""

    def __init__(self, error: DmoaError, retry_after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after_s = retry_after_s


class _FieldRefusedError(Exception):
    """The endpoint does not take an optional field; the call is sent again without it."""


class Endpoint:
    """Sends calls to one model of one endpoint."""

    def __init__(self, model: str, options: OpenaiOptions) -> None:
        """`model` is the name that the endpoint knows. Raises ConfigError where the key's variable holds no key."""
        self._model = model
        self._options = options
        self._key = read_key(options.api_key_env)
        self._conceal = Conceal(self._key)
        self._url = f"{options.base_url.rstrip('/')}/chat/completions"
        self._refused: set[str] = set()
        # Made here, because reading the certificates takes a while, which a first call's deadline should not pay for.
        is_secure = self._url.startswith("https")
        self._tls = ssl.create_default_context() if is_secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def connect(self, max_connections: int) -> httpx.AsyncClient:
        """Return a client whose connections carry the key; it belongs to the event loop that first uses it."""
        options = self._options
        headers = {"User-Agent": f"dmoa/{__version__}"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        return httpx.AsyncClient(
            headers=headers,
            verify=self._tls,
            trust_env=uses_proxies(self._url),
            timeout=httpx.Timeout(options.timeout_s, connect=min(CONNECT_TIMEOUT_S, options.timeout_s), pool=None),
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        )

    def error(self, text: str) -> EngineError:
        """Return an error that names the model."""
        return EngineError(self._named(text))

    async def answer(
        self, client: httpx.AsyncClient, request: GenerationRequest, on_text: OnText | None, drafts: list[Draft]
    ) -> Draft:
        """Return the reply to one call, as a stream where `on_text` listens.

        Sends it again after a passing failure, up to `max_retries` times, unless text has been handed on or the deadline would
        pass before. `drafts` gets what each attempt has read, for a caller whose patience ends. Raises as `Engine.generate`.
        """
        attempt = 0
        while True:
            drafts.append(Draft(self._options.vocab_size, self._key))
            try:
                await self._exchange(client, request, on_text, drafts[-1])
            except _FieldRefusedError:
                continue
            except _PassingError as failure:
                wait_s = self._wait_s(failure, attempt)
                if attempt >= self._options.max_retries or drafts[-1].is_begun or not self._has_time(request, wait_s):
                    raise failure.error from None
                attempt += 1
                await asyncio.sleep(wait_s)
            else:
                return drafts[-1]

    def _wait_s(self, failure: _PassingError, attempt: int) -> float:
        """Return how long to wait: as the endpoint asks, else twice as long each time, spread so that callers do not meet."""
        if failure.retry_after_s is not None:
            return failure.retry_after_s
        return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0**attempt) * _RANDOM.uniform(0.5, 1.0)

    def _has_time(self, request: GenerationRequest, wait_s: float) -> bool:
        deadline = request.deadline_unix_s
        return wait_s <= self._options.timeout_s if deadline is None else time.time() + wait_s < deadline

    async def _exchange(
        self, client: httpx.AsyncClient, request: GenerationRequest, on_text: OnText | None, draft: Draft
    ) -> None:
        """Send the call once and read the reply into the draft."""
        body, is_begun = self._body(request, is_stream=on_text is not None), False
        try:
            async with client.stream("POST", self._url, json=body) as response:
                is_begun = True
                if response.status_code != httpx.codes.OK:
                    raise self._refusal(response, await response.aread(), body)
                kind = response.headers.get("content-type", "").lower()
                if kind.startswith("application/json") or (on_text is None and not kind.startswith("text/event-stream")):
                    self._take(draft, await response.aread(), on_text)
                else:
                    await self._read_events(response, on_text, draft)
        except (httpx.TransportError, httpx.DecodingError) as error:
            if not draft.is_ended:  # else what was lost came after the end of the reply
                raise self._failure(error, is_begun=is_begun) from None
        try:
            rest = draft.finish()
        except EngineError as error:
            raise self.error(self._quoted(str(error))) from None
        if rest and on_text is not None:
            on_text(rest)

    def _failure(self, error: Exception, *, is_begun: bool) -> Exception:
        """Return what a lost or silent connection stands for; `is_begun`: the endpoint had begun to answer."""
        said = f"{type(error).__name__}: {self._quoted(str(error)) or 'no details'}"
        if isinstance(error, httpx.ConnectTimeout):
            return _PassingError(self.error("no connection in time; check base_url, or raise timeout_s"))
        if isinstance(error, httpx.TimeoutException):
            return self.error(f"nothing came for {self._options.timeout_s:g} s; raise timeout_s, or lower max_tokens")
        if isinstance(error, httpx.DecodingError):
            return self.error(f"its reply cannot be decoded ({said})")
        if is_begun:
            return _PassingError(self.error(f"the connection failed in mid-reply ({said}); ask again"))
        if isinstance(error, httpx.ReadError | httpx.RemoteProtocolError):
            advice = "ask again; where that never helps, check base_url, http or https"
            return _PassingError(self.error(f"the connection failed before the reply ({said}); {advice}"))
        return _PassingError(self.error(f"the connection failed ({said}); check base_url"))

    async def _read_events(self, response: httpx.Response, on_text: OnText | None, draft: Draft) -> None:
        is_done = False
        async with aclosing(events(response.aiter_bytes())) as found:
            async for data in found:
                if data == "[DONE]":
                    is_done = True
                    break
                if data:
                    self._take(draft, data, on_text)
        if not is_done and not draft.is_ended:
            raise _PassingError(self.error("its stream broke off before the end of the reply; ask again"))

    def _take(self, draft: Draft, data: bytes | str, on_text: OnText | None) -> None:
        try:
            text = draft.take(data)
        except EngineError as error:
            raise self.error(self._quoted(str(error))) from None
        if text and on_text is not None:
            on_text(text)

    def _body(self, request: GenerationRequest, *, is_stream: bool) -> dict[str, Any]:
        sampling, options = request.sampling, self._options
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": message.role, "content": break_names(message.content)} for message in request.messages],
            "temperature": sampling.temperature,
            "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens": sampling.max_tokens,
            "stream": is_stream,
        }
        if sampling.top_p < 1.0:
            body["top_p"] = sampling.top_p
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.temperature > 0.0 and "seed" not in self._refused:
            body["seed"] = _seed(request)
        if options.top_logprobs and "logprobs" not in self._refused:
            body |= {"logprobs": True, "top_logprobs": options.top_logprobs}
        if is_stream and "stream_options" not in self._refused:
            body["stream_options"] = {"include_usage": True}
        if options.continue_final_message and request.messages[-1].role == "assistant":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body

    def _refusal(self, response: httpx.Response, content: bytes, body: dict[str, Any]) -> Exception:
        """Return what a status other than 200 stands for."""
        status = response.status_code
        try:
            tree = json.loads(content)
        except ValueError:
            tree = content.decode("utf-8", "replace")
        message = error_message(tree)
        said = self._quoted(message) or "no details"
        if error_field(tree, "code") == "context_length_exceeded" or re.search(r"maximum context length|context window", message):
            return PromptTooLongError(self._named(f"the prompt does not fit: {said}"))
        if status in (400, 422) and self._learn(f"{error_field(tree, 'param')} {message}", body):
            return _FieldRefusedError()
        if status in (401, 403):
            whose = (
                f"the key in {self._options.api_key_env}" if self._options.api_key_env else "a call without a key (api_key_env)"
            )
            return self.error(f"it refuses {whose} with status {status}: {said}")
        text = f"it answered with status {status}: {said}"
        if status == 429:
            overloaded = AgentOverloadedError(self._named(text))
            return _PassingError(overloaded, _retry_after_s(response.headers.get("retry-after", "")))
        if status == 408 or status >= 500:
            return _PassingError(self.error(text), _retry_after_s(response.headers.get("retry-after", "")))
        return self.error(text)

    def _learn(self, said: str, body: dict[str, Any]) -> bool:
        """Remember an optional field that a refusal names and the call held; tells whether there was one."""
        for name, word in _OPTIONAL.items():
            if re.search(rf"\b{word}\b", said) and name in body and name not in self._refused:
                self._refused.add(name)
                _LOG.warning("openai:%s refuses %s, which is no longer sent: %s", self._model, name, self._quoted(said))
                return True
        return False

    def _named(self, text: str) -> str:
        return f"openai:{self._model}: {text}"

    def _quoted(self, text: str) -> str:
        """Return a text of the endpoint or about it, on one line, short, without the key or a part of it."""
        clean = " ".join(self._conceal(text[:_MAX_READ_CHARS]).split())
        return redact_text(clean)[:_MAX_QUOTED_CHARS]


def read_key(variable: str | None) -> str:
    """Return the key in an environment variable, empty where none is named. Raises ConfigError, never with the key."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"engine_kwargs.api_key_env: the variable {variable} is not set where the engine runs, or empty; set it there "
            "before Ray is started, or set api_key_env to null for an endpoint without keys"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", key):  # else the HTTP library would refuse the header and show it
        raise ConfigError(f"engine_kwargs.api_key_env: the value of {variable} holds characters that no key has; set it again")
    return key


def _seed(request: GenerationRequest) -> int:
    """Return the request's seed, or one that its id always gives, 31 bits."""
    if request.sampling.seed is not None:
        return request.sampling.seed
    return int.from_bytes(hashlib.sha256(request.call_id.encode()).digest()[:4], "little") >> 1


def _retry_after_s(value: str) -> float | None:
    """Return the seconds of a Retry-After header, given as seconds or as a date; None where it says nothing."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


_TEMPLATE_CHARS = 16
"""What a chat template adds to a message, in an estimate of its length."""


@dataclass(slots=True)
class _Room:
    """What belongs to one event loop: the connections, and the places of calls in flight."""

    loop: asyncio.AbstractEventLoop
    client: httpx.AsyncClient
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
        self._endpoint = Endpoint(model, options)
        self._is_told = False
        self._is_closed = False
        self._room: _Room | None = None

    @property
    def label(self) -> str:
        """Engine and the options that may change numbers, such as `openai/top20/vocab128000`."""
        return f"openai/top{self._options.top_logprobs}/vocab{self._options.vocab_size}"

    @property
    def num_running(self) -> int:
        """Calls in flight at this moment, those that wait for a place included."""
        return len(self._room.limits) if self._room else 0

    def count_prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Return an estimate of a conversation's prompt in tokens, by its length: an endpoint shows no tokenizer."""
        return estimated_tokens(_prompt_chars(messages))

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
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        answering = asyncio.create_task(self._answer(request, pieces.put_nowait))
        answering.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield TextDelta(text=piece)
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
            await room.client.aclose()

    async def _answer(self, request: GenerationRequest, on_text: OnText | None) -> Generation:
        started = time.perf_counter()
        self._check(request)
        room, drafts, deadline = self._room_here(), list[Draft](), request.deadline_unix_s
        placed: float | None = None
        is_late = False
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.time())) as limit:
                room.limits.add(limit)
                try:
                    async with room.places:
                        placed = time.perf_counter()
                        await self._endpoint.answer(room.client, request, on_text, drafts)
                finally:
                    room.limits.discard(limit)
        except TimeoutError:
            if self._is_closed:
                raise self._endpoint.error("the engine was closed") from None
            if not drafts or not drafts[-1].is_begun:
                raise DeadlineError(f"openai:{self._model}: the deadline passed before the endpoint's reply") from None
            is_late = not drafts[-1].is_ended
        self._tell_if_unlisted(drafts[-1])
        return drafts[-1].generation(
            prompt_tokens=self.count_prompt_tokens(request.messages),
            engine_ms=(time.perf_counter() - started) * 1e3,
            queue_ms=((placed or started) - started) * 1e3,
            is_late=is_late,
        )

    def _check(self, request: GenerationRequest) -> None:
        if self._is_closed:
            raise self._endpoint.error("the engine is closed; build a new one")
        if request.adapter is not None:
            raise self._endpoint.error(
                f"adapter: value seen: {request.adapter!r}; an endpoint serves adapters as models of their own; set it to null"
            )
        if not request.messages:
            raise self._endpoint.error("messages: value seen: none; at least one message is needed")

    def _room_here(self) -> _Room:
        """Return what belongs to the running event loop; connections of a loop that has ended went with it."""
        loop = asyncio.get_running_loop()
        if self._room is None or self._room.loop is not loop:
            client = self._endpoint.connect(self._max_num_seqs)
            self._room = _Room(loop=loop, client=client, places=asyncio.Semaphore(self._max_num_seqs))
        return self._room

    def _tell_if_unlisted(self, draft: Draft) -> None:
        """Warn, once, of an endpoint that gives the gate nothing to learn from."""
        if self._is_told or draft.has_entropy or not draft.is_begun:
            return
        self._is_told = True
        _LOG.warning(
            "openai:%s lists no log-probabilities: the entropy of its replies is unknown, so they never count as sure, and the "
            "gate learns nothing of its agents",
            self._model,
        )


def _prompt_chars(messages: Sequence[Message]) -> int:
    return sum(len(message.content) + _TEMPLATE_CHARS for message in messages)
