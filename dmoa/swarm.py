"""A pool put together: orchestrator, policies, router and encoder, wherever its agents run.

The same object answers in one process, in the Serve ingress, in rollouts and in evaluation; only the agent client,
the router and the encoder behind it differ.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TypeVar

from dmoa.agents import tools as toolbox
from dmoa.agents.summarizer import LlmSummarizer, SelectSummarizer
from dmoa.config import AgentConfig, Config, LlmConfig, summarizer_agent
from dmoa.dispatch import Dispatcher
from dmoa.errors import RequestError
from dmoa.orchestrator import Orchestrator
from dmoa.policies.registry import POLICIES, NamedGate, PolicyContext, build_policy
from dmoa.protocols import AgentClient, Encoder, Engine, Policy, Router, Turn, ended
from dmoa.step_calls import AgentCard
from dmoa.types import Activation, Event, Limits, Price, Query, QueryState, StepPlan, StepRecord, Stop

N = TypeVar("N", int, float)


class Swarm:
    """Answers queries for one pool; implements `SwarmClient`."""

    def __init__(
        self,
        config: Config,
        *,
        agents: AgentClient,
        router: Router,
        encoder: Encoder,
        gates: Mapping[str, NamedGate] | None = None,
        engines: Sequence[Engine] = (),
        turn: Turn = nullcontext,
    ) -> None:
        """`gates`: versions that the router holds beside its current one, by the names that queries may ask for.

        `engines`: those that `close` stops; `turn`: what calls of steps are made in.
        """
        self.config = config
        self._engines = tuple(engines)
        self._gates = dict(gates or {})
        self.router = router
        self.encoder = encoder
        is_select = config.summarizer.mode == "select"
        cards = {agent.name: _card(config, agent) for agent in config.agents}
        writer = summarizer_agent(config)
        self._orchestrator = Orchestrator(
            dispatcher=Dispatcher(agents=agents, cards=cards, router=router, is_select=is_select, turn=turn),
            summarizer=SelectSummarizer() if is_select else LlmSummarizer(agents, config.summarizer, turn),
            defence=config.summarizer.defence,
            writer=None if writer is None else _card(config, writer),
        )

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies that queries may ask for."""
        return tuple(POLICIES)

    def ask(self, query: Query, policy: str = "dmoa", agent: str | None = None) -> AsyncGenerator[Event]:
        """Yield steps, text deltas and last the Answer; see `Orchestrator.answer`. `agent` is for policies of one agent.

        For `dmoa` it names one of the gates. Raises RequestError for an unknown policy or gate.
        """
        chosen = self.policy(policy, agent)
        self._orchestrator.check(query, agent)
        return self._orchestrator.answer(query, chosen)

    def policy(self, name: str, agent: str | None = None) -> Policy:
        """Return the policy called `name`, built for one query. Raises RequestError for an unknown policy or gate."""
        context = PolicyContext(config=self.config, router=self.router, encoder=self.encoder, agent=agent, gates=self._gates)
        return build_policy(name, context)

    def branch(
        self,
        query: Query,
        policy: str,
        done: tuple[StepRecord, ...],
        first: tuple[str, ...] = (),
        *,
        agent: str | None = None,
    ) -> AsyncGenerator[Event]:
        """Answer as `ask` does, from some steps on; `first`: agents that the next step asks in place of the policy's own."""
        chosen = self.policy(policy, agent)
        return self._orchestrator.answer(query, AsksFirst(chosen, first, len(done)) if first else chosen, done)

    def follow(self, query: Query, policy: Policy) -> AsyncGenerator[Event]:
        """Answer as `ask` does, by a policy of the caller's own."""
        return self._orchestrator.answer(query, policy)

    async def close(self) -> None:
        """Stop the engines."""
        for engine in self._engines:
            await engine.close()


class AsksFirst:
    """A policy that asks agents of one's own in one step, and else goes on as another does; implements `Policy`."""

    def __init__(self, policy: Policy, agents: tuple[str, ...], step: int) -> None:
        """`step` counts from 0. What the gate decided there stays recorded, and its state goes on."""
        self._policy, self._agents, self._step = policy, agents, step
        self.name = policy.name

    def ended(self, state: QueryState) -> str:
        """Return what the other policy makes of a query that is over."""
        return ended(self._policy, state)

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Return the other policy's plan, in the one step with the agents asked in place of its own.

        Raises RequestError where that policy asks nobody then.
        """
        plan = await self._policy.next_step(state)
        if len(state.steps) != self._step:
            return plan
        if isinstance(plan, Stop):
            why = f"agents: policy {self.name!r} asks nobody any more after {self._step} steps; choose another one"
            raise RequestError(why, param="agents", code="invalid_value")
        known = {one.agent: one for one in (*plan.activations, *plan.reserves)}
        asked = tuple(known.get(name) or Activation(agent=name, probability=0.0) for name in self._agents)
        rest = tuple(one for name, one in known.items() if name not in self._agents)
        mass = sum(one.probability for one in asked)
        return replace(plan, activations=asked, reserves=rest, explored=(), quorum=None, mass=min(1.0, mass))


def _card(config: Config, agent: AgentConfig) -> AgentCard:
    llm = config.llms[agent.llm]
    return AgentCard(
        name=agent.name,
        profile=agent.profile,
        tools_text=toolbox.instructions(agent.tools),
        sampling=agent.sampling.to_sampling(),
        place=agent.name if llm.placement == "dedicated" else agent.llm,
        cold=config.scaling_of(agent).cold,
        is_recorded=llm.engine_entry.is_recorded,
        price=None if llm.price is None else Price(**llm.price.model_dump()),
        engine=llm.engine,
        abilities=abilities_of(llm),
    )


def abilities_of(llm: LlmConfig) -> frozenset[str]:
    """Return what an LLM's engine can do beyond plain replies, with its options; as `EngineEntry.abilities` names it."""
    return frozenset((*llm.engine_entry.abilities, *llm.options.abilities))


def limits_for(config: Config, asked: Limits | None = None) -> Limits:
    """Return a query's limits: the pool's, lowered by what was asked for."""
    pool, wish = config.limits, asked or Limits(max_steps=config.limits.max_steps)
    return Limits(
        max_steps=min(pool.max_steps, wish.max_steps),
        max_agents=_lower(config.gate.activation.max_agents, wish.max_agents) if wish.max_agents else None,
        budget_tokens=_lower(pool.budget_tokens, wish.budget_tokens),
        budget_price=_lower(pool.budget_price, wish.budget_price),
        budget_calls=wish.budget_calls,
        deadline_s=_lower(pool.deadline_s, wish.deadline_s),
        max_tokens=wish.max_tokens,
        quorum=pool.quorum,
        hedge_after_ms=pool.hedge_after_ms,
    )


def _lower(*limits: N | None) -> N | None:
    return min((limit for limit in limits if limit is not None), default=None)
