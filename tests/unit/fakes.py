"""Small deterministic stand-ins behind the protocols: agents with set fates, a policy with a set schedule, a clock that jumps."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from dmoa.agents.summarizer import LlmSummarizer, SelectSummarizer
from dmoa.config import SummarizerConfig
from dmoa.core.gate import Gate, GateSpec
from dmoa.dispatch import AgentCard, Dispatcher
from dmoa.errors import AgentOverloadedError, AgentUnavailableError
from dmoa.orchestrator import Event, Orchestrator
from dmoa.protocols import Policy
from dmoa.routing import LocalRouter
from dmoa.types import (
    Activation,
    AgentCall,
    AgentReply,
    Answer,
    FinishReason,
    FloatArray,
    Limits,
    Query,
    QueryState,
    RouteDecision,
    Sampling,
    StepPlan,
    StepRecord,
    Stop,
    TextDelta,
)

T = TypeVar("T")
DIM = 4
"""Width of the fake embeddings."""


@dataclass(frozen=True, kw_only=True)
class Say:
    """The agent answers; streamed in `pieces`, or else whole."""

    text: str
    nats: float = 0.5
    tokens: int = 4
    prompt_tokens: int = 10
    finish_reason: FinishReason = "stop"
    pieces: tuple[str, ...] = ()
    after: asyncio.Event | None = None
    """Answers only once this is set."""


@dataclass(frozen=True, kw_only=True)
class Lose:
    """The agent's place dies, when streaming after `pieces` were sent."""

    error: str = "replica died"
    pieces: tuple[str, ...] = ()
    kind: type[AgentUnavailableError] = AgentUnavailableError


@dataclass(frozen=True)
class Refuse:
    """The agent's queue is full."""


@dataclass(frozen=True, kw_only=True)
class Fail:
    """The agent replies that it failed, when streaming after `pieces` were sent."""

    error: str = "out of memory"
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Hang:
    """The agent never answers, when streaming after `pieces` were sent."""

    pieces: tuple[str, ...] = ()


Fate = Say | Lose | Refuse | Fail | Hang


class FakeAgents:
    """Implements `AgentClient`: every call of an agent meets the agent's next fate, the last one for ever after."""

    def __init__(self, fates: Mapping[str, Fate | Sequence[Fate]]) -> None:
        self._fates = {name: (fate,) if isinstance(fate, Fate) else tuple(fate) for name, fate in fates.items()}
        self.calls: list[AgentCall] = []
        self.streamed: list[str] = []
        self.cancelled: list[str] = []
        self._waiting: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def call(self, call: AgentCall) -> AgentReply:
        async for item in self._play(call):
            if isinstance(item, AgentReply):
                return item
        raise AssertionError("a fate ends with a reply")

    async def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        self.streamed.append(call.agent)
        async for item in self._play(call):
            yield item

    async def ping(self, agent: str) -> None:
        """A place whose next fate is to hang is still coming up; every other one answers."""
        fates = self._fates[agent]
        if isinstance(fates[min(len(self.calls_of(agent)), len(fates) - 1)], Hang):
            await asyncio.Event().wait()

    def calls_of(self, agent: str) -> list[AgentCall]:
        return [call for call in self.calls if call.agent == agent]

    async def until_waiting(self, *agents: str) -> None:
        """Return once each of the agents has had a call that waits."""
        for agent in agents:
            await self._waiting[agent].wait()

    async def _play(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        fates = self._fates[call.agent]
        fate = fates[min(len(self.calls_of(call.agent)), len(fates) - 1)]
        self.calls.append(call)
        await asyncio.sleep(0)
        if isinstance(fate, Refuse):
            raise AgentOverloadedError(f"agent {call.agent!r}: its queue is full")
        if isinstance(fate, Say):
            if fate.after is not None:
                await self._wait(call.agent, fate.after)
            for piece in fate.pieces or (fate.text,):
                yield TextDelta(text=piece)
            yield said(call.agent, fate)
            return
        for piece in fate.pieces:
            yield TextDelta(text=piece)
        if isinstance(fate, Lose):
            raise fate.kind(fate.error)
        if isinstance(fate, Hang):
            await self._wait(call.agent, asyncio.Event())
        yield AgentReply(agent=call.agent, status="failed", error=fate.error if isinstance(fate, Fail) else None)

    async def _wait(self, agent: str, event: asyncio.Event) -> None:
        self._waiting[agent].set()
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancelled.append(agent)
            raise


def said(agent: str, fate: Say) -> AgentReply:
    """The reply of an agent that answers: every token has the same entropy."""
    return AgentReply(
        agent=agent,
        status="ok",
        text=fate.text,
        finish_reason=fate.finish_reason,
        entropy_sum_nats=fate.nats * fate.tokens,
        entropy_sq_sum=fate.nats**2 * fate.tokens,
        entropy_tokens=fate.tokens,
        prompt_tokens=fate.prompt_tokens,
        completion_tokens=fate.tokens,
    )


class FakeEncoder:
    """Implements `Encoder` with unit vectors that depend on the text alone; zeros for the empty text."""

    def __init__(self) -> None:
        self.texts: list[list[str]] = []

    async def embed(self, texts: Sequence[str]) -> list[FloatArray]:
        self.texts.append(list(texts))
        return [embedding(text) for text in texts]


def embedding(text: str) -> FloatArray:
    """The fake embedding of a text, [DIM]."""
    if not text:
        return np.zeros(DIM, np.float32)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    row = np.random.default_rng(seed).standard_normal(DIM)
    return np.asarray(row / np.linalg.norm(row), dtype=np.float32)


def gate_spec(agents: Sequence[str], **changes: Any) -> GateSpec:
    """The spec of a tiny gate."""
    values: dict[str, Any] = {
        "preset": "default",
        "head": "linear",
        "hidden": 3,
        "temperature": 1.0,
        "agents": tuple(agents),
        "embedding_dim": DIM,
        "rule": "top_mass",
        "mass": 0.8,
        "max_agents": 4,
        "cascade": False,
        "score": "raw",
    }
    return GateSpec(**(values | changes))


def fixed_gate(probabilities: Mapping[str, float], **changes: Any) -> Gate:
    """A gate that gives these probabilities whatever it reads: all weights are 0, the head's bias is log p."""
    gate = Gate(gate_spec(tuple(probabilities), **changes))
    with torch.no_grad():
        gate.head_bias.copy_(torch.tensor([math.log(p) for p in probabilities.values()]))
    return gate


def router_of(gate: Gate, version: str = "v1") -> LocalRouter:
    """A router that holds one gate."""
    router = LocalRouter()
    router.install(version, gate)
    return router


def decision(probabilities: Mapping[str, float], k: int, *, masked: tuple[str, ...] = (), **changes: Any) -> RouteDecision:
    """A decision as a gate would make it."""
    names = tuple(probabilities)
    ranking = sorted((i for i, name in enumerate(names) if name not in masked), key=lambda i: -probabilities[names[i]])
    values: dict[str, Any] = {
        "gate_version": "v1",
        "agents": names,
        "probability_A": np.asarray(list(probabilities.values()), dtype=np.float32),
        "ranking": tuple(ranking),
        "k": k,
        "mass": sum(probabilities[names[i]] for i in ranking[:k]),
        "masked": masked,
        "hidden_H": np.zeros(3, np.float32),
    }
    return RouteDecision(**(values | changes))


def asks(*agents: str, reserves: Sequence[str] = (), **changes: Any) -> StepPlan:
    """A plan that asks agents, each with probability 1 / their number."""
    return StepPlan(
        activations=tuple(Activation(agent=name, probability=1 / len(agents)) for name in agents),
        reserves=tuple(Activation(agent=name, probability=0.0) for name in reserves),
        **changes,
    )


class Schedule:
    """Implements `Policy`: one plan per step, the last one for ever after. An exception is raised once, as the last for ever."""

    name = "schedule"

    def __init__(self, *plans: StepPlan | Stop | Exception) -> None:
        self._plans = list(plans)
        self.states: list[QueryState] = []

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        index = min(len(state.steps), len(self._plans) - 1)
        plan = self._plans[index]
        if isinstance(plan, Exception):
            if index < len(self._plans) - 1:
                del self._plans[index]
            raise plan
        self.states.append(state)
        return plan


def query(text: str = "What is 12 + 7?", *, sampling: dict[str, Any] | None = None, **limits: Any) -> Query:
    """One query."""
    return Query(trace_id="t1", text=text, sampling=sampling or {}, limits=Limits(**limits))


def state_of(asked: Query, **changes: Any) -> QueryState:
    """The state of a query before its first step."""
    return QueryState(query=asked, started_unix_s=0.0, **changes)


def sheet(name: str, place: str | None = None, **changes: Any) -> AgentCard:
    """What is known of an agent; without `place` all agents live together in `llm`."""
    values: dict[str, Any] = {
        "profile": f"You are {name}.",
        "tools_text": "",
        "sampling": Sampling(max_tokens=50),
        "place": place or "llm",
    }
    return AgentCard(name=name, **(values | changes))


def orchestrator_of(
    agents: FakeAgents,
    names: Sequence[str],
    *,
    router: LocalRouter | None = None,
    llm: bool = False,
    places: Mapping[str, str] | None = None,
) -> Orchestrator:
    """An orchestrator over fake agents; `llm`: the summarizer is the agent `summarizer`."""
    sheets = {name: sheet(name, (places or {}).get(name)) for name in names}
    config = SummarizerConfig(mode="llm", llm="tiny") if llm else SummarizerConfig()
    return Orchestrator(
        asker=Dispatcher(agents=agents, sheets=sheets, router=router, is_select=not llm),
        summarizer=LlmSummarizer(agents, config) if llm else SelectSummarizer(),
        summarizer_sampling=Sampling(max_tokens=70),
        is_select=not llm,
    )


async def events_of(orchestrator: Orchestrator, asked: Query, policy: Policy) -> list[Event]:
    """Everything that a query yields."""
    return [event async for event in orchestrator.answer(asked, policy)]


async def answer_of(orchestrator: Orchestrator, asked: Query, policy: Policy) -> Answer:
    """The answer of a query, after a check that it comes exactly once and last, and that the steps come in order."""
    events = await events_of(orchestrator, asked, policy)
    answers = [event for event in events if isinstance(event, Answer)]
    assert len(answers) == 1
    assert events[-1] is answers[0]
    assert [event for event in events if isinstance(event, StepRecord)] == list(answers[0].steps)
    assert [step.step for step in answers[0].steps] == list(range(len(answers[0].steps)))
    return answers[0]


class _JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self._jumped_s = 0.0
        select = self._selector.select  # type: ignore[attr-defined]  # asyncio's own selector

        def jump(timeout: float | None = None) -> Any:
            assert timeout is not None, "nothing is left to wait for"
            self._jumped_s += timeout
            return select(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._jumped_s


def jumping(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Run a coroutine on a clock that jumps; return its result and the seconds that passed on that clock."""
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
        result = runner.run(work)
        return result, runner.get_loop().time()
