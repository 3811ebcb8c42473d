"""The rows of a run: loaded or generated, checked, sampled by seed, and written as tasks and labels in folders apart."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dmoa.errors import ConfigError
from dmoa.evaluation.options import EvaluateOptions
from dmoa.evaluation.records import SPLITS, Row
from dmoa.evaluation.run_files import RunFolder
from dmoa.evaluation.splits import load_disjoint
from dmoa.evaluation.suites.table import SUITES
from dmoa.validation import did_you_mean

SUITE_ROWS = 200
"""Rows of a suite where no limit is given: suites have no end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is known of the rows of one benchmark of a run."""

    name: str
    num_rows: int
    sources: dict[str, str]
    """File -> SHA-256, or hub data set -> revision, or the generator and its parameters."""
    num_bad: int = 0
    """Rows left out because they do not parse (`--skip-bad-rows`)."""
    num_duplicates: int = 0
    """Rows left out because an equal row of the same split came before."""
    num_dropped: int = 0
    """Rows taken out of train or adaptation because a later split has them."""


def prepare(folder: RunFolder, name: str, options: EvaluateOptions) -> Prepared:
    """Write the tasks and labels of one benchmark. Raises ConfigError as the loaders and the generators do."""
    if name in SUITES:
        return _prepare_suite(folder, name, options)
    split = next((known for known in SPLITS if known == options.split), None)
    if split is None:
        raise ConfigError(
            f"--split: value seen: {options.split!r}; allowed for {name}: {', '.join(SPLITS)}; only generated suites have more"
            f"{did_you_mean(options.split, SPLITS)}"
        )
    loaded = load_disjoint(name, data_dir=options.data_dir, skip_bad_rows=options.skip_bad_rows, required=(split,))
    part = loaded.splits[split]
    rows = part.rows if options.limit is None else sample(part.rows, options.limit, options.seed)
    return Prepared(
        name=name,
        num_rows=write_rows(folder, name, rows),
        sources={key: value for split in loaded.splits.values() for key, value in split.sources.items()},
        num_bad=len(part.bad),
        num_duplicates=part.num_duplicates,
        num_dropped=len(loaded.dropped),
    )


def _prepare_suite(folder: RunFolder, name: str, options: EvaluateOptions) -> Prepared:
    limit = options.limit or SUITE_ROWS
    rows = SUITES[name].generate(options.split, limit, options.seed, options.difficulty)
    return Prepared(
        name=name,
        num_rows=write_rows(folder, name, rows),
        sources={f"generated:{name}": f"difficulty {options.difficulty}, seed {options.seed}"},
    )


def sample(rows: Iterable[Row], limit: int, seed: int) -> list[Row]:
    """Return `limit` rows drawn by seed, the same ones whatever the order of the rows; all where there are no more."""
    return heapq.nsmallest(limit, rows, key=lambda row: hashlib.sha256(f"{seed}\0{row.row_hash}".encode()).digest())


def write_rows(folder: RunFolder, name: str, rows: Iterable[Row]) -> int:
    """Write tasks and labels, streaming, each file whole and then renamed; returns the number of rows."""
    targets = folder.tasks(name), folder.gold(name)
    parts = [target.with_name(f".{target.name}.part") for target in targets]
    for part in parts:
        part.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with parts[0].open("w", encoding="utf-8") as tasks, parts[1].open("w", encoding="utf-8") as labels:
        for row in _unique(rows):
            tasks.write(row.task.model_dump_json() + "\n")
            labels.write(row.label.model_dump_json() + "\n")
            count += 1
    for part, target in zip(parts, targets, strict=True):
        part.replace(target)
    return count


def _unique(rows: Iterable[Row]) -> Iterator[Row]:
    """Pass rows through; asserts that no id comes twice, because answers are kept by it."""
    seen: set[bytes] = set()
    for row in rows:
        key = hashlib.sha256(row.task.row_id.encode()).digest()[:8]
        assert key not in seen, row.task.row_id
        seen.add(key)
        yield row
