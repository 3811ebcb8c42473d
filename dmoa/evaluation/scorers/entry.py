"""What is known of one benchmark's scoring: the scorer, its perfect replies, its chance level, its deviation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dmoa.errors import ConfigError
from dmoa.evaluation.records import Label, Score, Scorer

VALUE = "value"
"""The measure that accuracy is the mean of, beside the names of the secondary metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerEntry:
    """One benchmark's scoring."""

    score: Scorer
    gold_replies: Callable[[Label], dict[str, str]]
    """Measure (`value`, or a secondary metric) -> a reply that must reach 1.0 in it."""
    primary: str
    """What accuracy means here, such as `exact match`."""
    metrics: tuple[str, ...] = ()
    """Names of the secondary metrics; every score has exactly these."""
    chance: Callable[[Sequence[Label]], float]
    """Accuracy, 0..1, to expect of guessing: one of the choices where they are given, else another row's right answer."""
    answer_key: Callable[[Label], Hashable]
    """Rows of the same key have the same right answer."""
    deviation: str
    """How this differs from the benchmark's original protocol; empty where it does not. Every table says it."""
    excuses: tuple[str, ...] = ()
    """How the reasons begin with which a row is unscored whatever the reply says, because of this host's libraries."""
    runs_programs: bool = False
    """Whether scoring runs a program in the sandbox, which takes seconds a row."""


def gold_of(label: Label, *keys: str) -> tuple[Any, ...]:
    """Return the named gold values.

    Raises:
        ConfigError: a key is missing, so the label is not this benchmark's.
    """
    missing = [key for key in keys if key not in label.gold]
    if missing:
        raise ConfigError(
            f"label {label.row_id}: gold has the keys {sorted(label.gold)}, and not {missing}, which scoring "
            f"{label.benchmark!r} needs; load the rows again"
        )
    return tuple(label.gold[key] for key in keys)


def unscored(reason: str, metrics: Iterable[str] = ()) -> Score:
    """Return the score of a reply that could not be judged: 0 in everything, and not scored."""
    return Score(value=0.0, reason=reason, is_scored=False, metrics=dict.fromkeys(metrics, 0.0))


def chance_of(keys: Sequence[Hashable]) -> float:
    """Return how often another row's right answer is right as well: the share of equal keys among all pairs of rows."""
    pairs = len(keys) * (len(keys) - 1)
    return sum(count * (count - 1) for count in Counter(keys).values()) / pairs if pairs else 0.0
