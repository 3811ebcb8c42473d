"""A client of a running server, for `dmoa run --url`, the benches and the demo: the official openai client, thinly.

It adds what OpenAI's objects do not name: the swarm's options going in, the steps and the `dmoa` object coming out, and
dmoa's own errors in place of HTTP statuses.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from dmoa.errors import DeadlineError, DmoaError, EmptyAnswerError, NoAgentError, RequestError
from dmoa.loopback import asked_wait_s, uses_proxies
from dmoa.types import Message, TextDelta
from dmoa.validation import Conceal, redact_text

_LOG = logging.getLogger("dmoa.client")
BUSY_S, LEAST_WAIT_S = 1.0, 0.05
"""How long to wait where a busy server does not say it, and at least."""
T = TypeVar("T")
_KINDS: dict[str, type[DmoaError]] = {
    "no_agent": NoAgentError,
    "empty_answer": EmptyAnswerError,
    "deadline_exceeded": DeadlineError,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLine:
    """The readable line of a finished step, as the server streams it."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteReply:
    """A server's whole reply."""

    text: str
    reasoning: str = ""
    """What the model of the final call thought before."""
    finish_reason: str
    model: str
    usage: dict[str, Any]
    """prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details, completion_tokens_details."""
    dmoa: dict[str, Any]
    """The reply's `dmoa` object, with the fields of `dmoa.trace.ReplyDmoa`."""


class ServerClient:
    """Asks a running server; use it as `async with`, or call `close`."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        timeout_s: float = 600.0,
        patience_s: float = 0.0,
        http_client: DefaultAsyncHttpxClient | None = None,
    ) -> None:
        """`patience_s`: how long a request that a busy server refuses is sent again, when the server says (Retry-After)."""
        self.waits = 0
        """Requests that were sent again."""
        self._patience_s, self._timeout_s = patience_s, timeout_s
        self.url = url.rstrip("/").removesuffix("/v1")
        self._conceal = Conceal(api_key)
        if http_client is None and not uses_proxies(self.url):
            http_client = DefaultAsyncHttpxClient(trust_env=False)
        # The openai client insists on some key. No retries of its own: it repeats queries that were begun, too.
        self._openai = AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=api_key or "none", timeout=timeout_s, max_retries=0, http_client=http_client
        )

    async def __aenter__(self) -> ServerClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        dmoa: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> RemoteReply:
        """Return the reply to a conversation.

        `model` None is the server's pool; `dmoa` and `sampling` hold fields of the request. Raises RequestError for
        what the server refuses, NoAgentError, EmptyAnswerError, DeadlineError as the server does, and DmoaError where
        it cannot be reached.
        """
        with self._errors():
            name = model or await self.pool()
            reply = await self._patiently(
                lambda: self._openai.chat.completions.create(
                    model=name, messages=_plain(messages), extra_body={"dmoa": dict(dmoa or {})}, **dict(sampling or {})
                )
            )
        if not isinstance(reply, ChatCompletion) or not reply.choices:
            raise self._foreign("its answer is no chat completion")
        choice = reply.choices[0]
        return RemoteReply(
            text=choice.message.content or "",
            reasoning=(choice.message.model_extra or {}).get("reasoning_content") or "",
            finish_reason=choice.finish_reason,
            model=reply.model,
            usage=reply.usage.model_dump(exclude_none=True) if reply.usage else {},
            dmoa=_extra(reply, "dmoa"),
        )

    async def stream(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        dmoa: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[StepLine | TextDelta | RemoteReply]:
        """Yield the steps and pieces of the answer as they come, and last, exactly once, the whole reply. As `chat`."""
        with self._errors():
            chunks = await self._openai.chat.completions.create(
                model=model or await self.pool(),
                messages=_plain(messages),
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"dmoa": dict(dmoa or {})},
                **(sampling or {}),
            )
            texts: dict[bool, list[str]] = {False: [], True: []}
            finish_reason, used_model = "", ""
            record: dict[str, Any] = {}
            usage: dict[str, Any] = {}
            async with chunks:
                async for chunk in chunks:
                    used_model = chunk.model
                    record = _extra(chunk, "dmoa") or record
                    usage = chunk.usage.model_dump(exclude_none=True) if chunk.usage else usage
                    finish_reason = next(
                        (choice.finish_reason for choice in chunk.choices if choice.finish_reason), finish_reason
                    )
                    for event in _events(chunk):
                        if isinstance(event, TextDelta):
                            texts[event.is_reasoning].append(event.text)
                        yield event
        if not finish_reason:
            raise self._foreign("its stream broke off before the answer was whole")
        yield RemoteReply(
            text="".join(texts[False]),
            reasoning="".join(texts[True]),
            finish_reason=finish_reason,
            model=used_model,
            usage=usage,
            dmoa=record,
        )

    async def models(self) -> list[str]:
        """Return every model name of the server, the pool first. Raises DmoaError where what answers lists none."""
        with self._errors():
            names = _names(await self._openai.get("/models", cast_to=object))
        if not names:
            raise self._foreign("its answer lists no models")
        return names

    async def pool(self) -> str:
        """Return the server's pool name."""
        return (await self.models())[0]

    async def served(self) -> tuple[str, str | None]:
        """Return the name of the server's pool, and its fingerprint unless the router is away."""
        with self._errors():
            found = await self._openai.get("/dmoa/status", cast_to=object)
        if not isinstance(found, dict) or not isinstance(found.get("pool"), str):
            raise self._foreign("its answer names no pool")
        return found["pool"], (found.get("router") or {}).get("pool_fingerprint")

    async def ready(self) -> dict[str, str]:
        """Return agent -> "up", "cold" (scaled to zero, and started when it is asked), or the reason why it is neither."""
        with self._errors():
            try:
                return _agents(await self._openai.get(f"{self.url}/readyz", cast_to=object))
            except openai.InternalServerError as error:
                # A proxy in front of the server has its own 503, without the agents' states.
                if "application/json" not in error.response.headers.get("content-type", ""):
                    raise
                return _agents(error.response.json())

    async def trace(self, trace_id: str) -> dict[str, Any]:
        """Return the trace of a query made with the same key. Raises RequestError (404)."""
        with self._errors():
            found = await self._patiently(lambda: self._openai.get(f"/dmoa/traces/{trace_id}", cast_to=object))
        return cast(dict[str, Any], found)

    async def _patiently(self, send: Callable[[], Awaitable[T]]) -> T:
        """Send a request, again while the server is busy (429, or 503 with Retry-After), as long as patience lasts."""
        give_up = time.monotonic() + self._patience_s
        while True:
            try:
                return await send()
            except openai.APIStatusError as error:
                asked_s = asked_wait_s(error.response.headers)
                wait_s = max(LEAST_WAIT_S, BUSY_S if asked_s is None else asked_s)
                is_busy = error.status_code == 429 or (error.status_code == 503 and asked_s is not None)
                if not is_busy or time.monotonic() + wait_s > give_up:
                    raise
                self.waits += 1
                if self.waits.bit_count() == 1:  # at twice as many each time
                    _LOG.warning("%s is busy (%d): requests sent again: %d", self.url, error.status_code, self.waits)
            await asyncio.sleep(wait_s * (1.0 + random.random() / 4))  # noqa: S311 -- no secret

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except openai.APITimeoutError as error:
            raise DmoaError(f"{self.url}: no answer within {self._timeout_s:g} s; ask for less, or set a deadline") from error
        except openai.APIConnectionError as error:
            raise DmoaError(self._clean(f"{self.url}: cannot be reached ({error}); is the server running there?")) from error
        except openai.APIError as error:
            body = error.body if isinstance(error.body, Mapping) else {}
            message = self._clean(f"{self.url}: {body.get('message') or error.message}")
            if isinstance(error, openai.APIStatusError) and 400 <= error.status_code < 500:
                raise RequestError(message, param=error.param, code=error.code, status=error.status_code) from error
            raise _KINDS.get(error.code or "", DmoaError)(message) from error
        except json.JSONDecodeError as error:
            raise self._foreign("its answer is not JSON") from error

    def _foreign(self, seen: str) -> DmoaError:
        """Return the error for an answer with a good status that no server of ours gave."""
        return DmoaError(self._clean(f"{self.url}: {seen}; is it a dmoa server, or a page before one?"))

    def _clean(self, text: str) -> str:
        """Return a text about the server without the key and without other secrets."""
        return redact_text(self._conceal(text))


def _events(chunk: ChatCompletionChunk) -> Iterator[StepLine | TextDelta]:
    for choice in chunk.choices:
        extra = choice.delta.model_extra or {}
        said = extra.get("reasoning_content")
        if said:
            yield TextDelta(text=said, is_reasoning=True) if extra.get("dmoa_step") is None else StepLine(text=said)
        if choice.delta.content:
            yield TextDelta(text=choice.delta.content)


def _names(found: object) -> list[str]:
    listed = found.get("data") if isinstance(found, dict) else None
    names = [one.get("id") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return [name for name in names if isinstance(name, str)]


def _agents(found: object) -> dict[str, str]:
    return dict(found["agents"]) if isinstance(found, dict) and "agents" in found else {}


def _extra(reply: Any, name: str) -> dict[str, Any]:
    return dict((reply.model_extra or {}).get(name) or {})


def _plain(messages: Sequence[Message]) -> list[ChatCompletionMessageParam]:
    return [cast(ChatCompletionMessageParam, {"role": message.role, "content": message.content}) for message in messages]
