"""Routers as choices on an answer matrix: gates as they serve, and the references that they are printed beside.

Every function returns one `Choice` per row. Shape letters: R rows, A agents, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dmoa.core.features import gate_input
from dmoa.core.gate import Gate
from dmoa.core.inference import Decider
from dmoa.errors import ConfigError
from dmoa.evaluation.matrix import AnswerMatrix
from dmoa.evaluation.matrix_replay import Choice, choice_of
from dmoa.types import FloatArray, RouteRequest


def gate_choices(gate: Gate, embedding_RD: FloatArray, *, cascades: bool = True, max_agents: int | None = None) -> list[Choice]:
    """Return what a gate decides at the first step of every row, through the very code that serves.

    `cascades` False leaves the cascade out; `max_agents` lowers K, as a query's limit does.
    """
    decider = Decider(gate, "replay")
    requests = [RouteRequest(input_X=gate_input(gate.spec.preset, query_D), max_agents=max_agents) for query_D in embedding_RD]
    choices = [choice_of(decision) for decision in decider.decide(requests)]
    if cascades:
        return choices
    return [Choice(ranking=choice.ranking, k=choice.k, anchors=choice.anchors) for choice in choices]


def check_agents(gate: Gate, matrix: AnswerMatrix) -> None:
    """Raise ConfigError unless a gate's agents are the matrix's, in its order."""
    if gate.spec.agents != matrix.agents:
        raise ConfigError(
            f"checkpoint: agents: value seen: {', '.join(gate.spec.agents)}; allowed: {', '.join(matrix.agents)}, the answer "
            "matrix's; use the matrix of the same pool, or `AnswerMatrix.only`"
        )


def one_agent(matrix: AnswerMatrix, agent: str) -> list[Choice]:
    """Return the choice of one agent for every row."""
    return ranked(np.full((len(matrix.tasks), 1), matrix.agents.index(agent)))


def everyone(matrix: AnswerMatrix) -> list[Choice]:
    """Return the choice of all agents for every row, in the pool's order."""
    count = len(matrix.agents)
    return ranked(np.tile(np.arange(count), (len(matrix.tasks), 1)), k=count)


def anyone(matrix: AnswerMatrix, seed: int) -> list[Choice]:
    """Return one agent drawn evenly for every row."""
    rng = np.random.default_rng(seed)
    return ranked(np.stack([rng.permutation(len(matrix.agents)) for _ in matrix.tasks]))


def row_oracle(matrix: AnswerMatrix) -> list[Choice]:
    """Return, with knowledge of the labels, an agent whose reply scores best on each row; of equals the pool's first."""
    return ranked(np.argsort(-matrix.value_RA, axis=1, kind="stable"))


def ranked(ranking_RA: npt.NDArray[np.integer], k: int = 1) -> list[Choice]:
    """Return the first k agents of every row's ranking."""
    rows: Sequence[Sequence[int]] = ranking_RA.tolist()
    return [Choice(ranking=tuple(row), k=k) for row in rows]
