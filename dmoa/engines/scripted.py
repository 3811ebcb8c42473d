"""The `scripted` engine: deterministic replies, entropies, delays and failures set by configuration, without a model.

Stands where a real engine stands, in tests and wherever the cost of everything but the model is measured.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

from dmoa.core.entropy_scope import ScopedEntropy, scoped_entropy
from dmoa.core.reasoning import split_reasoning
from dmoa.engine_options import ScriptedOptions
from dmoa.errors import EngineError
from dmoa.types import EntropySum, Generation, GenerationRequest, TextDelta, TokenUsage

_MIN_NATS, _MAX_NATS = 0.05, 2.0
_MAX_DELTAS = 4


class ScriptedEngine:
    """Implements `protocols.Engine` from a table of replies; the same request always gets the same generation.

    A reply is the agent's entry in `replies`, else an echo of the question: the opening paragraph of the last user
    message, where `agents.prompts` puts it (the whole message would double the history with every step). As with a model,
    a reply ends before a stop string, and a continued reply goes on behind the stop string where it was cut.
    """

    label = "scripted"

    def __init__(self, options: ScriptedOptions) -> None:
        self._options = options
        self._closed = asyncio.Event()
        self.in_flight = 0
        """Requests that are being answered now."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate one continuation. Raises EngineError for an agent that is set to fail and after `close`."""
        with self._at_work(request) as started:
            generation = self._generation(request)
            await self._wait(self._delay_s(request))
            return _timed(generation, started)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta | Generation, None]:
        """Yield the reply in up to four pieces, the delay spread over them, then the generation."""
        with self._at_work(request) as started:
            generation = self._generation(request)
            size = max(1, math.ceil(len(generation.text) / _MAX_DELTAS))
            pieces = [generation.text[i : i + size] for i in range(0, len(generation.text), size)] or [""]
            for piece in pieces:
                await self._wait(self._delay_s(request) / len(pieces))
                if piece:
                    yield TextDelta(text=piece)
            yield _timed(generation, started)

    @contextmanager
    def _at_work(self, request: GenerationRequest) -> Iterator[float]:
        """Count the request as in flight; yields time.perf_counter() of its start. Raises EngineError where it is to fail."""
        if request.agent in self._options.failing:
            raise EngineError(f"agent {request.agent!r}: scripted to fail (engine_kwargs.failing); remove it there")
        self.in_flight += 1
        try:
            yield time.perf_counter()
        finally:
            self.in_flight -= 1

    def _delay_s(self, request: GenerationRequest) -> float:
        return self._options.delays_ms.get(request.agent, self._options.delay_ms) / 1e3

    async def close(self) -> None:
        """Refuse new requests and fail those in flight with EngineError."""
        self._closed.set()

    async def _wait(self, delay_s: float) -> None:
        if delay_s > 0:
            try:
                async with asyncio.timeout(delay_s):
                    await self._closed.wait()
            except TimeoutError:
                return
        if self._closed.is_set():
            raise EngineError("scripted engine: closed; build a new one")

    def _generation(self, request: GenerationRequest) -> Generation:
        query = _question(request)
        text = _continuation(self._options.replies.get(request.agent, "{query}").replace("{query}", query), request)
        tokens = min(self._options.tokens, request.sampling.max_tokens)
        text = text[: len(text) * tokens // self._options.tokens]
        mean_nats = self._options.entropies_nats.get(request.agent)
        if mean_nats is None:
            mean_nats = _MIN_NATS + (_MAX_NATS - _MIN_NATS) * _fraction(request.agent, query)
        # Token entropies alternate between half and one and a half of the mean; an odd one out is the mean itself.
        swings = tokens // 2 * 2
        whole = EntropySum(sum_nats=mean_nats * tokens, sq_sum=mean_nats**2 * (tokens + 0.25 * swings), tokens=tokens)
        entropy, split = ScopedEntropy(whole, EntropySum(), 0), split_reasoning(text)
        if split.reasoning or split.is_open:
            nats = [mean_nats * (0.5 + i % 2) for i in range(swings)] + [mean_nats] * (tokens - swings)
            ends = [len(text) * (i + 1) // tokens for i in range(tokens)]
            entropy = scoped_entropy([text[start:end] for start, end in pairwise((0, *ends))], nats, split)
        return Generation(
            text=text,
            finish_reason="stop" if tokens == self._options.tokens else "length",
            entropy=entropy.answer,
            reasoning_entropy=entropy.thought,
            usage=TokenUsage(
                prompt_tokens=sum(len(message.content.split()) for message in request.messages),
                completion_tokens=tokens,
                reasoning_tokens=entropy.thought_tokens,
            ),
        )


def _timed(generation: Generation, started: float) -> Generation:
    return replace(generation, engine_ms=(time.perf_counter() - started) * 1e3)


def _question(request: GenerationRequest) -> str:
    """Return the opening paragraph of the last user message."""
    last = next((message.content for message in reversed(request.messages) if message.role == "user"), "")
    return last.strip().partition("\n\n")[0]


def _continuation(reply: str, request: GenerationRequest) -> str:
    """Return the part of a reply that this request asks for: before the first stop string, or behind those already met."""
    stops = [stop for stop in request.sampling.stop if stop]
    if not stops:
        return reply
    begun = request.messages[-1].content if request.messages and request.messages[-1].role == "assistant" else ""
    parts = re.split("|".join(re.escape(stop) for stop in stops), reply)
    met = sum(begun.count(stop) for stop in stops)
    return parts[met] if met < len(parts) else ""


def _fraction(*texts: str) -> float:
    """Return a number in [0, 1) that depends on the texts alone."""
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
