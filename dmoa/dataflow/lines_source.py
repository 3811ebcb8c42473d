"""A Ray Data source over lines of files: rows are read where and when they are needed, a shard at a time.

The driver keeps only where each line begins; Ray Data reads shards ahead as far as its memory limits allow. The files of
a run lie on the driver's node, so that is where shards are read.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import ray
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

_READERS = 2


@dataclass(frozen=True, slots=True)
class Line:
    """Where a line begins."""

    path: str
    offset: int
    """In bytes."""


Cell = str | Line
"""A value, or the line that holds it."""
Item = tuple[Cell, ...]
"""One row: a cell per column."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Cells of one column of a shard in a few bytes each: Ray keeps what describes a shard for as long as a pass runs."""

    names: tuple[str, ...]
    """Different values, and paths of lines."""
    codes: array[int]
    """Per cell, which of the names."""
    starts: array[int]
    """Per cell, where its line begins; -1: the name is the value."""


def pack(cells: Sequence[Cell]) -> Packed:
    """Return the cells packed."""
    names = [cell.path if isinstance(cell, Line) else cell for cell in cells]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    starts = array("q", (cell.offset if isinstance(cell, Line) else -1 for cell in cells))
    return Packed(tuple(numbers), array("l", (numbers[name] for name in names)), starts)


class LinesSource(Datasource):  # type: ignore[misc] # Ray ships no types
    """Rows of texts, shard by shard."""

    def __init__(self, columns: Sequence[str], items: Sequence[Item], shard_rows: int) -> None:
        super().__init__()
        self._columns = tuple(columns)
        shards = (items[i : i + shard_rows] for i in range(0, len(items), shard_rows))
        self._shards = [tuple(map(pack, zip(*shard, strict=True))) for shard in shards]

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return len(self._shards)

    def get_name(self) -> str:
        """Return the name under which Ray Data lists the source."""
        return "Lines"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the size is not known before the lines are read."""
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        """Return one task per shard, whatever parallelism is asked for."""
        return [self._task(shard) for shard in self._shards]

    def _task(self, shard: Sequence[Packed]) -> ReadTask:
        names = self._columns

        def read() -> Iterator[pa.Table]:
            yield pa.table({name: pa.array(read_cells(column), pa.string()) for name, column in zip(names, shard, strict=True)})

        metadata = BlockMetadata(num_rows=len(shard[0].codes), size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(read, metadata)


def read_cells(column: Packed) -> list[str]:
    """Return the values of a column; those of lines are read, without their line ends."""
    files: dict[str, BinaryIO] = {}
    try:
        return [_read(column.names[code], start, files) for code, start in zip(column.codes, column.starts, strict=True)]
    finally:
        for file in files.values():
            file.close()


def _read(name: str, start: int, files: dict[str, BinaryIO]) -> str:
    if start < 0:
        return name
    if name not in files:
        files[name] = Path(name).open("rb")  # noqa: SIM115 -- closed by the caller, after the last line
    files[name].seek(start)
    return files[name].readline().decode("utf-8").rstrip("\n")


def offsets(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield where each whole line of a file begins, and the line; nothing where there is no file."""
    if not path.exists():
        return
    position = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield position, line
            position += len(line)


def stream(columns: Sequence[str], items: Sequence[Item], shard_rows: int) -> ray.data.Dataset:
    """Return a dataset over the items; reading is pinned to this node, where the files are."""
    source = LinesSource(columns, items, shard_rows)
    # No CPU: a head node of a cluster may have none to give, and reading lines takes next to nothing.
    return ray.data.read_datasource(
        source,
        override_num_blocks=max(1, source.num_shards),
        num_cpus=0,
        concurrency=_READERS,
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )


def drain(dataset: ray.data.Dataset) -> Iterable[None]:
    """Run a dataset to its end and throw its blocks away, one None per block."""
    for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield None
