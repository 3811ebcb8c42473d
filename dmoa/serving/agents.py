"""Agents on Ray Serve: the deployments they run in, and the client that reaches them.

`shared` placement: one `AgentHost` per LLM, its agents are records over one engine. `dedicated`: the same class, one
deployment per agent, with its own engine, GPUs and replicas. Where there may be several replicas, all calls of a conversation
go to one of them (`scaling` says how it is chosen), whose prefix cache knows how it began.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from dmoa.agents.agent import Agent, LocalAgents
from dmoa.agents.pool import build_agents, build_engine
from dmoa.agents.summarizer import withhold
from dmoa.config import SUMMARIZER, AgentConfig, AutoscalingConfig, Config, callable_agents
from dmoa.dispatch import PATIENCE_S
from dmoa.errors import AgentOverloadedError, AgentUnavailableError, CallNotTakenError, ConfigError, PoolChangedError
from dmoa.protocols import Engine
from dmoa.serving.handles import Sent, ask
from dmoa.serving.losses import CALL_ERRORS
from dmoa.serving.placement import deployment_name
from dmoa.serving.scaling import has_affinity, scaling_options
from dmoa.serving.upgrade import CALL_DRAIN_S, check_version, pool_version
from dmoa.serving.vigil import Absent, Gone, Vigil, Watched
from dmoa.types import AgentCall, AgentReply, TextDelta

ENGINE_ENV = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads of an engine that wait must sleep: spinning ones slow every token some thirty times on a busy machine."""
_DEADLINE_SLACK_S = 1.0
"""After a call's deadline, at which its caller ends it."""


class Answers:
    """What every replica with agents does, whatever engine it runs."""

    _agents: LocalAgents
    _label: str
    _replica: str
    _version: str

    async def call(self, call: AgentCall, version: str) -> AgentReply:
        """Answer one call of a query on this version of the pool; cancelling it frees its place in the engine's batch.

        Raises PoolChangedError for a query on another version: of what a deployment runs on, Serve tells a caller nothing.
        """
        check_version(version, self._version)
        return replace(await self._agents.call(call), replica=self._replica)

    async def stream(self, call: AgentCall, version: str) -> AsyncIterator[TextDelta | AgentReply]:
        """Answer one call, yielding its text as it comes, last the reply. Raises as `call` does."""
        check_version(version, self._version)
        items = self._agents.stream(call)
        async for item in withhold(items) if call.agent == SUMMARIZER else items:
            yield replace(item, replica=self._replica) if isinstance(item, AgentReply) else item

    async def ping(self) -> str:
        """Say that this replica is up; returns the engine's label."""
        return self._label

    def _host(self, config: Config, llm: str, hosted: Sequence[AgentConfig], engine: Engine) -> None:
        agents: dict[str, Agent] = build_agents(config, llm, engine)
        self._agents = LocalAgents({item.name: agents[item.name] for item in hosted})
        self._label = engine.label
        self._replica = serve.get_replica_context().replica_tag
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
        is_light = llm.engine in ("scripted", "openai")
        options = _options(name, config.scaling_of(agent), max_num_seqs=llm.max_num_seqs, gpus=llm.gpus, is_light=is_light)
        only = None if llm.placement == "shared" else agent.name
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
        "health_check_period_s": 2.0,
        "graceful_shutdown_timeout_s": CALL_DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    return options | scaling_options(scaling, max_num_seqs=max_num_seqs)


def affine_agents(config: Config) -> frozenset[str]:
    """Return the agents (and the summarizer) that may have several replicas: a conversation stays on one of them."""
    return frozenset(agent.name for agent in callable_agents(config) if has_affinity(config.scaling_of(agent)))


async def _nobody() -> Absent:
    return Absent()


class ServeAgents:
    """Reaches agents through Serve handles; implements `protocols.AgentClient`."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        version: str,
        *,
        affine: Collection[str] = (),
        gone: Gone = _nobody,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`handles` are by agent name; `version` is the pool's, which every reply must come from.

        Calls of `affine` agents go to the replica of their conversation. `gone` says who has no replica; calls to them end.
        So do calls without a deadline that no replica takes for `patience_s`, see `Vigil.watch`.
        """
        self._version = version
        self._patience_s = patience_s
        self._vigil = Vigil(gone)
        # Made once, because a handle builds a new one for every method that is named on it. Calls are plain records:
        # pickle takes half of cloudpickle's time for them. Replies may be errors, which only cloudpickle carries safely.
        options = {"request_serialization": "pickle"}
        self._calls = {name: handle.options(method_name="call", **options) for name, handle in handles.items()}
        self._streams = {name: handle.options(method_name="stream", stream=True, **options) for name, handle in handles.items()}
        self._affine = frozenset(affine)
        self._pings = {name: handle.options(method_name="ping") for name, handle in handles.items()}
        self._queues = {name: id(handle) for name, handle in handles.items()}  # one for all agents of a deployment

    async def call(self, call: AgentCall) -> AgentReply:
        """Ask one agent; cancelling this cancels the call where it runs.

        Raises AgentUnavailableError, CallNotTakenError among them, AgentOverloadedError, PoolChangedError.
        """
        sent = ask(self._handle(self._calls, call), call, self._version)
        response, watched = sent.response, self._watch(call.agent, sent, call.deadline_unix_s)
        try:
            reply: AgentReply = await response
        except asyncio.CancelledError:
            response.cancel()
            if watched.is_given_up:
                raise self._given_up(call.agent, watched) from None
            raise
        except CALL_ERRORS as error:
            raise self._given_up(call.agent, watched) if watched.is_given_up else _lost(call.agent, error) from error
        finally:
            watched.end()
        watched.answered()
        return reply

    async def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        """Ask one agent and yield its text as it comes, last the reply. Raises as `call` does."""
        sent = ask(self._handle(self._streams, call), call, self._version)
        responses, watched = sent.response, self._watch(call.agent, sent, call.deadline_unix_s)
        is_done = False
        try:
            async for item in responses:
                watched.answered()
                is_done = isinstance(item, AgentReply)
                yield item
        except asyncio.CancelledError:
            if watched.is_given_up:
                raise self._given_up(call.agent, watched) from None
            raise
        except CALL_ERRORS as error:
            is_done = True  # to cancel it now could raise the same error again
            raise self._given_up(call.agent, watched) if watched.is_given_up else _lost(call.agent, error) from error
        finally:
            watched.end()
            if not is_done:
                responses.cancel()

    async def ping(self, agent: str) -> None:
        """Return once the agent's place answers. Raises AgentUnavailableError, AgentOverloadedError, PoolChangedError.

        Serve starts a replica for a ping as for any call; cancelled, it no longer asks for one.
        """
        sent = ask(self._pings[agent])
        response, watched = sent.response, self._watch(agent, sent)
        try:
            await response
        except asyncio.CancelledError:
            response.cancel()
            if watched.is_given_up:
                raise self._given_up(agent, watched) from None
            raise
        except CALL_ERRORS as error:
            # Serve refuses calls to a deployment that was deleted, and so what waits by pings would wait for ever.
            is_gone = watched.is_given_up or await self._vigil.is_gone(agent)
            raise self._given_up(agent, watched) if is_gone else _lost(agent, error) from error
        finally:
            watched.end()
        watched.answered()

    def _watch(self, agent: str, sent: Sent, deadline_unix_s: float | None = None) -> Watched:
        left_s = None if deadline_unix_s is None else max(0.0, deadline_unix_s - time.time())
        return self._vigil.watch(
            agent,
            sent.response.cancel,
            is_taken=sent.is_taken,
            patience_s=self._patience_s if left_s is None else left_s + _DEADLINE_SLACK_S,
            queue=self._queues[agent],
        )

    def _given_up(self, agent: str, watched: Watched) -> AgentUnavailableError | PoolChangedError | asyncio.CancelledError:
        """Return how what was given up ends: as cancelled where its own task is, for Serve tells both by one error.

        Where another pool is served by now, the agent may be gone for good: the query has to begin again on that one.
        """
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return asyncio.CancelledError()
        if self._vigil.served not in (None, self._version):
            return PoolChangedError(f"agent {agent!r} has no running replica, and another version of the pool is served by now")
        if watched.is_untaken:
            return CallNotTakenError(f"agent {agent!r}: no replica of it took the call for {watched.patience_s:.3g} s")
        return AgentUnavailableError(f"agent {agent!r}: it has no running replica")

    def _handle(self, handles: Mapping[str, Any], call: AgentCall) -> Any:
        """Return the handle to call by; one that names the conversation costs some 15 microseconds more."""
        handle = handles[call.agent]
        return handle.options(session_id=call.conversation) if call.conversation and call.agent in self._affine else handle


def _lost(agent: str, error: Exception) -> AgentUnavailableError | AgentOverloadedError | PoolChangedError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, PoolChangedError):
        return cause
    if isinstance(error, BackPressureError) or isinstance(cause, BackPressureError):
        return AgentOverloadedError(f"agent {agent!r}: its queue is full")
    if isinstance(cause, ConfigError):
        return AgentUnavailableError(f"agent {agent!r}: {cause}")
    return AgentUnavailableError(f"agent {agent!r}: {type(error).__name__}: its replica died or cannot be reached")
