"""Rows of a benchmark: from files under `--data-dir` or from the hub, checked line by line, divided into splits.

Under `--data-dir DIR` a benchmark is the folder DIR/NAME with one file a split, JSON Lines in UTF-8, plain (`.jsonl`) or
gzip (`.jsonl.gz`), upstream's field names; `benchmarks.specs` says which file serves which split. Every file is parsed
once, however many splits it serves.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmoa.errors import ConfigError
from dmoa.evaluation import hub
from dmoa.evaluation.benchmarks.specs import spec_of
from dmoa.evaluation.benchmarks.upstream import ParsedRow, RowError, RowSpec, Slice, fraction_of, hash_content, show
from dmoa.evaluation.records import Label, Row, Split, Task

ID_CHARS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that was left out because it does not parse."""

    file: str
    line: int
    """From 1; on the hub, the row's number in its split."""
    field: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One split of one benchmark."""

    rows: tuple[Row, ...]
    """In the order of the file; every row once."""
    bad: tuple[BadRow, ...]
    """What was skipped in the files that were read, whichever split it would have belonged to."""
    sources: dict[str, str]
    """File name under the data folder -> SHA-256 hex, or hub data set and split -> revision."""
    num_duplicates: int = 0
    """Rows left out because an equal row came before."""


@dataclass(slots=True)
class _Part:
    """A split while it is being read."""

    slice: Slice
    rows: dict[str, Row] = field(default_factory=dict)
    num_duplicates: int = 0

    def add(self, spec: RowSpec, split: Split, parsed: ParsedRow, row_hash: str) -> None:
        if not self.slice.holds(fraction_of(parsed.family or row_hash)):
            return
        if row_hash in self.rows:
            self.num_duplicates += 1
            return
        row_id = f"{spec.name}/{split}/{row_hash[:ID_CHARS]}"
        task = Task(row_id=row_id, benchmark=spec.name, text=parsed.text, group=parsed.group)
        self.rows[row_hash] = Row(task=task, label=Label(row_id=row_id, benchmark=spec.name, gold=parsed.gold), row_hash=row_hash)


def load(name: str, split: Split, *, data_dir: Path | None, skip_bad_rows: bool = False) -> Loaded:
    """One split of a benchmark; from the hub where `data_dir` is None.

    Raises:
        ConfigError: an unknown benchmark; a file is missing, damaged or empty; the hub cannot be reached; a row is bad and
            `skip_bad_rows` is false: names file, line, field, value seen and what was expected.
    """
    return load_splits(name, [split], data_dir=data_dir, skip_bad_rows=skip_bad_rows)[split]


def load_splits(name: str, splits: Sequence[Split], *, data_dir: Path | None, skip_bad_rows: bool = False) -> dict[Split, Loaded]:
    """Several splits of a benchmark, each file read once; raises as `load` does."""
    spec = spec_of(name)
    slices = slices_of(spec, data_dir)
    definitions, sources = read_definitions(spec, data_dir)
    loaded: dict[Split, Loaded] = {}
    for file in dict.fromkeys(slices[split].file for split in splits):
        parts = {split: _Part(slices[split]) for split in splits if slices[split].file == file}
        file_sources, bad = _read_file(spec, file, parts, definitions, data_dir, skip_bad_rows)
        for split, part in parts.items():
            rows = tuple(part.rows.values())
            assert len({row.task.row_id for row in rows}) == len(rows), "two rows share the first 64 bits of their hashes"
            loaded[split] = Loaded(
                rows=rows, bad=tuple(bad), sources={**file_sources, **sources}, num_duplicates=part.num_duplicates
            )
    return loaded


def slices_of(spec: RowSpec, data_dir: Path | None) -> Mapping[Split, Slice]:
    """Where the splits come from: files, or the hub's splits."""
    return spec.slices if data_dir is not None else hub.HUB[spec.name].slices or spec.slices


def find_file(spec: RowSpec, file: str, data_dir: Path) -> Path | None:
    """The file of this name, plain or gzip; None where there is none.

    Raises:
        ConfigError: both are there.
    """
    found = [path for ending in ("jsonl", "jsonl.gz") if (path := data_dir / spec.name / f"{file}.{ending}").is_file()]
    if len(found) > 1:
        raise ConfigError(f"{found[0]} and {found[1]} are both there: which one counts is not said; remove one")
    return found[0] if found else None


def _read_file(
    spec: RowSpec, file: str, parts: Mapping[Split, _Part], definitions: Any, data_dir: Path | None, skip_bad_rows: bool
) -> tuple[dict[str, str], list[BadRow]]:
    """Reads one file into the splits that it serves."""
    lines: Iterator[tuple[int, bytes | dict[str, Any]]]
    if data_dir is None:
        source = hub.HUB[spec.name]
        name, records = hub.read_split(source, file)
        sources, lines = {name: source.revision}, enumerate(records, start=1)
    else:
        path = _require_file(spec, file, data_dir)
        name = f"{spec.name}/{path.name}"
        sources, lines = {name: hash_file(path)}, read_lines(path)
    bad: list[BadRow] = []
    num_lines = 0
    for number, line in lines:
        num_lines += 1
        try:
            parsed = spec.parse(line if isinstance(line, dict) else parse_line(line), definitions)
            row_hash = hash_content(parsed.content)
        except RowError as error:
            if not skip_bad_rows:
                advice = "Correct the row, or leave such rows out and count them with --skip-bad-rows."
                raise ConfigError(f"{name}, line {number}, {error}. {advice}") from None
            bad.append(BadRow(file=name, line=number, field=error.field, reason=str(error)))
            continue
        for split, part in parts.items():
            part.add(spec, split, parsed, row_hash)
    if num_lines == len(bad):
        raise ConfigError(f"{name} holds no usable row ({len(bad)} bad ones); expected one {spec.name} row a line as JSON")
    return sources, bad


def _require_file(spec: RowSpec, file: str, data_dir: Path) -> Path:
    folder = data_dir / spec.name
    if not folder.is_dir():
        advice = f"--data-dir must hold one folder a benchmark, this one with {file}.jsonl or {file}.jsonl.gz"
        raise ConfigError(f"{spec.name}: there is no folder {folder}; {advice}")
    path = find_file(spec, file, data_dir)
    if path is None:
        served = ", ".join(split for split, part in spec.slices.items() if part.file == file)
        seen = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise ConfigError(
            f"{spec.name}: {folder} has neither {file}.jsonl nor {file}.jsonl.gz, which the rows for {served} come from "
            f"(it holds {seen}); put the file there or ask for another split"
        )
    return path


def read_definitions(spec: RowSpec, data_dir: Path | None) -> tuple[Any, dict[str, str]]:
    """What gives the codes a meaning, and the hashes (hub: the revision) of the files that say so."""
    paths: dict[str, Path] = {}
    sources: dict[str, str] = {}
    for file in spec.definitions:
        if data_dir is None:
            source = hub.HUB[spec.name]
            paths[file] = hub.fetch_file(source, file)
            sources[f"{source.dataset}/{file}"] = source.revision
            continue
        paths[file] = data_dir / spec.name / file
        if not paths[file].is_file():
            raise ConfigError(f"{spec.name}: {paths[file]} is missing; its rows are codes that only this file explains: add it")
        sources[f"{spec.name}/{file}"] = hash_file(paths[file])
    return spec.read_definitions(paths), sources


def hash_file(path: Path) -> str:
    """SHA-256 hex of the file as it lies on the disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a plain or gzip file that are not blank, with their numbers from 1; streamed.

    Raises:
        ConfigError: the gzip file is damaged or cut short.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is not a whole gzip file: {error}; fetch it again, or name a plain file .jsonl") from error


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        RowError: it is not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RowError("(whole row)", show(line), f"one JSON object in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise RowError("(whole row)", show(value), "one JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
