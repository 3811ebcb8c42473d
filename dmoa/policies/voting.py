"""Policies that ask in one step and choose: chain of thought, samples of one agent, and a vote of several agents."""

from __future__ import annotations

import random

from dmoa.policies.options import Count, OneOptions, PolicyOptions, SampledOptions, ask, ask_one
from dmoa.policies.registry import scheduled
from dmoa.types import Fold, QueryState, StepPlan, Stop

STEP_BY_STEP = "Think step by step, then write the answer on a last line of its own."


@scheduled(
    "cot",
    "One agent thinks step by step (chain of thought, arXiv 2205.11916).",
    options=OneOptions,
    cost="1",
    reads="0",
)
def cot(options: OneOptions, state: QueryState) -> StepPlan | Stop:
    """Ask the first agent, told to think aloud; the others stand in for it."""
    if state.steps:
        return Stop(reason="schedule")
    return ask_one(options.agents, options.agents[0], ends_with="schedule", instruction=STEP_BY_STEP)


@scheduled(
    "self_consistency",
    "One agent thinks step by step k times; the answer of most samples wins (arXiv 2203.11171).",
    options=SampledOptions,
    cost="k",
    reads="0",
)
def self_consistency(options: SampledOptions, state: QueryState) -> StepPlan | Stop:
    """Take k samples of the first agent. Of answers equally often given the surest wins (ours)."""
    return _samples(options, state, "vote")


@scheduled(
    "best_of_n",
    "One agent thinks step by step k times; its surest sample wins: best of n without a reward model.",
    options=SampledOptions,
    cost="k",
    reads="0",
)
def best_of_n(options: SampledOptions, state: QueryState) -> StepPlan | Stop:
    """Take k samples of the first agent, of which the lowest mean entropy wins (after arXiv 2502.18581)."""
    return _samples(options, state, "surest")


def _samples(options: SampledOptions, state: QueryState, fold: Fold) -> StepPlan | Stop:
    if state.steps:
        return Stop(reason="schedule")
    samples = ask([options.lead] * options.k, instruction=STEP_BY_STEP, temperature=options.temperature)
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


@scheduled(
    "majority_k",
    "k agents answer alone; the answer of most wins.",
    options=MajorityOptions,
    cost="min(k, A)",
    reads="0",
    first_step_only=True,
)
def majority_k(options: MajorityOptions, state: QueryState) -> StepPlan | Stop:
    """Ask the voters; the others stand in for lost ones, and of answers equally often given the surest agent's wins (ours)."""
    if state.steps:
        return Stop(reason="schedule")
    order = list(options.agents)
    if options.drawn:
        random.Random(f"{state.query.trace_id}/0").shuffle(order)  # noqa: S311 -- a baseline, not a secret
    asked, k = ask(order), options.width
    return StepPlan(activations=asked[:k], reserves=asked[k:], fold="vote", ends_with="schedule")
