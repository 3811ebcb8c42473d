"""The two sides of P5 and P13: a swarm on an engine that notes its calls, and the bare engine that replays them.

Both load the pool's one engine and let it generate once, in the event loop of all that follows, so that neither pays for the
loading: vLLM's client serves one loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmoa.agents.agent import LocalAgents
from dmoa.agents.pool import build_agents, build_encoder, build_engine, build_pool_gate
from dmoa.bench.call_graph import QueryCalls, RecordingEngine, Window, replay, replay_flat
from dmoa.config import Config, callable_agents
from dmoa.protocols import Encoder, Engine
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm
from dmoa.types import GenerationRequest, Message, Sampling


def recorded_swarm(config: Config, calls: Path) -> tuple[Swarm, Engine]:
    """Return a pool's swarm, warm, whose engine notes every call in a file, and that engine; blocks while models load."""
    gate, record = build_pool_gate(config)
    router = LocalRouter()
    router.install(record.version, gate)
    encoder = build_encoder(config)
    asyncio.run(_touch(encoder))
    name = _llm(config)
    engine = RecordingEngine(build_engine(config, name, callable_agents(config, name)), calls, before=warm)
    agents = LocalAgents(build_agents(config, name, engine))
    return Swarm(config, agents=agents, router=router, encoder=encoder), engine


def replayed(config: Config, graph: Sequence[QueryCalls], in_flight: int | None) -> Window:
    """Replay a graph on the bare engine, in a fresh actor with an engine's environment; `in_flight` None: as a flat list."""
    import ray

    from dmoa.serving.agent_replica import ENGINE_ENV

    gpus = config.llms[_llm(config)].gpus
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": dict(ENGINE_ENV)}}
    actor = ray.remote(Replayer).options(**options).remote(config.model_dump_json())
    try:
        window: Window = ray.get(actor.run.remote(tuple(graph), in_flight))
    finally:
        ray.kill(actor)
    return window


class Replayer:
    """The bare engine in an actor."""

    def __init__(self, config_json: str) -> None:
        config = Config.model_validate_json(config_json)
        name = _llm(config)
        self._engine = build_engine(config, name, callable_agents(config, name))

    def run(self, graph: Sequence[QueryCalls], in_flight: int | None) -> Window:
        """Replay a graph, once, with so many queries in flight; None: as a flat list. Stops the engine."""
        return asyncio.run(_replay(self._engine, graph, in_flight))


async def _replay(engine: Engine, graph: Sequence[QueryCalls], in_flight: int | None) -> Window:
    """Warm an engine, replay and close it. Not a method: with an async one Ray gives the whole actor an event loop of its own."""
    try:
        await warm(engine)
        return await (replay_flat(engine, graph) if in_flight is None else replay(engine, graph, in_flight))
    finally:
        await engine.close()


async def _touch(encoder: Encoder) -> None:
    await encoder.embed(["A first text."])


def _llm(config: Config) -> str:
    """Return the one LLM of a pool."""
    (name,) = config.llms
    return name


async def warm(engine: Engine) -> None:
    """Let an engine generate once."""
    words = (Message(role="user", content="Count to three."),)
    await engine.generate(GenerationRequest(request_id="warm", messages=words, sampling=Sampling(max_tokens=8)))
