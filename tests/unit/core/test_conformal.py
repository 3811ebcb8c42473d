"""tau and theta: order statistics by hand, and coverage counted over every split of exchangeable rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from dmoa.core.activation import activate, probabilities
from dmoa.core.calibration import fit_mass_left, fit_operating_point, fit_theta
from dmoa.core.gate import GateSpec
from dmoa.errors import ConfigError


def rows_of(num_rows: int, num_agents: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, their probabilities at T = 1 and scores that the logits predict in part."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_rows, num_agents)).astype(np.float32)
    p = np.exp(logits)
    return logits, (p / p.sum(axis=1, keepdims=True)).astype(np.float32), rng.normal(size=logits.shape) - logits


def test_tau_by_hand() -> None:
    probability = np.asarray([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.4, 0.4, 0.2]], dtype=np.float32)
    score = np.asarray([[2.0, 1.0, 3.0], [3.0, 1.0, 2.0], [math.nan, 5.0, 6.0]])
    # Masses down to the surest: 0.8, 0.7, and 0.8 again: of the tie of probabilities the second in the pool.
    assert fit_mass_left(probability[:2], score[:2], 0.4) == pytest.approx(0.2)  # rank ceil(3 x 0.6) = 2
    assert fit_mass_left(probability, score, 0.8) == pytest.approx(0.3)  # rank ceil(4 x 0.2) = 1
    assert fit_mass_left(probability, score, 0.5) == pytest.approx(0.2)  # rank 2
    assert fit_mass_left(probability, score, 0.2) == 0.0  # rank 4 of 3 rows


def test_theta_by_hand() -> None:
    score = np.asarray([[2.0, 1.0], [math.nan, 4.0], [3.0, 3.5], [math.nan, math.nan]])
    # Lowest scores: 1, 4, 3; the last row holds none.
    assert fit_theta(score, 0.8) == 1.0  # rank ceil(4 x 0.2) = 1
    assert fit_theta(score, 0.5) == 3.0
    assert fit_theta(score, 0.25) == 4.0
    assert fit_theta(score, 0.01) == 4.0  # rank 4 of 3 rows: the largest


def test_rank_is_not_rounded_up_by_binary_fractions() -> None:
    score = np.arange(1.0, 10.0)[:, None]
    assert fit_theta(score, 1.0 - 0.7) == 7.0  # (9 + 1) x 0.7 exactly
    for tenths in range(1, 10):
        assert fit_theta(score, tenths / 10) == 10.0 - tenths


def test_of_equally_sure_agents_the_most_probable_counts() -> None:
    score = np.asarray([[1.0, 1.0, 2.0]] * 3)
    assert fit_mass_left(np.asarray([[0.2, 0.7, 0.1]] * 3), score, 0.5) == pytest.approx(0.3)


def test_equally_probable_agents_stand_in_pool_order() -> None:
    score = np.ones((3, 40))
    score[:, 25] = 0.0
    assert fit_mass_left(np.full((3, 40), 1 / 40, dtype=np.float32), score, 0.5) == pytest.approx(14 / 40)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("num_rows", [3, 10, 25])
def test_coverage_over_all_splits_of_exchangeable_rows(num_rows: int, alpha: float) -> None:
    """Each of n + 1 rows in turn is new: the quantile of the others covers exactly min(ceil((n+1)(1-alpha)), n+1) of them.

    That is at least (1 - alpha)(n + 1), and less than one row more: the quantile is valid and not wasteful.
    """
    logits, probability, score = rows_of(num_rows + 1, 6, seed=num_rows)
    covered = calm = 0
    for new in range(num_rows + 1):
        others = np.arange(num_rows + 1) != new
        left = fit_mass_left(probability[others], score[others], alpha)
        active = activate(
            logits[new : new + 1],
            np.ones((1, 6), dtype=np.bool_),
            temperature=1.0,
            rule="top_mass",
            mass_left=left,
            max_agents_B=np.asarray([6]),
        )
        covered += int(score[new].argmin()) in active.ranking_BA[0, : active.k_B[0]]
        calm += score[new].min() <= fit_theta(score[others], alpha)
    rank = math.ceil((num_rows + 1) * (1 - alpha) - 1e-9)
    # A set whose mass goes beyond tau may hold the surest agent all the same: activation rounds up to whole agents.
    assert covered >= rank
    assert calm == min(rank, num_rows)


def test_mass_of_the_surest_is_covered_exactly() -> None:
    _, probability, score = rows_of(21, 6, seed=4)
    order = np.argsort(-probability, axis=1, kind="stable")
    masses = []
    for p, ranking, s in zip(probability, order, score, strict=True):
        total = 0.0
        for agent in ranking:
            total += float(p[agent])
            if agent == s.argmin():
                break
        masses.append(1 - total)
    for alpha in (0.1, 0.3):
        covered = 0
        for new in range(21):
            others = np.arange(21) != new
            covered += masses[new] >= fit_mass_left(probability[others], score[others], alpha) - 1e-6
        assert covered == math.ceil(21 * (1 - alpha) - 1e-9)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="tau: alpha is"):
        fit_mass_left(np.ones((1, 1)), np.ones((1, 1)), alpha)
    with pytest.raises(ConfigError, match="theta: alpha is"):
        fit_theta(np.ones((1, 1)), alpha)


@pytest.mark.parametrize("score", [np.zeros((0, 2)), np.full((3, 2), math.nan)])
def test_rows_without_scores_are_refused(score: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="tau: no held-back row holds a score"):
        fit_mass_left(np.full(score.shape, 0.5), score, 0.1)
    with pytest.raises(ConfigError, match="theta: no held-back row holds a score"):
        fit_theta(score, 0.1)


@pytest.mark.parametrize("second", [-1.4, -2.5, -6.0])
def test_tau_covers_the_second_agent_of_a_sharp_gate(second: float) -> None:
    """At T = 0.1 the first agent has all of the mass but exp(-14), or exp(-60), which no float32 sum can tell from 1."""
    spec = GateSpec(
        preset="default", head="linear", hidden=4, temperature=0.1, agents=("a", "b", "c"), rule="top_mass", mass=0.8,
        max_agents=3, cascade=False, score="raw",
    )  # fmt: skip
    logits = np.asarray([[0.0, second, 2 * second]] * 5, dtype=np.float32)
    score = np.asarray([[1.0, 0.0, 2.0]] * 5)
    point = fit_operating_point(spec, logits, score, None, alphas=(0.5,), price=0.0)
    assert point.agents == 2.0
    fitted = replace(spec, mass=1.0 - point.mass_left, fitted_left=point.mass_left)
    assert GateSpec.from_json(json.loads(json.dumps(fitted.to_json()))).mass_left == point.mass_left
    active = activate(
        logits, np.ones((5, 3), dtype=np.bool_), temperature=0.1, rule="top_mass", mass_left=fitted.mass_left,
        max_agents_B=np.full(5, 3),
    )  # fmt: skip
    assert active.k_B.tolist() == [2] * 5


def test_tau_covers_what_it_promises_for_sharp_gates() -> None:
    """Simulated as the issue saw it: two agents, the second surest on half of the rows, gates of any sharpness."""
    rng = np.random.default_rng(0)
    covered = total = 0
    for _ in range(400):
        sharpness = 10 ** rng.uniform(-1, 1)
        logits = rng.normal(scale=sharpness, size=(11, 4)).astype(np.float32)
        score = rng.normal(size=logits.shape) - logits / sharpness
        everyone, limits = np.ones(logits.shape, dtype=np.bool_), np.full(11, 4)
        left = fit_mass_left(probabilities(logits[:10], everyone[:10], 0.1), score[:10], 0.1)
        active = activate(logits[10:], everyone[10:], temperature=0.1, rule="top_mass", mass_left=left, max_agents_B=limits[10:])
        covered += int(score[10].argmin()) in active.ranking_BA[0, : active.k_B[0]]
        total += 1
    assert covered / total >= 0.9 - 2 * math.sqrt(0.9 * 0.1 / total)
