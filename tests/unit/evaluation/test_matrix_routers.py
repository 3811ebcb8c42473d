"""Routers on an answer matrix: references by hand, gates exactly as they serve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dmoa.config import GateConfig
from dmoa.core.gate import GateSpec, init_gate
from dmoa.evaluation.answer_matrix import (
    AnswerMatrix,
    everyone,
    gate_choices,
    one_agent,
    replay_choices,
    row_oracle,
)
from dmoa.evaluation.records import Task
from dmoa.policies.dmoa import DmoaPolicy
from dmoa.routing import LocalRouter
from dmoa.testing import FakeEncoder, query, state_of
from dmoa.types import AgentReply, StepPlan, TokenUsage

AGENTS = ("a", "b", "c")
VALUES = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.fixture
def matrix() -> AnswerMatrix:
    tasks = tuple(Task(row_id=f"r{n}", benchmark="sums", text=f"question {n}") for n in range(4))
    replies = tuple(
        tuple(
            AgentReply(agent=name, status="ok", text=f"{name}{n}", usage=TokenUsage(prompt_tokens=1, completion_tokens=1))
            for name in AGENTS
        )
        for n in range(4)
    )
    return AnswerMatrix(benchmark="sums", agents=AGENTS, tasks=tasks, replies=replies, value_RA=VALUES)


def test_references(matrix: AnswerMatrix) -> None:
    assert replay_choices(matrix, one_agent(matrix, "c")).value_R.tolist() == [1.0, 0.0, 0.0, 1.0]
    oracle = replay_choices(matrix, row_oracle(matrix))
    assert (oracle.accuracy, oracle.chosen_R.tolist()) == (0.75, [1, 0, 0, 2])
    assert set(replay_choices(matrix, everyone(matrix)).k_R) == {3}
    assert replay_choices(matrix, everyone(matrix)).tokens_R.tolist() == [6] * 4


async def test_a_gate_chooses_as_it_serves(matrix: AnswerMatrix) -> None:
    encoder = FakeEncoder()
    texts = [task.text for task in matrix.tasks]
    text_RD = np.stack(list(await encoder.embed(texts)))
    spec = replace(GateSpec.from_config(GateConfig(temperature=0.5), AGENTS), embedding_dim=text_RD.shape[1])
    gate = init_gate(spec, seed=3)
    choices = gate_choices(gate, text_RD)
    router = LocalRouter()
    router.install("v", gate)
    policy = DmoaPolicy(router=router, encoder=encoder, preset="default")
    for text, choice in zip(texts, choices, strict=True):
        plan = await policy.next_step(state_of(query(text)))
        assert isinstance(plan, StepPlan)
        names = [AGENTS[index] for index in choice.ranking]
        assert names[: choice.k] == [activation.agent for activation in plan.activations]
        assert names[choice.k :] == [activation.agent for activation in plan.reserves]
    lowered = gate_choices(gate, text_RD, max_agents=1)
    assert {choice.k for choice in lowered} == {1}
