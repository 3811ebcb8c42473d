"""A swarm in this process, without Ray: what `dmoa run` and `dmoa chat` ask where no `--url` names a server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dmoa.cli.show import Asked, Screen
from dmoa.config import Config
from dmoa.errors import ConfigError, EmptyAnswerError, RequestError
from dmoa.policies.registry import POLICIES
from dmoa.trace import reply_dmoa, reply_step, trace_of
from dmoa.types import Answer, Limits, Message, Query, StepRecord, TextDelta
from dmoa.validation import did_you_mean

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from dmoa.protocols import AgentClient, Engine
    from dmoa.swarm import Swarm


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
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

    async def ask(self, question: str, turns: Sequence[Message], wish: Wish, screen: Screen) -> Asked:
        """Answer one question after earlier turns, showing its steps. Raises DmoaError."""
        ...

    async def close(self) -> None:
        """Free what the backend holds."""
        ...


class LocalBackend:
    """A pool put together in this process."""

    def __init__(self, config: Config, swarm: Swarm, engines: Sequence[Engine], fingerprint: str) -> None:
        self._config = config
        self.swarm = swarm
        self._engines = engines
        self.fingerprint = fingerprint

    async def ask(self, question: str, turns: Sequence[Message], wish: Wish, screen: Screen) -> Asked:
        """Answer one question after earlier turns, showing its steps. Raises DmoaError."""
        policy = check_wish(self._config, wish)
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
        return Asked(
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


def check_wish(config: Config, wish: Wish) -> str:
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


def new_query(config: Config, question: str, turns: Sequence[Message], wish: Wish) -> Query:
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
        if llm.engine not in ("scripted", "openai"):
            say(f"loading {name} ({llm.model})")
            resolve_model(llm.model, progress=say)
    if any(llm.engine != "scripted" for llm in config.llms.values()):
        fetch("minilm", progress=say)


def build_local_backend(
    config: Config,
    say: Callable[[str], None],
    call_cache: Path | None = None,
    gates: Mapping[str, Path] | None = None,
) -> LocalBackend:
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
    return LocalBackend(config, swarm, engines, fingerprint(config))


def append_line(path: Path, line: str) -> None:
    """Append one line to a file, making its folder. Raises ConfigError if that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise ConfigError(f"--trace: cannot write {str(path)!r}: {error}; name a file that can be written") from error
