"""Activation against values by hand, a slow float64 reference, and its invariants."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.core.activation import LEFT_TOLERANCE, ActivationBatch, activate, effective_count, probabilities
from tests.examples import examples

Rule = Literal["top_mass", "fixed", "effective_count"]
RULES: tuple[Rule, ...] = ("top_mass", "fixed", "effective_count")


def logits_of(*probability: float, temperature: float = 1.0) -> np.ndarray:
    """Return logits [1, A] whose softmax at `temperature` is the given distribution."""
    return (temperature * np.log(np.array([probability]))).astype(np.float32)


def activate_one(
    logits_BA: np.ndarray,
    *,
    rule: Rule = "top_mass",
    mass: float = 0.8,
    limit: int = 4,
    masked: tuple[int, ...] = (),
    t: float = 1.0,
) -> ActivationBatch:
    available_BA = np.ones(logits_BA.shape, dtype=bool)
    available_BA[:, list(masked)] = False
    limits_B = np.full(len(logits_BA), limit)
    return activate(logits_BA, available_BA, temperature=t, rule=rule, mass_left=1 - mass, max_agents_B=limits_B)


@pytest.mark.parametrize(
    ("probability", "mass", "k", "active_mass"),
    [
        ((0.5, 0.3, 0.2), 0.8, 2, 0.8),
        ((0.5, 0.3, 0.2), 0.81, 3, 1.0),
        ((0.2, 0.5, 0.3), 0.5, 1, 0.5),
        ((0.97, 0.02, 0.01), 0.8, 1, 0.97),
        ((0.1,) * 10, 0.3, 3, 0.3),
        ((0.5, 0.3, 0.2), 1.0, 3, 1.0),
    ],
)
def test_top_mass_by_hand(probability: tuple[float, ...], mass: float, k: int, active_mass: float) -> None:
    active = activate_one(logits_of(*probability), mass=mass)
    assert active.k_B.tolist() == [k]
    assert active.mass_B[0] == pytest.approx(active_mass, abs=1e-6)


def test_limit_cuts_the_set_and_its_mass() -> None:
    active = activate_one(logits_of(0.25, 0.25, 0.25, 0.25), mass=0.8, limit=2)
    assert active.k_B.tolist() == [2]
    assert active.mass_B[0] == pytest.approx(0.5)


def test_fixed_is_the_limit_or_whoever_is_left() -> None:
    logits_BA = logits_of(0.5, 0.3, 0.2)
    assert activate_one(logits_BA, rule="fixed", limit=2).k_B.tolist() == [2]
    assert activate_one(logits_BA, rule="fixed", limit=4).k_B.tolist() == [3]
    assert activate_one(logits_BA, rule="fixed", limit=4, masked=(0, 2)).k_B.tolist() == [1]


@pytest.mark.parametrize("num_agents", [1, 2, 3, 5, 7, 16])
def test_effective_count_of_equal_agents_is_their_number(num_agents: int) -> None:
    p_BA = np.full((1, num_agents), 1 / num_agents, dtype=np.float32)
    assert effective_count(p_BA).tolist() == [num_agents]


def test_effective_count_by_hand() -> None:
    """H(.9, .1) = 0.3251 nats, exp = 1.384; a certain distribution counts one agent."""
    p_BA = np.array([[0.9, 0.1], [1.0, 0.0]], dtype=np.float32)
    assert effective_count(p_BA).tolist() == [2, 1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 5e-324])
def test_a_temperature_near_zero_takes_the_most_probable_agent(temperature: float) -> None:
    logits_BA = np.array([[0.1, 0.3, -9.0, 9.0]], np.float32)
    available_BA = np.array([[True, True, True, False]])
    active = activate(
        logits_BA, available_BA, temperature=temperature, rule="top_mass", mass_left=0.2, max_agents_B=np.array([4])
    )
    assert (active.probability_BA.tolist(), active.ranking_BA[0, 0], active.k_B.tolist()) == ([[0.0, 1.0, 0.0, 0.0]], 1, [1])


def test_temperature_by_hand() -> None:
    """exp(0.2 / 0.1) = 7.389: probabilities 0.8808 and 0.1192."""
    p_BA = probabilities(np.array([[0.2, 0.0]], dtype=np.float32), np.ones((1, 2), dtype=bool), 0.1)
    assert p_BA[0].tolist() == pytest.approx([0.880797, 0.119203], abs=1e-6)


def test_mask_renormalises_over_the_others() -> None:
    active = activate_one(logits_of(0.5, 0.3, 0.2), masked=(0,))
    assert active.probability_BA[0].tolist() == pytest.approx([0.0, 0.6, 0.4], abs=1e-6)
    assert active.probability_BA[0, 0] == 0.0
    assert active.ranking_BA[0].tolist() == [1, 2, 0]


def test_ties_rank_by_pool_order() -> None:
    active = activate_one(logits_of(0.1, 0.4, 0.1, 0.4), masked=())
    assert active.ranking_BA[0].tolist() == [1, 3, 0, 2]


def test_available_agent_without_probability_ranks_before_masked_one() -> None:
    logits_BA = np.array([[-1e6, 0.0, -1e6]], dtype=np.float32)
    active = activate_one(logits_BA, masked=(0,), t=0.1)
    assert active.probability_BA[0].tolist() == [0.0, 1.0, 0.0]
    assert active.ranking_BA[0].tolist() == [1, 2, 0]


def test_limits_are_per_row() -> None:
    logits_BA = np.zeros((3, 4), dtype=np.float32)
    available_BA = np.ones((3, 4), dtype=bool)
    limits_B = np.array([1, 2, 4])
    active = activate(logits_BA, available_BA, temperature=0.1, rule="top_mass", mass_left=0.0, max_agents_B=limits_B)
    assert active.k_B.tolist() == [1, 2, 4]


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float, float, int]:
    num_agents = draw(st.integers(1, 20))
    rows = draw(st.integers(1, 5))
    values = st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0])
    logits_BA = np.array(draw(st.lists(values, min_size=rows * num_agents, max_size=rows * num_agents)), dtype=np.float32)
    available = np.array(draw(st.lists(st.booleans(), min_size=rows * num_agents, max_size=rows * num_agents)))
    available_BA = available.reshape(rows, num_agents)
    available_BA[:, draw(st.integers(0, num_agents - 1))] = True
    temperature = draw(st.floats(0.05, 5.0))
    return logits_BA.reshape(rows, num_agents), available_BA, temperature, draw(st.floats(0.01, 1.0)), draw(st.integers(1, 24))


@settings(max_examples=examples(150), derandomize=True)
@given(cases(), st.sampled_from(RULES))
def test_invariants_and_float64_reference(case: tuple[np.ndarray, np.ndarray, float, float, int], rule: Rule) -> None:
    logits_BA, available_BA, temperature, mass, limit = case
    limits_B = np.full(len(logits_BA), limit)
    active = activate(logits_BA, available_BA, temperature=temperature, rule=rule, mass_left=1 - mass, max_agents_B=limits_B)
    for row, available_A in enumerate(available_BA):
        p_A, k = active.probability_BA[row], int(active.k_B[row])
        exact_A = softmax_float64(logits_BA[row], available_A, temperature)
        assert p_A == pytest.approx(exact_A, abs=2e-5)
        assert float(p_A.astype(np.float64).sum()) == pytest.approx(1.0, abs=1e-5)
        assert (p_A[~available_A] == 0.0).all()
        num_available = int(available_A.sum())
        assert 1 <= k <= min(limit, num_available)
        order = active.ranking_BA[row].tolist()
        assert order == sorted(range(len(p_A)), key=lambda i: (not available_A[i], -p_A[i], i))
        cumulative = np.cumsum(p_A[order].astype(np.float64))
        assert float(active.mass_B[row]) == pytest.approx(min(cumulative[k - 1], 1.0), abs=1e-5)
        if rule == "top_mass":
            left = [float(p_A[order[place:]].astype(np.float64).sum()) for place in range(num_available + 1)]
            assert k == 1 or left[k - 1] > (1 - mass)
            assert k == min(limit, num_available) or left[k] <= (1 - mass) * (1 + 2 * LEFT_TOLERANCE)


def softmax_float64(logits_A: np.ndarray, available_A: np.ndarray, temperature: float) -> list[float]:
    best = max(float(z) for z, ok in zip(logits_A, available_A, strict=True) if ok)
    weights = [math.exp((float(z) - best) / temperature) if ok else 0.0 for z, ok in zip(logits_A, available_A, strict=True)]
    return [weight / sum(weights) for weight in weights]


@settings(max_examples=examples(50), derandomize=True)
@given(cases())
def test_more_mass_never_takes_fewer_agents(case: tuple[np.ndarray, np.ndarray, float, float, int]) -> None:
    logits_BA, available_BA, temperature, mass, limit = case
    limits_B = np.full(len(logits_BA), limit)
    low, high = (
        activate(logits_BA, available_BA, temperature=temperature, rule="top_mass", mass_left=1 - tau, max_agents_B=limits_B)
        for tau in (mass / 2, mass)
    )
    assert (low.k_B <= high.k_B).all()
    assert (low.mass_B <= high.mass_B).all()


@pytest.mark.parametrize("num_agents", [2, 7, 100, 1000, 1024])
@pytest.mark.parametrize("mass", ["0.5", "0.7", "0.9", "0.99"])
def test_as_many_equal_agents_are_asked_as_the_mass_says(num_agents: int, mass: str) -> None:
    found = activate(
        np.zeros((1, num_agents), np.float32),
        np.ones((1, num_agents), bool),
        temperature=0.1,
        rule="top_mass",
        mass_left=1 - float(mass),
        max_agents_B=np.array([num_agents]),
    )
    assert found.k_B[0] == math.ceil(Fraction(mass) * num_agents)
