"""Entropies between two bounds: gaps within the bounds may be chance, exact rollouts are learned from as ever."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dmoa import checkpoint
from dmoa.core.losses import Loss, Targets, ranking_loss
from dmoa.core.scores import reply_noise
from dmoa.errors import ConfigError
from dmoa.testing import domain_rows, write_rollouts
from dmoa.testing import scripted_pool as pool
from dmoa.training.dataset import Episodes, read_episodes
from dmoa.training.objective import Scale, Split, build_data
from dmoa.training.options import TrainOptions
from dmoa.training.rollouts import part_paths, read_table
from dmoa.training.trainer import build_start, run_training
from tests.unit.training.in_process import AROUND

CONFIG = pool()


def episodes_of(folder: Path) -> Episodes:
    start = build_start(TrainOptions.parse({"rollouts": folder, "out": folder / "out"}), CONFIG)
    return read_episodes([folder], start.gate.spec, start.fingerprint, on_ray=False)


def as_older(folder: Path) -> Path:
    """Take away the column that files did not always have."""
    for path in part_paths(folder):
        pq.write_table(pq.read_table(path).drop_columns(["entropy_slack_nats"]), path)
    return folder


def truncated(rows: list[dict[str, Any]], agent: str, slack: float) -> list[dict[str, Any]]:
    changes = {"entropy_kind": "truncated", "entropy_slack_nats": slack}
    return [row | changes if row["agent"] == agent else row for row in rows]


def noise_of(episodes: Episodes) -> Any:
    split = Split(train_Q=np.arange(len(episodes.key_Q)), held_Q=np.arange(0))
    return build_data(episodes, split, Scale(score="raw", eta=1.0, anchors=None)).noise_NA


def test_exact_rollouts_teach_the_same_bits_with_and_without_the_column(tmp_path: Path) -> None:
    folders = [write_rollouts(tmp_path / name, domain_rows(), CONFIG) for name in ("now", "older")]
    as_older(folders[1])
    assert all(math.isnan(value) for value in read_table(folders[1])["entropy_slack_nats"].to_pylist())
    weights, hashes = [], []
    for folder in folders:
        found = episodes_of(folder)
        assert not found.slack_NA.any()
        plain = reply_noise(found.sum_NA, found.sq_sum_NA, found.tokens_NA)
        assert noise_of(found).tobytes() == plain.tobytes()
        hashes.append(found.digest())
        values = {"rollouts": folder, "out": folder / "run", "workers": 0, "track": "none", "epochs": 2}
        weights.append(checkpoint.load(run_training(TrainOptions.parse(values), CONFIG, AROUND).checkpoint)[0].state_dict())
    assert hashes[0] == hashes[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_slack_of_truncated_sums_is_noise_and_part_of_what_is_learned_from(tmp_path: Path) -> None:
    exact = episodes_of(write_rollouts(tmp_path / "exact", domain_rows(), CONFIG))
    bounded = episodes_of(write_rollouts(tmp_path / "bounded", truncated(domain_rows(), "two", 0.8), CONFIG))
    assert bounded.digest() != exact.digest()
    more_NA = noise_of(bounded) - noise_of(exact)
    mean_N = bounded.sum_NA[:, 1] / bounded.tokens_NA[:, 1]
    np.testing.assert_allclose(more_NA[:, 1], (0.8 / 8 / (mean_N + 1e-3)) ** 2)
    assert not more_NA[:, [0, 2]].any()


def test_of_truncated_sums_without_a_slack_any_gap_may_be_chance(tmp_path: Path) -> None:
    for name, rows in (("older", truncated(domain_rows(), "two", 0.0)), ("unknown", truncated(domain_rows(), "two", math.nan))):
        folder = write_rollouts(tmp_path / name, rows, CONFIG)
        noise_NA = noise_of(episodes_of(as_older(folder) if name == "older" else folder))
        assert np.isinf(noise_NA[:, 1]).all()
        assert np.isfinite(noise_NA[:, [0, 2]]).all()
        values = {"rollouts": folder, "out": folder / "run", "workers": 0, "track": "none", "epochs": 1}
        assert run_training(TrainOptions.parse(values), CONFIG, AROUND).record.metrics["bad_steps"] == 0


@pytest.mark.parametrize(("loss", "share"), [("soft", 0.5), ("hard", 0.0), ("hinge", 0.0), ("listnet", 1.0)])
def test_pairs_within_the_bounds_count_half_or_not_at_all(loss: Loss, share: float) -> None:
    def weight(slack: float) -> float:
        sums, tokens = np.array([[0.8, 1.6]]), np.array([[8.0, 8.0]])
        noise = reply_noise(sums, sums**2 / tokens, tokens, np.array([[0.0, slack]]))
        score = np.log(sums / tokens + 1e-3)
        parts = (torch.from_numpy(values) for values in (score, tokens > 0, np.ones((1, 2)), noise))
        found = ranking_loss(loss, torch.zeros(1, 2, dtype=torch.float64), Targets(*parts), temperature=0.5, eta=1.0)
        assert torch.isfinite(found.total)
        return float(found.weight)

    assert weight(0.0) == weight(0.5) > 0  # 0.2 +- 0.06 nats against 0.1
    assert weight(1.5) == weight(math.inf) == share * weight(0.0)


def test_a_slack_below_zero_is_refused(tmp_path: Path) -> None:
    folder = write_rollouts(tmp_path / "r", truncated(domain_rows(), "two", -0.5), CONFIG)
    with pytest.raises(ConfigError, match=r"agent 'two': entropy_slack_nats is -0.5 \(truncated\); expected numbers"):
        episodes_of(folder)
