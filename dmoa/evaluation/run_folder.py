"""The folder of a run: what lies where, how lines are appended so that none is lost, and what a killed run left behind.

run.json                                what was asked for, and everything needed to repeat it
tasks/BENCHMARK.jsonl                   the sampled tasks, without labels
answers/BENCHMARK.POLICY.jsonl          one line per answered row, written at once
labels/gold/BENCHMARK.jsonl             what is right; opened by scoring alone
labels/scores/BENCHMARK.POLICY.jsonl    how each answer was judged
evaluation.json, report.html            the result
repeat-N/                               a run of its own, of which the lines above are the mean (`dmoa compare --repeats`)
curve/N-DEFENCE/                        the same run with N adversaries and a defence (`dmoa compare --curve`)

Of a POLICY with many parameters the name of its files has the beginning, and a hash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from dmoa import storage
from dmoa.errors import ConfigError
from dmoa.evaluation.records import Answered, FileRecord, Label, Scored, Task
from dmoa.reading import offsets, read_bounded
from dmoa.validation import describe

R = TypeVar("R", bound=FileRecord)
M = TypeVar("M", bound=BaseModel)
_MAX_NAME_BYTES = 233
"""Of a file's name without its ending: file systems take 255, of which a draft needs 16."""
_SHOWN_BYTES = 160


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def run(self) -> Path:
        """Settings and provenance."""
        return self.root / "run.json"

    @property
    def evaluation(self) -> Path:
        """The result."""
        return self.root / "evaluation.json"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.root / "report.html"

    @property
    def is_answered(self) -> bool:
        """Whether anything was answered: what was begun and is not may begin anew."""
        return any(self.root.glob("**/answers/*.jsonl"))

    def curve(self, adversaries: int, defence: str) -> Path:
        """Folder of the same run with some adversaries and a defence."""
        return self.root / "curve" / f"{adversaries}-{defence}"

    def curve_runs(self) -> list[Path]:
        """Return the folders of runs with adversaries that were begun."""
        return sorted(path.parent for path in self.root.glob("curve/*/run.json"))

    def make(self) -> None:
        """Make the folder. Raises ConfigError where it cannot be made or written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage.unwritable(self.root, error) from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise storage.unwritable(self.root, "permission denied")

    def tasks(self, benchmark: str) -> Path:
        """Tasks of a benchmark."""
        return self.root / "tasks" / f"{benchmark}.jsonl"

    def gold(self, benchmark: str) -> Path:
        """Labels of a benchmark."""
        return self.root / "labels" / "gold" / f"{benchmark}.jsonl"

    def answers(self, benchmark: str, policy: str) -> Path:
        """Answers of a policy to a benchmark."""
        return self.root / "answers" / _file_name(benchmark, policy)

    def scores(self, benchmark: str, policy: str) -> Path:
        """Scores of a policy on a benchmark."""
        return self.root / "labels" / "scores" / _file_name(benchmark, policy)

    def read_tasks(self, benchmark: str) -> Iterator[Task]:
        """Yield the tasks of a benchmark, in the order of the sample."""
        return read_lines(self.tasks(benchmark), Task)

    def read_gold(self, benchmark: str) -> Iterator[Label]:
        """Yield the labels of a benchmark."""
        return read_lines(self.gold(benchmark), Label)

    def read_answers(self, benchmark: str, policy: str) -> Iterator[Answered]:
        """Yield what a policy answered; nothing where it has not begun."""
        return read_lines(self.answers(benchmark, policy), Answered)

    def read_scores(self, benchmark: str, policy: str) -> Iterator[Scored]:
        """Yield how a policy's answers were judged; nothing where they have not been."""
        return read_lines(self.scores(benchmark, policy), Scored)


def _file_name(benchmark: str, policy: str) -> str:
    """Return the name of a policy's file; of one too long for a file system the beginning and a hash of the whole."""
    name = f"{benchmark}.{policy.replace('/', '%2F')}"
    whole = name.encode()
    if len(whole) > _MAX_NAME_BYTES:
        name = f"{whole[:_SHOWN_BYTES].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:16]}"
    return f"{name}.jsonl"


def read_record(path: Path, kind: type[M]) -> M:
    """Return the record that a file of a run holds. Raises ConfigError naming file and field."""
    try:
        return kind.model_validate_json(read_bounded(path, most=1 << 26))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}; name the folder that `dmoa evaluate --out` wrote") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, kind)}") from error


def read_lines(path: Path, kind: type[R]) -> Iterator[R]:
    """Yield the records of a file, none where it does not exist; a torn last line, which a killed run leaves, is passed over.

    Raises ConfigError naming file and line for anything else that is not such a record.
    """
    for number, (_, line) in enumerate(offsets(path), 1):
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            raise ConfigError(
                f"{path}, line {number}: not a {kind.__name__} record ({error.error_count()} errors, "
                f"first: {error.errors()[0]['msg']}); remove the line to have the row run again, or use another folder"
            ) from error


def mend(path: Path) -> None:
    """Cut a torn last line off a file, so that the next append begins a line of its own."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            end = data.rfind(b"\n") + 1
        file.truncate(end)


def append(path: Path, records: Iterable[BaseModel]) -> None:
    """Append records, each a line, and see that they reach the disk. Raises OSError; the file is then as it was before."""
    data = memoryview("".join(record.model_dump_json() + "\n" for record in records).encode("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while data:  # a disk that becomes full takes a part
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a file whole, then rename it into place. Raises ConfigError if that cannot be done."""
    try:
        storage.write_whole(path, text)
    except OSError as error:
        raise storage.unwritable(path, error) from error


def write_lines(path: Path, records: Iterable[FileRecord]) -> int:
    """Write a file of records whole, streaming, then rename it into place; returns how many."""
    count = 0
    with storage.replacing(path) as file:
        for record in records:
            file.write(record.model_dump_json().encode() + b"\n")
            count += 1
    return count
