"""What the self-check checks: a benchmark's rows from its files, or a suite's generated ones, with their scoring."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from dmoa.evaluation.benchmarks.specs import spec_of
from dmoa.evaluation.loading import find_file, load_splits, slices_of
from dmoa.evaluation.records import SPLITS, Label, Reply, Row, Scorer, Split
from dmoa.evaluation.scorers.entry import VALUE
from dmoa.evaluation.scorers.table import build
from dmoa.evaluation.suites.table import SUITES

_SUITE_ROWS = 200
_SUITE_SEED = 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One benchmark or suite with rows, scorer and perfect replies."""

    name: str
    is_generated: bool
    rows: dict[str, tuple[Row, ...]]
    """By split."""
    dealt_rows: tuple[Row, ...]
    """Rows whose answers are dealt out among each other: all have the same number of answers."""
    score: Scorer
    gold_replies: Callable[[Label], dict[str, Reply]]
    """Measure -> a reply that must reach 1.0 in it."""
    silent_reply: Callable[[Label, str], Reply]
    """A reply that says this text wherever the scorer looks."""
    answer_keys: Callable[[Label], tuple[Hashable, ...]]
    """The right answers that a row is scored by."""
    deviation: str = ""
    excuses: tuple[str, ...] = ()
    """As in `ScorerEntry`."""
    runs_programs: bool = False
    num_bad_rows: int = 0
    num_duplicates: int = 0
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """The rows of all splits."""
        return tuple(chain.from_iterable(self.rows.values()))


def subject_of(name: str, data_dir: Path | None, *, skip_bad_rows: bool, allow_weak_sandbox: bool, limit: int | None) -> Subject:
    """Return a benchmark or suite to check, by name; raises as `loading.load` does."""
    if name in SUITES:
        return _suite(name, limit or _SUITE_ROWS)
    return _benchmark(name, data_dir, skip_bad_rows, allow_weak_sandbox, limit)


def _benchmark(name: str, data_dir: Path | None, skip_bad_rows: bool, allow_weak_sandbox: bool, limit: int | None) -> Subject:
    entry = build(name, allow_weak_sandbox=allow_weak_sandbox)
    loaded = load_splits(name, _splits_at_hand(name, data_dir), data_dir=data_dir, skip_bad_rows=skip_bad_rows)
    rows = {split: part.rows[:limit] for split, part in loaded.items()}
    bad = {(row.file, row.line) for part in loaded.values() for row in part.bad}
    return Subject(
        name=name,
        is_generated=False,
        rows=dict(rows.items()),
        dealt_rows=tuple(chain.from_iterable(rows.values())),
        score=entry.score,
        gold_replies=lambda label: {measure: Reply(text=text) for measure, text in entry.gold_replies(label).items()},
        silent_reply=lambda label, text: Reply(text=text),
        answer_keys=lambda label: (entry.answer_key(label),),
        deviation=entry.deviation,
        excuses=entry.excuses,
        runs_programs=entry.runs_programs,
        num_bad_rows=len(bad),
        num_duplicates=sum(part.num_duplicates for part in loaded.values()),
        sources={file: source for part in loaded.values() for file, source in part.sources.items()},
    )


def _splits_at_hand(name: str, data_dir: Path | None) -> list[Split]:
    """Return the splits whose file is there; all of them where none is, so that loading says what is missing."""
    spec = spec_of(name)
    slices = slices_of(spec, data_dir)
    found = [split for split in SPLITS if data_dir is None or find_file(spec, slices[split].file, data_dir) is not None]
    return found or list(SPLITS)


def _suite(name: str, limit: int) -> Subject:
    suite = SUITES[name]
    rows: dict[str, tuple[Row, ...]] = {
        f"{split}, difficulty {difficulty}": tuple(suite.generate(split, limit, _SUITE_SEED, difficulty))
        for difficulty in suite.difficulties
        for split in SPLITS
    }

    def silent_reply(label: Label, text: str) -> Reply:
        return Reply(text=text, step_texts=(text,) * len(suite.gold_reply(label).step_texts))

    return Subject(
        name=name,
        is_generated=True,
        rows=rows,
        dealt_rows=rows["test, difficulty 1"],
        score=suite.score,
        gold_replies=lambda label: {VALUE: suite.gold_reply(label)},
        silent_reply=silent_reply,
        answer_keys=_suite_keys,
    )


def _suite_keys(label: Label) -> tuple[Hashable, ...]:
    if "answers" in label.gold:
        return tuple(answer for answer in label.gold["answers"] if answer is not None)
    return (label.gold["answer"],)
