"""The study's endpoints on made-up matrices whose right figures are known beforehand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
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
from dmoa.training.cluster_router import KMeansRouter
from dmoa.types import AgentReply, EntropySum, TokenUsage

pytestmark = pytest.mark.contract  # works for seconds

FOLDER = Path(__file__).parents[3] / "jobs" / "study"
AGENTS = ("base", "arith-carry", "arith-plain", "arith-both", "words", "calendar", "generalist")
SUITES = ("arith", "words", "calendar", "shared")
ROWS = 80


def study(name: str = "study") -> Any:
    """A file of the study, which lies among the jobs and not in the package."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def matrix(suite: str, agents: tuple[str, ...] = AGENTS) -> AnswerMatrix:
    """Every agent is right on its own suite alone, carry on even rows, plain on odd ones, both on three rows of four."""
    right: Mapping[str, Any] = {
        "arith-carry": lambda row: suite in ("arith", "shared") and row % 2 == 0,
        "arith-plain": lambda row: suite in ("arith", "shared") and row % 2 == 1,
        "arith-both": lambda row: suite in ("arith", "shared") and row % 4 != 3,
        "words": lambda row: suite == "words",
        "calendar": lambda row: suite == "calendar",
    }
    values = [[float(name in right and right[name](row)) for name in agents] for row in range(ROWS)]
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
    """One-hot by surface: `shared` looks like `arith`; the last number tells even rows from odd ones, hardly."""
    rows = np.zeros((ROWS, 4), dtype=np.float32)
    rows[:, {"arith": 0, "shared": 0, "words": 1, "calendar": 2}[suite]] = 1.0
    rows[:, 3] = 0.1 * (np.arange(ROWS) % 2)
    return rows


def knowing_gate(agents: tuple[str, ...] = AGENTS, **changes: Any) -> Gate:
    """A linear gate that sends words and calendar home, and sums to carry or plain by the row's parity."""
    spec = replace(GateSpec.from_config(GateConfig(core="linear"), agents), embedding_dim=4, max_agents=3, **changes)
    gate = Gate(spec)
    with torch.no_grad():
        for agent, column in (("arith-carry", 0), ("words", 1), ("calendar", 2)):
            gate.head_weight[agents.index(agent), column] = 2.0 if column == 0 else 9.0
        gate.head_weight[agents.index("arith-plain"), 0] = 1.0
        gate.head_weight[agents.index("arith-plain"), 3] = 20.0
    return gate


def blind_gate(agents: tuple[str, ...], favourite: int | None) -> Gate:
    """A gate that asks one agent whatever it reads, or by a hash of the row."""
    gate = Gate(replace(GateSpec.from_config(GateConfig(core="linear"), agents), embedding_dim=4, max_agents=3))
    with torch.no_grad():
        if favourite is not None:
            gate.head_bias[favourite] = 5.0
    return gate


def material(gate: Gate, agents: tuple[str, ...] = AGENTS) -> Any:
    found = {suite: matrix(suite, agents) for suite in SUITES}
    centres = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])
    order = [
        [agents.index(first), *[i for i in range(len(agents)) if agents[i] != first]]
        for first in ("arith-both", "words", "calendar")
    ]
    clusters = [KMeansRouter(centres_CD=centres, ranking_CA=np.array(order))] * 2
    return study().Material(
        validation=found, test=found, embedding={suite: embedding(suite) for suite in SUITES}, gates=[gate] * 2, clusters=clusters
    )


def test_home() -> None:
    found = study().home(material(knowing_gate()))
    assert (found["home_share"], found["accuracy"], found["passed"]) == (1.0, 1.0, True)
    assert found["oracle_agents"] == {"arith": "arith-both", "words": "words", "calendar": "calendar"}
    assert found["oracle_accuracy"] == pytest.approx((0.75 + 1 + 1) / 3)
    assert found["kmeans_accuracy"] == pytest.approx((0.75 + 1 + 1) / 3)
    assert found["best_specialist_accuracy"] == pytest.approx(1 / 3)
    lost = study().home(material(blind_gate(AGENTS, 0)))
    assert (lost["home_share"], lost["passed"]) == (0.0, False)


def test_same_surface() -> None:
    found = study().same_surface(material(knowing_gate()))
    assert (found["accuracy"], found["kmeans_accuracy"], found["mean_active"], found["passed"]) == (1.0, 0.75, 1.0, True)
    assert found["against_kmeans"]["difference"] == pytest.approx(0.25)
    # A gate that cannot tell them apart, with a cascade: unsure rows ask the next one.
    sums = blind_gate(AGENTS, 1)
    with torch.no_grad():
        sums.head_bias[2] = 4.9
    cascading = Gate(replace(sums.spec, theta=-2.0, mass=0.6))
    cascading.load_state_dict(sums.state_dict())
    asked = study().same_surface(material(cascading))
    assert (asked["accuracy"], asked["gate_alone"], asked["mean_active"]) == (1.0, 0.5, 1.5)


def test_several_agents() -> None:
    found = study().several(material(knowing_gate()))
    assert (found["best_agent"], found["best_accuracy"]) == ("arith-both", 0.75)
    assert (found["oracle_room"], found["gain"], found["share_of_room"]) == (0.25, 0.25, 1.0)
    assert found["token_share"] == pytest.approx(1 / 3)
    assert found["passed"] is True
    assert study().several(material(blind_gate(AGENTS, 3)))["passed"] is False


def test_a_liar_may_get_no_rows() -> None:
    agents = (*AGENTS, "liar-constant")
    honest = material(knowing_gate())
    ignored = study().liar(material(knowing_gate(agents), agents), honest)
    assert (ignored["share"], ignored["passed"]) == (0.0, True)
    # Wilson's upper end for none of the 240 rows that every gate meets: two gates are no 480 independent rows.
    assert ignored["share_high"] == pytest.approx(1.96**2 / (240 + 1.96**2), rel=1e-3)
    assert ignored["share_high_over_gates"] == pytest.approx(ignored["share_high"])
    assert ignored["asked_share"] == 0.0
    believed = study().liar(material(blind_gate(agents, 7), agents), honest)
    assert (believed["share"], believed["passed"]) == (1.0, False)


def test_controls() -> None:
    even, favourite = material(blind_gate(AGENTS, None)), material(blind_gate(AGENTS, 2))
    found = study().controls(even, favourite)
    assert found["across_favourite"] == 1.0
    assert found["within_shares"]["base"] == 1.0, "ties go to the pool's first"
    assert found["passed"] is False
