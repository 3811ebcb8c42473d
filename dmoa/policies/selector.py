"""The `selector` policy: a language model reads the agents' profiles and names the one that answers.

The rival of a trained gate that needs no training, at the price of one more call a query. Source: ours (LLM routing).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from dmoa.types import Activation, QueryState, StepPlan, Stop


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
            return StepPlan(activations=(Activation(agent=self._chooser, instruction=self._instruction),), fold="pass")
        if len(state.steps) > 1:
            return Stop(reason="single")
        chosen = named(state.summary, self._agents) or self._chooser
        others = tuple(Activation(agent=name, history=()) for name in self._agents if name != chosen)
        return StepPlan(activations=(Activation(agent=chosen, history=()),), reserves=others, fold="pass", ends_with="single")


def named(text: str, agents: tuple[str, ...]) -> str | None:
    """Return the agent that a text names first, as a whole word; of names that begin at one place the longest. None: nobody."""
    found = [(match.start(), -len(name), name) for name in agents if (match := _whole(name).search(text.lower()))]
    return min(found)[2] if found else None


def _whole(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-])")
