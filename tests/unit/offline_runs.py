"""Reads the records of offline W&B runs, and says what a server would hold once they are synced."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_HEADER_BYTES = 7
_BLOCK_BYTES = 32 * 1024
_FULL, _LAST = 1, 4


@dataclass
class Synced:
    """A W&B run as a server has it."""

    id: str
    group: str
    steps: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    step_of: dict[str, str] = field(default_factory=dict)
    """Figure -> the figure that it is plotted by."""


def synced(folder: Path) -> dict[str, Synced]:
    """Sync all offline runs of a folder in the order of their beginning: of two with one id the later takes all."""
    found: dict[str, Synced] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        run = Synced("", "")
        for record in records(path):
            if record.HasField("run") and not run.id:
                run.id, run.group = record.run.run_id, record.run.run_group
            if record.HasField("metric"):
                run.step_of[record.metric.name] = record.metric.step_metric
            if record.HasField("history"):
                row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                own = row.pop("_step", record.history.step.num)
                run.steps.append(row.pop("step", own))
                run.rows.append({name: value for name, value in row.items() if not name.startswith("_")})
        found[run.id] = run
    return found


def records(path: Path) -> Iterator[Record]:
    """Yield the records of a run's file, which is a log of LevelDB's kind; what was torn at its end is left out."""
    data = path.read_bytes()
    position, whole = _HEADER_BYTES, b""
    while position + 7 <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < 7:
            position += left
            continue
        size, kind = struct.unpack_from("<HB", data, position + 4)
        chunk = data[position + 7 : position + 7 + size]
        position += 7 + size
        if len(chunk) < size or kind == 0:
            return
        whole += chunk
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
