"""The rounds of `jobs/train_rounds.py`: what each training is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmoa.errors import ConfigError
from dmoa.testing import scripted_pool
from dmoa.workflows.console import Common
from dmoa.workflows.rounds import RoundsOptions, run_rounds, training_of


def test_every_training_begins_with_the_gate_that_its_round_was_collected_with(tmp_path: Path) -> None:
    options = RoundsOptions.parse({"out": tmp_path, "rollouts": {}, "train": {"epochs": 3}})
    plain = scripted_pool()
    trained = plain.model_copy(update={"gate": plain.gate.model_copy(update={"checkpoint": "here"})})
    found = [training_of(options, config, [tmp_path / "r"], tmp_path / "gate") for config in (plain, trained)]
    assert [one.start_from for one in found] == [None, Path("here")]
    assert [(one.epochs, one.rollouts, one.out) for one in found] == [(3, (tmp_path / "r",), tmp_path / "gate")] * 2


def test_every_round_keeps_the_state_of_its_training_in_a_place_of_its_own(tmp_path: Path) -> None:
    for given, used in (("s3://bucket/x?scheme=http", "s3://bucket/x/round-1?scheme=http"), ("/shared/x", "/shared/x/round-1")):
        options = RoundsOptions.parse({"out": tmp_path, "rollouts": {}, "train": {"storage_path": given}})
        assert training_of(options, scripted_pool(), [tmp_path / "r"], tmp_path / "round-1" / "gate").storage_path == used


@pytest.mark.parametrize(
    ("rollouts", "train", "message"),
    [
        ({"benchmarks": "arith", "epsilon": 2}, {}, "rollouts: epsilon is 2"),
        ({"benchmarks": "arith"}, {"epochz": 5}, "train: epochz: unknown key"),
    ],
)
def test_bad_options_are_refused_before_anybody_is_asked(
    rollouts: dict[str, object], train: dict[str, object], message: str, tmp_path: Path
) -> None:
    options = RoundsOptions.parse({"out": tmp_path / "out", "rollouts": rollouts, "train": train})
    with pytest.raises(ConfigError, match=message):
        run_rounds(options, scripted_pool(), Common(verbosity=-1), "")
    assert not (tmp_path / "out").exists()


def test_labels_and_queries_may_lie_beside_the_rounds(tmp_path: Path) -> None:
    """Training reads the folders of the rounds alone: what is refused here is the training, whose options are looked at next."""
    mine = {"benchmarks": "arith", "labels": tmp_path / "labels", "queries": str(tmp_path / "queries.jsonl"), "limit": 2}
    options = RoundsOptions.parse({"out": tmp_path, "rollouts": mine, "train": {"epochs": 0}})
    with pytest.raises(ConfigError, match="train: epochs is 0"):
        run_rounds(options, scripted_pool(), Common(verbosity=-1), "")


@pytest.mark.parametrize("name", ["url", "from_traffic"])
def test_rounds_ask_the_gate_that_they_train(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"job.rollouts: {name}: a round asks its own pool, by the gate that was trained last"):
        RoundsOptions.parse({"out": tmp_path, "rollouts": {name: "http://127.0.0.1:9"}})
