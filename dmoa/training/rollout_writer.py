"""The actor that writes the rollouts of a collection: queries come in as they are answered and leave in Parquet parts.

A part is written whole and then renamed, so a session that is killed leaves nothing torn, and loses only what was answered
in the seconds since the last part. The pause between parts grows with the session, so that a long one has few of them.
"""

from __future__ import annotations

import io
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from dmoa.training.rollout_records import SCHEMA
from dmoa.training.rollouts import RolloutFolder, write_whole

PART_BYTES = 64 << 20
"""A part is written as soon as so much waits for it."""
_PAUSE_SHARE = 0.02
"""Longest wait for a part, as a share of the session so far."""
_LOCK_S = 60.0
_MAX_FAILURES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What became of one query."""

    query_id: str
    table: pa.Table | None = None
    """Its rows; None where the query failed."""
    error: str = ""
    """Why it failed."""


class RolloutWriter:
    """An actor on the driver's node; counts what it is given for the progress bar."""

    def __init__(self, root: str, first_pause_s: float = 2.0) -> None:
        """Take the collection's write lock, waiting for the writer of a session that was killed a moment ago.

        `first_pause_s`: shortest wait between two parts.
        """
        self._first_pause_s = first_pause_s
        self._folder = RolloutFolder(Path(root))
        self._folder.parts.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._folder.root / ".writing.lock")
        self._lock.acquire(timeout=_LOCK_S)
        for draft in self._folder.parts.glob(".*.draft"):
            draft.unlink()
        self._number = 1 + max((_number(path) for path in self._folder.parts.glob("part-*.parquet")), default=-1)
        self._counts = {"rows": 0, "failed": 0, "tokens": 0}
        self._failures: deque[str] = deque(maxlen=_MAX_FAILURES)
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        self._seen: set[str] = set()
        self._started_s = self._written_s = time.monotonic()

    def ready(self) -> None:
        """Return once this is the collection's only writer."""

    def take(self, collected: list[Collected]) -> None:
        """Take queries; they are on disk after the next part, at the latest after `flush`."""
        for query in collected:
            if query.query_id in self._seen:  # Ray Data runs a shard again whose worker died half-way
                continue
            self._seen.add(query.query_id)
            self._counts["rows"] += 1
            if query.table is None:
                self._counts["failed"] += 1
                self._failures.append(f"{query.query_id}: {query.error}")
                continue
            self._counts["tokens"] += sum(query.table["completion_tokens"].to_pylist())
            self._waiting.append(query.table)
            self._waiting_bytes += query.table.nbytes
        self._write_if_due()

    def counts(self) -> dict[str, int]:
        """Return queries taken, failed ones among them, and completion tokens; writes a part if it is time."""
        self._write_if_due()
        return dict(self._counts)

    def flush(self) -> list[str]:
        """Write what waits, and return the newest failures, each as `query_id: error`."""
        self._write()
        return list(self._failures)

    def _write_if_due(self) -> None:
        now = time.monotonic()
        pause_s = max(self._first_pause_s, _PAUSE_SHARE * (now - self._started_s))
        if self._waiting_bytes >= PART_BYTES or now - self._written_s >= pause_s:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            data = io.BytesIO()
            strings = [field.name for field in SCHEMA if pa.types.is_string(field.type)]
            # Contexts repeat from agent to agent: zstd finds that, a dictionary of single numbers would not.
            pq.write_table(
                pa.concat_tables(self._waiting), data, compression="zstd", use_dictionary=strings, write_page_checksum=True
            )
            write_whole(self._folder.parts / f"part-{self._number:06d}.parquet", data.getvalue())
            self._number += 1
            self._waiting, self._waiting_bytes = [], 0
        self._written_s = time.monotonic()


def _number(path: Path) -> int:
    """Return the number of a part; -1 for a file with another name."""
    digits = path.stem.removeprefix("part-")
    return int(digits) if digits.isdigit() else -1
