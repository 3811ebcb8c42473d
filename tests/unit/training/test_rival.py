"""The rival by clusters: it is scored as a gate is, in the study and in `dmoa evaluate --ablations` alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from dmoa.errors import ConfigError
from dmoa.evaluation.run_folder import RunFolder
from dmoa.testing import AGENTS, domain_rows, write_rollouts
from dmoa.testing import CONTEXT_DIM as DIM
from dmoa.testing import scripted_pool as pool
from dmoa.training.ablations import ABLATIONS, left_out, train_ablation
from dmoa.training.cluster_router import fit_rival, sample_of, training_scores
from dmoa.training.rollouts import read_table
from dmoa.workflows import ablate as ablations
from dmoa.workflows.console import Common
from tests.unit.training.in_process import AROUND

PAPER = "{preset: paper, hidden: 16}"


def rows_with_cut_replies(agent: str) -> list[dict[str, Any]]:
    """One agent is the surest of all everywhere, and all its replies were cut off."""
    changes = {"entropy_sum_nats": 0.001, "entropy_sq_sum": 0.0, "finish_reason": "length"}
    return [row | changes if row["agent"] == agent else row for row in domain_rows(steps=2)]


def test_scores_are_those_of_the_rows_of_the_sample_and_cut_replies_are_last(tmp_path: Path) -> None:
    rows = rows_with_cut_replies("two")
    rows[3] |= {"status": "failed"}
    table = read_table(write_rollouts(tmp_path / "r", rows, pool()))
    score_RA, entropy_RA = training_scores(table, AGENTS), sample_of(table, AGENTS, "default").entropy_RA
    assert np.isnan(score_RA).sum() == np.isnan(entropy_RA).sum()
    assert np.array_equal(score_RA[:, 0], np.log(entropy_RA[:, 0] + 1e-3), equal_nan=True)
    assert (np.nanmin(score_RA[:, 1]) > np.nanmax(score_RA[:, [0, 2]])).all()


def test_the_commands_rival_is_the_studys(tmp_path: Path) -> None:
    config, rows = pool(), rows_with_cut_replies("two")
    rollouts = write_rollouts(tmp_path / "r", rows, config)
    contexts = [row["context"][:DIM] for row in rows if row["step"] == 0 and row["agent"] == "one"]

    class Encoder:
        async def embed(self, texts: list[str]) -> list[Any]:
            return [contexts[int(text)] for text in texts]

    tasks = [SimpleNamespace(text=str(number)) for number in range(len(contexts))]
    folder = cast("RunFolder", SimpleNamespace(read_tasks=lambda name: tasks))
    chosen = ablations.cluster_choices(folder, ["made-up"], rollouts, config, 3, Encoder())["made-up"]
    studys = fit_rival(read_table(rollouts), AGENTS, "default", num_clusters=8, seed=3).rank(np.stack(contexts))[:, 0]
    assert np.array_equal(chosen, studys)
    assert AGENTS.index("two") not in chosen
    assert len(set(chosen)) == 2


def test_ablations_that_do_not_apply_are_told_and_left_out(tmp_path: Path) -> None:
    done: list[str] = []

    def say(text: str) -> None:
        done.append(text)

    def train(name: str, *_: object) -> Path:
        done.append(name)
        return tmp_path / name

    common = cast("Common", SimpleNamespace(say=say))
    found = ablations.train_all(tmp_path, tmp_path, pool(gate=PAPER), common, 0, train)
    assert set(ABLATIONS) - set(found) == {"no-summary", "paper"} == set(left_out(pool(gate=PAPER)))
    assert done[0].startswith("left out: no-summary (gate.preset paper embeds query and summary together); paper (")
    assert done[1:3] == [f"training 1 of {len(ABLATIONS) - 2}: default (the default configuration)", "default"]
    done.clear()
    assert set(ablations.train_all(tmp_path, tmp_path, pool(), common, 0, train)) == set(ABLATIONS)
    assert not any("left out" in line for line in done)


@pytest.mark.parametrize("name", ["no-summary", "paper"])
def test_one_that_does_not_apply_is_refused_before_it_is_trained(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"ablation is '{name}'; .*paper.*; choose one of default, raw"):
        train_ablation(name, tmp_path / "nowhere", tmp_path / "out", pool(gate=PAPER), AROUND)
    assert not (tmp_path / "out").exists()


def test_a_paper_pool_trains_the_others(tmp_path: Path) -> None:
    config = pool(gate=PAPER)
    rows = [row | {"context": row["context"][:DIM]} for row in domain_rows()]
    rollouts = write_rollouts(tmp_path / "r", rows, config)
    for name in ("no-cascade", "anchored", "shuffled-within"):
        assert train_ablation(name, rollouts, tmp_path / "out", config, AROUND, {"epochs": 1}).is_dir()
