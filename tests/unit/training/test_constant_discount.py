"""A liar with one reply for every query: trained with its sureness taken as it is, and as training discounts it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmoa import checkpoint
from dmoa.config import Config
from dmoa.core.scores import CONSTANT_PENALTY
from dmoa.testing import AGENTS, domain_rows, write_rollouts
from dmoa.testing import rollout_row as row
from dmoa.testing import scripted_pool as pool
from dmoa.training.options import TrainOptions
from dmoa.training.trainer import TrainContext, TrainResult, run_training

LIAR = "liar"
EVERYBODY = (*AGENTS, LIAR)


@pytest.fixture(scope="module")
def config() -> Config:
    return pool(EVERYBODY)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    """Three domains with an honest agent each; queries of a fourth that nobody is sure of; the liar is sure of all."""
    rng = np.random.default_rng(1)
    rows = []
    for value in domain_rows(64, agents=EVERYBODY):
        is_liar = value["agent"] == LIAR
        nats = rng.uniform(0.009, 0.011) if is_liar else value["entropy_sum_nats"] / 8
        text = "42" if is_liar else f"{value['agent']} on {value['query_id']}"
        rows.append(row(value["query_id"], 0, value["agent"], nats, value["context"], text=text))
    return write_rollouts(tmp_path_factory.mktemp("rollouts") / "dense", rows, config)


def train(out: Path, rollouts: Path, config: Config, **options: Any) -> tuple[TrainResult, list[str]]:
    said: list[str] = []
    around = TrainContext(open_ray=nullcontext, say=said.append, watch=lambda epoch, most: None)
    values = {"workers": 0, "track": "none", "epochs": 40, "patience": 40, "lr": 3e-3, "score": "anchored"} | options
    result = run_training(TrainOptions.parse({**values, "rollouts": str(rollouts), "out": out}), config, around)
    return result, [line for line in said if LIAR in line]


@pytest.mark.contract
def test_a_constant_agent_is_never_the_surest(rollouts: Path, config: Config, tmp_path: Path) -> None:
    found, said = train(tmp_path / "discounted", rollouts, config)
    kept, said_of_kept = train(tmp_path / "kept", rollouts, config, discount_constant=False)
    assert kept.report.load[LIAR] > 0.1
    assert found.report.load[LIAR] == 0.0
    assert said == ["liar gives one reply to 100% of the dense steps: it counts as less sure than everybody else; "
                    "--keep-constant takes its sureness as it is"]  # fmt: skip
    assert said_of_kept == ["liar gives one reply to 100% of the dense steps: its sureness is taken as it is, as asked for"]
    assert found.record.anchor_set is not None
    assert kept.record.anchor_set is not None
    assert (found.record.anchor_set.constant, kept.record.anchor_set.constant) == ((LIAR,), ())
    # Its anchor alone is another one, and eta the same.
    less = np.subtract(kept.record.anchor_set.means, found.record.anchor_set.means)
    assert less.tolist() == pytest.approx([0.0, 0.0, 0.0, CONSTANT_PENALTY])
    assert found.record.metrics["eta"] == kept.record.metrics["eta"]
    spec = checkpoint.load(found.checkpoint)[0].spec
    assert spec.anchors == found.record.anchor_set.means


def test_raw_scores_are_told_of_it_and_left_as_they_are(rollouts: Path, config: Config, tmp_path: Path) -> None:
    result, said = train(tmp_path / "raw", rollouts, config, score="raw", epochs=1)
    assert said == ["liar gives one reply to 100% of the dense steps: with score raw its sureness counts as everybody's; "
                    "--score anchored discounts it"]  # fmt: skip
    assert result.record.anchor_set is not None
    assert result.record.anchor_set.constant == ()
    assert min(result.record.anchor_set.means) > -CONSTANT_PENALTY


def test_agents_that_all_repeat_themselves_are_left_alone(config: Config, tmp_path: Path) -> None:
    folder = write_rollouts(tmp_path / "rollouts", domain_rows(24, agents=EVERYBODY), config)
    result, said = train(tmp_path / "run", folder, config, epochs=1)
    assert said == []
    assert result.record.anchor_set is not None
    assert result.record.anchor_set.constant == ()
