"""The exploring policy: DMoA's own choice, and beside it agents that are asked only to learn from.

Rollouts use it. What the explored agents say is recorded and never folded, and the inner policy does not see it, so a query
goes through the same states as without exploration. Source: dense warm-up from the paper; epsilon and propensities ours.
"""

from __future__ import annotations

import random
from dataclasses import replace

from dmoa.policies.dmoa import build_dmoa
from dmoa.policies.registry import PolicyContext, policy
from dmoa.protocols import Policy
from dmoa.types import Activation, QueryState, StepPlan, StepRecord, Stop


@policy(
    "exploring",
    "As dmoa, and beside it the other agents are asked only to learn from: all, or one with `dmoa.epsilon`.",
    cost="steps * A at most",
    reads="A * steps * (steps - 1) / 2 at most",
    first_step_only=True,
)
def build_exploring(context: PolicyContext) -> ExploringPolicy:
    """Return the policy around `dmoa`; explored agents use up the query's own budgets too."""
    return ExploringPolicy(build_dmoa(context), epsilon=None, budget_tokens=context.config.limits.budget_tokens)


class ExploringPolicy:
    """Follows another policy and asks more agents beside it: all others, or now and then one drawn evenly."""

    name = "exploring"

    def __init__(self, policy: Policy, *, epsilon: float | None, budget_tokens: int | None = None) -> None:
        """`epsilon`: probability, (0, 1], with which a step explores one agent; None: the query's own, else all (dense).

        `budget_tokens` is the budget that the other policy lives on where the query has none of its own, which explorers use up.
        """
        self._policy = policy
        self._epsilon = epsilon
        self._budget_tokens = budget_tokens

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Return the other policy's plan with explored agents, drawn by the query's id and the step's number alone."""
        seen = self._with_budget(unexplored(state))
        budget = seen.query.limits.budget_tokens
        if budget is not None and seen.steps and seen.tokens_used >= budget:
            return Stop(reason="budget_tokens")
        plan = await self._policy.next_step(seen)
        if isinstance(plan, Stop):
            return plan
        return replace(plan, explored=self._draw(state, plan.reserves))

    def _with_budget(self, state: QueryState) -> QueryState:
        if self._budget_tokens is None or state.query.limits.budget_tokens is not None:
            return state
        limits = replace(state.query.limits, budget_tokens=self._budget_tokens)
        return replace(state, query=replace(state.query, limits=limits))

    def _draw(self, state: QueryState, others: tuple[Activation, ...]) -> tuple[Activation, ...]:
        epsilon = state.query.epsilon if self._epsilon is None else self._epsilon
        if epsilon is None:
            return others
        rng = random.Random(f"{state.query.trace_id}/{len(state.steps)}")  # noqa: S311 -- exploration, not secrets
        if not others or rng.random() >= epsilon:
            return ()
        return (replace(rng.choice(others), propensity=epsilon / len(others)),)


def unexplored(state: QueryState) -> QueryState:
    """Return the state as it would be had nobody been explored."""
    steps = tuple(map(_unexplored_step, state.steps))
    spent = sum(step.usage.total for step in state.steps) - sum(step.usage.total for step in steps)
    return replace(state, steps=steps, tokens_used=state.tokens_used - spent)


def _unexplored_step(step: StepRecord) -> StepRecord:
    names = {name for name, _ in step.explored}
    return replace(step, replies=tuple(reply for reply in step.replies if reply.agent not in names), explored=())
