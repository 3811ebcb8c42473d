"""The `single` policy: one agent, one step. The baseline that every other policy must beat."""

from __future__ import annotations

from dmoa.types import Activation, QueryState, StepPlan, Stop


class SinglePolicy:
    """Asks one agent once; the other agents of the pool, in order, stand in if it is lost."""

    name = "single"

    def __init__(self, *, agent: str, stand_ins: tuple[str, ...] = ()) -> None:
        self._agent = agent
        self._stand_ins = tuple(name for name in stand_ins if name != agent)

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask the agent at the first step, or at every stage of a query that has some, then stop."""
        num_steps = max(1, len(state.query.stages))
        if len(state.steps) >= num_steps:
            return Stop(reason="single")
        return StepPlan(
            activations=(Activation(agent=self._agent),),
            reserves=tuple(Activation(agent=name) for name in self._stand_ins),
            fold="pass",
            ends_with="single" if len(state.steps) == num_steps - 1 else None,
        )
