"""Counts that grow while the lines of a run go by: per row only a number or two, so that long runs fit in memory.

Fed by `results.build`. Whatever depends on the order of lines is left out or put right at the end: sums of fractions are
exact, lists are sorted.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from dmoa.errors import ConfigError
from dmoa.evaluation.records import Answered, Scored

MAX_FAILURES = 50
"""Failed rows that are kept with their error, per benchmark and policy."""
_MAX_ERROR_CHARACTERS = 500


class RowNumbers:
    """Gives every row id a small number, the same for all policies."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def of(self, row_id: str) -> int:
        """Return the number of a row."""
        return self._numbers.setdefault(row_id, len(self._numbers))


@dataclass(slots=True)
class Answers:
    """What is counted of the answers of one policy to one benchmark."""

    seen: set[int] = field(default_factory=set)
    ok: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    summarizer_tokens: int = 0
    memoised_tokens: int = 0
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
        self.prompt_tokens += line.prompt_tokens
        self.cached_tokens += line.cached_tokens
        self.completion_tokens += line.completion_tokens
        self.summarizer_tokens += line.summarizer_tokens
        self.memoised_tokens += line.memoised_tokens
        self.wall_ms.append(line.wall_ms)
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
            self.routing.update((step, agent) for agent in agents)

    def _add_failure(self, row_id: str, error: str) -> None:
        text = error if len(error) <= _MAX_ERROR_CHARACTERS else error[: _MAX_ERROR_CHARACTERS - 3] + "..."
        self.failures.append((row_id, text))
        if len(self.failures) >= 2 * MAX_FAILURES:
            self.failures = self.first_failures()

    def first_failures(self) -> list[tuple[str, str]]:
        """Return the first failed rows by id."""
        return sorted(self.failures)[:MAX_FAILURES]


@dataclass(slots=True)
class Scores:
    """What is counted of the scores of one policy on one benchmark."""

    values: dict[int, float] = field(default_factory=dict)
    """Row -> score."""
    unscored: int = 0
    failed: int = 0
    groups: dict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    metrics: dict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))

    @property
    def did_run(self) -> bool:
        """Whether a row was judged whose query did not fail."""
        return self.failed < len(self.values)

    @property
    def num_scored(self) -> int:
        """Rows whose reply could be judged."""
        return len(self.values) - self.failed - self.unscored

    def add(self, row: int, line: Scored) -> None:
        """Count one score. Raises ConfigError for a row that was counted before."""
        if row in self.values:
            raise _twice("labels/scores", line)
        self.failed += line.is_failed
        self.unscored += not (line.is_scored or line.is_failed)
        value = line.value if line.is_scored else 0.0
        self.values[row] = value
        if line.group:
            self.groups[line.group].append(value)
        for name, figure in line.metrics.items():
            self.metrics[name].append(figure)


def mean(figures: array[float], n: int | None = None) -> float | None:
    """Return the exact sum of figures over n, or over their number; None over none."""
    count = len(figures) if n is None else n
    return math.fsum(figures) / count if count else None


def _twice(folder: str, line: Answered | Scored) -> ConfigError:
    return ConfigError(
        f"{folder}: row {line.row_id!r} is there twice for policy {line.policy!r}; a row counts once; "
        "remove one of its lines, or run into another folder"
    )
