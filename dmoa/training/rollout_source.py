"""A Ray Data source over the shards of rollouts: a task per file, on the driver's node, where the folders are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from dmoa.dataflow import quiet
from dmoa.training.reading import read_rows

_READERS = 2


class RolloutSource(Datasource):  # type: ignore[misc] # Ray ships no types
    """Rows of rollouts, file by file."""

    def __init__(self, parts: Sequence[tuple[int, str]], fingerprint: str) -> None:
        """`parts`: place of the folder and path of each file."""
        super().__init__()
        self._parts = tuple(parts)
        self._fingerprint = fingerprint

    def get_name(self) -> str:
        """Return the name under which Ray Data lists the source."""
        return "Rollouts"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the size is not known before the files are read."""
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        """Return one task per file, whatever parallelism is asked for."""
        return [self._task(*part) for part in self._parts]

    def _task(self, place: int, path: str) -> ReadTask:
        fingerprint = self._fingerprint

        def read() -> Iterator[pa.Table]:
            yield read_rows(place, path, fingerprint)

        return ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=[path], exec_stats=None))


def read_parts(parts: Sequence[tuple[int, str]], fingerprint: str) -> ray.data.Dataset:
    """Return a dataset over the files. Reading takes no CPU: a head node of a cluster may have none to give."""
    quiet()
    return ray.data.read_datasource(
        RolloutSource(parts, fingerprint),
        override_num_blocks=len(parts),
        num_cpus=0,
        concurrency=_READERS,
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )
