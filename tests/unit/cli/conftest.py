"""Pools of scripted agents, the command line as a function, and a server of such a pool on a real port."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.main import get_command
from typer.testing import CliRunner, Result

from dmoa.agents.pool import fingerprint
from dmoa.cli.main import app
from dmoa.config import Config, LimitsConfig, load
from dmoa.engine_options import ENGINES
from dmoa.evaluation.benchmarks.base import BENCHMARKS
from dmoa.policies.registry import POLICIES
from dmoa.serving.http.routes import create_app
from dmoa.trace import AnsweredQuery
from dmoa.types import Event, Query
from dmoa.workflows.backends import build_local_swarm
from tests.unit.serving.fake_service import FakePage

POOL = """
name: tiny
llms:
  fake:
    model: scripted:fake
    engine: scripted
    engine_kwargs:
      replies: {adder: "The answer is 19.", guesser: "The answer is 18."}
      entropies_nats: {adder: 0.25, guesser: 1.5, echo: 2.0}
      tokens: 8
agents:
  - {name: adder, llm: fake, profile: Adds numbers.}
  - {name: guesser, llm: fake, profile: Guesses.}
  - {name: echo, llm: fake, profile: Repeats the question.}
gate: {activation: {rule: top_mass, mass: 0.8, max_agents: 3}}
limits: {max_steps: 3}
"""

_command_of = cache(get_command)
"""Made once: Typer makes every option of every command out of the function's signature."""
Invoke = Callable[..., Result]


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a pool of three scripted agents with an untrained gate."""
    path = tmp_path_factory.mktemp("pool") / "pool.yaml"
    path.write_text(POOL, encoding="utf-8")
    return path


@pytest.fixture
def dmoa(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `dmoa ARGS` in this process; the result has exit_code, stdout and stderr."""
    for name in ("DMOA_CONFIG", "DMOA_API_KEY", "DMOA_API_KEYS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("typer.testing._get_command", _command_of)

    def invoke(*args: object, **options: Any) -> Result:
        result = CliRunner().invoke(app, [str(arg) for arg in args], **options)
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        return result

    return invoke


class PoolService:
    """A scripted pool behind the HTTP front; implements `serving.service.SwarmService` with the real step loop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._swarm = build_local_swarm(config, lambda _: None)
        self._fingerprint = fingerprint(config)
        self._traces: dict[str, dict[str, Any]] = {}
        self.page = FakePage()
        self.pool = config.name
        self.agents = config.agent_names
        self.policies = ("dmoa", "single", "exploring")
        self.limits: LimitsConfig = config.limits
        self.abilities: frozenset[str] = frozenset()

    async def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        async for event in self._swarm.ask(query, policy, agent):
            yield event

    async def close(self) -> None:
        await self._swarm.close()

    async def ready(self) -> dict[str, str]:
        return dict.fromkeys(self.agents, "up")

    async def metrics(self) -> str:
        return ""

    async def trace(self, trace_id: str, key_hash: str) -> dict[str, Any] | None:
        return self._traces.get(trace_id)

    def record(self, answered: AnsweredQuery, key_hash: str) -> None:
        # Kept a moment after the reply, as the real store does.
        trace = json.loads(replace(answered, pool=self.pool, fingerprint=self._fingerprint).trace().model_dump_json())
        asyncio.get_running_loop().call_later(0.05, self._traces.__setitem__, answered.answer.trace_id, trace)


@pytest.fixture(scope="session")
def url(pool: Path) -> Iterator[str]:
    """The base URL of a server of the pool, on a free port, in a thread of its own."""
    config = load(pool)
    service = PoolService(config)
    front = create_app(lambda: service, key_hashes=(), server=config.server, max_queued_requests=64)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(front, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 30.0
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=30.0)
        assert not thread.is_alive()


@pytest.fixture
def as_before() -> Iterator[None]:
    """The registries forget what a test has loaded."""
    before = [(registry, set(registry)) for registry in (POLICIES, ENGINES, BENCHMARKS)]
    yield
    for registry, names in before:
        for name in set(registry) - names:
            del registry[name]  # type: ignore[attr-defined]
