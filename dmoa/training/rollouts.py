"""The folder of a collection of rollouts, and how it is read: nothing damaged, of another pool or another version gets by.

rollouts.json            the manifest
queries.jsonl            what is asked, without labels
rollouts/*.parquet       one row per agent and step, in parts that are written whole and then renamed
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from dmoa.errors import ConfigError
from dmoa.training.rollout_records import LATER_COLUMNS, SCHEMA, SCHEMA_VERSION, Manifest
from dmoa.validation import describe, short

__all__ = ["SCHEMA", "RolloutFolder", "check_pool", "part_paths", "read_manifest", "read_part", "read_table"]
_AGAIN = "remove the file: the command that collected it asks its queries again"


@dataclass(frozen=True, slots=True)
class RolloutFolder:
    """Paths of one collection."""

    root: Path

    @property
    def manifest(self) -> Path:
        """Where the rollouts come from."""
        return self.root / "rollouts.json"

    @property
    def queries(self) -> Path:
        """What is asked."""
        return self.root / "queries.jsonl"

    @property
    def parts(self) -> Path:
        """Folder of the Parquet files."""
        return self.root / "rollouts"

    @property
    def artifact(self) -> str:
        """Name under which runs log the folder of the Parquet files: the collection, and the trainings that read it."""
        name = self.root.resolve().name
        return f"rollouts-{re.sub(r'[^A-Za-z0-9._-]', '-', name)}"[:128]


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a collection. Raises ConfigError naming file, value seen and what is allowed."""
    path = RolloutFolder(Path(folder)).manifest
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--rollouts: cannot read {str(path)!r}: {error}; name a folder that `dmoa rollouts` wrote") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, Manifest)}; name a folder that `dmoa rollouts` wrote") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise _other_version(path, manifest.schema_version)
    return manifest


def check_pool(manifest: Manifest, *, fingerprint: str, agents: Sequence[str]) -> None:
    """Raise ConfigError unless the rollouts are of this pool; the message says which agents differ."""
    if manifest.pool_fingerprint == fingerprint:
        return
    theirs = manifest.agents
    missing, added = [name for name in theirs if name not in agents], [name for name in agents if name not in theirs]
    detail = "a model, adapter, profile, tool or sampling setting, or the order of the agents differs"
    if missing or added:
        detail = f"only in the rollouts: {', '.join(missing) or 'none'}; only in the pool: {', '.join(added) or 'none'}"
    raise ConfigError(
        f"--rollouts: pool_fingerprint: value seen: {manifest.pool_fingerprint[:12]} (pool {manifest.pool}); allowed is "
        f"{fingerprint[:12]}, this pool's; {detail}; use the pool that they were collected with, or collect them again"
    )


def part_paths(folder: str | Path) -> list[Path]:
    """Return the Parquet files of a collection, in order."""
    return sorted(RolloutFolder(Path(folder)).parts.glob("*.parquet"))


def read_part(path: str | Path, *, fingerprint: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of one Parquet file, checked; `columns` reads a part of them. Older files get `LATER_COLUMNS`.

    Raises ConfigError naming file, value seen and what is allowed: a file that is damaged or cut short, a column that is
    missing or of another type, rows of another schema version, or of a pool other than `fingerprint`.
    """
    wanted = list(SCHEMA.names if columns is None else columns)
    marks = ["schema_version", *(["pool_fingerprint"] if fingerprint is not None else [])]
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            absent = [name for name in LATER_COLUMNS if name in wanted and name not in file.schema_arrow.names]
            present = [name for name in dict.fromkeys([*wanted, *marks]) if name not in absent]
            _check_columns(path, file.schema_arrow, present)
            table = file.read(columns=present, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"{path}: not a whole Parquet file: {reason}; {_AGAIN}") from error
    for version in table["schema_version"].unique().to_pylist():
        if version != SCHEMA_VERSION:
            raise _other_version(path, version)
    for seen in table["pool_fingerprint"].unique().to_pylist() if fingerprint is not None else ():
        if seen != fingerprint:
            raise ConfigError(
                f"{path}: pool_fingerprint: value seen: {short(seen)}; allowed is {fingerprint!r}, the collection's; "
                "take the file of another pool out of this folder"
            )
    for name in absent:
        table = table.append_column(SCHEMA.field(name), pa.array([LATER_COLUMNS[name]] * len(table), SCHEMA.field(name).type))
    return table.select(wanted).cast(pa.schema([SCHEMA.field(name) for name in wanted]))


def read_table(folder: str | Path) -> pa.Table:
    """Return all rows of a collection, checked as `read_part` does; for collections that fit into memory."""
    manifest = read_manifest(folder)
    parts = [read_part(path, fingerprint=manifest.pool_fingerprint) for path in part_paths(folder)]
    return pa.concat_tables(parts) if parts else SCHEMA.empty_table()


def _check_columns(path: str | Path, schema: pa.Schema, wanted: Sequence[str]) -> None:
    for name in wanted:
        expected = SCHEMA.field(name).type
        seen = schema.field(name).type if name in schema.names else None
        if not _is_same(seen, expected):
            raise ConfigError(f"{path}: column {name}: value seen: {seen}; allowed is {expected}; {_AGAIN}")


def _is_same(seen: pa.DataType | None, expected: pa.DataType) -> bool:
    """Compare column types; the name of a list's item is the writer's own business."""
    if seen is not None and pa.types.is_list(expected):
        return pa.types.is_list(seen) and bool(seen.value_type == expected.value_type)
    return bool(seen == expected)


def _other_version(path: str | Path, seen: object) -> ConfigError:
    return ConfigError(
        f"{path}: schema_version: value seen: {short(seen)}; this dmoa reads {SCHEMA_VERSION}; "
        "use the dmoa that wrote it, or collect the rollouts again"
    )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole, see that it reaches the disk, and rename it into place. Raises OSError; nothing is left then."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
