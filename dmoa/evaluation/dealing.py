"""What to expect when the right answers of rows are dealt out among the rows at random. Source: ours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

_SIGMAS = 4.5
_MATCHES = 3
"""Rows with unlike answers match as rare events do, whose tails are longer than the normal distribution's."""


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
