"""Checks a benchmark's own scoring: right answers score 1, silence scores 0, answers dealt out at random score as expected.

`dmoa evaluate --selfcheck` runs it, without any agent. Source: ours.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from dmoa import sandbox
from dmoa.evaluation.benchmarks.base import VALUE
from dmoa.evaluation.benchmarks.ds1000 import library_version
from dmoa.evaluation.benchmarks.programs import require_sandbox
from dmoa.evaluation.data import load_splits, splits_at_hand
from dmoa.evaluation.records import SPLITS, FileRecord, Label, Reply, Row, Score, Scorer
from dmoa.evaluation.registry import SUITES, build_scorer, spec_of

_SIGMAS = 4.5
_MATCHES = 3
"""Rows with unlike answers match as rare events do, whose tails are longer than the normal distribution's."""

_SUITE_ROWS = 200
_SUITE_SEED = 1234

SILENT = (
    "",
    " \n\t ",
    "I cannot help with that.",
    "I'm sorry, as an AI language model I can't answer this question.",
    "Sorry, but I won't provide an answer. Please ask a professional.",
)
"""Empty and refused replies: each must score exactly 0 on every row."""

Progress = Callable[[str, int, int], None]
"""Called with what is being checked, how many rows are done, and of how many."""

_SEED = 1234
_MAX_FAILURES = 20
_PROGRAMS_AT_ONCE = 2
_MAX_DEALT_PROGRAMS = 60
"""Rows whose programs are dealt out among each other; a benchmark's rows at equal distances."""
_NUM_DEALS = 5
_PROGRESS_EVERY = 200


@dataclass(frozen=True, slots=True)
class Dealing:
    """Accuracy of random deals."""

    mean: float
    deviation: float
    """Standard deviation; where an answer has several parts, an upper bound of it."""
    tolerance: float
    """Distance from the mean that random deals stay within: 4.5 standard deviations and 3 matches."""


def expect_dealt(keys: Sequence[Sequence[Hashable]], num_deals: int) -> Dealing:
    """Return what independent uniformly random deals give; every row has the same number of parts, equal parts match.

    For one part and classes of n_a equal answers among N: mean = sum n_a^2 / N^2; the variance of the number of matches is
    the sum of the squares of the doubly centred matrix of matches, divided by N - 1 (Hoeffding 1951).
    """
    num_rows, num_parts = len(keys), len(keys[0])
    moments = [_one_part([row[part] for row in keys]) for part in range(num_parts)]
    mean = sum(mean for mean, _ in moments) / num_parts
    deviation = sum(deviation for _, deviation in moments) / num_parts / math.sqrt(num_deals)
    return Dealing(mean, deviation, _SIGMAS * deviation + _MATCHES / (num_rows * num_deals))


def _one_part(keys: Sequence[Hashable]) -> tuple[float, float]:
    """Return mean and standard deviation of the share of matches."""
    num_rows = len(keys)
    counts = Counter(keys).values()
    pairs, triples = sum(n**2 for n in counts), sum(n**3 for n in counts)
    spread = pairs - 2 * triples / num_rows + (pairs / num_rows) ** 2
    variance = spread / (num_rows - 1) if num_rows > 1 else 0.0
    return pairs / num_rows**2, math.sqrt(max(0.0, variance)) / num_rows


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
    answer_keys: Callable[[Label], tuple[Hashable, ...]]
    """The right answers that a row is scored by."""
    deviation: str = ""
    runs_programs: bool = False
    num_bad_rows: int = 0
    num_duplicates: int = 0
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """The rows of all splits."""
        return tuple(chain.from_iterable(self.rows.values()))


def subject_of(name: str, data_dir: Path | None, *, skip_bad_rows: bool, allow_weak_sandbox: bool, limit: int | None) -> Subject:
    """Return a benchmark or suite to check, by name; raises as `load_rows` does."""
    if name in SUITES:
        return _suite(name, limit or _SUITE_ROWS)
    return _benchmark(name, data_dir, skip_bad_rows, allow_weak_sandbox, limit)


def _benchmark(name: str, data_dir: Path | None, skip_bad_rows: bool, allow_weak_sandbox: bool, limit: int | None) -> Subject:
    entry = build_scorer(name, allow_weak_sandbox=allow_weak_sandbox)
    splits = splits_at_hand(spec_of(name), data_dir) or SPLITS  # without any, loading says what is missing
    loaded = load_splits(name, splits, data_dir=data_dir, skip_bad_rows=skip_bad_rows)
    rows = {split: part.rows[:limit] for split, part in loaded.items()}
    bad = {(row.file, row.line) for part in loaded.values() for row in part.bad}
    return Subject(
        name=name,
        is_generated=False,
        rows=dict(rows.items()),
        dealt_rows=tuple(chain.from_iterable(rows.values())),
        score=entry.score,
        gold_replies=lambda label: {measure: Reply(text=text) for measure, text in entry.gold_replies(label).items()},
        answer_keys=lambda label: (entry.answer_key(label),),
        deviation=entry.deviation,
        runs_programs=entry.runs_programs,
        num_bad_rows=len(bad),
        num_duplicates=sum(part.num_duplicates for part in loaded.values()),
        sources={file: source for part in loaded.values() for file, source in part.sources.items()},
    )


def _suite(name: str, limit: int) -> Subject:
    suite = SUITES[name]
    rows: dict[str, tuple[Row, ...]] = {
        f"{split}, difficulty {difficulty}": tuple(suite.generate(split, limit, _SUITE_SEED, difficulty))
        for difficulty in suite.difficulties
        for split in SPLITS
    }

    return Subject(
        name=name,
        is_generated=True,
        rows=rows,
        dealt_rows=rows["test, difficulty 1"],
        score=suite.score,
        gold_replies=lambda label: {VALUE: suite.gold_reply(label)},
        answer_keys=_suite_keys,
    )


def _suite_keys(label: Label) -> tuple[Hashable, ...]:
    if "answers" in label.gold:
        return tuple(answer for answer in label.gold["answers"] if answer is not None)
    return (label.gold["answer"],)


class UnscoredRow(FileRecord):
    """A row whose right answer could not be judged here."""

    row_id: str
    group: str
    """The library."""
    version: str | None
    """Its installed version; None where it is not installed."""
    problem_id: int | None
    reason: str


class GoldCheck(FileRecord):
    """Perfect replies in one measure."""

    measure: str
    """`value`, what accuracy is the mean of, or a secondary metric."""
    num_rows: int
    num_right: int
    num_unscored: int
    """Rows that cannot be judged on this host: neither right nor wrong."""
    failures: tuple[str, ...] = ()
    """The first rows that scored neither 1.0 nor unscored, with the scorer's reason."""

    @property
    def passed(self) -> bool:
        """Whether every row that can be judged scored exactly 1.0, and there are such rows."""
        return self.num_right > 0 and self.num_right + self.num_unscored == self.num_rows


class SilentCheck(FileRecord):
    """Empty and refused replies."""

    num_replies: int
    num_above_zero: int
    """Replies with a score above 0 in any measure."""
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every such reply scored exactly 0."""
        return self.num_replies > 0 and self.num_above_zero == 0


class DealtCheck(FileRecord):
    """The rows' own right answers, dealt out among the rows by a seeded shuffle."""

    num_rows: int
    num_deals: int
    """Independent shuffles; the accuracy is over all of them."""
    accuracy: float
    expected: float
    """Computed from the labels: how often two rows have the same answer."""
    tolerance: float
    """Half the interval that the accuracy must lie in: 4.5 standard deviations, computed from the labels, and 3 matches."""
    can_fail: bool = True
    """False where the interval holds every accuracy, as it does of a handful of rows: the check then says nothing."""

    @property
    def passed(self) -> bool:
        """Whether the accuracy is what chance gives."""
        return abs(self.accuracy - self.expected) <= self.tolerance


class BenchmarkCheck(FileRecord):
    """One benchmark or suite."""

    name: str
    is_generated: bool
    rows: dict[str, int]
    """Rows by split."""
    num_bad_rows: int
    """Rows that do not parse, skipped."""
    num_duplicates: int
    """Rows left out because an equal one is in the same split."""
    sources: dict[str, str]
    deviation: str
    gold: tuple[GoldCheck, ...]
    silent: SilentCheck
    dealt: DealtCheck
    unscored: tuple[UnscoredRow, ...] = ()
    wall_s: float
    passed: bool


class SelfCheck(FileRecord):
    """The whole check; `dmoa evaluate --selfcheck --json FILE` writes it."""

    benchmarks: tuple[BenchmarkCheck, ...]
    sandbox_level: str
    wall_s: float
    passed: bool
    """Whether every benchmark passed."""


def run_selfcheck(
    names: Sequence[str],
    *,
    data_dir: Path | None,
    skip_bad_rows: bool = False,
    allow_weak_sandbox: bool = False,
    limit: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> SelfCheck:
    """Check benchmarks and suites by name; at most `limit` rows of each split, else all of the files and 200 generated ones.

    Raises ConfigError for an unknown name and bad rows, SandboxError where programs are to be run and cannot be contained.
    """
    started = time.monotonic()
    subjects = [
        subject_of(name, data_dir, skip_bad_rows=skip_bad_rows, allow_weak_sandbox=allow_weak_sandbox, limit=limit)
        for name in names
    ]
    if any(subject.runs_programs for subject in subjects):
        require_sandbox(allow_weak=allow_weak_sandbox)
    checks = tuple(_check(subject, progress) for subject in subjects)
    return SelfCheck(
        benchmarks=checks,
        sandbox_level=sandbox.level(),
        wall_s=round(time.monotonic() - started, 1),
        passed=bool(checks) and all(check.passed for check in checks),
    )


def _check(subject: Subject, progress: Progress) -> BenchmarkCheck:
    started = time.monotonic()
    gold, unscored = _check_gold(subject, progress)
    silent = _check_silent(subject, progress)
    dealt = _check_dealt(subject, progress)
    return BenchmarkCheck(
        name=subject.name,
        is_generated=subject.is_generated,
        rows={split: len(rows) for split, rows in subject.rows.items()},
        num_bad_rows=subject.num_bad_rows,
        num_duplicates=subject.num_duplicates,
        sources=subject.sources,
        deviation=subject.deviation,
        gold=gold,
        silent=silent,
        dealt=dealt,
        unscored=unscored,
        wall_s=round(time.monotonic() - started, 1),
        passed=all(check.passed for check in gold) and silent.passed and dealt.passed,
    )


def _check_gold(subject: Subject, progress: Progress) -> tuple[tuple[GoldCheck, ...], tuple[UnscoredRow, ...]]:
    jobs = [(row, measure, reply) for row in subject.all_rows for measure, reply in subject.gold_replies(row.label).items()]
    scores = list(_score_all(subject, [(row.label, reply) for row, _, reply in jobs], "right answers", progress))
    checks: list[GoldCheck] = []
    for measure in dict.fromkeys(measure for _, measure, _ in jobs):
        mine = [(row, score) for (row, of, _), score in zip(jobs, scores, strict=True) if of == measure]
        excused = [row for row, score in mine if score.is_left_out]
        right = [row for row, score in mine if _measured(score, measure) == 1.0]
        wrong = [(row, s) for row, s in mine if _measured(s, measure) != 1.0 and not s.is_left_out]
        failures = tuple(f"{row.task.row_id}: {score.reason}" for row, score in wrong[:_MAX_FAILURES])
        checks.append(
            GoldCheck(measure=measure, num_rows=len(mine), num_right=len(right), num_unscored=len(excused), failures=failures)
        )
    unscored = [
        UnscoredRow(
            row_id=row.task.row_id,
            group=row.task.group,
            version=library_version(row.task.group),
            problem_id=row.label.gold.get("problem_id"),
            reason=score.reason,
        )
        for (row, _, _), score in zip(jobs, scores, strict=True)
        if score.is_left_out
    ]
    return tuple(checks), tuple(unscored)


def _measured(score: Score, measure: str) -> float:
    return score.value if measure == VALUE else score.metrics.get(measure, 0.0)


def _check_silent(subject: Subject, progress: Progress) -> SilentCheck:
    steps = ((row.label, len(subject.gold_replies(row.label)[VALUE].step_texts)) for row in subject.all_rows)
    jobs = [(label, Reply(text=text, step_texts=(text,) * number)) for label, number in steps for text in SILENT]
    scores = _score_all(subject, jobs, "empty and refused replies", progress)
    above = [
        f"{label.row_id}: {reply.text!r} scored {score.value} {score.metrics}"
        for (label, reply), score in zip(jobs, scores, strict=True)
        if score.value != 0.0 or any(score.metrics.values())
    ]
    return SilentCheck(num_replies=len(jobs), num_above_zero=len(above), failures=tuple(above[:_MAX_FAILURES]))


def _check_dealt(subject: Subject, progress: Progress) -> DealtCheck:
    rows = subject.dealt_rows
    if subject.runs_programs:
        rows = rows[:: max(1, -(-len(rows) // _MAX_DEALT_PROGRAMS))]
    num_deals = 1 if subject.runs_programs else _NUM_DEALS
    dice = random.Random(f"{_SEED}/{subject.name}")  # noqa: S311 a reproducible deal, not a secret
    replies = [subject.gold_replies(row.label)[VALUE] for row in rows]
    jobs = [
        (row.label, reply) for _ in range(num_deals) for row, reply in zip(rows, dice.sample(replies, len(rows)), strict=True)
    ]
    scores = list(_score_all(subject, jobs, "answers dealt out", progress))
    expected = expect_dealt([subject.answer_keys(row.label) for row in rows], num_deals)
    return DealtCheck(
        num_rows=len(rows),
        num_deals=num_deals,
        accuracy=sum(score.value for score in scores) / len(scores),
        expected=expected.mean,
        tolerance=expected.tolerance,
        can_fail=expected.mean + expected.tolerance < 1.0 or expected.mean - expected.tolerance > 0.0,
    )


def _score_all(subject: Subject, jobs: Sequence[tuple[Label, Reply]], what: str, progress: Progress) -> Iterator[Score]:
    """Yield the scores in order; programs two at a time."""
    label = f"{subject.name}: {what}"
    every = 1 if subject.runs_programs else _PROGRESS_EVERY
    with ThreadPoolExecutor(_PROGRAMS_AT_ONCE) as threads:
        scores: Iterable[Score]
        if subject.runs_programs:
            scores = threads.map(lambda job: subject.score(*job), jobs)
        else:
            scores = (subject.score(*job) for job in jobs)
        for done, score in enumerate(scores, 1):
            if done % every == 0 or done == len(jobs):
                progress(label, done, len(jobs))
            yield score
