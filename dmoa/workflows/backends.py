"""Reaches a swarm for commands, evaluation and rollouts: a pool loaded in this process or in workers, or a running server.

What opens a backend for workers must be picklable; see `evaluation/answering` and `training/collect`.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError

from dmoa.config import Config
from dmoa.errors import ConfigError, DmoaError, EmptyAnswerError, RequestError
from dmoa.evaluation.answering import SwarmOutcome, ask_swarm
from dmoa.policies.registry import POLICIES
from dmoa.trace import ReplyDmoa, Trace, reply_dmoa, reply_step, trace_of
from dmoa.types import Answer, Limits, Message, Query, StepRecord, TextDelta
from dmoa.validation import describe, did_you_mean
from dmoa.workflows.console import QueryResult, Screen

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from dmoa.protocols import AgentClient, Engine
    from dmoa.serving.client import RemoteReply, SwarmClient
    from dmoa.swarm import Swarm
    from dmoa.training.collect import SwarmCollector


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPool:
    """Loads a pool's gate, encoder and engines in the process that calls it."""

    config_json: str
    call_cache: Path | None = None
    gates: Mapping[str, Path] = field(default_factory=dict)
    """Checkpoints beside the pool's own, by the NAME of `dmoa:NAME`."""
    policy_files: tuple[str, ...] = ()
    """Policies as `FILE.py:NAME`, with paths that this process finds too."""

    def __call__(self) -> PoolAnswerer:
        """Return the swarm; blocks while models load. Raises ConfigError, CheckpointError, ModelFetchError."""
        POLICIES.resolve(self.policy_files, "--policies")
        config = Config.model_validate_json(self.config_json)
        return PoolAnswerer(build_local_swarm(config, lambda text: None, self.call_cache, self.gates))


class PoolAnswerer:
    """A pool in this process."""

    def __init__(self, backend: LocalSwarm) -> None:
        self._backend = backend

    async def answer(self, query: Query, policy: str, agent: str | None) -> SwarmOutcome:
        """Answer one query. Raises DmoaError."""
        return await ask_swarm(self._backend.swarm, query, policy, agent)

    async def close(self) -> None:
        """Stop the engines."""
        await self._backend.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCollectingPool:
    """Loads a pool as `OpenPool` does, to be asked with exploration."""

    config_json: str
    epsilon: float | None
    """As in `ExploringPolicy`."""
    call_cache: Path | None = None

    def __call__(self) -> SwarmCollector:
        """Return the swarm; blocks while models load. Raises ConfigError, CheckpointError, ModelFetchError."""
        from dmoa.training.collect import SwarmCollector

        config = Config.model_validate_json(self.config_json)
        return SwarmCollector(build_local_swarm(config, lambda text: None, self.call_cache).swarm, self.epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenServer:
    """Opens a client of a running server."""

    url: str
    pool: str
    api_key: str = field(default="", repr=False)

    def __call__(self) -> ServerAnswerer:
        """Return the client."""
        from dmoa.serving.client import SwarmClient

        return ServerAnswerer(SwarmClient(self.url, api_key=self.api_key), self.pool)


class ServerAnswerer:
    """A running server."""

    def __init__(self, client: SwarmClient, pool: str) -> None:
        self._client = client
        self._pool = pool

    async def answer(self, query: Query, policy: str, agent: str | None) -> SwarmOutcome:
        """Answer one query. Raises DmoaError as the server says, RequestError for what it refuses."""
        limits = query.limits
        asked = {
            "max_steps": limits.max_steps,
            "max_agents": limits.max_agents,
            "budget_tokens": limits.budget_tokens,
            "deadline_s": limits.deadline_s,
            "trace": True,
        }
        sampling = {"seed": int(query.trace_id[:8], 16)}
        if limits.max_tokens is not None:
            sampling["max_tokens"] = limits.max_tokens
        started = time.perf_counter()
        reply = await self._client.ask(
            [Message(role="user", content=query.text)],
            model=agent or f"{self._pool}/{policy}",
            dmoa={name: value for name, value in asked.items() if value is not None},
            sampling=sampling,
        )
        return SwarmOutcome(
            text=reply.text,
            finish_reason=reply.finish_reason,
            dmoa=ReplyDmoa.model_validate(reply.dmoa),
            wall_ms=(time.perf_counter() - started) * 1e3,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class AskOptions:
    """How a question is to be answered: the command-line options of one query."""

    policy: str | None = None
    agent: str | None = None
    max_steps: int | None = None
    deadline_s: float | None = None
    max_tokens: int | None = None
    """Most new tokens of a reply, where the pool's own limits do not hold; the demo keeps replies short."""
    keeps_trace: bool = False
    """Whether the reply comes with its trace."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling fields of the request."""
        return {} if self.max_tokens is None else {"max_tokens": self.max_tokens}


class Backend(Protocol):
    """Answers questions for a command: in this process, or through a server."""

    async def ask(self, question: str, turns: Sequence[Message], wish: AskOptions, screen: Screen) -> QueryResult:
        """Answer one question after earlier turns, showing its steps. Raises DmoaError."""
        ...

    async def close(self) -> None:
        """Free what the backend holds."""
        ...


class LocalSwarm:
    """A pool put together in this process."""

    def __init__(self, config: Config, swarm: Swarm, engines: Sequence[Engine], fingerprint: str) -> None:
        self._config = config
        self.swarm = swarm
        self._engines = engines
        self.fingerprint = fingerprint

    async def ask(self, question: str, turns: Sequence[Message], wish: AskOptions, screen: Screen) -> QueryResult:
        """Answer one question after earlier turns, showing its steps. Raises DmoaError."""
        policy = check_ask_options(self._config, wish)
        query = new_query(self._config, question, turns, wish)
        started = time.perf_counter()
        async with aclosing(_generator(self.swarm, query, policy, wish.agent)) as events:
            async for event in events:
                if isinstance(event, StepRecord):
                    screen.step(reply_step(event, with_texts=True))
                elif isinstance(event, TextDelta):
                    screen.delta(event.text)
                else:
                    answer = event
        if not answer.text.strip():
            raise EmptyAnswerError("every contribution was empty; ask again, or raise max_tokens")
        return QueryResult(
            question=question,
            text=answer.text,
            finish_reason=answer.finish_reason,
            wall_s=time.perf_counter() - started,
            dmoa=reply_dmoa(answer, pool=self._config.name, with_texts=True),
            trace=trace_of(query, answer, pool=self._config.name, fingerprint=self.fingerprint) if wish.keeps_trace else None,
        )

    async def close(self) -> None:
        """Stop the engines."""
        for engine in self._engines:
            await engine.close()


async def _generator(
    swarm: Swarm, query: Query, policy: str, agent: str | None
) -> AsyncGenerator[StepRecord | TextDelta | Answer, None]:
    async for event in swarm.answer(query, policy, agent):
        yield event


def check_ask_options(config: Config, wish: AskOptions) -> str:
    """Return the policy that a wish names, directly or through its agent. Raises RequestError for names not in the pool."""
    names = config.agent_names
    if wish.agent is not None and wish.agent not in names:
        nearest = did_you_mean(wish.agent, names)
        raise RequestError(
            f"--agent: value seen: {wish.agent!r}; allowed: {', '.join(names)}; name an agent of the pool{nearest}"
        )
    policy = wish.policy or ("single" if wish.agent else "dmoa")
    if policy not in POLICIES:
        nearest = did_you_mean(policy, POLICIES)
        raise RequestError(f"--policy: value seen: {policy!r}; allowed: {', '.join(POLICIES)}; see `dmoa policies`{nearest}")
    if wish.agent is not None and policy != "single":
        raise RequestError(f"--agent: {wish.agent!r} is asked alone, policy {policy!r} chooses itself; leave one of them out")
    return policy


def check_question(question: str) -> str:
    """Return the question. Raises RequestError if it is empty or no valid Unicode."""
    if not question.strip():
        raise RequestError('question: it is empty; give a text, such as dmoa run "What is 12 + 7?"')
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("question: it is not valid UTF-8; give it in the terminal's encoding") from error
    return question


def new_query(config: Config, question: str, turns: Sequence[Message], wish: AskOptions) -> Query:
    """Return the query of a question; its limits are the pool's, lowered by the wish."""
    from dmoa.swarm import limits_for

    asked = Limits(max_steps=wish.max_steps or config.limits.max_steps, deadline_s=wish.deadline_s)
    return Query(
        trace_id=uuid.uuid4().hex,
        text=check_question(question),
        turns=tuple(turns),
        sampling=wish.sampling,
        limits=limits_for(config, asked),
    )


def fetch_models(config: Config, say: Callable[[str], None]) -> None:
    """Fetch what a pool's engines and encoder load, saying what is under way. Raises ModelFetchError, ConfigError."""
    from dmoa.engines.models import fetch, resolve_model

    for name, llm in config.llms.items():
        if llm.engine_entry.loads_weights:
            say(f"loading {name} ({llm.model})")
            resolve_model(llm.model, progress=say)
    if any(not llm.engine_entry.is_scripted for llm in config.llms.values()):
        fetch("minilm", progress=say)


def build_local_swarm(
    config: Config,
    say: Callable[[str], None],
    call_cache: Path | None = None,
    gates: Mapping[str, Path] | None = None,
) -> LocalSwarm:
    """Load a pool's gates, encoder and engines in this process, saying what is under way.

    `call_cache` is a folder in which greedy agent calls are kept and found again; `gates` are checkpoints beside the
    pool's own, for the policies `dmoa:NAME`. Blocks while models load; the first use fetches and converts the embedded
    ones. Raises ConfigError, CheckpointError, ModelFetchError.
    """
    from dmoa.agents.call_cache import CachedAgents, CallStore, call_identities
    from dmoa.agents.pool import (
        build_encoder,
        build_local,
        build_other_gate,
        build_pool_gate,
        check_corpus,
        check_files,
        fingerprint,
    )
    from dmoa.policies.registry import NamedGate
    from dmoa.routing import LocalRouter
    from dmoa.swarm import Swarm

    check_files(config)
    check_corpus(config)
    fetch_models(config, say)
    router = LocalRouter()
    named: dict[str, NamedGate] = {}
    for name, folder in (gates or {}).items():
        gate, record = build_other_gate(config, folder)
        router.install(record.version, gate)
        named[name] = NamedGate(version=record.version, preset=gate.spec.preset)
    gate, record = build_pool_gate(config)
    router.install(record.version, gate)
    agents: AgentClient
    agents, engines = build_local(config)
    if call_cache is not None:
        agents = CachedAgents(agents, CallStore(call_cache), call_identities(config))
    swarm = Swarm(config, agents=agents, router=router, encoder=build_encoder(config), gates=named)
    return LocalSwarm(config, swarm, engines, fingerprint(config))


def append_line(path: Path, line: str) -> None:
    """Append one line to a file, making its folder. Raises ConfigError if that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise ConfigError(f"--trace: cannot write {str(path)!r}: {error}; name a file that can be written") from error


_TRACE_PATIENCE_S = 10.0
_TRACE_PAUSE_S = 0.1
_NOT_FOUND = 404


class RemoteSwarm:
    """Asks a running server."""

    def __init__(self, client: SwarmClient) -> None:
        self.client = client

    async def ask(self, question: str, turns: Sequence[Message], wish: AskOptions, screen: Screen) -> QueryResult:
        """Answer one question after earlier turns, showing its steps. Raises DmoaError."""
        from dmoa.serving.client import StepLine

        messages = [*turns, Message(role="user", content=check_question(question))]
        started = time.perf_counter()
        try:
            async for event in self.client.stream(messages, model=wish.agent, dmoa=_options(wish), sampling=wish.sampling):
                if isinstance(event, StepLine):
                    screen.live_line(event.text)
                elif not isinstance(event, TextDelta):
                    reply = event
        finally:
            screen.end_live_line()
        wall_s = time.perf_counter() - started
        record = _record(self.client, reply)
        for step in record.steps:
            screen.step(step)
        return QueryResult(
            question=question,
            text=reply.text,
            finish_reason=reply.finish_reason,
            wall_s=wall_s,
            dmoa=record,
            trace=await fetch_trace(self.client, record.trace_id) if wish.keeps_trace else None,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


def build_remote_swarm(url: str) -> RemoteSwarm:
    """Return a backend for a server's URL; the key, where it wants one, is DMOA_API_KEY. Raises RequestError."""
    from dmoa.serving.client import SwarmClient

    if not url.startswith(("http://", "https://")):
        raise RequestError(f"--url: value seen: {url!r}; give the server's address, such as http://127.0.0.1:8000")
    return RemoteSwarm(SwarmClient(url, api_key=os.environ.get("DMOA_API_KEY", "")))


async def fetch_trace(client: SwarmClient, trace_id: str) -> Trace:
    """Return a query's trace from the server, which keeps it a moment after the reply. Raises RequestError."""
    deadline = time.monotonic() + _TRACE_PATIENCE_S
    while True:
        try:
            return Trace.model_validate(await client.trace(trace_id))
        except RequestError as error:
            if error.status != _NOT_FOUND or time.monotonic() >= deadline:
                raise
        await asyncio.sleep(_TRACE_PAUSE_S)


def _options(wish: AskOptions) -> dict[str, Any]:
    asked = {"policy": wish.policy, "max_steps": wish.max_steps, "deadline_s": wish.deadline_s, "trace": True}
    return {name: value for name, value in asked.items() if value is not None}


def _record(client: SwarmClient, reply: RemoteReply) -> ReplyDmoa:
    try:
        return ReplyDmoa.model_validate(reply.dmoa)
    except ValidationError as error:
        raise DmoaError(f"{client.url}: its reply has no usable dmoa object ({describe(error)}); is it a dmoa server?") from error
