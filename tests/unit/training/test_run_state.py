"""The state of a training: whole or not there, exact, and read without its tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoa.errors import ConfigError, DmoaError
from dmoa.training.state import FILE, EpochRecord, RunState, StateStore, TrainProgress

numbers = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))


def record(epoch: int, loss: float | None = 0.5) -> EpochRecord:
    return EpochRecord(
        epoch=epoch, train_loss=loss, held_loss=loss, held_pairwise=0.5, grad_norm=1.0, updates=3, bad_steps=0, seconds=0.1
    )


def store_in(folder: Path) -> StateStore:
    store = StateStore(str(folder / "state"))
    store.check()
    return store


def test_nothing_is_kept_before_the_first_state(tmp_path: Path) -> None:
    assert store_in(tmp_path).read() is None
    assert store_in(tmp_path).read_progress() is None
    assert StateStore(str(tmp_path / "elsewhere")).read() is None


@pytest.mark.parametrize("as_uri", [False, True])
def test_a_state_comes_back_bit_for_bit(as_uri: bool, tmp_path: Path) -> None:
    store = StateStore((tmp_path / "state").as_uri() if as_uri else str(tmp_path / "state"))
    store.check()
    tensors = {"weights/a": torch.rand(3, 4, dtype=torch.float64), "best/a": torch.rand(3, 4), "exp_avg/a": torch.zeros(2)}
    progress = TrainProgress(identity={"lr": 0.1}, epochs=(record(1), record(2)), num_updates=6, best_epoch=2, best_loss=0.5)
    store.write(RunState(progress, tensors))
    found = store.read()
    assert found is not None
    assert found.progress == progress == store.read_progress()
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)
    assert list(found.part("weights")) == ["a"]
    assert [path.name for path in (tmp_path / "state").iterdir()] == [FILE]


@given(st.lists(numbers, max_size=5))
def test_the_curve_is_kept_exactly(losses: list[float | None]) -> None:
    progress = TrainProgress(identity={}, epochs=tuple(record(n, loss) for n, loss in enumerate(losses)))
    assert TrainProgress.model_validate_json(progress.model_dump_json()) == progress


def test_a_later_state_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for epoch in (1, 2):
        epochs = tuple(record(n + 1) for n in range(epoch))
        store.write(RunState(TrainProgress(identity={}, epochs=epochs), {"weights/a": torch.full((2,), float(epoch))}))
    found = store.read()
    assert found is not None
    assert len(found.progress.epochs) == 2
    assert found.part("weights")["a"].tolist() == [2.0, 2.0]


def test_a_state_that_cannot_be_written_is_told_in_a_line_and_the_one_before_stays(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    path = tmp_path / "state" / FILE
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(DmoaError, match=r"train: cannot write '.*': .*; make room, then go on by the same command"):
        store.write(RunState(TrainProgress(identity={}, epochs=(record(1),)), {"weights/a": torch.ones(2)}))
    assert [found.name for found in path.parent.iterdir()] == [FILE]  # no draft is left


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -3])
def test_a_damaged_state_is_refused(keep: int, tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.write(RunState(TrainProgress(identity={}, epochs=(record(1),)), {"weights/a": torch.ones(50)}))
    path = tmp_path / "state" / FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="cannot be read"):
        store.read()


def _headed(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    "attack",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: _headed(path, b"[" * 100_000),
        lambda path: _headed(path, b"[]"),
        lambda path: _headed(path, b'{"__metadata__": {}}' + b" " * (1 << 25)),
        lambda path: path.write_bytes((1 << 30).to_bytes(8, "little")),
    ],
)
def test_a_file_that_is_made_to_stall_is_refused(attack: Callable[[Path], object], tmp_path: Path) -> None:
    store = store_in(tmp_path)
    attack(tmp_path / "state" / FILE)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        store.read()
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused_by_their_tensor(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.write(RunState(TrainProgress(identity={}, epochs=(record(1),)), {"weights/a": torch.tensor([0.0, float("nan")])}))
    with pytest.raises(ConfigError, match=r"cannot be read: weights/a holds NaN or infinity"):
        store.read()


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    (tmp_path / "state" / FILE).write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        store.read_progress()


def test_a_mark_is_seen_in_the_same_place_alone_and_goes(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    with store.marked() as mark:
        assert store.has(mark)
        assert StateStore((tmp_path / "state").as_uri()).has(mark)
        assert not StateStore(str(tmp_path / "other")).has(mark)
    assert not store.has(mark)
