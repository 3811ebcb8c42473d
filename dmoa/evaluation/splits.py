"""Train, adaptation and test rows of a benchmark, disjoint by row hash: checked whenever an evaluation starts.

What occurs twice stays where it is needed most: in the test rows, else in the adaptation rows; the side that learns
loses it, and the loss is counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.specs import spec_of
from dmoa.evaluation.loading import Loaded, find_file, load_splits, slices_of
from dmoa.evaluation.records import SPLITS, Row, Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A row that was taken out of a split because another split has it."""

    row_id: str
    split: Split
    kept_in: Split
    is_equal_row: bool
    """False: only the question is the same, its label or an unasked field differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disjoint:
    """The splits of a benchmark, no row in two of them."""

    splits: dict[Split, Loaded]
    """What there is; a split whose file is absent is absent."""
    dropped: tuple[Dropped, ...]


def load_disjoint(
    name: str, *, data_dir: Path | None, skip_bad_rows: bool = False, required: tuple[Split, ...] = ("test",)
) -> Disjoint:
    """All splits of a benchmark that there are, made disjoint.

    Raises:
        ConfigError: as `loading.load` does; a required split has no file or no rows.
    """
    spec = spec_of(name)
    slices = slices_of(spec, data_dir)
    wanted = [split for split in SPLITS if data_dir is None or split in required or find_file(spec, slices[split].file, data_dir)]
    splits, dropped = drop_overlaps(load_splits(name, wanted, data_dir=data_dir, skip_bad_rows=skip_bad_rows))
    for split in required:
        if not splits[split].rows:
            raise ConfigError(f"{name}: no rows for {split} in {', '.join(splits[split].sources)}; give a larger file")
    check_disjoint({split: loaded.rows for split, loaded in splits.items()})
    return Disjoint(splits=splits, dropped=dropped)


def drop_overlaps(splits: Mapping[Split, Loaded]) -> tuple[dict[Split, Loaded], tuple[Dropped, ...]]:
    """Takes out of train what adaptation or test has, and out of adaptation what test has.

    Rows count as the same when their hashes are equal or when agents would read the same text.
    """
    owners: dict[str, Split] = {}
    kept: dict[Split, Loaded] = {}
    dropped: list[Dropped] = []
    for split in reversed(SPLITS):
        if split not in splits:
            continue
        rows: list[Row] = []
        for row in splits[split].rows:
            owner = owners.get(row.row_hash) or owners.get(row.task.text)
            if owner is None:
                rows.append(row)
            else:
                dropped.append(Dropped(row_id=row.task.row_id, split=split, kept_in=owner, is_equal_row=row.row_hash in owners))
        for row in rows:
            owners[row.row_hash] = owners[row.task.text] = split
        kept[split] = replace(splits[split], rows=tuple(rows))
    return {split: kept[split] for split in SPLITS if split in kept}, tuple(dropped)


def check_disjoint(splits: Mapping[Split, Collection[Row]]) -> None:
    """Makes sure that no row is in two splits.

    Raises:
        ConfigError: one is; names it and the splits.
    """
    seen: dict[str, Split] = {}
    for split, rows in splits.items():
        for row in rows:
            other = seen.setdefault(row.row_hash, split)
            if other != split:
                raise ConfigError(
                    f"row {row.task.row_id} is in {other} and in {split}: what is learned there would be asked here; "
                    "load the splits with splits.load_disjoint"
                )
