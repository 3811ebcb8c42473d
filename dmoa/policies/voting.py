"""Policies that ask in one step and choose: chain of thought, samples of one agent, and a vote of several agents."""

from __future__ import annotations

import random

from dmoa.policies.options import Count, OneOptions, Optioned, PolicyOptions, SampledOptions, ask, others
from dmoa.policies.registry import PolicyContext, policy
from dmoa.types import Fold, QueryState, StepPlan, Stop

STEP_BY_STEP = "Think step by step, then write the answer on a last line of its own."


class OneStep:
    """One plan, set beforehand; its answer ends the query."""

    def __init__(self, name: str, plan: StepPlan) -> None:
        self.name = name
        self._plan = plan

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Return the plan, then stop."""
        return Stop(reason="schedule") if state.steps else self._plan


@policy(
    "cot",
    "One agent thinks step by step (chain of thought, arXiv 2205.11916).",
    options=OneOptions,
    cost="1",
    reads="0",
    first_step_only=False,
)
def build_cot(context: PolicyContext) -> OneStep:
    """Return the policy of the first agent, told to think aloud; the others stand in for it."""
    options: OneOptions = context.options
    first = options.agents[0]
    plan = StepPlan(
        activations=ask([first], instruction=STEP_BY_STEP),
        reserves=others(options.agents, first, instruction=STEP_BY_STEP),
        fold="pass",
        ends_with="schedule",
    )
    return OneStep("cot", plan)


@policy(
    "self_consistency",
    "One agent thinks step by step k times; the answer of most samples wins (arXiv 2203.11171).",
    options=SampledOptions,
    cost="k",
    reads="0",
    first_step_only=False,
)
def build_self_consistency(context: PolicyContext) -> OneStep:
    """Return the policy of k samples of the first agent. Of answers equally often given the surest wins (ours)."""
    return OneStep("self_consistency", _samples(context.options, "vote"))


@policy(
    "best_of_n",
    "One agent thinks step by step k times; its surest sample wins: best of n without a reward model.",
    options=SampledOptions,
    cost="k",
    reads="0",
    first_step_only=False,
)
def build_best_of_n(context: PolicyContext) -> OneStep:
    """Return the policy of k samples of the first agent, of which the lowest mean entropy wins (after arXiv 2502.18581)."""
    return OneStep("best_of_n", _samples(context.options, "surest"))


def _samples(options: SampledOptions, fold: Fold) -> StepPlan:
    samples = ask([options.agent] * options.k, instruction=STEP_BY_STEP, temperature=options.temperature)
    return StepPlan(activations=samples, fold=fold, ends_with="schedule")


class MajorityOptions(PolicyOptions):
    """Parameters of `majority_k`."""

    k: Count = 3
    """Agents that vote; all where the pool has no more."""
    drawn: bool = True
    """Whether voters are drawn anew for every query, evenly, by its id; else they are the first k."""

    @property
    def width(self) -> int:
        """All voters are asked at once."""
        return min(self.k, len(self.agents))


@policy(
    "majority_k",
    "k agents answer alone; the answer of most wins.",
    options=MajorityOptions,
    cost="min(k, A)",
    reads="0",
    first_step_only=True,
)
class MajorityPolicy(Optioned):
    """A vote of k agents; of answers equally often given the surest agent's wins (ours)."""

    name = "majority_k"
    _options: MajorityOptions

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask the voters; the others stand in for lost ones."""
        if state.steps:
            return Stop(reason="schedule")
        order = list(self._options.agents)
        if self._options.drawn:
            random.Random(f"{state.query.trace_id}/0").shuffle(order)  # noqa: S311 -- a baseline, not a secret
        asked, k = ask(order), self._options.width
        return StepPlan(activations=asked[:k], reserves=asked[k:], fold="vote", ends_with="schedule")
