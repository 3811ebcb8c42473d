"""The evaluation's check of itself: does every scorer give right answers 1, silence 0, and others' answers chance?

Behind `dmoa evaluate --selfcheck`. Reads every split of every benchmark, and rows of the suites at every difficulty, and
scores three kinds of replies without any agent: perfect ones, each in the measure that it is for; empty and refused ones;
and the rows' own right answers dealt out among the rows. Programs run in the sandbox, two at a time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dmoa import sandbox
from dmoa.evaluation.dealing import expect_dealt
from dmoa.evaluation.records import Label, Reply, Score
from dmoa.evaluation.scorers.ds1000 import installed_version
from dmoa.evaluation.scorers.entry import VALUE
from dmoa.evaluation.scorers.programs import require_sandbox
from dmoa.evaluation.subjects import Subject, subject_of

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


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class UnscoredRow(_Record):
    """A row whose right answer could not be judged here."""

    row_id: str
    group: str
    """The library."""
    version: str | None
    """Its installed version; None where it is not installed."""
    problem_id: int | None
    reason: str


class GoldCheck(_Record):
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


class SilentCheck(_Record):
    """Empty and refused replies."""

    num_replies: int
    num_above_zero: int
    """Replies with a score above 0 in any measure."""
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every such reply scored exactly 0."""
        return self.num_replies > 0 and self.num_above_zero == 0


class DealtCheck(_Record):
    """The rows' own right answers, dealt out among the rows by a seeded shuffle."""

    num_rows: int
    num_deals: int
    """Independent shuffles; the accuracy is over all of them."""
    accuracy: float
    expected: float
    """Computed from the labels: how often two rows have the same answer."""
    tolerance: float
    """Half the interval that the accuracy must lie in: 4.5 standard deviations, computed from the labels, and 3 matches."""

    @property
    def passed(self) -> bool:
        """Whether the accuracy is what chance gives."""
        return abs(self.accuracy - self.expected) <= self.tolerance


class BenchmarkCheck(_Record):
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


class SelfCheck(_Record):
    """The whole check; `dmoa evaluate --selfcheck --json FILE` writes it."""

    benchmarks: tuple[BenchmarkCheck, ...]
    sandbox_level: str
    wall_s: float
    passed: bool
    """Whether every benchmark passed."""


def run(
    names: Sequence[str],
    *,
    data_dir: Path | None,
    skip_bad_rows: bool = False,
    allow_weak_sandbox: bool = False,
    limit: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> SelfCheck:
    """Check benchmarks and suites by name.

    Args:
        limit: at most so many rows of each split; None: every row of the files, and 200 generated ones of each split.

    Raises:
        ConfigError: an unknown name, rows that are missing or do not parse.
        SandboxError: programs are to be run and this host cannot contain them.
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
        excused = [row for row, score in mine if _is_excused(subject, score)]
        right = [row for row, score in mine if _measured(score, measure) == 1.0]
        wrong = [(row, s) for row, s in mine if _measured(s, measure) != 1.0 and not _is_excused(subject, s)]
        failures = tuple(f"{row.task.row_id}: {score.reason}" for row, score in wrong[:_MAX_FAILURES])
        checks.append(
            GoldCheck(measure=measure, num_rows=len(mine), num_right=len(right), num_unscored=len(excused), failures=failures)
        )
    unscored = [
        UnscoredRow(
            row_id=row.task.row_id,
            group=row.task.group,
            version=installed_version(row.task.group),
            problem_id=row.label.gold.get("problem_id"),
            reason=score.reason,
        )
        for (row, _, _), score in zip(jobs, scores, strict=True)
        if _is_excused(subject, score)
    ]
    return tuple(checks), tuple(unscored)


def _is_excused(subject: Subject, score: Score) -> bool:
    """Tell whether a perfect reply is unscored for a reason that lies in this host's libraries."""
    return not score.is_scored and score.reason.startswith(subject.excuses)


def _measured(score: Score, measure: str) -> float:
    return score.value if measure == VALUE else score.metrics[measure]


def _check_silent(subject: Subject, progress: Progress) -> SilentCheck:
    jobs = [(row.label, subject.silent_reply(row.label, text)) for row in subject.all_rows for text in SILENT]
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
