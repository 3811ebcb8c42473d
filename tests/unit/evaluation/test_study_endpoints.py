"""The study's endpoints on made-up matrices whose right figures are known beforehand."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmoa.config import GateConfig
from dmoa.core.gate import Gate, GateSpec
from dmoa.evaluation.answer_matrix import AnswerMatrix
from dmoa.evaluation.records import Task
from dmoa.evaluation.registry import SKILLS
from dmoa.training.cluster_router import KMeansRouter
from dmoa.types import AgentReply, EntropySum, TokenUsage

pytestmark = pytest.mark.contract  # works for seconds

FOLDER = Path(__file__).parents[3] / "jobs" / "study"
SUITES = tuple(suite.name for suite in SKILLS)
AGENTS = SUITES
ROWS = 80


def study(name: str = "study") -> Any:
    """A file of the study, which lies among the jobs and not in the package."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def matrix(suite: str, agents: tuple[str, ...] = AGENTS) -> AnswerMatrix:
    """Every agent is right on its own suite alone, `arith` on three rows of four."""
    right = {name: [suite == name and (name != "arith" or row % 4 != 3) for row in range(ROWS)] for name in SUITES}
    values = [[float(name in right and right[name][row]) for name in agents] for row in range(ROWS)]
    replies = tuple(
        tuple(
            AgentReply(
                agent=name,
                status="ok",
                text=f"Answer: {100 + index if value else index}",
                entropy=EntropySum(sum_nats=0.1 if value else 5.0, tokens=5),
                usage=TokenUsage(prompt_tokens=20, completion_tokens=5),
            )
            for index, (name, value) in enumerate(zip(agents, values[row], strict=True))
        )
        for row in range(ROWS)
    )
    tasks = tuple(Task(row_id=f"{suite}/test/{row}", benchmark=suite, text=str(row)) for row in range(ROWS))
    return AnswerMatrix(benchmark=suite, agents=agents, tasks=tasks, replies=replies, value_RA=np.array(values))


def embedding(suite: str) -> np.ndarray[Any, Any]:
    """One-hot by suite."""
    return np.tile(np.eye(len(SUITES), dtype=np.float32)[SUITES.index(suite)], (ROWS, 1))


def knowing_gate(agents: tuple[str, ...] = AGENTS) -> Gate:
    """A linear gate that sends every suite home."""
    gate = blind_gate(agents, None)
    with torch.no_grad():
        for column, name in enumerate(SUITES):
            gate.head_weight[agents.index(name), column] = 9.0
    return gate


def blind_gate(agents: tuple[str, ...], favourite: int | None) -> Gate:
    """A gate that asks one agent whatever it reads, or by a hash of the row."""
    gate = Gate(replace(GateSpec.from_config(GateConfig(core="linear"), agents), embedding_dim=len(SUITES), max_agents=3))
    with torch.no_grad():
        if favourite is not None:
            gate.head_bias[favourite] = 5.0
    return gate


def material(gate: Gate, agents: tuple[str, ...] = AGENTS) -> Any:
    found = {suite: matrix(suite, agents) for suite in SUITES}
    order = [[agents.index(first), *[i for i in range(len(agents)) if agents[i] != first]] for first in SUITES]
    clusters = [KMeansRouter(centres_CD=np.eye(len(SUITES)), ranking_CA=np.array(order))] * 2
    return study().Material(
        validation=found, test=found, embedding={suite: embedding(suite) for suite in SUITES}, gates=[gate] * 2, clusters=clusters
    )


def test_home() -> None:
    found = study().home(material(knowing_gate()))
    assert (found["home_share"], found["passed"]) == (1.0, True)
    assert found["oracle_agents"] == {name: name for name in SUITES}
    for name in ("accuracy", "oracle_accuracy", "kmeans_accuracy"):
        assert found[name] == pytest.approx((0.75 + 5) / 6)
    assert found["best_specialist_accuracy"] == pytest.approx(1 / 6)
    lost = study().home(material(blind_gate(AGENTS, 0)))
    assert (lost["home_share"], lost["passed"]) == (pytest.approx(1 / 6), False)


def test_a_liar_may_get_no_rows() -> None:
    agents = (*AGENTS, "liar-constant")
    honest = material(knowing_gate())
    ignored = study().liar(material(knowing_gate(agents), agents), honest)
    assert (ignored["share"], ignored["passed"]) == (0.0, True)
    # Wilson's upper end for none of the 480 rows that every gate meets: two gates are no 960 independent rows.
    assert ignored["share_high"] == pytest.approx(1.96**2 / (480 + 1.96**2), rel=1e-3)
    assert ignored["share_high_over_gates"] == pytest.approx(ignored["share_high"])
    assert ignored["asked_share"] == 0.0
    believed = study().liar(material(blind_gate(agents, 6), agents), honest)
    assert (believed["share"], believed["passed"]) == (1.0, False)


def test_controls() -> None:
    even, favourite = material(blind_gate(AGENTS, None)), material(blind_gate(AGENTS, 2))
    found = study().controls(even, favourite)
    assert found["across_favourite"] == 1.0
    assert found["within_shares"]["arith"] == 1.0, "ties go to the pool's first"
    assert found["passed"] is False
