"""What P5 replays: the engine calls of answered queries, with what had to be done before each.

A recording engine stands between the agents and the real one. Its notes become a graph: a query is a row of steps, a
step holds the chains of its agents, a chain is one call, or several around tool results. Replaying it on a bare engine
computes nothing in between, so it is the most that any orchestration of the same calls could reach.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmoa.protocols import Engine
from dmoa.types import Generation, GenerationRequest, TextDelta

Chain = tuple[GenerationRequest, ...]
"""One agent's calls in one step, each after the one before."""
StepCalls = tuple[Chain, ...]
"""Chains that run side by side."""
QueryCalls = tuple[StepCalls, ...]
"""Steps, each after all of the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCall:
    """One generation as it happened."""

    request: GenerationRequest
    began_s: float
    """time.perf_counter() at the engine's accept, as `ended_s` at its last token: one clock for the whole machine."""
    ended_s: float
    completion_tokens: int


class RecordingEngine:
    """An engine that notes every generation of another in a file, at once; implements `protocols.Engine`.

    `before`: done with the other engine once, before the first call is timed; nothing of it is noted.
    """

    def __init__(self, engine: Engine, path: Path, *, before: Callable[[Engine], Awaitable[None]] | None = None) -> None:
        self._engine = engine
        self._path = path
        self._before = before
        self._opening = asyncio.Lock()

    @property
    def label(self) -> str:
        """The other engine's."""
        return self._engine.label

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate and note it. Raises as the other engine."""
        await self._open()
        began_s = time.perf_counter()
        generation = await self._engine.generate(request)
        self._note(request, began_s, generation)
        return generation

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta | Generation]:
        """Generate piece by piece and note it. Raises as the other engine."""
        await self._open()
        began_s = time.perf_counter()
        async for item in self._engine.stream(request):
            if isinstance(item, Generation):
                self._note(request, began_s, item)
            yield item

    async def close(self) -> None:
        """Close the other engine."""
        await self._engine.close()

    async def _open(self) -> None:
        async with self._opening:
            if self._before is not None:
                await self._before(self._engine)
                self._before = None

    def _note(self, request: GenerationRequest, began_s: float, generation: Generation) -> None:
        call = RecordedCall(
            request=request, began_s=began_s, ended_s=time.perf_counter(), completion_tokens=generation.completion_tokens
        )
        with self._path.open("ab", buffering=0) as file:
            file.write(pickle.dumps(call))


def read_calls(path: Path) -> list[RecordedCall]:
    """Return the calls that a recording engine noted."""
    calls: list[RecordedCall] = []
    with path.open("rb") as file:
        while file.peek(1):
            calls.append(pickle.load(file))  # noqa: S301 -- written by this bench a moment ago
    return calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Work between the first call and the last token."""

    tokens: int
    """Completion tokens."""
    seconds: float
    under_way: float
    """Calls at the engine, mean over the window."""

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens per second."""
        return self.tokens / self.seconds


def window_of(calls: Sequence[RecordedCall]) -> Window:
    """Return the window of recorded calls."""
    seconds = max(call.ended_s for call in calls) - min(call.began_s for call in calls)
    return Window(
        tokens=sum(call.completion_tokens for call in calls),
        seconds=seconds,
        under_way=sum(call.ended_s - call.began_s for call in calls) / seconds,
    )


def graph_of(calls: Iterable[RecordedCall]) -> tuple[QueryCalls, ...]:
    """Return the queries behind recorded calls, in the order in which they began.

    Reads `call_id`, which is `trace/step/agent`, with `#n` behind it from the second call of an agent's tool loop on.
    """
    graph: dict[str, dict[int, dict[str, list[GenerationRequest]]]] = {}
    for call in sorted(calls, key=lambda call: call.began_s):
        trace, step, agent = call.request.call_id.split("/")
        steps = graph.setdefault(trace, {})
        steps.setdefault(int(step), {}).setdefault(agent.partition("#")[0], []).append(call.request)
    return tuple(tuple(tuple(map(tuple, steps[number].values())) for number in sorted(steps)) for steps in graph.values())


async def replay(engine: Engine, graph: Sequence[QueryCalls], in_flight: int) -> Window:
    """Run a graph on a bare engine, `in_flight` queries at a time, and return its window."""
    waiting = iter(graph)
    done: list[RecordedCall] = []

    async def chain(requests: Chain) -> None:
        for request in requests:
            done.append(await _timed(engine, request))

    async def worker() -> None:
        for query in waiting:
            for step in query:
                await asyncio.gather(*map(chain, step))

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return window_of(done)


async def replay_flat(engine: Engine, graph: Sequence[QueryCalls]) -> Window:
    """Run all calls of a graph as one list, none waiting for another, as the engine has room."""
    requests = [request for query in graph for step in query for calls in step for request in calls]
    return window_of(await asyncio.gather(*(_timed(engine, request) for request in requests)))


async def _timed(engine: Engine, request: GenerationRequest) -> RecordedCall:
    began_s = time.perf_counter()
    generation = await engine.generate(request)
    return RecordedCall(
        request=request, began_s=began_s, ended_s=time.perf_counter(), completion_tokens=generation.completion_tokens
    )
