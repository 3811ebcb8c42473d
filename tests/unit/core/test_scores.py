"""Scores, reply weights, eta and anchors, against plain loops and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.core.scores import CUT_PENALTY, MIN_ETA, fit_anchors, fit_eta, raw_score, reply_noise, reply_weights, score, scores
from dmoa.errors import ConfigError
from tests.examples import examples

LARGEST_ENTROPY = math.log(2**18)
"""Nats per token of a uniform distribution over more tokens than any vocabulary has."""


def test_score_by_hand() -> None:
    assert raw_score(0.0) == pytest.approx(math.log(0.001))
    assert score(0.999, None) == pytest.approx(0.0, abs=1e-12)
    assert score(math.e - 1e-3, 0.25) == pytest.approx(0.75)
    assert score(math.e - 1e-3, None, is_cut=True) == pytest.approx(1.0 + CUT_PENALTY)


def test_arrays_give_the_same_numbers_as_single_replies() -> None:
    rng = np.random.default_rng(0)
    sums, tokens = rng.gamma(2.0, size=(4, 3, 5)), rng.integers(0, 4, size=(4, 3, 5))
    is_cut, anchors = rng.random((4, 3, 5)) < 0.3, tuple(rng.normal(size=5))
    found = scores(sums, tokens, anchors, is_cut)
    assert found.dtype == np.float64
    assert (tokens == 0).any()
    for place in np.ndindex(4, 3, 5):
        n = int(tokens[place])
        if n == 0:
            assert math.isnan(found[place])
        else:
            expected = score(float(sums[place]) / n, anchors[place[-1]], is_cut=bool(is_cut[place]))
            assert found[place] == pytest.approx(expected, rel=1e-12)


def test_raw_arrays_need_neither_anchors_nor_cuts() -> None:
    sums, tokens = np.asarray([[0.0, 4.0, 1.0]], dtype=np.float32), np.asarray([[3, 2, 0]])
    assert scores(sums, tokens)[0, :2] == pytest.approx([math.log(1e-3), math.log(2.001)])
    assert sums.tolist() == [[0.0, 4.0, 1.0]]


@settings(max_examples=examples(200), derandomize=True)
@given(*(st.floats(0.0, LARGEST_ENTROPY) for _ in range(4)))
def test_a_reply_cut_off_is_less_sure_than_every_finished_one(cut: float, done: float, mean_cut: float, mean_done: float) -> None:
    """Whatever the entropies, and whatever the anchors: these are means of raw scores."""
    for anchors in ((None, None), (raw_score(mean_cut), raw_score(mean_done))):
        assert score(cut, anchors[0], is_cut=True) > score(done, anchors[1])


def test_weight_of_a_reply_by_hand() -> None:
    weights = reply_weights(np.asarray([0, 1, 4, 12, 12, 12]), np.asarray([1.0, 1.0, 1.0, 0.1, 0.05, 0.001]))
    assert weights == pytest.approx([0.0, 0.2, 0.5, 7.5, 15.0, 15.0])


def test_noise_is_that_of_a_mean_entropy_carried_to_its_logarithm() -> None:
    entropies = [np.asarray([0.1, 0.4, 0.7, 1.2]), np.asarray([0.3, 0.3]), np.asarray([2.0])]
    sums, squares = [float(e.sum()) for e in entropies], [float((e * e).sum()) for e in entropies]
    noise = reply_noise(np.asarray([*sums, 0.0]), np.asarray([*squares, 0.0]), np.asarray([4, 2, 1, 0]))
    expected = [float(np.var(e)) / len(e) / (float(np.mean(e)) + 1e-3) ** 2 for e in entropies]
    assert noise == pytest.approx([*expected, 0.0], abs=1e-15)
    assert (noise >= 0).all()


def test_eta_is_the_median_gap_of_all_pairs() -> None:
    # Gaps of the first row 1, 4, 3; of the second 2; the third holds no pair.
    rows = np.asarray([[0.0, 1.0, 4.0], [5.0, math.nan, 3.0], [math.nan, math.nan, 1.0]])
    assert fit_eta(rows) == pytest.approx(2.5)
    assert fit_eta(rows[:1]) == pytest.approx(3.0)
    assert fit_eta(np.zeros((4, 3))) == MIN_ETA


@pytest.mark.parametrize("rows", [np.zeros((0, 3)), np.zeros((2, 1)), np.asarray([[1.0, math.nan]])])
def test_eta_needs_a_pair(rows: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=rf"eta: {len(rows)} held-back rows hold no pair"):
        fit_eta(rows)


def two_clusters() -> tuple[np.ndarray, np.ndarray]:
    """Six rows about (1, 0) and two about (0, 1), with raw scores of two agents."""
    rng = np.random.default_rng(1)
    centres = np.asarray([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 2)
    raw = np.asarray([[-4.0, -1.0]] * 6 + [[-2.0, -3.0], [0.0, -5.0]])
    return raw, centres + 0.01 * rng.standard_normal(centres.shape)


def test_every_cluster_weighs_the_same() -> None:
    raw, embedding = two_clusters()
    assert fit_anchors(raw, embedding, num_clusters=2, seed=0) == pytest.approx((-2.5, -2.5))
    assert fit_anchors(raw, embedding, num_clusters=1, seed=0) == pytest.approx(tuple(raw.mean(axis=0)))


def test_more_rows_of_a_domain_do_not_move_the_anchors() -> None:
    raw, embedding = two_clusters()
    once = fit_anchors(raw, embedding, num_clusters=2, seed=0)
    again = fit_anchors(np.vstack([raw, raw[:6]]), np.vstack([embedding, embedding[:6]]), num_clusters=2, seed=0)
    assert again == pytest.approx(once)
    assert np.vstack([raw, raw[:6]])[:, 0].mean() < raw[:, 0].mean() - 0.2  # a plain mean would have moved


def test_anchors_depend_on_the_rows_and_not_on_their_order() -> None:
    rng = np.random.default_rng(2)
    raw, embedding = rng.normal(size=(40, 3)), rng.normal(size=(40, 6)).astype(np.float32)
    order = rng.permutation(40)
    anchors = fit_anchors(raw, embedding, num_clusters=5, seed=3)
    assert fit_anchors(raw, embedding, num_clusters=5, seed=3) == anchors
    assert fit_anchors(raw[order], embedding[order], num_clusters=5, seed=3) == pytest.approx(anchors, rel=1e-12)


def test_well_separated_groups_are_the_clusters_whatever_the_seed() -> None:
    """Five groups of different sizes far apart: the anchor is the plain mean of the five group means."""
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(5), [3, 30, 8, 1, 15])
    embedding = 10.0 * np.eye(5)[group] + 0.1 * rng.standard_normal((57, 5))
    raw = rng.normal(size=(57, 4))
    expected = np.mean([raw[group == g].mean(axis=0) for g in range(5)], axis=0)
    for seed in range(5):
        assert fit_anchors(raw, embedding, num_clusters=5, seed=seed) == pytest.approx(expected)


def test_without_clear_clusters_the_start_of_k_means_hardly_matters() -> None:
    """Against the anchors by one clustering each, in which a few rows alone in theirs weigh much."""
    rng = np.random.default_rng(6)
    raw, embedding = rng.normal(size=(34, 4)), rng.normal(size=(34, 16))

    def spread(**options: int) -> float:
        found = [fit_anchors(raw, embedding, num_clusters=8, seed=seed, **options) for seed in range(20)]
        return float(np.std(found, axis=0).mean())

    assert spread() < spread(num_clusterings=1) / 2


def test_a_missing_score_leaves_its_cluster_to_the_others() -> None:
    raw, embedding = two_clusters()
    raw[0, 0] = math.nan
    raw[6:, 1] = math.nan
    assert fit_anchors(raw, embedding, num_clusters=2, seed=0) == pytest.approx((-2.5, -1.0))


@pytest.mark.parametrize("num_clusters", [1, 3, 50])
def test_fewer_different_rows_than_clusters_are_clusters_of_their_own(num_clusters: int) -> None:
    raw = np.asarray([[1.0], [1.0], [1.0], [5.0]])
    embedding = np.asarray([[0.0, 1.0]] * 3 + [[1.0, 0.0]])
    expected = 2.0 if num_clusters == 1 else 3.0
    assert fit_anchors(raw, embedding, num_clusters=num_clusters, seed=0) == pytest.approx((expected,))


def test_anchors_need_rows_clusters_and_every_agent() -> None:
    raw, embedding = two_clusters()
    with pytest.raises(ConfigError, match="anchor set: 0 rows, 2 clusters"):
        fit_anchors(raw[:0], embedding[:0], num_clusters=2, seed=0)
    with pytest.raises(ConfigError, match="anchor set: 8 rows, 0 clusters"):
        fit_anchors(raw, embedding, num_clusters=0, seed=0)
    raw[:, 1] = math.nan
    with pytest.raises(ConfigError, match=r"agents \[1\] \(by place in the pool\) have no score"):
        fit_anchors(raw, embedding, num_clusters=2, seed=0)


def test_anchoring_ignores_an_agent_that_is_always_equally_sure() -> None:
    """A liar with one constant answer is the surest by raw score everywhere, and nowhere by anchored score."""
    raw = np.asarray([[-3.0, 0.0, -6.9], [0.0, -3.0, -6.9]])
    anchors = fit_anchors(raw, np.eye(2), num_clusters=2, seed=0)
    assert raw.argmin(axis=1).tolist() == [2, 2]
    sums = np.exp(raw) - 1e-3
    assert scores(np.maximum(sums, 0.0), np.ones((2, 3)), anchors).argmin(axis=1).tolist() == [0, 1]
