"""What the parts of dmoa ask of each other, as protocols.

The orchestrator and the policies see nothing but these, so the same loop runs in a unit test, in one process, over
Ray Serve handles and over HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Protocol

from dmoa.errors import DmoaError, NoAgentError
from dmoa.types import (
    AgentCall,
    AgentReply,
    Answer,
    Event,
    FloatArray,
    Generation,
    GenerationRequest,
    Query,
    QueryState,
    RouteDecision,
    RouteRequest,
    StepPlan,
    StepRecord,
    Stop,
    SummarizerRecord,
    TextDelta,
)

Turn = Callable[[], AbstractAsyncContextManager[None]]
"""What a call is made in: entering may wait, for the moment of a call that stands back behind others."""


class Engine(Protocol):
    """Runs one language model for many agents at once."""

    @property
    def label(self) -> str:
        """Engine and the options that may change numbers, such as `transformers/float32`."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate one continuation.

        Cancelling the awaiting task frees the request's place in the batch within two token steps. Raises EngineError
        for a request that can never run (a prompt over the model's length, an unknown adapter).
        """

    def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta | Generation]:
        """Generate one continuation, yielding pieces of text and last, exactly once, the whole Generation."""

    async def close(self) -> None:
        """Stop the engine and free its memory; requests in flight fail with EngineError."""


class AgentClient(Protocol):
    """Reaches the agents of a pool, wherever they run."""

    async def call(self, call: AgentCall) -> AgentReply:
        """Ask one agent. An agent's own failure is a reply with status `failed`.

        Raises AgentUnavailableError (its place is gone; the same call may succeed later) and AgentOverloadedError.
        """

    def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        """Ask one agent, yielding pieces of text and last, exactly once, the whole reply. Raises as `call` does."""

    async def ping(self, agent: str) -> None:
        """Return once the agent's place answers; waits for one that is coming up. Raises AgentUnavailableError."""


class Encoder(Protocol):
    """Turns texts into sentence embeddings."""

    async def embed(self, texts: Sequence[str]) -> list[FloatArray]:
        """Return one unit-length float32 [D] per text, in order; a text over the window is the mean of its chunks."""


class Router(Protocol):
    """Decides which agents a step activates, and keeps track of who is alive."""

    async def route(self, request: RouteRequest) -> RouteDecision:
        """Decide one step. Raises NoAgentError if every agent is unavailable, RoutingError for an unknown version."""

    def report_unavailable(self, agent: str, reason: str, masked_s: float = 0.0) -> None:
        """Tell that an agent's place died; returns at once, the agent is masked for a while and until it answers again."""


class Policy(Protocol):
    """Decides, step by step, which agents to ask; a fixed topology is a fixed schedule."""

    @property
    def name(self) -> str:
        """The name clients use, as in `POOL/NAME`."""

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Return whom to ask next, or stop. Reads the state, changes nothing."""


def ended(policy: Policy, state: QueryState) -> str:
    """Tell a policy that a query is over, where it has a method `ended` to know it by; return the query's answer."""
    tell: Callable[[QueryState], str] | None = getattr(policy, "ended", None)
    return tell(state) if tell else state.summary


class SwarmClient(Protocol):
    """Reaches a swarm: in this process, on Serve, or a server behind a URL."""

    def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        """Answer one query: steps as they finish, pieces of the final text if it streams, last the Answer, exactly once.

        The whole iteration runs in one task; closing or cancelling it cancels the agent calls in flight. `agent` is the one
        agent of the `single` policy, or the gate of `dmoa:NAME`, else None. Raises NoAgentError, EmptyAnswerError,
        DeadlineError, and RequestError for what only the engine can refuse (a prompt over the model's length).
        """

    async def close(self) -> None:
        """Free what the client holds."""


OpenSwarm = Callable[[], SwarmClient]
"""Builds a client where it works, maybe in another process; must be picklable, what it builds need not be. May block."""


async def final_answer(swarm: SwarmClient, query: Query, policy: str, agent: str | None = None) -> Answer:
    """Ask a swarm and return the Answer alone. Raises as `SwarmClient.ask` does, with the calls of all steps before."""
    answer, calls = None, list[AgentReply | SummarizerRecord]()
    try:
        async with aclosing(swarm.ask(query, policy, agent)) as events:
            async for event in events:
                if isinstance(event, Answer):
                    answer = event
                elif isinstance(event, StepRecord):
                    calls += event.calls
    except DmoaError as error:
        error.replies = error.replies or tuple(calls)
        raise
    if answer is None:
        raise NoAgentError("the query ended without an answer; ask again")
    return answer
