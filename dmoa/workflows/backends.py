"""Reaches a swarm for commands, evaluation and rollouts: a pool loaded in this process or in workers, or a running server.

What opens a swarm for workers must be picklable; see `protocols.OpenSwarm`.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import ValidationError

from dmoa.agents.adversaries import AdversarialAgents, Adversaries
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
from dmoa.config import Config
from dmoa.engines.models import fetch, resolve_model
from dmoa.errors import DmoaError, EmptyAnswerError, RequestError
from dmoa.policies.registry import POLICIES, NamedGate, check_words, split_policy
from dmoa.protocols import AgentClient, SwarmClient
from dmoa.storage import check_local, writing
from dmoa.swarm import Swarm, limits_for
from dmoa.trace import AnsweredQuery, ReplyDmoa, Trace, answer_of_reply, answer_of_trace
from dmoa.types import Answer, Event, Limits, Message, Query, StepRecord, TextDelta
from dmoa.validation import describe, did_you_mean
from dmoa.workflows.console import QueryResult, Screen

if TYPE_CHECKING:
    from dmoa.serving.client import RemoteReply, ServerClient
    from dmoa.training.collect import ExploringSwarm


Carried = Mapping[str, Mapping[str, bytes]]
"""Checkpoints that travel with what opens a pool, by folder: a worker's machine may have no such folder."""


def carried(config: Config, gates: Mapping[str, Path] | None = None) -> Carried:
    """Read the pool's own checkpoint, and those of `gates`. Raises CheckpointError."""
    from dmoa import checkpoint

    folders = [str(folder) for folder in (config.gate.checkpoint, *(gates or {}).values()) if folder]
    return {folder: checkpoint.files_of(*checkpoint.load(folder)) for folder in folders}


@contextmanager
def unpacked(config_json: str, gates: Mapping[str, Path], packed: Carried) -> Iterator[tuple[Config, dict[str, Path]]]:
    """Yield a pool and gates beside its own whose checkpoints lie on this machine for as long as the block runs."""
    config = Config.model_validate_json(config_json)
    with tempfile.TemporaryDirectory(prefix="dmoa-gates-") as root:
        where = {folder: Path(root, str(number)) for number, folder in enumerate(packed)}
        for folder, files in packed.items():
            where[folder].mkdir()
            for name, data in files.items():
                (where[folder] / name).write_bytes(data)
        own = config.gate.checkpoint
        if own in where:
            config = config.changed("gate", checkpoint=str(where[own]))
        yield config, {name: where.get(str(folder), folder) for name, folder in gates.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPool:
    """Loads a pool's gate, encoder and engines in the process that calls it."""

    config_json: str
    call_cache: Path | None = None
    gates: Mapping[str, Path] = field(default_factory=dict)
    """Checkpoints beside the pool's own, by the NAME of `dmoa:NAME`."""
    policy_files: tuple[str, ...] = ()
    """Policies as `FILE.py:NAME`, with paths that this process finds too."""
    adversaries: Adversaries | None = None
    """Agents that work against the swarm; None: nobody does."""
    carried: Carried = field(default_factory=dict, repr=False)
    """What is not in it is read from its folder."""

    def __call__(self) -> Swarm:
        """Return the swarm; blocks while models load. Raises ConfigError, CheckpointError, ModelFetchError."""
        POLICIES.resolve(self.policy_files, "--policies")
        with unpacked(self.config_json, self.gates, self.carried) as (config, gates):
            return build_local_swarm(config, lambda text: None, self.call_cache, gates, self.adversaries)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCollectingPool:
    """Opens a pool to be asked with exploration."""

    pool: Callable[[], Swarm]
    epsilon: float | None
    """As in `ExploringPolicy`."""

    def __call__(self) -> ExploringSwarm:
        """Return the swarm. Raises as `pool`."""
        from dmoa.training.collect import ExploringSwarm

        return ExploringSwarm(self.pool(), self.epsilon)


BUSY_PATIENCE_S = 600.0
"""How long evaluation and rollouts go on asking a server that is busy, for each query."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenServer:
    """Opens a client of a running server."""

    url: str
    pool: str
    api_key: str = field(default="", repr=False)

    def __call__(self) -> RemoteSwarm:
        """Return the client."""
        return RemoteSwarm(open_client(self.url, self.api_key, patience_s=BUSY_PATIENCE_S), pool=self.pool, has_seeds=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCollectingServer:
    """Opens a client of a running server whose agents are asked with exploration."""

    url: str
    pool: str
    fingerprint: str
    """Of the pool that the server is to have."""
    epsilon: float | None
    """As in `ExploringPolicy`."""
    api_key: str = field(default="", repr=False)

    def __call__(self) -> CollectingServer:
        """Return the client."""
        return CollectingServer(self)

    async def check(self) -> None:
        """Raise RequestError where the server has another pool, before anybody is asked."""
        async with open_client(self.url, self.api_key) as client:
            pool, seen = await client.served()
        if pool != self.pool or seen not in (None, self.fingerprint):
            raise self.foreign(pool, seen or "")

    def foreign(self, pool: str, seen: str) -> RequestError:
        """Return the error for a server with another pool."""
        there, here = f"{pool!r} {seen[:12]}".strip(), f"{self.pool!r} {self.fingerprint[:12]}"
        return RequestError(f"--url: the server's pool is {there}, this one {here}; give the pool that is served (--config)")


class CollectingServer:
    """A running server, asked to learn from; implements `SwarmClient`. Answers have the gate's inputs, which traces tell."""

    def __init__(self, opened: OpenCollectingServer) -> None:
        self._opened = opened
        self._swarm = OpenServer(url=opened.url, pool=opened.pool, api_key=opened.api_key)()
        self._foreign: RequestError | None = None

    async def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        """Yield the answer by policy `exploring`, whatever `policy` says, once its trace is there.

        Raises DmoaError as `RemoteSwarm.ask`, RequestError for stages, which no request carries, and for another pool.
        """
        if query.stages:
            raise RequestError("stages: they do not fit in an HTTP request; leave suites that have some out with --url")
        if self._foreign is not None:
            raise self._foreign  # agents that are not these are asked no more
        async with aclosing(self._swarm.ask(replace(query, epsilon=self._opened.epsilon), "exploring")) as events:
            async for event in events:
                if isinstance(event, Answer):
                    trace = await fetch_trace(self._swarm.client, event.trace_id)
        if trace.pool_fingerprint != self._opened.fingerprint:
            self._foreign = self._opened.foreign(self._swarm.pool, trace.pool_fingerprint)
            raise self._foreign
        yield answer_of_trace(trace, self._opened.epsilon)

    async def close(self) -> None:
        """Close the connections."""
        await self._swarm.close()


MOST_STEPS = 1000
"""What a server takes for any number of steps: its own limit holds."""


class RemoteSwarm:
    """A running server; implements `SwarmClient`."""

    def __init__(
        self,
        client: ServerClient,
        *,
        pool: str | None = None,
        has_seeds: bool = False,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        """`pool`: the server's, None to ask for its name; `has_seeds`: queries are seeded by their ids, so that they repeat.

        `on_line` gets the readable line of each step as soon as the step is finished.
        """
        self.client = client
        self.pool = pool or ""
        """Name of the pool; where it was not given, as the last reply has it."""
        self._asked_pool = pool
        self._has_seeds = has_seeds
        self.on_line = on_line

    async def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        """Yield the steps and the Answer; `policy` may be empty for the server's own.

        The server tells of the steps with its last words, so its pieces of text, which come before them, are not yielded.
        Raises DmoaError as the server says, RequestError for what it refuses.
        """
        from dmoa.serving.client import RemoteReply, StepLine

        messages = [*([Message(role="system", content=query.system)] if query.system else []), *query.turns]
        messages.append(Message(role="user", content=query.text))
        model, options, sampling = agent or self._asked_pool, _options(query.limits, policy), self._sampling(query)
        options |= {} if query.epsilon is None else {"epsilon": query.epsilon}
        started = time.perf_counter()
        if query.is_streamed:
            async with aclosing(self.client.stream(messages, model=model, dmoa=options, sampling=sampling)) as chunks:
                async for chunk in chunks:
                    if isinstance(chunk, StepLine) and self.on_line:
                        self.on_line(chunk.text)
                    elif isinstance(chunk, RemoteReply):
                        reply = chunk
        else:
            reply = await self.client.chat(messages, model=model, dmoa=options, sampling=sampling)
        wall_ms = (time.perf_counter() - started) * 1e3
        record = _record(self.client, reply)
        self.pool = record.pool
        finish_reason: Literal["stop", "length"] = "length" if reply.finish_reason == "length" else "stop"
        answer = answer_of_reply(record, text=reply.text, finish_reason=finish_reason, wall_ms=wall_ms, reasoning=reply.reasoning)
        for step in answer.steps:
            yield step
        yield answer

    def _sampling(self, query: Query) -> dict[str, Any]:
        sampling = dict(query.sampling)
        if self._has_seeds:
            sampling.setdefault("seed", int(query.trace_id[:8], 16))
        if query.limits.max_tokens is not None:
            sampling["max_tokens"] = query.limits.max_tokens
        return sampling

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


def _options(limits: Limits, policy: str) -> dict[str, Any]:
    """Return the request's `dmoa` object."""
    names = ("max_steps", "max_agents", "budget_tokens", "budget_price", "deadline_s")
    asked = {"policy": policy or None, **{name: getattr(limits, name) for name in names}, "trace": True}
    asked["max_steps"] = min(limits.max_steps, MOST_STEPS)
    return {name: value for name, value in asked.items() if value is not None}


_URL = re.compile(r"https?://([^\s/?#@]*@)?(\[[\w:.%]+\]|[^\s\[\]/:?#@]+)(:\d+)?([/?#].*)?")


def open_client(url: str, api_key: str | None = None, *, patience_s: float = 0.0) -> ServerClient:
    """Return a client of a server; the key, where it wants one, is DMOA_API_KEY unless given. Raises RequestError.

    `patience_s` as in `ServerClient`.
    """
    if not _is_url(url):
        raise RequestError(f"--url is {url!r}; give the server's address, such as http://127.0.0.1:8000")
    from dmoa.serving.client import ServerClient

    key = os.environ.get("DMOA_API_KEY", "") if api_key is None else api_key
    return ServerClient(url, api_key=key, patience_s=patience_s)


def _is_url(text: str) -> bool:
    """Tell whether a text is the address of a server, with a port that there can be: HTTP libraries raise for others."""
    try:
        return _URL.fullmatch(text) is not None and text.isprintable() and urlsplit(text).port != 0
    except ValueError:
        return False


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

    def limits(self, max_steps: int) -> Limits:
        """Return the limits that are asked for; `max_steps` where no number of steps is."""
        return Limits(max_steps=self.max_steps or max_steps, deadline_s=self.deadline_s)


class Backend:
    """Puts the questions of a command to a swarm: one in this process, or a server."""

    def __init__(self, source: Swarm | ServerClient) -> None:
        self._source = source

    async def ask(self, question: str, turns: Sequence[Message], wish: AskOptions, screen: Screen) -> QueryResult:
        """Answer one question after earlier turns, showing its steps. Raises DmoaError."""
        source = self._source
        if isinstance(source, Swarm):
            policy = check_ask_options(source.config, wish)
            query = new_query(question, turns, wish, limits_for(source.config, wish.limits(source.config.limits.max_steps)))
            name, words = split_policy(policy)
            answer = await _shown(source, query, name, wish.agent or words, screen)
            pool, trace = source.config.name, None
            if wish.keeps_trace:
                trace = AnsweredQuery(query=query, answer=answer, pool=pool, fingerprint=fingerprint(source.config)).trace()
        else:
            remote = RemoteSwarm(source, on_line=screen.live_line)
            query = new_query(question, turns, wish, wish.limits(MOST_STEPS))
            answer = await _shown(remote, query, wish.policy or "", wish.agent, screen)
            pool, trace = remote.pool, await fetch_trace(source, answer.trace_id) if wish.keeps_trace else None
        return QueryResult(question=question, answer=answer, pool=pool, trace=trace)

    async def check(self, wish: AskOptions) -> None:
        """Check that the policy or the agent that is asked for is there, before anything is asked. Raises RequestError."""
        if isinstance(self._source, Swarm):
            check_ask_options(self._source.config, wish)
            return
        names = await self._source.models()
        policies = [name.removeprefix(f"{names[0]}/") for name in names if name.startswith(f"{names[0]}/")]
        agents = [name for name in names if name != names[0] and not name.startswith(f"{names[0]}/")]
        for option, asked, known in (("--policy", wish.policy, policies), ("--agent", wish.agent, agents)):
            if asked is not None and asked not in known:
                raise RequestError(f"{option} is {asked!r}; expected one of {', '.join(known)}{did_you_mean(asked, known)}")

    async def close(self) -> None:
        """Stop the engines, or close the connections."""
        await self._source.close()


async def _shown(swarm: SwarmClient, query: Query, policy: str, agent: str | None, screen: Screen) -> Answer:
    """Return the answer, showing what comes of the query. Raises EmptyAnswerError for one without a text."""
    try:
        async with aclosing(swarm.ask(query, policy, agent)) as events:
            async for event in events:
                if isinstance(event, StepRecord):
                    screen.end_live_line()
                    screen.step(event)
                elif isinstance(event, TextDelta):
                    if not event.is_reasoning:
                        screen.delta(event.text)
                else:
                    answer = event
    finally:
        screen.end_live_line()
    if not answer.text.strip():
        raise EmptyAnswerError("every contribution was empty; ask again, or raise max_tokens")
    return answer


def check_ask_options(config: Config, wish: AskOptions) -> str:
    """Return the policy that a wish names, directly or through its agent. Raises RequestError for names not in the pool."""
    names = config.agent_names
    if wish.agent is not None and wish.agent not in names:
        nearest = did_you_mean(wish.agent, names)
        raise RequestError(f"--agent is {wish.agent!r}; expected one of {', '.join(names)}; name an agent of the pool{nearest}")
    policy = wish.policy or ("single" if wish.agent else "dmoa")
    name, words = split_policy(policy)
    if name not in POLICIES:
        nearest = did_you_mean(policy, POLICIES)
        raise RequestError(f"--policy is {policy!r}; expected one of {', '.join(POLICIES)}; see `dmoa policies`{nearest}")
    if wish.agent is not None and policy != "single":
        raise RequestError(f"--agent: {wish.agent!r} is asked alone, policy {policy!r} chooses itself; leave one of them out")
    entry = POLICIES[name]
    has_agent = words is None or name == "dmoa" or (name == "single" and words in names)
    if check_words(entry, words, config) is None and not has_agent:
        seen = f"--policy is {policy!r}, and {name!r} has no parameters; single:AGENT takes one of {', '.join(names)}"
        raise RequestError(f"{seen}; see `dmoa policies`{did_you_mean(words or '', names)}")
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


def new_query(question: str, turns: Sequence[Message], wish: AskOptions, limits: Limits) -> Query:
    """Return the query of a question. Raises RequestError for one that cannot be asked."""
    text = check_question(question)
    return Query(trace_id=uuid.uuid4().hex, text=text, turns=tuple(turns), sampling=wish.sampling, limits=limits)


def fetch_models(config: Config, say: Callable[[str], None]) -> None:
    """Fetch what a pool's engines and encoder load, saying what is under way. Raises ModelFetchError, ConfigError."""
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
    adversaries: Adversaries | None = None,
) -> Swarm:
    """Load a pool's gates, encoder and engines in this process, saying what is under way.

    `call_cache` is a folder in which greedy agent calls are kept and found again; `gates` are checkpoints beside the
    pool's own, for the policies `dmoa:NAME`. Blocks while models load; the first use fetches and converts the embedded
    ones. Raises ConfigError, CheckpointError, ModelFetchError.
    """
    from dmoa.routing import LocalRouter

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
    if adversaries is not None:
        agents = AdversarialAgents(agents, adversaries.of(config.agent_names), adversaries.kind)
    return Swarm(config, agents=agents, router=router, encoder=build_encoder(config), gates=named, engines=engines)


def append_line(path: Path, line: bytes = b"") -> None:
    """Append a line to a file, made where it is not there. Raises ConfigError if that cannot be written."""
    check_local(path, "--trace")
    with writing(path, "--trace"):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = False  # what a killed run left of a line stays a line of its own
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                is_torn = file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
        with path.open("ab") as file:
            file.write(b"\n" * is_torn + line if line else b"")


_TRACE_PATIENCE_S = 10.0
_TRACE_PAUSE_S = 0.1
_NOT_FOUND = 404


async def fetch_trace(client: ServerClient, trace_id: str) -> Trace:
    """Return a query's trace from the server, which keeps it a moment after the reply.

    Raises RequestError, and DmoaError for one that this dmoa does not understand.
    """
    deadline = time.monotonic() + _TRACE_PATIENCE_S
    while True:
        try:
            return Trace.model_validate(await client.trace(trace_id))
        except RequestError as error:
            if error.status != _NOT_FOUND or time.monotonic() >= deadline:
                raise
        except ValidationError as error:
            raise DmoaError(
                f"{client.url}: its trace is not understood ({describe(error)}); use the dmoa of the server"
            ) from error
        await asyncio.sleep(_TRACE_PAUSE_S)


def _record(client: ServerClient, reply: RemoteReply) -> ReplyDmoa:
    try:
        return ReplyDmoa.model_validate(reply.dmoa)
    except ValidationError as error:
        raise DmoaError(f"{client.url}: its reply has no usable dmoa object ({describe(error)}); is it a dmoa server?") from error
