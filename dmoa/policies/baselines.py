"""Policies without a gate: `single` (one agent, one step, which every other must beat), `dense`, `random` and `selector`."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from dmoa.policies.options import ask, ask_one, texts
from dmoa.policies.registry import PolicyContext, policy
from dmoa.types import QueryState, StepPlan, Stop


@policy(
    "single",
    "One agent answers once: the one named, or the pool's first.",
    width=lambda config: 1,
    cost="1",
    reads="0",
    first_step_only=True,
)
def build_single(context: PolicyContext) -> SinglePolicy:
    """Return the policy of the agent that is named, without stand-ins; else of the first, with all others as stand-ins."""
    names = context.config.agent_names
    return SinglePolicy(agent=context.agent) if context.agent is not None else SinglePolicy(agent=names[0], stand_ins=names)


class SinglePolicy:
    """Asks one agent once; the other agents of the pool, in order, stand in if it is lost."""

    name = "single"

    def __init__(self, *, agent: str, stand_ins: tuple[str, ...] = ()) -> None:
        self._agent = agent
        self._stand_ins = stand_ins

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask the agent at the first step, or at every stage of a query that has some, then stop."""
        num_steps = max(1, len(state.query.stages))
        if len(state.steps) >= num_steps:
            return Stop(reason="single")
        return ask_one(self._stand_ins, self._agent, ends_with="single" if len(state.steps) == num_steps - 1 else None)


@policy(
    "dense",
    "Every agent of the pool at every step.",
    cost="steps * A",
    reads="A * steps * (steps - 1) / 2",
    first_step_only=True,
)
class DensePolicy:
    """Asks all agents of the pool at every step; stopping is the pool's own."""

    name = "dense"

    def __init__(self, context: PolicyContext) -> None:
        self._agents = context.config.agent_names

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask everyone, in the order of the pool."""
        return StepPlan(activations=ask(self._agents, probability=1 / len(self._agents)))


@policy(
    "random",
    "One agent a step, drawn evenly; repeats for the same query.",
    width=lambda config: 1,
    cost="steps",
    reads="steps * (steps - 1) / 2",
    first_step_only=True,
)
class RandomPolicy:
    """Asks one agent, drawn anew at every step; draws depend on the query's id and the step, so a repeated query repeats."""

    name = "random"

    def __init__(self, context: PolicyContext) -> None:
        self._agents = context.config.agent_names

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Draw an order of all agents: the first is asked, the others stand in for lost ones."""
        rng = random.Random(f"{state.query.trace_id}/{len(state.steps)}")  # noqa: S311 -- a baseline, not a secret
        order = rng.sample(self._agents, len(self._agents))
        probability = 1 / len(order)
        drawn = ask(order, probability=probability)
        return StepPlan(activations=drawn[:1], reserves=drawn[1:], mass=probability)


@policy(
    "selector",
    "The pool's first agent reads all profiles and names the one that answers.",
    width=lambda config: 1,
    cost="2",
    reads="0",
    first_step_only=False,
    answers_at_once=False,
)
def build_selector(context: PolicyContext) -> SelectorPolicy:
    """Return the policy with the agent that is named, or the pool's first, as the chooser."""
    agents = context.config.agents
    return SelectorPolicy(chooser=context.agent or agents[0].name, profiles={agent.name: agent.profile for agent in agents})


class SelectorPolicy:
    """First step: one agent of the pool names an agent. Second step: the named one answers, without seeing the first."""

    name = "selector"

    def __init__(self, *, chooser: str, profiles: Mapping[str, str]) -> None:
        """`profiles`: each agent's own words about itself, in the order of the pool."""
        self._chooser = chooser
        self._agents = tuple(profiles)
        experts = "\n".join(f"{name}: {profile.strip()}" for name, profile in profiles.items())
        self._instruction = (
            f"Do not answer it yourself. Experts:\n{experts}\nReply with the name of the one expert who should answer."
        )

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask who should answer, then ask that one; the chooser itself where it named nobody."""
        if not state.steps:
            return StepPlan(activations=ask([self._chooser], instruction=self._instruction), fold="keep")
        if len(state.steps) > 1:
            return Stop(reason="single")
        chosen = named(" ".join(texts(state.steps[0])), self._agents) or self._chooser
        return ask_one(self._agents, chosen, ends_with="single", history=())


def named(text: str, agents: tuple[str, ...]) -> str | None:
    """Return the agent that a text names first, as a whole word; of names that begin at one place the longest. None: nobody."""
    found = [(match.start(), -len(name), name) for name in agents if (match := _whole(name).search(text.lower()))]
    return min(found)[2] if found else None


def _whole(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-])")
