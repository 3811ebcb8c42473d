"""The rounds of `jobs/train_rounds.py`: what each training is asked for."""

from __future__ import annotations

from pathlib import Path

from dmoa.testing import scripted_pool
from dmoa.workflows.rounds import RoundsOptions, training_of


def test_every_training_begins_with_the_gate_that_its_round_was_collected_with(tmp_path: Path) -> None:
    options = RoundsOptions.parse({"out": tmp_path, "rollouts": {}, "train": {"epochs": 3}})
    plain = scripted_pool()
    trained = plain.model_copy(update={"gate": plain.gate.model_copy(update={"checkpoint": "here"})})
    found = [training_of(options, config, [tmp_path / "r"], tmp_path / "gate") for config in (plain, trained)]
    assert [one.start_from for one in found] == [None, Path("here")]
    assert [(one.epochs, one.rollouts, one.out) for one in found] == [(3, (tmp_path / "r",), tmp_path / "gate")] * 2
