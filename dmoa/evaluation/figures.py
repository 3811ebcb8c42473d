"""Words the figures of a result, the same in the terminal and in the HTML report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dmoa.evaluation.results import Evaluation, EvaluationRow, PairedRow, RobustnessRow
from dmoa.evaluation.statistics import wilson
from dmoa.types import is_untrained, supervision_of

UNTRAINED = " (untrained gate)"
"""Follows the name of a policy whose gate nobody trained."""
GENERATED = "generated rows: made by a seeded generator, not a public benchmark"
FRACTIONAL = "fractional scores: Student's interval instead of Wilson's"
MISSING = "not finished: rows are still to be answered or judged"
NOT_RUN = "did not run: every query failed, so there is no accuracy and no comparison"
MOSTLY_FAILED = "most queries failed: the accuracy says more about that than about the answers"
NOT_SCORED = "not one reply could be judged: 0 is not a measurement of right and wrong"
LABELLED = "it learnt from labels: judged replies, or outcomes"
DEGRADED = "some queries lost an agent, and others answered in its place: `degraded`, in the report and in the JSON, counts them"
MEMOISED = "part of the tokens came from the call cache: they are counted as if run, their seconds are not"


@dataclass(frozen=True, slots=True)
class Footnote:
    """A numbered remark under the tables."""

    mark: str
    text: str


class Footnotes:
    """Numbers the remarks of the rows in the order in which they first come."""

    def __init__(self, evaluation: Evaluation) -> None:
        texts = dict.fromkeys(text for row in evaluation.rows for text in _remarks(row))
        self._numbers = {text: str(number) for number, text in enumerate(texts, 1)}
        self._rows = evaluation.rows

    def marks(self, row: EvaluationRow) -> str:
        """Return the marks of a row, such as `1,3`."""
        return ",".join(sorted((self._numbers[text] for text in _remarks(row)), key=int))

    def marks_of_benchmark(self, benchmark: str) -> str:
        """Return the marks that hold for a whole benchmark."""
        held = {text for row in self._rows if row.benchmark == benchmark for text in _remarks_of_benchmark(row)}
        return ",".join(number for text, number in self._numbers.items() if text in held)

    def all(self) -> list[Footnote]:
        """Return every remark once."""
        return [Footnote(mark, text) for text, mark in self._numbers.items()]


def _remarks_of_benchmark(row: EvaluationRow) -> list[str]:
    remarks = [f"{row.benchmark}: {row.deviation}"] if row.deviation else []
    if row.left_out:
        remarks.append(
            f"{row.benchmark}: {row.left_out} rows cannot be judged here, whatever is replied; no policy is judged by them"
        )
    return [*remarks, GENERATED] if row.is_generated else remarks


def _remarks(row: EvaluationRow) -> list[str]:
    remarks = _remarks_of_benchmark(row)
    conditions = {
        NOT_RUN: is_not_run(row),
        MOSTLY_FAILED: row.did_run and 2 * row.failed > row.n,
        NOT_SCORED: row.did_run and row.n > 0 and row.num_scored == 0,
        FRACTIONAL: row.interval != "wilson",
        MISSING: row.missing > 0,
        LABELLED: any(word.startswith(("data=", "rewards=")) for word in row.policy.split(":"))
        or any(supervision_of(version) != "none" for version in row.gate_versions),
        DEGRADED: row.degraded > 0,
        MEMOISED: row.memoised_tokens > 0,
    }
    return [*remarks, *(text for text, holds in conditions.items() if holds)]


def untrained_policies(evaluation: Evaluation) -> set[str]:
    """Return the policies that a gate without any training routed, by what answered and by what the run was begun with."""
    run = evaluation.config
    by_it = [x for x in run.policies if x == "dmoa" or (x.partition(":")[0] == "knapsack" and ":rewards=" not in x)]
    versions = {policy: {run.gate_version} if run.gate_version else set() for policy in by_it}
    versions |= {f"dmoa:{name}": {version} for name, version in run.gates.items()}
    for row in evaluation.rows:
        versions.setdefault(row.policy, set()).update(row.gate_versions)
    return {policy for policy, found in versions.items() if policy in run.all_policies and any(map(is_untrained, found))}


def names(evaluation: Evaluation) -> dict[str, str]:
    """Return what tables call each policy: its name, and whether its gate is untrained."""
    untrained = untrained_policies(evaluation)
    return {policy: policy + (UNTRAINED if policy in untrained else "") for policy in evaluation.config.all_policies}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overall:
    """One policy on all benchmarks together, every row counting the same."""

    policy: str
    by_benchmark: list[str]
    """Accuracy in percent, in the order of the run."""
    n: int
    failed: int
    accuracy: float | None
    """None where it did not run on some benchmark: its mean would be over other rows than the others'."""
    ends: str
    """Wilson's interval; empty where some scores are fractions."""
    active: str
    tokens: str
    """Per row."""


def overall(evaluation: Evaluation) -> list[Overall]:
    """Return a line per policy, in the order of the run."""
    run, cells = evaluation.config, {(row.benchmark, row.policy): row for row in evaluation.rows}
    return [_overall(policy, [cells[info.name, policy] for info in run.benchmarks]) for policy in run.all_policies]


def _overall(policy: str, rows: Sequence[EvaluationRow]) -> Overall:
    ran = [row for row in rows if row.n and row.did_run]
    n, is_whole = sum(row.n for row in ran), bool(rows) and len(ran) == len(rows)
    steps = [sum(number * rows for number, rows in row.steps_histogram.items()) for row in ran]
    active = sum((row.active_mean or 0.0) * taken for row, taken in zip(ran, steps, strict=True))
    has_ends = is_whole and all(row.interval == "wilson" for row in ran)
    found = wilson(sum(row.correct for row in ran), n)
    return Overall(
        policy=policy,
        by_benchmark=[accuracy(row) for row in rows],
        n=sum(row.n for row in rows),
        failed=sum(row.failed for row in rows),
        accuracy=sum(row.accuracy * row.n for row in ran) / n if is_whole else None,
        ends=ends(found.low, found.high) if has_ends else "",
        active=decimals(active / sum(steps) if sum(steps) else None),
        tokens=count(sum(row.per_query(row.usage.total) * row.n for row in ran) / n) if n else "-",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveLine:
    """How accurate one policy is on one benchmark, with one defence, as more agents work against the swarm."""

    benchmark: str
    policy: str
    defence: str
    rows: dict[int, RobustnessRow]
    """By number of adversaries."""

    @property
    def shown(self) -> dict[int, str]:
        """Accuracy in percent with its interval, by number of adversaries."""
        return {count: f"{share(row.accuracy)} {ends(row.low, row.high)}" for count, row in self.rows.items()}


def curves(evaluation: Evaluation) -> list[CurveLine]:
    """Return a line for each benchmark, policy and defence, in the order of the run."""
    found: dict[tuple[str, str, str], dict[int, RobustnessRow]] = {}
    for row in evaluation.robustness:
        found.setdefault((row.benchmark, row.policy, row.defence), {})[row.adversaries] = row
    return [
        CurveLine(benchmark=name, policy=policy, defence=defence, rows=rows) for (name, policy, defence), rows in found.items()
    ]


def gate_policies(evaluation: Evaluation) -> list[str]:
    """Return the policies that a gate routes, untrained ones first, so that before and after a training stand side by side."""
    untrained = untrained_policies(evaluation)
    found = [policy for policy in evaluation.config.all_policies if policy.partition(":")[0] == "dmoa"]
    return sorted(found, key=lambda policy: policy not in untrained)


def routing_shares(evaluation: Evaluation, policy: str) -> dict[tuple[str, str | int], float]:
    """Return the share of steps in which an agent's contribution counted, by (agent, benchmark) and (agent, step from 0)."""
    counts: dict[tuple[str, str | int], int] = defaultdict(int)
    for row in evaluation.routing:
        if row.policy == policy:
            counts[row.agent, row.benchmark] += row.count
            counts[row.agent, row.step] += row.count
    by_benchmark, by_step = steps_taken(evaluation, policy)
    totals = {**by_benchmark, **by_step}
    return {key: count / totals[key[1]] for key, count in counts.items() if totals.get(key[1])}


def agents_of(evaluation: Evaluation, asked: set[str]) -> list[str]:
    """Return the pool's agents in its order, those that were never asked among them, then any others."""
    listed = evaluation.config.pool.config.get("agents")
    pool = [str(agent.get("name")) for agent in listed if isinstance(agent, dict)] if isinstance(listed, list) else []
    return [*pool, *sorted(asked - set(pool))]


def steps_taken(evaluation: Evaluation, policy: str) -> tuple[dict[str | int, int], dict[str | int, int]]:
    """Return how many steps a policy took, by benchmark and by number of the step."""
    by_benchmark: dict[str | int, int] = {}
    by_step: dict[str | int, int] = defaultdict(int)
    for row in evaluation.rows:
        if row.policy == policy:
            taken = sum(number * count for number, count in row.steps_histogram.items())
            if taken:
                by_benchmark[row.benchmark] = taken
            for number, count in row.steps_histogram.items():
                for step in range(number):
                    by_step[step] += count
    return by_benchmark, dict(sorted(by_step.items()))


def share(value: float) -> str:
    """Return a share as percent, such as `62.5`."""
    return f"{100 * value:.1f}"


def accuracy(row: EvaluationRow) -> str:
    """Return accuracy in percent, a dash without rows, `did not run` where every query failed."""
    if is_not_run(row):
        return "did not run"
    return share(row.accuracy) if row.n else "-"


def accuracy_ends(row: EvaluationRow) -> str:
    """Return the interval of accuracy in percent; empty where nothing is known."""
    return ends(row.low, row.high, is_known=row.n > 0 and row.did_run)


def is_not_run(row: EvaluationRow) -> bool:
    """Tell whether every query of a row failed; one that is still to be asked did not."""
    return row.n > 0 and not row.did_run


def ends(low: float, high: float, *, is_known: bool = True) -> str:
    """Return an interval in percent, such as `[30.6, 86.3]`."""
    return f"[{share(low)}, {share(high)}]" if is_known else ""


def chance(row: EvaluationRow) -> str:
    """Return the chance level in percent; empty where unknown."""
    return "" if row.chance is None else share(row.chance)


def count(number: float) -> str:
    """Return a count in three figures, such as `950`, `12.3k`, `4.57M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"


def decimals(value: float | None, digits: int = 2) -> str:
    """Return a number with fixed decimals; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def money(price: float | None) -> str:
    """Return a price in three figures; a dash where it is not known."""
    return "-" if price is None else f"{price:.3g}"


def duration(seconds: float) -> str:
    """Return a duration, such as `8.3 s`, `12.4 min`, `3.1 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def p_value(p: float | None) -> str:
    """Return p in three decimals, or as a bound; a dash where it is not known."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def points(value: float) -> str:
    """Return a difference of accuracies in percent points, signed."""
    return f"{100 * value:+.1f}"


def point_ends(row: PairedRow) -> str:
    """Return the interval of a difference in percent points."""
    return f"[{points(row.low)}, {points(row.high)}]"


def metrics(row: EvaluationRow) -> str:
    """Return the secondary measures, such as `f1 71.2`."""
    return ", ".join(f"{name} {share(value)}" for name, value in row.metrics.items())


def tests(rows: Sequence[PairedRow]) -> list[str]:
    """Return the tests that were used, each once."""
    return list(dict.fromkeys(row.test for row in rows))
