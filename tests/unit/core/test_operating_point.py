"""tau and theta chosen together: by hand, against a replay row by row, and how the price moves the choice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dmoa.core.calibration import ALPHAS, MAX_REGRET, ONE_FIRST, OperatingPoint, fit_mass_left, fit_operating_point, fit_theta
from dmoa.core.gate import GateSpec
from dmoa.errors import ConfigError


def spec_of(num_agents: int, **more: Any) -> GateSpec:
    values: dict[str, Any] = {"preset": "default", "head": "linear", "hidden": 4, "temperature": 1.0, "rule": "top_mass"}
    values |= {"mass": 0.8, "max_agents": num_agents, "cascade": True, "score": "raw"}
    return GateSpec(agents=tuple(f"a{i}" for i in range(num_agents)), **values | more)


def logits_of(*probabilities: list[float]) -> np.ndarray:
    return np.log(np.asarray(probabilities, dtype=np.float32))


def test_by_hand() -> None:
    # The first agent is the surest of three rows; of the fourth it is unsure, and the second is the surest.
    logits = logits_of([0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1])
    score = np.asarray([[-3.0, 0.0, 0.0], [-2.5, 0.0, 0.0], [-2.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
    # Lowest scores -3, -2.5, -2, -1: theta of alpha .3 is the fourth (rank ceil(5 x .7)), of .5 the third. tau of .5 is
    # the third mass of .6, .6, .6, .9.
    found = fit_operating_point(spec_of(3), logits, score, score, alphas=(0.5,), theta_alphas=(0.3, 0.5), price=0.1)
    # Both begin with one agent (.5 < .6: with two in the last row, which has the surest then); theta -1 stops there, theta
    # -2 asks the third agent of the last row too, for nothing.
    assert found == OperatingPoint(
        alpha=0.5, theta_alpha=0.3, mass_left=pytest.approx(0.4), theta=-1.0, agents=pytest.approx(5 / 4), regret=0.0
    )
    cascade = fit_operating_point(spec_of(3), logits, score, score, alphas=(0.9,), theta_alphas=(0.7,), price=0.1)
    # tau is the lowest mass, .6, again; theta -2.5 asks everyone in the last two rows.
    assert (cascade.theta, cascade.agents, cascade.regret) == (-2.5, (1 + 1 + 3 + 3) / 4, 0.0)
    without = fit_operating_point(spec_of(3, cascade=False), logits, score, None, alphas=(0.5,), price=0.1)
    assert (without.theta, without.theta_alpha, without.agents) == (None, None, 5 / 4)


def slowly(spec: GateSpec, p: np.ndarray, score: np.ndarray, tau: float, theta: float | None) -> tuple[float, float]:
    """Agents and regret, mean over the rows, as serving would go through each."""
    agents, regrets = [], []
    for p_A, score_A in zip(p, score, strict=True):
        if np.isnan(score_A).all():
            continue
        ranking = sorted(range(len(p_A)), key=lambda i: (-p_A[i], i))
        asked: list[int] = []
        while len(asked) < spec.max_agents:
            heard = [score_A[i] for i in asked if not math.isnan(score_A[i])]
            is_enough = sum(p_A[i] for i in asked) >= tau - 1e-6
            if asked and is_enough and (theta is None or any(one <= theta for one in heard)):
                break
            asked.append(ranking[len(asked)])
        best = min((score_A[i] for i in asked if not math.isnan(score_A[i])), default=math.inf)
        agents.append(len(asked))
        regrets.append(min(best - np.nanmin(score_A), MAX_REGRET))
    return float(np.mean(agents)), float(np.mean(regrets))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("max_agents", "price"), [(4, 0.1), (3, 0.02), (6, 0.5)])
def test_the_cheapest_pair_against_a_replay_row_by_row(seed: int, max_agents: int, price: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(25, 6)).astype(np.float32)
    score = rng.normal(size=logits.shape) - logits
    score[rng.random(score.shape) < 0.1] = math.nan
    score[7] = math.nan
    finished = np.where(rng.random(score.shape) < 0.1, math.nan, score)
    spec = spec_of(6, max_agents=max_agents)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    costs = {}
    for alpha in (*ALPHAS, ONE_FIRST):
        for theta_alpha in ALPHAS:
            tau = 0.0 if alpha == ONE_FIRST else 1 - fit_mass_left(p.astype(np.float32), score, alpha)
            theta = fit_theta(finished, theta_alpha)
            agents, regret = slowly(spec, p, score, tau, theta)
            costs[alpha, theta_alpha] = regret + price * agents
    found = fit_operating_point(spec, logits, score, finished, price=price)
    assert found.theta_alpha is not None
    assert found.regret + price * found.agents == pytest.approx(min(costs.values()))
    assert costs[found.alpha, found.theta_alpha] == pytest.approx(min(costs.values()))


def test_a_gate_whose_first_choice_is_always_the_surest_asks_one_agent_whatever_its_probabilities() -> None:
    """By the lowest quantile, of alpha = .9, the two least certain of fifteen rows would ask more."""
    even = [[0.6 - 0.01 * row, 0.25, 0.15 + 0.01 * row] for row in range(15)]
    logits, score = logits_of(*even), np.asarray([[-3.0, 0.0, 0.0]] * 15)
    found = fit_operating_point(spec_of(3, cascade=False), logits, score, None, price=0.1)
    assert (found.alpha, found.agents, found.regret) == (ONE_FIRST, 1.0, 0.0)
    given = fit_operating_point(spec_of(3, cascade=False), logits, score, None, alphas=(0.9,), price=0.1)
    assert given.agents > 1.0
    assert 0.0 < 1.0 - found.mass_left < 1e-5


def test_the_dearer_agents_are_the_fewer_are_asked() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 5)).astype(np.float32)
    score = rng.normal(size=logits.shape) - logits
    points = [fit_operating_point(spec_of(5), logits, score, score, price=price) for price in (0.0, 0.05, 0.2, 1.0, 100.0)]
    agents = [point.agents for point in points]
    assert agents == sorted(agents, reverse=True)
    assert agents[0] > 3.5 > 2 > agents[-1]
    regrets = [point.regret for point in points]
    assert regrets == sorted(regrets)


def test_of_equally_good_pairs_the_most_cautious_is_taken() -> None:
    score = np.asarray([[-1.0, 0.0]] * 5)
    found = fit_operating_point(
        spec_of(2, rule="fixed", max_agents=2), np.zeros((5, 2), dtype=np.float32), score, score, price=1.0
    )
    assert (found.alpha, found.theta_alpha, found.agents) == (ALPHAS[0], ALPHAS[0], 2.0)


def test_a_winner_that_was_cut_off_counts_as_much_regret_and_no_more() -> None:
    score = np.asarray([[20.0, 0.0]] * 4)  # the first was cut off
    found = fit_operating_point(spec_of(2, cascade=False), logits_of(*[[0.9, 0.1]] * 4), score, None, alphas=(0.9,), price=0.0)
    assert (found.agents, found.regret) == (2.0, 0.0)  # tau covers the second, the surest
    assert fit_operating_point(
        spec_of(2, cascade=False, max_agents=1), logits_of(*[[0.9, 0.1]] * 4), score, None, alphas=(0.9,), price=0.0
    ).regret == pytest.approx(MAX_REGRET)


def test_rows_without_any_score_are_refused() -> None:
    with pytest.raises(ConfigError, match="no held-back row holds a score"):
        fit_operating_point(spec_of(2), np.zeros((3, 2), dtype=np.float32), np.full((3, 2), math.nan), None, price=0.1)
