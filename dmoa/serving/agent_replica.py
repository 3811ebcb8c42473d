"""A Serve replica that answers for agents: one engine, and the agents over it.

In `shared` placement one replica holds every agent of an LLM, in `dedicated` placement one agent with an engine of its own;
`deployments` says how many replicas there are and who gets which call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace

from ray import serve

from dmoa.agents.agent import Agent, LocalAgents
from dmoa.agents.pool import build_agents, build_engine
from dmoa.agents.summarizer import withhold
from dmoa.config import SUMMARIZER, AgentConfig, Config, callable_agents
from dmoa.errors import DmoaError
from dmoa.protocols import AgentClient, Engine
from dmoa.serving.handles import listen_where_ray_does
from dmoa.serving.placement import INGRESS, deployment_names, is_in_ingress
from dmoa.serving.rollover import check_version, pool_version
from dmoa.types import AgentCall, AgentReply, TextDelta

ENGINE_ENV = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads of an engine that wait must sleep: spinning ones slow every token some thirty times on a busy machine."""


class AgentCalls:
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
        async for item in withhold(items) if call.agent == SUMMARIZER and call.final is None else items:
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


class AgentReplica(AgentCalls):
    """A replica that runs one engine of this process for some or all agents of one LLM."""

    def __init__(self, config_json: str, llm: str, agent: str | None = None) -> None:
        """Load the engine. `agent` names the one agent of a dedicated deployment, None hosts all of the LLM's."""
        listen_where_ray_does()
        config = Config.model_validate_json(config_json)
        hosted = hosted_agents(config, llm, agent)
        self._host(config, llm, hosted, build_engine(config, llm, hosted))


class IngressAgents:
    """Reaches every agent of a pool: those in `ingress` placement in this process; implements `protocols.AgentClient`."""

    def __init__(self, config: Config, elsewhere: AgentClient, host: Callable[[str, str], AgentCalls] | None = None) -> None:
        """Build the engines of this process; `elsewhere` reaches the other agents. Blocks; raises ConfigError.

        `host` makes what hosts the agents of an LLM, from a pool as JSON and the LLM's name.
        """
        text, here = config.model_dump_json(), [agent for agent in callable_agents(config) if is_in_ingress(config, agent)]
        hosts = {llm: (host or AgentReplica)(text, llm) for llm in dict.fromkeys(agent.llm for agent in here)}
        self._here = {agent.name: hosts[agent.llm] for agent in here}
        self._elsewhere = elsewhere
        self._places = deployment_names(config)
        self._version = pool_version(config)
        self._looks: dict[str, asyncio.Task[str]] = {}
        """Looks at places that are under way, by the agent that is pinged."""

    async def call(self, call: AgentCall) -> AgentReply:
        """Ask one agent. Raises as the client of agents elsewhere."""
        here = self._here.get(call.agent)
        return await (self._elsewhere.call(call) if here is None else here.call(call, self._version))

    def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        """Ask one agent and yield its text as it comes, last the reply. Raises as `call` does."""
        here = self._here.get(call.agent)
        return self._elsewhere.stream(call) if here is None else here.stream(call, self._version)

    async def ping(self, agent: str) -> None:
        """Return once the agent's place answers: at once, where that is this process. Raises as `call` does."""
        if agent not in self._here:
            await self._elsewhere.ping(agent)

    async def unready(self, agents: Iterable[str], patience_s: float) -> dict[str, str]:
        """Return agent -> why it does not answer. A deployment is pinged once, whoever asks: pings would fill its queue else."""
        asked = {name: self._places.get(name, INGRESS) for name in agents}
        first = {place: name for name, place in reversed(asked.items())}
        found = dict(zip(first, await asyncio.gather(*(self._look(name, patience_s) for name in first.values())), strict=True))
        wrong = {name: found[place].replace(repr(first[place]), repr(name)) for name, place in asked.items()}
        return {name: why for name, why in wrong.items() if why}

    async def _look(self, agent: str, patience_s: float) -> str:
        look = self._looks.get(agent)
        if look is None:
            look = self._looks[agent] = asyncio.create_task(self._wrong(agent, patience_s))
            look.add_done_callback(lambda _: self._looks.pop(agent))
        return await asyncio.shield(look)

    async def _wrong(self, agent: str, patience_s: float) -> str:
        """Return why an agent's place does not answer, "" where it does."""
        try:
            async with asyncio.timeout(patience_s):
                await self.ping(agent)
        except TimeoutError:
            return f"no answer within {patience_s} s"
        except DmoaError as error:
            return str(error)
        return ""


def hosted_agents(config: Config, llm: str, agent: str | None) -> list[AgentConfig]:
    """Return the agents of one deployment: all of an LLM (and the summarizer, if it is on it), or the one named."""
    return [item for item in callable_agents(config, llm) if agent in (None, item.name)]
