"""Aggregates an evaluation: lines of answers and scores into counts, tables, paired comparisons and `evaluation.json`.

Counts grow while the lines go by, a number or two per row, so that long runs fit in memory. Whatever depends on the order of
lines is left out or put right at the end.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import model_validator

from dmoa.errors import ConfigError
from dmoa.evaluation.records import Answered, BenchmarkInfo, FileRecord, RunInfo, Scored
from dmoa.evaluation.run_folder import RunFolder, read_record
from dmoa.evaluation.statistics import Interval, Method, compare_policies, holm, interval
from dmoa.flat import TokenFields, flat
from dmoa.types import TokenUsage

MAX_FAILURES = 50
"""Failed rows that are kept with their error, per benchmark and policy."""
_MAX_ERROR_CHARACTERS = 500


@dataclass(slots=True)
class AnswerTally:
    """What is counted of the answers of one policy to one benchmark."""

    seen: set[int] = field(default_factory=set)
    ok: int = 0
    usage: TokenUsage = field(default_factory=TokenUsage)
    summarizer_tokens: int = 0
    memoised_tokens: int = 0
    calls: float = 0
    bugs: int = 0
    late: int = 0
    price: array[float] = field(default_factory=lambda: array("d"))
    """Per row whose price is known."""
    unpriced: int = 0
    """Rows whose calls took what has no price."""
    steps: int = 0
    active: int = 0
    """Agents, summed over steps."""
    degraded: int = 0
    wall_ms: array[float] = field(default_factory=lambda: array("d"))
    entropy_nats: array[float] = field(default_factory=lambda: array("d"))
    stop_reasons: Counter[str] = field(default_factory=Counter)
    steps_histogram: Counter[int] = field(default_factory=Counter)
    routing: Counter[tuple[int, str]] = field(default_factory=Counter)
    """(step, agent) -> rows."""
    gate_versions: set[str] = field(default_factory=set)
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(row id, error)."""

    def add(self, row: int, line: Answered) -> None:
        """Count one answer. Raises ConfigError for a row that was counted before."""
        if row in self.seen:
            raise _twice("answers", line)
        self.seen.add(row)
        self.usage += line.usage
        self.summarizer_tokens += line.summarizer_tokens
        self.memoised_tokens += line.memoised_tokens
        self.calls += line.calls or 0
        self.bugs += line.bugs
        self.late += line.is_late
        self.wall_ms.append(line.wall_ms)
        if line.price is not None:
            self.price.append(line.price)
        elif line.status == "ok" or line.usage.total:
            self.unpriced += 1
        if line.gate_version is not None:
            self.gate_versions.add(line.gate_version)
        if line.status == "failed":
            self._add_failure(line.row_id, line.error or "")
        else:
            self._add_steps(line)

    def _add_steps(self, line: Answered) -> None:
        self.ok += 1
        self.degraded += line.degraded
        self.steps += len(line.active)
        self.steps_histogram[len(line.active)] += 1
        self.stop_reasons[line.stop_reason] += 1
        if line.entropy_nats is not None:
            self.entropy_nats.append(line.entropy_nats)
        for step, agents in enumerate(line.active):
            self.active += len(agents)
            self.routing.update((step, agent) for agent in set(agents))  # a policy may take several samples of one agent

    def _add_failure(self, row_id: str, error: str) -> None:
        text = error if len(error) <= _MAX_ERROR_CHARACTERS else error[: _MAX_ERROR_CHARACTERS - 3] + "..."
        self.failures.append((row_id, text))
        if len(self.failures) >= 2 * MAX_FAILURES:
            self.failures = self.first_failures()

    def first_failures(self) -> list[tuple[str, str]]:
        """Return the first failed rows by id."""
        return sorted(self.failures)[:MAX_FAILURES]


@dataclass(slots=True)
class ScoreTally:
    """What is counted of the scores of one policy on one benchmark."""

    values: dict[int, float] = field(default_factory=dict)
    """Row -> score."""
    unscored: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    left_out: set[int] = field(default_factory=set)
    """Rows that cannot be judged whatever is replied, as this policy's replies show; in no other field once counted."""
    group_of: dict[int, str] = field(default_factory=dict)
    metrics_of: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def did_run(self) -> bool:
        """Whether a row was judged whose query did not fail."""
        return len(self.failed) < len(self.values)

    @property
    def num_scored(self) -> int:
        """Rows whose reply could be judged."""
        return len(self.values) - len(self.failed) - len(self.unscored)

    def add(self, row: int, line: Scored) -> None:
        """Count one score. Raises ConfigError for a row that was counted before."""
        if row in self.values:
            raise _twice("labels/scores", line)
        if line.is_left_out:
            self.left_out.add(row)
        if line.is_failed:
            self.failed.add(row)
        elif not line.is_scored:
            self.unscored.add(row)
        self.values[row] = line.value if line.is_scored else 0.0
        if line.group:
            self.group_of[row] = line.group
        for name, figure in line.metrics.items():
            self.metrics_of[name][row] = figure

    def leave_out(self, rows: set[int]) -> None:
        """Take rows out of every count."""
        for row in rows & self.values.keys():
            del self.values[row]
            self.group_of.pop(row, None)
            for figures in self.metrics_of.values():
                figures.pop(row, None)
        self.unscored -= rows
        self.failed -= rows
        self.left_out = set(rows)

    def groups(self) -> dict[str, list[float]]:
        """Return the scores by group."""
        found: dict[str, list[float]] = defaultdict(list)
        for row, group in self.group_of.items():
            found[group].append(self.values[row])
        return found


def mean(figures: Collection[float], n: int | None = None) -> float | None:
    """Return the exact sum of figures over n, or over their number; None over none."""
    count = len(figures) if n is None else n
    return math.fsum(figures) / count if count else None


def _twice(folder: str, line: Answered | Scored) -> ConfigError:
    return ConfigError(
        f"{folder}: row {line.row_id!r} is there twice for policy {line.policy!r}; a row counts once; "
        "remove one of its lines, or run into another folder"
    )


Cell = tuple[str, str]
"""Benchmark and policy."""
T = TypeVar("T", AnswerTally, ScoreTally)


class _EvaluationRowHead(FileRecord):
    benchmark: str
    policy: str
    n: int
    """Rows judged, failed and unscored ones included; rows still to be answered or judged are in `missing`."""
    correct: int
    """Rows with a score of 1."""
    unscored: int
    """Rows whose reply could not be judged; worth 0 in accuracy. Failed rows are not among them."""
    failed: int
    """Rows whose query failed; worth 0 in accuracy."""
    left_out: int = 0
    """Rows that cannot be judged here whatever is replied: not in n, for any policy of the run; missing in older results."""
    accuracy: float
    """Mean score over n, 0..1; what it is the mean of is the benchmark's `primary`."""
    low: float
    """Lower end of the 95 % interval of accuracy."""
    high: float
    """Upper end of the 95 % interval of accuracy."""
    interval: Method
    """`wilson` for scores of 0 and 1, `student` where any is a fraction."""


class EvaluationRow(TokenFields, _EvaluationRowHead):
    """What one policy did on one benchmark. Counts of tokens are of all agents and the summarizer."""

    summarizer_tokens: int
    """Part of prompt_tokens and completion_tokens that the summarizer took."""
    memoised_tokens: int
    """Part of prompt_tokens and completion_tokens that came from the call cache: counted as if run."""
    tokens_per_correct: float | None
    """Prompt and completion tokens of the rows judged per point of score, each row taken as the mean; None without any point."""
    steps_mean: float | None
    """Steps per answered row; None without any."""
    active_mean: float | None
    """Agents per step; None without any."""
    wall_s: float
    """Sum of the queries' own wall times; they ran side by side, so it exceeds the time of the run."""
    seed: int
    metrics: dict[str, float]
    """Secondary measure -> mean over n."""
    entropy_nats: float | None
    """Mean over rows of the entropy of the last step's agents, nats per token; None where no engine gave any."""
    degraded: int
    """Answered rows in which an agent was lost."""
    missing: int
    """Rows of the run that have no answer, or no judged one, yet."""
    stop_reasons: dict[str, int]
    """Why queries ended -> answered rows."""
    steps_histogram: dict[int, int]
    """Number of steps -> answered rows."""
    gate_versions: list[str]
    """Gate versions that answered; more than one where a gate was installed meanwhile."""
    is_generated: bool
    """Whether a generator made the rows."""
    chance: float | None
    """Accuracy of guessing; None where unknown."""
    deviation: str
    """How the scoring differs from the benchmark's original protocol; empty where it does not."""
    calls: int = 0
    """Calls of agents and the summarizer in all rows; 0 in older results."""
    asked: int = 0
    """Rows that tokens, calls, seconds and price are the sums of: those left out are among them, and those not judged yet; 0 in
    older results."""
    late: int = 0
    """Rows that the deadline ended: failed, or with the answer of the steps before it."""
    bugs: int = 0
    """Calls and queries that failed because code is wrong (a tool's, an engine's, a policy's); any ends the command with 1."""
    price: float | None = None
    """What all rows cost; None where that of an answered row is not known."""
    price_per_correct: float | None = None
    """The same of the price; None without any point or price."""
    did_run: bool
    """Whether any query was answered. Where every one failed nothing is known: accuracy 0, interval 0..1, no comparison."""

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, values: Any) -> Any:
        """Read a result that was written when rows did not say whether they ran."""
        if isinstance(values, dict) and "did_run" not in values and {"n", "failed"} <= values.keys():
            return {**values, "did_run": values["n"] > values["failed"]}
        return values

    @property
    def num_scored(self) -> int:
        """Rows whose reply could be judged."""
        return self.n - self.unscored - self.failed

    def per_query(self, whole: float) -> float:
        """Return the mean over all rows that were asked of what they took together; 0 without any."""
        asked = self.asked or self.n + self.left_out
        return whole / asked if asked else 0.0


class PairedRow(FileRecord):
    """Two policies compared on the rows that both were judged on, failed and unscored ones as 0.

    There is none where nothing can be compared: no common row, a policy whose every query failed, no reply of either judged.
    """

    benchmark: str
    a: str
    """Policy."""
    b: str
    """Policy."""
    n: int
    """Rows compared."""
    difference: float
    """Accuracy of a minus accuracy of b on these rows."""
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    """Upper end of the 95 % interval of the difference."""
    p: float
    """Two-sided, not corrected for the number of comparisons."""
    p_holm: float | None = None
    """p corrected for the number of comparisons on this benchmark (Holm); None in results of earlier versions."""
    test: str
    """What gave p and the interval."""


class GroupRow(FileRecord):
    """What one policy did on one group of a benchmark's rows: a subject, a library, a template."""

    benchmark: str
    policy: str
    group: str
    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    interval: Method


class RoutingRow(FileRecord):
    """How often an agent was active in one step of one policy on one benchmark."""

    benchmark: str
    policy: str
    step: int
    """Counts from 0."""
    agent: str
    count: int
    """Answered rows in whose step the agent's contribution counted."""


class FailedRow(FileRecord):
    """A row whose query failed."""

    benchmark: str
    policy: str
    row_id: str
    error: str


class RobustnessRow(FileRecord):
    """What one policy did on one benchmark while some agents worked against the swarm (`dmoa compare --curve`)."""

    benchmark: str
    policy: str
    adversaries: int
    agents: int
    """Of the pool, adversaries included."""
    kind: str
    """What adversaries do."""
    defence: str
    n: int
    accuracy: float
    low: float
    """Lower end of the 95 % interval of accuracy."""
    high: float
    """Upper end of the 95 % interval of accuracy."""
    tokens: float
    """Prompt and completion tokens per row."""


class Evaluation(FileRecord):
    """The file `evaluation.json`: what was run, and how it went."""

    config: RunInfo
    rows: list[EvaluationRow]
    """By benchmark, then policy, in the order of the run."""
    paired: list[PairedRow]
    groups: list[GroupRow]
    """Of benchmarks with at least two groups."""
    routing: list[RoutingRow]
    failures: list[FailedRow]
    """The first 50 of each benchmark and policy, by row id; their number is in `rows`."""
    robustness: tuple[RobustnessRow, ...] = ()
    """Of the runs with adversaries in `curve/`, by benchmark, policy, defence and number of adversaries."""


def build_evaluation(run: RunInfo, answered: Iterable[Answered], scored: Iterable[Scored]) -> Evaluation:
    """Make a run's result from its lines in one pass, a few numbers per row. Raises ConfigError for lines of others, or twice."""
    numbers: dict[str, int] = defaultdict(lambda: len(numbers))  # of rows by their ids, the same for all policies
    answers = {cell: AnswerTally() for cell in _cells(run)}
    scores = {cell: ScoreTally() for cell in _cells(run)}
    for answer in answered:
        _of_line(answers, answer).add(numbers[answer.row_id], answer)
    for score in scored:
        _of_line(scores, score).add(numbers[score.row_id], score)
    infos = {info.name: info for info in run.benchmarks}
    for name in infos:
        tallies = [scores[name, policy] for policy in run.all_policies]
        left_out = set[int]().union(*(tally.left_out for tally in tallies))
        for tally in tallies:
            tally.leave_out(left_out)
    return Evaluation(
        config=run,
        rows=[_row(run, infos[cell[0]], cell[1], answers[cell], scores[cell]) for cell in _cells(run)],
        paired=[row for info in run.benchmarks for row in _paired(info.name, run.all_policies, scores)],
        groups=[row for info in run.benchmarks for row in _groups(info.name, run.all_policies, scores)],
        routing=[
            RoutingRow(benchmark=cell[0], policy=cell[1], step=step, agent=agent, count=count)
            for cell in _cells(run)
            for (step, agent), count in sorted(answers[cell].routing.items())
        ],
        failures=[
            FailedRow(benchmark=cell[0], policy=cell[1], row_id=row_id, error=error)
            for cell in _cells(run)
            for row_id, error in answers[cell].first_failures()
        ],
    )


def not_run(evaluation: Evaluation) -> list[EvaluationRow]:
    """Return the rows whose every query failed; those that are still to be asked are not among them."""
    return [row for row in evaluation.rows if row.n and not row.did_run]


def rebuild_evaluation(folder: Path) -> Evaluation:
    """Make a run's result from its folder, finished or not, a torn last line passed over. Raises ConfigError if it is damaged."""
    paths = RunFolder(folder)
    run = read_record(paths.run, RunInfo)
    cells = list(_cells(run))
    evaluation = build_evaluation(
        run,
        chain.from_iterable(paths.read_answers(*cell) for cell in cells),
        chain.from_iterable(paths.read_scores(*cell) for cell in cells),
    )
    return evaluation.model_copy(update={"robustness": tuple(_robustness(paths, cells))})


def _robustness(folder: RunFolder, cells: Sequence[Cell]) -> list[RobustnessRow]:
    """Return the rows of the runs with adversaries, those that did not run left out."""
    found = [
        RobustnessRow(
            benchmark=row.benchmark,
            policy=row.policy,
            adversaries=part.config.options.get("adversaries", 0),
            agents=len(part.config.pool.config.get("agents", ())),
            kind=part.config.options.get("kind", ""),
            defence=part.config.options.get("defence") or "none",
            n=row.n,
            accuracy=row.accuracy,
            low=row.low,
            high=row.high,
            tokens=row.per_query(row.usage.total),
        )
        for path in folder.curve_runs()
        for part in [read_evaluation(path)]
        for row in part.rows
        if row.n and row.did_run
    ]
    order = {cell: number for number, cell in enumerate(cells)}
    return sorted(found, key=lambda row: (order.get((row.benchmark, row.policy), len(order)), row.defence, row.adversaries))


def read_evaluation(folder: Path) -> Evaluation:
    """Return the result of a run: `evaluation.json` if it exists, else made from its lines. Raises as `rebuild_evaluation`."""
    paths = RunFolder(folder)
    if paths.evaluation.exists():
        return read_record(paths.evaluation, Evaluation)
    if paths.run.exists():
        return rebuild_evaluation(folder)
    raise ConfigError(
        f"DIR: {str(folder)!r} holds no run: neither {paths.evaluation.name} nor {paths.run.name} is there; "
        "name the folder that `dmoa evaluate --out` wrote"
    )


def _cells(run: RunInfo) -> Iterator[Cell]:
    return ((info.name, policy) for info in run.benchmarks for policy in run.all_policies)


def _of_line(parts: dict[Cell, T], line: Answered | Scored) -> T:
    try:
        return parts[line.benchmark, line.policy]
    except KeyError:
        raise ConfigError(
            f"row {line.row_id!r}: benchmark {line.benchmark!r} with policy {line.policy!r} is not part of this run, which has "
            f"{', '.join(f'{benchmark} with {policy}' for benchmark, policy in parts)}; run.json and the lines must be of one run"
        ) from None


def _row(run: RunInfo, info: BenchmarkInfo, policy: str, answers: AnswerTally, scores: ScoreTally) -> EvaluationRow:
    values = np.fromiter(scores.values.values(), dtype=np.float64)
    n = len(values)
    did_run = answers.ok > 0 or scores.did_run
    found = interval(values if did_run else [])
    points = found.value * n
    judged = n / len(answers.seen) if answers.seen else 0.0  # of what all rows took
    price = mean(answers.price, 1) if answers.ok and not answers.unpriced else None
    return EvaluationRow(
        benchmark=info.name,
        policy=policy,
        n=n,
        correct=int(np.sum(values == 1.0)),
        unscored=len(scores.unscored),
        failed=len(scores.failed),
        left_out=len(scores.left_out),
        **_ends(found),
        **flat(answers.usage),
        summarizer_tokens=answers.summarizer_tokens,
        memoised_tokens=answers.memoised_tokens,
        tokens_per_correct=judged * answers.usage.total / points if points else None,
        steps_mean=answers.steps / answers.ok if answers.ok else None,
        active_mean=answers.active / answers.steps if answers.steps else None,
        wall_s=(mean(answers.wall_ms, 1) or 0.0) / 1e3,
        seed=run.seed,
        metrics={name: mean(found.values(), n) or 0.0 for name, found in sorted(scores.metrics_of.items())} if did_run else {},
        entropy_nats=mean(answers.entropy_nats),
        degraded=answers.degraded,
        missing=max(0, info.rows - min(n + len(scores.left_out), len(answers.seen))),
        stop_reasons=dict(sorted(answers.stop_reasons.items())),
        steps_histogram=dict(sorted(answers.steps_histogram.items())),
        gate_versions=sorted(answers.gate_versions),
        is_generated=info.is_generated,
        chance=info.chance,
        deviation=info.deviation,
        calls=round(answers.calls),
        asked=len(answers.seen),
        late=answers.late,
        bugs=answers.bugs,
        price=price,
        price_per_correct=judged * price / points if points and price is not None else None,
        did_run=did_run,
    )


def _ends(found: Interval) -> dict[str, Any]:
    return {"accuracy": found.value, "low": found.low, "high": found.high, "interval": found.method}


def _paired(benchmark: str, policies: list[str], scores: dict[Cell, ScoreTally]) -> list[PairedRow]:
    compared: list[PairedRow] = []
    for a, b in combinations([policy for policy in policies if scores[benchmark, policy].did_run], 2):
        of_a, of_b = scores[benchmark, a].values, scores[benchmark, b].values
        rows = [row for row in of_a if row in of_b]
        if not rows or not (scores[benchmark, a].num_scored or scores[benchmark, b].num_scored):
            continue
        found = compare_policies([of_a[row] for row in rows], [of_b[row] for row in rows])
        compared.append(PairedRow(benchmark=benchmark, a=a, b=b, **asdict(found)))
    corrected = holm([row.p for row in compared])
    return [row.model_copy(update={"p_holm": p}) for row, p in zip(compared, corrected, strict=True)]


def _groups(benchmark: str, policies: list[str], scores: dict[Cell, ScoreTally]) -> Iterator[GroupRow]:
    by_group: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for policy in policies:
        if not scores[benchmark, policy].did_run:
            continue
        for group, values in scores[benchmark, policy].groups().items():
            by_group[group][policy] = values
    if len(by_group) < 2:
        return
    for group, by_policy in sorted(by_group.items()):
        for policy, values in by_policy.items():
            yield GroupRow(
                benchmark=benchmark,
                policy=policy,
                group=group,
                n=len(values),
                correct=sum(value == 1.0 for value in values),
                **_ends(interval(values)),
            )
