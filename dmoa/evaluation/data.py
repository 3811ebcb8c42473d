"""Rows of benchmarks and suites: from files or the Hugging Face hub into splits without overlaps, sampled and written for a run.

The hub's data sets stand at fixed revisions, so the rows of a result are the same rows tomorrow. `prepare_rows` is what a run
asks for; the benchmarks' own modules parse the lines.
"""

from __future__ import annotations

import hashlib
import heapq
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dmoa.engines.recorded import read_lines
from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.base import (
    Benchmark,
    HubSource,
    ParsedRow,
    RowError,
    Slice,
    fraction_of,
    hash_content,
    shown_field,
)
from dmoa.evaluation.records import SPLITS, BenchmarkInfo, EvaluateOptions, Label, Row, Split, Task
from dmoa.evaluation.registry import SUITES, run_own, spec_of
from dmoa.evaluation.run_folder import RunFolder
from dmoa.reading import hash_file, read_json
from dmoa.storage import replacing
from dmoa.validation import did_you_mean


def read_split(source: HubSource, split: str) -> tuple[str, Iterator[dict[str, Any]]]:
    """Return the name under which the split is recorded, and its rows with upstream's field names. Raises ConfigError."""
    import datasets
    import httpx

    name = f"{source.dataset}{f'[{source.config}]' if source.config else ''}:{split}"
    try:
        rows = datasets.load_dataset(source.dataset, source.config, split=split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        raise unavailable(name, source, error) from error
    stride = -(-len(rows) // source.max_rows) if source.max_rows else 1
    if stride > 1:
        name, rows = f"{name}[::{stride}]", rows.select(range(0, len(rows), stride))
    return name, iter(rows)


def fetch_file(source: HubSource, file: str) -> Path:
    """Return a file of the data set's repository, in the hub's cache. Raises ConfigError where it cannot be had."""
    import httpx
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(source.dataset, file, repo_type="dataset", revision=source.revision))
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise unavailable(f"{source.dataset}/{file}", source, error) from error


def unavailable(name: str, source: HubSource, error: Exception) -> ConfigError:
    """What to tell who asked for rows that the hub does not give."""
    return ConfigError(
        f"{name} at revision {source.revision} cannot be had from the Hugging Face hub: {type(error).__name__}: {error}. "
        "Give the folder of the rows with --data-dir, or run where the hub or its cache can be reached."
    )


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
    num_of_text: Counter[str] = field(default_factory=Counter)
    """Rows of each text so far, by its hash: the same question with another answer is another row."""

    def add(self, spec: Benchmark, split: Split, parsed: ParsedRow, row_hash: str) -> None:
        if not self.slice.holds(fraction_of(parsed.family or row_hash)):
            return
        if row_hash in self.rows:
            self.num_duplicates += 1
            return
        # Of what is asked alone: a hash of the gold answer would tell a short one to whoever tries them all.
        text_hash = hash_content({"text": parsed.text})[:ID_CHARS]
        self.num_of_text[text_hash] += 1
        again = f"-{self.num_of_text[text_hash]}" if self.num_of_text[text_hash] > 1 else ""
        row_id = f"{spec.name}/{split}/{text_hash}{again}"
        task = Task(row_id=row_id, benchmark=spec.name, text=parsed.text, group=parsed.group)
        self.rows[row_hash] = Row(task=task, label=Label(row_id=row_id, benchmark=spec.name, gold=parsed.gold), row_hash=row_hash)


def load_rows(name: str, split: Split, *, data_dir: Path | None, skip_bad_rows: bool = False) -> Loaded:
    """Load one split of a benchmark; from the hub where `data_dir` is None.

    Raises ConfigError: an unknown benchmark, a file that is missing, damaged or empty, no hub, a bad row not to be skipped.
    """
    return load_splits(name, [split], data_dir=data_dir, skip_bad_rows=skip_bad_rows)[split]


def load_splits(name: str, splits: Sequence[Split], *, data_dir: Path | None, skip_bad_rows: bool = False) -> dict[Split, Loaded]:
    """Load several splits of a benchmark, each file read once. Raises as `load_rows`."""
    spec = spec_of(name)
    slices = slices_of(spec, data_dir)
    definitions, sources = find_definitions(spec, data_dir)
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


def slices_of(spec: Benchmark, data_dir: Path | None) -> Mapping[Split, Slice]:
    """Where the splits come from: files, or the hub's splits."""
    return spec.slices if data_dir is not None else _hub(spec).slices or spec.slices


def splits_at_hand(spec: Benchmark, data_dir: Path | None, required: Sequence[Split] = ()) -> list[Split]:
    """Return the splits whose file is there, and those required: loading says what is missing of them."""
    files = slices_of(spec, data_dir)
    return [split for split in SPLITS if data_dir is None or split in required or find_file(spec, files[split].file, data_dir)]


def _hub(spec: Benchmark) -> HubSource:
    if spec.hub is None:
        raise ConfigError(f"{spec.name}: its rows are on no hub; give the folder of its rows with --data-dir")
    return spec.hub


def find_file(spec: Benchmark, file: str, data_dir: Path) -> Path | None:
    """Return the file of this name, plain or gzip; None where there is none. Raises ConfigError where both are there."""
    found = [path for ending in ("jsonl", "jsonl.gz") if (path := data_dir / spec.name / f"{file}.{ending}").is_file()]
    if len(found) > 1:
        raise ConfigError(f"{found[0]} and {found[1]} are both there: which one counts is not said; remove one")
    return found[0] if found else None


def _read_file(
    spec: Benchmark, file: str, parts: Mapping[Split, _Part], definitions: Any, data_dir: Path | None, skip_bad_rows: bool
) -> tuple[dict[str, str], list[BadRow]]:
    """Reads one file into the splits that it serves."""
    lines: Iterator[tuple[int, bytes | dict[str, Any]]]
    if data_dir is None:
        source = _hub(spec)
        name, records = read_split(source, file)
        sources, lines = {name: source.revision}, enumerate(records, start=1)
    else:
        path = _require_file(spec, file, data_dir)
        name = f"{spec.name}/{path.name}"
        sources, lines = {name: _digest(path)}, read_lines(path)
    bad: list[BadRow] = []
    has_usable = False
    for number, line in lines:
        try:
            fields = line if isinstance(line, dict) else parse_line(line)
            parsed = run_own(spec.name, f"{name}, line {number}: reading the row", spec.parse, fields, definitions)
            row_hash = hash_content(parsed.content)
            for split, part in parts.items():
                part.add(spec, split, parsed, row_hash)
            has_usable = True
        except RowError as error:
            if not skip_bad_rows:
                advice = "Correct the row, or leave such rows out and count them with --skip-bad-rows."
                raise ConfigError(f"{name}, line {number}, {error}. {advice}") from None
            bad.append(BadRow(file=name, line=number, field=error.field, reason=str(error)))
    if not has_usable:
        raise ConfigError(f"{name} holds no usable row ({len(bad)} bad ones); expected one {spec.name} row a line as JSON")
    return sources, bad


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file. Raises ConfigError where it cannot be read."""
    try:
        return hash_file(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}; make it readable, or name another folder with --data-dir") from error


def _require_file(spec: Benchmark, file: str, data_dir: Path) -> Path:
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


def find_definitions(spec: Benchmark, data_dir: Path | None) -> tuple[Any, dict[str, str]]:
    """What gives the codes a meaning, and the hashes (hub: the revision) of the files that say so."""
    paths: dict[str, Path] = {}
    sources: dict[str, str] = {}
    for file in spec.definitions:
        if data_dir is None:
            source = _hub(spec)
            paths[file] = fetch_file(source, file)
            sources[f"{source.dataset}/{file}"] = source.revision
            continue
        paths[file] = data_dir / spec.name / file
        if not paths[file].is_file():
            raise ConfigError(f"{spec.name}: {paths[file]} is missing; its rows are codes that only this file explains: add it")
        sources[f"{spec.name}/{file}"] = _digest(paths[file])
    return spec.read_definitions(paths), sources


def parse_line(line: bytes) -> dict[str, Any]:
    """Return the JSON object of one line. Raises RowError where it is not UTF-8, not JSON, or not an object."""
    try:
        value = read_json(line.decode("utf-8"))
    except ValueError as error:
        raise RowError("(whole row)", shown_field(line), f"one JSON object in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise RowError("(whole row)", shown_field(value), "one JSON object")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Disjoint:
    """The splits of a benchmark, no row in two of them."""

    splits: dict[Split, Loaded]
    """What there is; a split whose file is absent is absent."""
    dropped: dict[str, Split]
    """The rows that were taken out, by id, and the split that keeps the like of each."""


def load_disjoint(
    name: str, *, data_dir: Path | None, skip_bad_rows: bool = False, required: tuple[Split, ...] = ("test",)
) -> Disjoint:
    """Load all splits of a benchmark that there are, made disjoint. Raises ConfigError, also for a required one without rows."""
    wanted = splits_at_hand(spec_of(name), data_dir, required)
    splits, dropped = drop_overlaps(load_splits(name, wanted, data_dir=data_dir, skip_bad_rows=skip_bad_rows))
    for split in required:
        if not splits[split].rows:
            raise ConfigError(f"{name}: no rows for {split} in {', '.join(splits[split].sources)}; give a larger file")
    return Disjoint(splits=splits, dropped=dropped)


def drop_overlaps(splits: Mapping[Split, Loaded]) -> tuple[dict[Split, Loaded], dict[str, Split]]:
    """Takes out of train what adaptation or test has, and out of adaptation what test has.

    Rows count as the same when their hashes are equal or when agents would read the same text, but for case, white space and
    the way in which Unicode writes a character.
    """
    owners: dict[str, Split] = {}
    kept: dict[Split, Loaded] = {}
    dropped: dict[str, Split] = {}
    for split in reversed(SPLITS):
        if split not in splits:
            continue
        rows: list[Row] = []
        for row in splits[split].rows:
            owner = owners.get(row.row_hash) or owners.get(_text_key(row))
            if owner is None:
                rows.append(row)
            else:
                dropped[row.task.row_id] = owner
        for row in rows:
            owners[row.row_hash] = owners[_text_key(row)] = split
        kept[split] = replace(splits[split], rows=tuple(rows))
    return {split: kept[split] for split in SPLITS if split in kept}, dropped


def _text_key(row: Row) -> str:
    return unicodedata.normalize("NFKC", " ".join(row.task.text.split())).casefold()


SUITE_ROWS = 200
"""Rows of a suite where no limit is given: suites have no end."""


def prepare_rows(folder: RunFolder, name: str, options: EvaluateOptions) -> BenchmarkInfo:
    """Write tasks and labels of one benchmark, and return what is known of its rows. Raises ConfigError as loaders do."""
    if name in SUITES:
        return _prepare_suite(folder, name, options)
    split = next((known for known in SPLITS if known == options.split), None)
    if split is None:
        raise ConfigError(
            f"--split: {name} has no split {options.split!r}; choose from {', '.join(SPLITS)}; only generated suites have more"
            f"{did_you_mean(options.split, SPLITS)}"
        )
    loaded = load_disjoint(name, data_dir=options.data_dir, skip_bad_rows=options.skip_bad_rows, required=(split,))
    part = loaded.splits[split]
    rows = part.rows if options.limit is None else sample_rows(part.rows, options.limit, options.seed)
    return BenchmarkInfo(
        name=name,
        rows=write_rows(folder, name, rows),
        sources={key: value for split in loaded.splits.values() for key, value in split.sources.items()},
        bad_rows=len(part.bad),
        duplicates=part.num_duplicates,
        dropped=len(loaded.dropped),
    )


def _prepare_suite(folder: RunFolder, name: str, options: EvaluateOptions) -> BenchmarkInfo:
    limit = options.limit or SUITE_ROWS
    rows = SUITES[name].generate(options.split, limit, options.seed, options.difficulty)
    return BenchmarkInfo(
        name=name,
        rows=write_rows(folder, name, rows),
        sources={f"generated:{name}": f"difficulty {options.difficulty}, seed {options.seed}"},
    )


def sample_rows(rows: Iterable[Row], limit: int, seed: int) -> list[Row]:
    """Return `limit` rows drawn by seed, the same ones whatever the order of the rows; all where there are no more."""
    return heapq.nsmallest(limit, rows, key=lambda row: hashlib.sha256(f"{seed}\0{row.row_hash}".encode()).digest())


def write_rows(folder: RunFolder, name: str, rows: Iterable[Row]) -> int:
    """Write tasks and labels, streaming, each file whole and then renamed; returns the number of rows."""
    seen: set[bytes] = set()
    with replacing(folder.tasks(name)) as tasks, replacing(folder.gold(name)) as labels:
        for row in rows:
            key = hashlib.sha256(row.task.row_id.encode()).digest()[:8]
            assert key not in seen, row.task.row_id  # answers are kept by it
            seen.add(key)
            tasks.write(row.task.model_dump_json().encode() + b"\n")
            labels.write(row.label.model_dump_json().encode() + b"\n")
    return len(seen)


def hash_files(name: str, data_dir: Path | None) -> dict[str, str]:
    """Return the SHA-256 of the files of a benchmark that are there, named as in `Loaded.sources`; none of a suite or the hub."""
    if data_dir is None or name in SUITES:
        return {}
    spec = spec_of(name)
    rows = (find_file(spec, file, data_dir) for file in {part.file for part in spec.slices.values()})
    paths = [*rows, *(data_dir / spec.name / file for file in spec.definitions)]
    return {f"{spec.name}/{path.name}": _digest(path) for path in paths if path is not None and path.is_file()}
