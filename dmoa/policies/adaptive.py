"""Policies that fit whom they ask to the query: until one is sure, by the gate's opinion of each, or by the skills it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from dmoa.core.aggregate import doubt, is_cut
from dmoa.errors import NoAgentError
from dmoa.policies.baselines import named
from dmoa.policies.dmoa import build_dmoa
from dmoa.policies.layers import aggregation
from dmoa.policies.options import Count, OneOptions, PolicyOptions, ask, said, texts
from dmoa.policies.registry import PolicyContext, policy, scheduled
from dmoa.types import Activation, QueryState, StepPlan, Stop


class EscalateOptions(OneOptions):
    """Parameters of `escalate`: `agents` from the cheapest to the best."""

    nats: Annotated[float, Field(ge=0.0)] = 0.3
    """Highest mean entropy, nats per token, of an answer that is sure enough."""


@scheduled(
    "escalate",
    "Agents in order, one at a time, until an answer is sure (the confidence looper of vLLM Semantic Router).",
    options=EscalateOptions,
    cost="A at most",
    reads="0",
)
def escalate(options: EscalateOptions, state: QueryState) -> StepPlan | Stop:
    """Stop at a sure answer, or ask the next agent.

    Nobody sees another's answer, and nobody is asked twice, who stood in for a lost one included. Where none is sure the last
    agent's answer stands; a reply that was cut off is not sure.
    """
    asked = {reply.agent for step in state.steps for reply in step.replies}
    later = ask((name for name in options.agents if name not in asked), history=())
    reply = next(iter(said(state.steps[-1])), None) if state.steps else None
    nats = reply.entropy.mean_nats if reply else None
    if reply is not None and not is_cut(reply) and nats is not None and nats <= options.nats:
        return Stop(reason="sure")
    if not later:
        return Stop(reason="schedule")
    return StepPlan(activations=later[:1], reserves=later[1:], fold="pass", ends_with=None if later[1:] else "schedule")


class ElasticOptions(PolicyOptions):
    """Parameters of `elastic`."""

    least: Count = 16
    """Fewest tokens of an opinion."""


@policy(
    "elastic",
    "All give opinions, the shorter the less the gate thinks of them; the surest then writes the answer.",
    options=ElasticOptions,
    cost="A + 1",
    reads="A",
    first_step_only=False,
)
class ElasticPolicy:
    """The gate's probability of an agent, as a share of the highest, is its share of its own `max_tokens` (ours)."""

    name = "elastic"

    def __init__(self, context: PolicyContext) -> None:
        self._options: ElasticOptions = context.options
        self._gate = build_dmoa(replace(context, agent=None, options=None))
        self._most = {agent.name: agent.sampling.max_tokens for agent in context.config.agents}

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask for opinions, then for the answer."""
        if len(state.steps) > 1:
            return Stop(reason="schedule")
        if not state.steps:
            return await self._opinions(state)
        opinions = said(state.steps[0])
        surest = min(opinions or state.steps[0].replies, key=lambda reply: (is_cut(reply), doubt(reply)))
        return aggregation(self._options.agents, surest.agent, texts(state.steps[0]))

    async def _opinions(self, state: QueryState) -> StepPlan | Stop:
        plan = await self._gate.next_step(state)
        if isinstance(plan, Stop):
            return plan
        ranked = [x for x in (*plan.activations, *plan.reserves) if x.agent in self._options.agents]
        if not ranked:
            raise NoAgentError("the agents that take part are all masked")
        asked = tuple(replace(x, max_tokens=self._tokens(x, ranked[0])) for x in ranked)
        return replace(plan, activations=asked, reserves=(), fold="vote", mass=sum(x.probability for x in asked))

    def _tokens(self, activation: Activation, first: Activation) -> int:
        share = activation.probability / first.probability if first.probability else 1.0
        return max(self._options.least, round(share * self._most[activation.agent]))


class SymbolicOptions(PolicyOptions):
    """Parameters of `symbolic`."""

    k: Count = 3
    """Agents that are recruited."""
    recruiter: str | None = None
    """Who says which skills the query needs, and writes the answer; None: the first of `agents`."""

    @property
    def width(self) -> int:
        """The recruits are asked at once."""
        return min(self.k, len(self.agents))


@policy(
    "symbolic",
    "A recruiter names the skills needed, the k agents with most of them answer, it aggregates (Symbolic-MoE, arXiv 2503.05641).",
    options=SymbolicOptions,
    cost="min(k, A) + 2",
    reads="min(k, A)",
    first_step_only=False,
    answers_at_once=False,
)
class SymbolicPolicy:
    """Skills are the `tags` of agents in the pool, their names where they have none; of equally fit agents the first are taken.

    The paper weighs skills by accuracy on labelled rows; here every skill that is named counts once, without labels.
    """

    name = "symbolic"

    def __init__(self, context: PolicyContext) -> None:
        self._options: SymbolicOptions = context.options
        tags = {agent.name: agent.tags or (agent.name,) for agent in context.config.agents}
        self._skills = {name: frozenset(tag.lower() for tag in tags[name]) for name in self._options.agents}

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask for the skills, then the recruits, then for the answer."""
        options, done = self._options, len(state.steps)
        if not state.steps:
            known = ", ".join(sorted(frozenset().union(*self._skills.values())))
            task = f"Do not answer it yourself. Skills: {known}. Reply with those that the question needs, and nothing else."
            return StepPlan(activations=ask([options.lead], instruction=task, history=()), fold="keep")
        if done == 1:
            words = " ".join(reply.text.lower() for reply in said(state.steps[0]))
            needed = {skill for found in self._skills.values() for skill in found if named(words, (skill,))}
            ranked = ask(sorted(options.agents, key=lambda name: -len(self._skills[name] & needed)), history=())
            return StepPlan(activations=ranked[: options.width], reserves=ranked[options.width :], fold="vote")
        return aggregation(options.agents, options.lead, texts(state.steps[1])) if done == 2 else Stop(reason="schedule")
