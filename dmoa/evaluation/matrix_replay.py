"""Routers replayed on an answer matrix: whom they would have asked, which reply would have won, at what cost.

Exact for policies that choose agents from a single step, because a greedy reply does not depend on who else was asked: the
same activation, cascade and selection as in serving run over replies that are already there. Shape letters: R rows, A agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmoa.core.aggregate import RAW, select_contribution
from dmoa.dispatch import is_any_sure
from dmoa.evaluation.matrix import AnswerMatrix, Floats
from dmoa.types import AgentReply, RouteDecision


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Whom a router asks for one row."""

    ranking: tuple[int, ...]
    """Indices of agents, the preferred first."""
    k: int
    """How many of the ranking are asked at once."""
    theta: float | None = None
    """While the surest reply's score is above it, the next-ranked agent is asked too; None: never."""
    limit: int = 1
    """Most agents that may come to be asked."""
    anchors: tuple[float, ...] | None = None
    """Per agent, what the anchored score subtracts; None: raw scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a router would have done on a matrix."""

    value_R: Floats
    """Score of the winning reply, 0 where nobody contributed."""
    first_R: npt.NDArray[np.int64]
    """Index of the router's first choice."""
    chosen_R: npt.NDArray[np.int64]
    """Index of the agent whose reply won; -1 where nobody contributed."""
    k_R: npt.NDArray[np.int64]
    """Agents asked, those of the cascade included."""
    tokens_R: npt.NDArray[np.int64]
    """Prompt and completion tokens of the agents asked."""
    asked_RA: npt.NDArray[np.bool_]
    """Whether an agent was asked at all, those of the cascade included."""

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return float(self.value_R.mean())


def choice_of(decision: RouteDecision) -> Choice:
    """Return a gate's decision as a choice."""
    return Choice(
        ranking=decision.ranking,
        k=decision.k,
        theta=decision.theta,
        limit=decision.limit,
        anchors=decision.anchors,
    )


def replay(matrix: AnswerMatrix, choices: Sequence[Choice]) -> Replayed:
    """Replay one choice per row of the matrix."""
    rows = [_row(matrix, row, choice) for row, choice in enumerate(choices)]
    if len(rows) != len(matrix.tasks):
        raise ValueError(f"choices: {len(rows)} for {len(matrix.tasks)} rows; give one per row")
    chosen, k, tokens = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    value_R = np.where(chosen >= 0, matrix.value_RA[np.arange(len(rows)), chosen], 0.0)
    first = np.array([choice.ranking[0] for choice in choices], dtype=np.int64)
    asked_RA = np.zeros((len(rows), len(matrix.agents)), dtype=np.bool_)
    for row, (choice, count) in enumerate(zip(choices, k, strict=True)):
        asked_RA[row, list(choice.ranking[:count])] = True
    return Replayed(value_R=value_R, first_R=first, chosen_R=chosen, k_R=k, tokens_R=tokens, asked_RA=asked_RA)


def _row(matrix: AnswerMatrix, row: int, choice: Choice) -> tuple[int, int, int]:
    """Return (agent that won or -1, agents asked, tokens) of one row."""
    ranked = [matrix.replies[row][index] for index in choice.ranking]
    anchors = dict(zip(matrix.agents, choice.anchors, strict=True)) if choice.anchors else RAW
    asked = choice.k
    while choice.theta is not None and _has_room(ranked[:asked], choice.limit) and asked < len(ranked):
        if is_any_sure(ranked[:asked], choice.theta, anchors):
            break
        asked += 1
    active = ranked[:asked]
    selection = select_contribution(active, anchors)
    winner = -1 if selection is None else matrix.agents.index(selection.agent)
    return winner, asked, sum(reply.prompt_tokens + reply.completion_tokens for reply in active)


def _has_room(asked: Sequence[AgentReply], limit: int) -> bool:
    """Tell whether the cascade may ask on: agents that were lost take no place."""
    return sum(reply.status == "ok" for reply in asked) < limit
