"""The `dense` policy: every agent at every step, folded by the pool's summarizer. What a sparse gate is to save on."""

from __future__ import annotations

from dmoa.types import Activation, QueryState, StepPlan, Stop


class DensePolicy:
    """Asks all agents of the pool at every step; stopping is the pool's own."""

    name = "dense"

    def __init__(self, *, agents: tuple[str, ...]) -> None:
        self._agents = agents

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask everyone, in the order of the pool."""
        return StepPlan(activations=tuple(Activation(agent=name, probability=1 / len(self._agents)) for name in self._agents))
