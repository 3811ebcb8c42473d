"""What outcomes that a user hands over settle about a pool: what was judged, and whether it bears out what answers alone told.

Estimates without outcomes are held against the rewards of the very replies that were judged; an agent is contradicted where the
two differ by more than chance, all agents together at 5 % (a normal test each, Bonferroni). Shape letters: R rows, A agents.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm

from dmoa.core.label_model import Signal
from dmoa.core.scores import Array, BoolArray
from dmoa.training.rollouts import FileRecord

_ALPHA = 0.05
_FEW = 5
"""Judged replies of an agent below which nothing is held against its estimate."""


class Judged(FileRecord):
    """What the outcomes say of one agent."""

    agent: str
    replies: int
    """Replies with an outcome."""
    reward: float
    """Their mean."""
    low: float
    """Lower end of the 95 % interval (Wilson's)."""
    high: float
    estimate: float
    """What was expected of the same replies without outcomes."""
    is_contradicted: bool


class Settled(FileRecord):
    """What the outcomes changed."""

    signal_before: Signal
    """What could route the pool as far as answers and entropies alone told."""
    was_trusted: bool
    best_before: str
    """The agent that was expected to be right most often."""
    agents: list[Judged]
    """Those with an outcome."""

    @property
    def contradicted(self) -> list[str]:
        """Agents of which the outcomes tell otherwise than the answers did."""
        return [judged.agent for judged in self.agents if judged.is_contradicted]


def judged_agents(agents: tuple[str, ...], right_RA: Array, outcome_RA: Array) -> list[Judged]:
    """Return what the outcomes say of the agents; `right_RA`: the probabilities that were estimated without them."""
    known_RA: BoolArray = np.isfinite(outcome_RA) & np.isfinite(right_RA)
    limit = float(norm.ppf(1 - _ALPHA / 2 / max(1, int(known_RA.any(axis=0).sum()))))
    found = []
    for index, agent in enumerate(agents):
        rewards, estimates = outcome_RA[known_RA[:, index], index], right_RA[known_RA[:, index], index]
        if not len(rewards):
            continue
        reward = float(rewards.mean())
        low, high = _wilson(reward, len(rewards))
        variance = float((estimates * (1 - estimates)).sum()) + 0.25
        distance = abs(float((rewards - estimates).sum())) / math.sqrt(variance)
        found.append(
            Judged(
                agent=agent,
                replies=len(rewards),
                reward=reward,
                low=low,
                high=high,
                estimate=float(estimates.mean()),
                is_contradicted=len(rewards) >= _FEW and distance > limit,
            )
        )
    return found


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a mean of rewards."""
    z2 = float(norm.ppf(1 - _ALPHA / 2)) ** 2 / count
    middle, half = share + z2 / 2, math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def settled_words(settled: Settled, *, outcomes: int, signal: Signal, is_trusted: bool, best: str) -> list[str]:
    """Return in sentences what the outcomes settle."""
    seen = "; ".join(
        f"{judged.agent} {judged.reward:.0%} of {judged.replies} ({judged.low:.0%} to {judged.high:.0%})"
        for judged in settled.agents
    )
    lines = [f"{outcomes} queries have outcomes; right by them: {seen}"]
    expected = "was expected without outcomes: answers err" if settled.was_trusted else "was guessed without outcomes"
    lines += [
        f"{judged.agent} is right on {judged.reward:.0%} where {judged.estimate:.0%} {expected}"
        for judged in settled.agents
        if judged.is_contradicted
    ]
    if not is_trusted and signal == "outcomes":
        lost = f", and {settled.signal_before} is not to be trusted either" if settled.was_trusted else ""
        lines.append(f"they are too few to decide what can route the pool{lost}")
    elif (signal, is_trusted) != (settled.signal_before, settled.was_trusted):
        state = {True: "to be trusted", False: "not to be trusted"}
        lines.append(
            f"they decide what can route the pool: {signal}, {state[is_trusted]} (without them: {settled.signal_before}, "
            f"{state[settled.was_trusted]})"
        )
    elif not settled.contradicted:
        lines.append("they contradict nothing that was found without them")
    if best != settled.best_before:
        lines.append(f"the best single agent is {best}, not {settled.best_before}")
    return lines
