"""What a gate reads of the last step while it learns is what it will read when it is served: few agents, most of them sure."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmoa import checkpoint
from dmoa.config import Config
from dmoa.core.activation import activate
from dmoa.core.features import feedback
from dmoa.core.gate import Gate
from dmoa.testing import AGENTS, CONTEXT_DIM, rollout_row, scripted_pool, write_rollouts
from dmoa.training.dataset import as_asked
from tests.unit.training.in_process import train
from tests.unit.training.test_objective import episodes_of

Numbers = np.ndarray[Any, Any]
K, STEPS = 3, 4
QUERIES = 200


def nats_of(query: int, step: int, place: int) -> float:
    return 0.1 + 0.3 * ((query + step + place) % 3) + 0.01 * (query % 7)


def dense_rows(queries: int = QUERIES, **changes: Any) -> list[dict[str, Any]]:
    """Rows of three steps, collected by a gate that asked all three agents; the budget share grows by a quarter a step."""
    return [
        rollout_row(
            f"q{query:03d}",
            step,
            agent,
            nats_of(query, step, place),
            np.full(2 * CONTEXT_DIM, 0.1),
            **{"num_steps": 3, "feedback": np.array([0.4, 0.3, 1.0, step / 4] if step else [0.0] * 4, np.float32)} | changes,
        )
        for query in range(queries)
        for step in range(3)
        for place, agent in enumerate(AGENTS)
    ]


def asked(nats: tuple[float, ...], step: int) -> list[float]:
    """The feedback by its definition: mean, spread, share of K, share of the budget."""
    mean = sum(nats) / len(nats)
    return [mean, math.sqrt(sum((value - mean) ** 2 for value in nats) / len(nats)), len(nats) / K, step / 4]


def test_feedback_is_that_of_few_agents_half_of_the_time_the_surest() -> None:
    before = episodes_of(dense_rows())
    after = as_asked(before, K)
    surest, counts = 0, []
    for query, step in itertools.product(range(QUERIES), (1, 2)):
        seen = after.input_NX[3 * query + step, -4:]
        nats = sorted(nats_of(query, step - 1, place) for place in range(3))
        count = round(float(seen[2]) * K)
        subsets = list(itertools.combinations(nats, count))
        assert any(seen == pytest.approx(asked(subset, step), abs=1e-5) for subset in subsets)
        counts.append(count)
        surest += count == 1 and seen == pytest.approx(asked(subsets[0], step), abs=1e-5)
    assert np.bincount(counts)[1:] == pytest.approx([400 / 3] * 3, abs=30)
    assert surest / counts.count(1) == pytest.approx(0.5 + 0.5 / 3, abs=0.15)
    assert not after.input_NX[::3, -4:].any()  # nothing comes before a first step
    assert np.array_equal(after.input_NX[:, :-4], before.input_NX[:, :-4])
    assert np.array_equal(as_asked(before, K).input_NX, after.input_NX)


def test_replies_that_never_came_are_not_read() -> None:
    rows = dense_rows(40)
    for row in rows:
        if row["agent"] != "two":
            row |= {"status": "failed", "entropy_tokens": 0, "entropy_sum_nats": 0.0, "entropy_sq_sum": 0.0}
    found = as_asked(episodes_of(rows), K).input_NX[:, -4:].reshape(40, 3, 4)
    for query, step in itertools.product(range(40), (1, 2)):
        one = asked((nats_of(query, step - 1, 1),), step)
        assert any(found[query, step] == pytest.approx(values, abs=1e-5) for values in (one, [0.0] * 4))


def test_feedback_of_a_trained_gate_and_of_sparse_steps_is_what_it_was() -> None:
    for rows in (dense_rows(5, gate_version="0123456789abcdef"), [row | {"propensity": 0.5} for row in dense_rows(5)]):
        episodes = episodes_of(rows)
        assert as_asked(episodes, K) is episodes
    firsts = episodes_of([row | {"num_steps": 1} for row in dense_rows(5) if row["step"] == 0])
    assert as_asked(firsts, K) is firsts


DOMAINS = len(AGENTS)


def cards(num_queries: int, seed: int) -> tuple[Numbers, Numbers]:
    """The gate sees a card a step, and agents answer the one before: domains [Q, S] of the cards, embeddings [Q, S, 2D]."""
    rng, centre = np.random.default_rng(seed), np.random.default_rng(9)
    centres = centre.standard_normal((DOMAINS, 2 * CONTEXT_DIM)) / np.sqrt(2 * CONTEXT_DIM)
    domain_QS = rng.integers(0, DOMAINS, (num_queries, STEPS))
    noise = rng.standard_normal((num_queries, STEPS, 2 * CONTEXT_DIM)) / np.sqrt(2 * CONTEXT_DIM)
    return domain_QS, (0.6 * centres[domain_QS] + 0.4 * noise).astype(np.float32)


def replies(domain_QS: Numbers, seed: int) -> Numbers:
    """Mean entropies [Q, S, A]: the agent of the card before is sure, the others are not, each in its own way."""
    rng = np.random.default_rng(seed)
    nats_QSA = np.array([2.0, 8.0, 5.0]) * rng.uniform(0.3, 1.7, (*domain_QS.shape, DOMAINS))
    for query, step in itertools.product(range(len(domain_QS)), range(1, STEPS)):
        nats_QSA[query, step, domain_QS[query, step - 1]] = 0.3 * rng.uniform(0.5, 1.5)
    return nats_QSA


def sent_home(gate: Gate, domain_QS: Numbers, x_QSD: Numbers, nats_QSA: Numbers, count: int) -> float:
    """Share of the cards that go to their agent where each step reads what the gate's own `count` agents said."""
    num_queries = len(x_QSD)
    last_QF, hidden_QH, hits = np.zeros((num_queries, 4), np.float32), torch.zeros(num_queries, gate.spec.hidden), []
    for step in range(STEPS):
        with torch.no_grad():
            logits_QA, hidden_QH = gate(torch.from_numpy(np.concatenate([x_QSD[:, step], last_QF], axis=1)), hidden_QH)
        found = activate(
            logits_QA.numpy(),
            np.ones(logits_QA.shape, np.bool_),
            temperature=gate.spec.temperature,
            rule="fixed",
            mass_left=0.0,
            max_agents_B=np.full(num_queries, count),
        )
        if step:
            hits.append(found.ranking_BA[:, 0] == domain_QS[:, step - 1])
        for query, ranking_A in enumerate(found.ranking_BA):
            nats = nats_QSA[query, step, ranking_A[:count]].tolist()
            last_QF[query] = feedback(nats, count, K, (step + 1) / STEPS)
    return float(np.mean(hits))


def test_a_gate_that_asks_one_agent_remembers_as_one_that_asks_three(tmp_path: Path) -> None:
    """Its rollouts tell of three agents a step alone: taken as they are, they leave 82 % of the cards to the right agent."""
    config: Config = scripted_pool()
    domain_QS, x_QSD = cards(100, seed=1)
    nats_QSA = replies(domain_QS, seed=2)
    rows = [
        rollout_row(
            f"q{query}",
            step,
            agent,
            float(nats_QSA[query, step, place]),
            x_QSD[query, step],
            num_steps=STEPS,
            feedback=feedback(nats_QSA[query, step - 1].tolist(), 3, K, step / STEPS) if step else np.zeros(4, np.float32),
        )
        for query in range(len(x_QSD))
        for step in range(STEPS)
        for place, agent in enumerate(AGENTS)
    ]
    folder = write_rollouts(tmp_path / "r", rows, config)
    options: dict[str, Any] = {"score": "anchored", "epochs": 10, "patience": 10, "seed": 0, "hidden": 32}
    gate, _ = checkpoint.load(train(tmp_path / "t", folder, config, **options).checkpoint)
    domain_QS, x_QSD = cards(100, seed=3)
    shares = [sent_home(gate, domain_QS, x_QSD, replies(domain_QS, seed=4), count) for count in (1, 3)]
    assert min(shares) >= 0.95
