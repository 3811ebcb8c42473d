"""Agents on Ray Serve: the deployments they run in, and the client that reaches them.

`shared` placement: one `AgentHost` per LLM, its agents are records over one engine. `dedicated`: the same class, one
deployment per agent, with its own engine, GPUs and replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from dmoa.agents.agent import Agent, LocalAgents
from dmoa.agents.pool import build_agents, build_engine, callable_agents
from dmoa.agents.summarizer import withhold
from dmoa.config import SUMMARIZER, AgentConfig, AutoscalingConfig, Config
from dmoa.errors import AgentOverloadedError, AgentUnavailableError, ConfigError, PoolChangedError
from dmoa.protocols import Engine
from dmoa.serving.placement import deployment_name
from dmoa.serving.upgrade import CALL_DRAIN_S, check_version, pool_version
from dmoa.types import AgentCall, AgentReply, TextDelta

ENGINE_ENV = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads of an engine that wait must sleep: spinning ones slow every token some thirty times on a busy machine."""
QUEUE_FACTOR = 4
"""Calls that may wait in a replica, as a multiple of the engine's batch, before it counts as overloaded."""


class Answers:
    """What every replica with agents does, whatever engine it runs."""

    _agents: LocalAgents
    _label: str
    _version: str

    async def call(self, call: AgentCall, version: str) -> AgentReply:
        """Answer one call of a query on this version of the pool; cancelling it frees its place in the engine's batch.

        Raises PoolChangedError for a query on another version: of what a deployment runs on, Serve tells a caller nothing.
        """
        check_version(version, self._version)
        return await self._agents.call(call)

    async def stream(self, call: AgentCall, version: str) -> AsyncIterator[TextDelta | AgentReply]:
        """Answer one call, yielding its text as it comes, last the reply. Raises as `call` does."""
        check_version(version, self._version)
        items = self._agents.stream(call)
        async for item in withhold(items) if call.agent == SUMMARIZER else items:
            yield item

    async def ping(self) -> str:
        """Say that this replica is up; returns the engine's label."""
        return self._label

    def _host(self, config: Config, llm: str, hosted: Sequence[AgentConfig], engine: Engine) -> None:
        agents: dict[str, Agent] = build_agents(config, llm, engine)
        self._agents = LocalAgents({item.name: agents[item.name] for item in hosted})
        self._label = engine.label
        self._version = pool_version(config)


class AgentHost(Answers):
    """A replica that runs one engine of this process for some or all agents of one LLM."""

    def __init__(self, config_json: str, llm: str, agent: str | None = None) -> None:
        """Load the engine. `agent` names the one agent of a dedicated deployment, None hosts all of the LLM's."""
        config = Config.model_validate_json(config_json)
        hosted = hosted_agents(config, llm, agent)
        self._host(config, llm, hosted, build_engine(config, llm, hosted))


def hosted_agents(config: Config, llm: str, agent: str | None) -> list[AgentConfig]:
    """Return the agents of one deployment: all of an LLM (and the summarizer, if it is on it), or the one named."""
    return [item for item in callable_agents(config, llm) if agent in (None, item.name)]


def bind_hosts(config: Config) -> dict[str, Any]:
    """Return the bound Serve deployments that run the pool's agents, by deployment name.

    Those with most GPUs come first, because Serve places them in this order, spread over the nodes: where narrow ones go
    first, no node may be left with room for a wide one.
    """
    text = config.model_dump_json()
    bound: dict[str, Any] = {}
    for agent in sorted(callable_agents(config), key=lambda agent: -config.llms[agent.llm].gpus):
        llm = config.llms[agent.llm]
        name = deployment_name(config, agent)
        if name in bound:
            continue
        is_shared = llm.placement == "shared"
        scaling = llm.autoscaling if is_shared else agent.autoscaling
        options = _options(
            name, scaling, max_num_seqs=llm.max_num_seqs, gpus=llm.gpus, is_light=llm.engine in ("scripted", "openai")
        )
        only = None if is_shared else agent.name
        if llm.engine == "vllm":
            from dmoa.serving.vllm_server import vllm_deployment

            deployment = vllm_deployment(config, agent.llm, hosted_agents(config, agent.llm, only), options)
        else:
            deployment = serve.deployment(AgentHost).options(**options)
        bound[name] = deployment.bind(text, agent.llm, only)
    return bound


def _options(name: str, scaling: AutoscalingConfig, *, max_num_seqs: int, gpus: float, is_light: bool) -> dict[str, Any]:
    actor: dict[str, Any] = {"num_cpus": 0} if is_light else {"num_cpus": 1, "runtime_env": {"env_vars": ENGINE_ENV}}
    options: dict[str, Any] = {
        "name": name,
        "ray_actor_options": actor | {"num_gpus": gpus},
        "max_ongoing_requests": max_num_seqs * QUEUE_FACTOR,
        "max_queued_requests": max_num_seqs * QUEUE_FACTOR * 4,
        "health_check_period_s": 2.0,
        "graceful_shutdown_timeout_s": CALL_DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    if scaling.max_replicas == scaling.min_replicas:
        return options | {"num_replicas": scaling.min_replicas}
    autoscaling = {
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.max_replicas,
        "target_ongoing_requests": scaling.target_ongoing_requests,
    }
    return options | {"autoscaling_config": autoscaling}


class ServeAgents:
    """Reaches agents through Serve handles; implements `protocols.AgentClient`."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], version: str) -> None:
        """`handles` are by agent name; `version` is the pool's, which every reply must come from."""
        self._version = version
        # Made once, because a handle builds a new one for every method that is named on it. Calls are plain records:
        # pickle takes half of cloudpickle's time for them. Replies may be errors, which only cloudpickle carries safely.
        options = {"request_serialization": "pickle"}
        self._calls = {name: handle.options(method_name="call", **options) for name, handle in handles.items()}
        self._streams = {name: handle.options(method_name="stream", stream=True, **options) for name, handle in handles.items()}
        self._pings = {name: handle.options(method_name="ping") for name, handle in handles.items()}

    async def call(self, call: AgentCall) -> AgentReply:
        """Ask one agent; cancelling this cancels the call where it runs."""
        response = self._calls[call.agent].remote(call, self._version)
        try:
            reply: AgentReply = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayError, RayServeException) as error:
            raise _lost(call.agent, error) from error
        return reply

    async def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        """Ask one agent and yield its text as it comes, last the reply."""
        responses = self._streams[call.agent].remote(call, self._version)
        is_done = False
        try:
            async for item in responses:
                is_done = isinstance(item, AgentReply)
                yield item
        except (RayError, RayServeException) as error:
            raise _lost(call.agent, error) from error
        finally:
            if not is_done:
                responses.cancel()

    async def ping(self, agent: str) -> None:
        """Return once the agent's place answers. Raises AgentUnavailableError."""
        try:
            await self._pings[agent].remote()
        except (RayError, RayServeException) as error:
            raise _lost(agent, error) from error


def _lost(agent: str, error: Exception) -> AgentUnavailableError | AgentOverloadedError | PoolChangedError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, PoolChangedError):
        return cause
    if isinstance(error, BackPressureError) or isinstance(cause, BackPressureError):
        return AgentOverloadedError(f"agent {agent!r}: its queue is full")
    if isinstance(cause, ConfigError):
        return AgentUnavailableError(f"agent {agent!r}: {cause}")
    return AgentUnavailableError(f"agent {agent!r}: {type(error).__name__}: its replica died or cannot be reached")
