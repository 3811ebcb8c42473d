"""The `random` policy: agents drawn evenly, the floor that every router must clear."""

from __future__ import annotations

import random

from dmoa.types import Activation, QueryState, StepPlan, Stop


class RandomPolicy:
    """Asks one agent, drawn anew at every step; draws hang on the query's id and the step, so a repeated query repeats."""

    name = "random"

    def __init__(self, *, agents: tuple[str, ...]) -> None:
        self._agents = agents

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Draw an order of all agents: the first is asked, the others stand in for lost ones."""
        rng = random.Random(f"{state.query.trace_id}/{len(state.steps)}")  # noqa: S311 -- a baseline, not a secret
        order = rng.sample(self._agents, len(self._agents))
        probability = 1 / len(order)
        drawn = tuple(Activation(agent=name, probability=probability) for name in order)
        return StepPlan(activations=drawn[:1], reserves=drawn[1:], mass=probability)
