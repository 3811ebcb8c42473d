"""The `openai` engine: a model behind somebody's OpenAI-compatible endpoint, for many agents at once.

Bounds the calls in flight by places, deadlines and `close`; `openai_endpoint` sends them. Entropies come from the listed
log-probabilities, marked `truncated`; where none are listed the entropy of a reply is unknown (no tokens in its sums), never
made up. Loads neither torch nor ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import httpx

from dmoa.agents.openai_endpoint import Endpoint, OnText
from dmoa.agents.openai_replies import Draft, estimated_tokens
from dmoa.config import OpenaiOptions
from dmoa.errors import DeadlineError
from dmoa.types import Generation, GenerationRequest, Message, TextDelta

_LOG = logging.getLogger("dmoa.openai")
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
