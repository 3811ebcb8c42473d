"""What a training keeps between epochs and goes on from: weights, AdamW's moments, the best weights, the curve.

One safetensors file without pickle, written whole and then renamed, wherever Ray's file systems reach (a folder, s3://,
gs://). The order of the queries follows from seed and epoch, so it needs no state.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dmoa.errors import ConfigError, DmoaError
from dmoa.storage import write_at
from dmoa.training.rollouts import FileRecord

FILE = "state.safetensors"
_META = "dmoa"
_HEADER_BYTES = 8
"""A safetensors file begins with the length of its header, in so many bytes."""
_MAX_HEADER_BYTES = 1 << 24
_READ_ERRORS = (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError)
Parsed = TypeVar("Parsed")


class EpochRecord(FileRecord):
    """One epoch of the curve."""

    epoch: int
    """Counts from 1."""
    train_loss: float | None
    """Mean over the epoch's batches, each by the weights before its update; null where no batch held a pair."""
    held_loss: float | None
    """Of the held-back queries, after the epoch; null where they hold no pair, or it is not finite."""
    held_pairwise: float | None
    """Share of the held-back pairs that the gate ranks as the scores do."""
    grad_norm: float
    """Mean norm of the gradient before clipping."""
    updates: int
    """Updates of the epoch."""
    bad_steps: int
    """Batches of the whole run so far that were skipped because loss or gradient was not finite."""
    seconds: float
    """Wall time since the end of the epoch before, and so with the keeping of the state in between."""


class TrainProgress(FileRecord):
    """How far a training is: the part of its state that is not a tensor."""

    identity: dict[str, Any]
    """What is learned, from what, by what options: the training goes on only with the same."""
    epochs: tuple[EpochRecord, ...] = ()
    num_updates: int = 0
    bad_steps: int = 0
    best_epoch: int = 0
    """Epoch of the best weights; 0: the initial ones."""
    best_loss: float | None = None
    """Held-back loss of the best weights."""
    ended: str | None = None
    """Why the training is over; null while it is not."""


@dataclass(frozen=True, slots=True)
class RunState:
    """A training between two epochs."""

    progress: TrainProgress
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """`weights/NAME`, `best/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`."""

    def part(self, kind: str) -> dict[str, Tensor]:
        """Return the tensors of one kind, by name."""
        return {name.removeprefix(f"{kind}/"): tensor for name, tensor in self.tensors.items() if name.startswith(f"{kind}/")}


class StateStore:
    """The place of a training's state. Cheap to make, and picklable: every worker makes its own."""

    # Not Ray Train's `report`: its controller takes one every two seconds, longer than twenty epochs of few-shot training,
    # and would either hold the training up or lose them.

    def __init__(self, place: str) -> None:
        """`place`: a folder, or a URI that Ray's file systems know."""
        # Absolute, because Ray Train's workers live in folders of their own.
        self.place = place if "://" in place else str(Path(place).absolute())

    def _open(self) -> tuple[pyarrow.fs.FileSystem, str]:
        system, root = pyarrow.fs.FileSystem.from_uri(self.place)  # takes absolute paths too
        return system, root

    def check(self) -> None:
        """Make the folder. Raises ConfigError where it cannot be made or written."""
        with self.marked():
            pass

    @contextmanager
    def marked(self) -> Iterator[str]:
        """Leave a file in the place while the block runs, and yield its name. Raises ConfigError where none can be written."""
        mark = f".mark-{secrets.token_hex(8)}"
        try:
            system, root = self._open()
            system.create_dir(root, recursive=True)
            with system.open_output_stream(f"{root}/{mark}") as stream:
                stream.write(b"")
        except (OSError, ValueError) as error:
            raise ConfigError(f"train: cannot write {self.place!r}: {error}; name a folder that can be written") from error
        try:
            yield mark
        finally:
            with suppress(OSError):
                system.delete_file(f"{root}/{mark}")

    def has(self, mark: str) -> bool:
        """Tell whether this process sees the file that another one has left: whether the place is the same for both."""
        system, root = self._open()
        return bool(system.get_file_info(f"{root}/{mark}").type == pyarrow.fs.FileType.File)

    def write(self, state: RunState) -> None:
        """Keep a state in place of the one before; a reader sees either of them whole. Raises DmoaError where it cannot."""
        system, root = self._open()
        data = save(dict(state.tensors), metadata={_META: state.progress.model_dump_json()})
        try:
            write_at(system, f"{root}/{FILE}", data)
        except OSError as error:
            raise DmoaError(f"train: cannot write {self.place!r}: {error}; make room, then go on by the same command") from error

    def read(self) -> RunState | None:
        """Return the state, None before the first. Raises ConfigError where the file is damaged."""
        return self._read(_state)

    def read_progress(self) -> TrainProgress | None:
        """Return how far the training is, without its tensors; None before the first state. Raises ConfigError."""
        return self._read(_progress)

    def _read(self, parse: Callable[[pyarrow.NativeFile], Parsed]) -> Parsed | None:
        system, root = self._open()
        kind = system.get_file_info(f"{root}/{FILE}").type
        if kind == pyarrow.fs.FileType.NotFound:
            return None
        try:
            if kind != pyarrow.fs.FileType.File:
                raise OSError("it is no regular file")  # a pipe would be waited for
            with system.open_input_file(f"{root}/{FILE}") as stream:
                return parse(stream)
        except _READ_ERRORS as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"train: the state in {self.place!r} cannot be read: {reason}; remove {FILE} there to begin anew"
            ) from error


def _state(stream: pyarrow.NativeFile) -> RunState:
    progress = _progress(stream)
    stream.seek(0)
    tensors = load(stream.read())
    if bad := next((name for name, one in tensors.items() if not one.isfinite().all()), None):
        raise ValueError(f"{bad} holds NaN or infinity")
    return RunState(progress, tensors)


def _progress(stream: pyarrow.NativeFile) -> TrainProgress:
    length = int.from_bytes(stream.read(_HEADER_BYTES), "little")
    if not 0 < length <= _MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes")
    try:
        return TrainProgress.model_validate_json(json.loads(stream.read(length))["__metadata__"][_META])
    except ValidationError as error:
        raise ValueError(f"{error.error_count()} fields do not fit, first: {error.errors()[0]['msg']}") from error
