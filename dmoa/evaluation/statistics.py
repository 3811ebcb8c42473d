"""Says how sure a figure is: intervals of accuracies, and comparisons of two policies on the same rows.

Scores that are all 0 or 1 get Wilson's interval, McNemar's exact test and Newcombe's interval of a difference; fractional
ones a percentile bootstrap. Everything depends only on the scores, whatever their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

RESAMPLES = 5000
"""Resamples of a bootstrap."""
SEED = 0
"""Seed of every bootstrap."""
CONFIDENCE = 0.95
_CHUNK_CELLS = 4_000_000

Method = Literal["wilson", "bootstrap"]
MCNEMAR = "McNemar, exact; Newcombe's interval"
"""How 0/1 scores are compared."""
BOOTSTRAP = f"paired bootstrap, {RESAMPLES} resamples, seed {SEED}"
"""How fractional scores are compared."""
Floats = npt.NDArray[np.float64]

DRAWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float
    method: Method


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Policy a against policy b on the rows of both."""

    n: int
    difference: float
    """Mean score of a minus that of b."""
    low: float
    high: float
    """Ends of the 95 % interval of the difference."""
    p: float
    """Two-sided."""
    test: str
    """What gave p and the interval."""


def interval(scores: Sequence[float] | Floats) -> Interval:
    """Return the mean of scores in 0..1 and its interval: Wilson's for 0/1 scores, else a percentile bootstrap.

    Without scores nothing is known: value 0, interval 0..1; one fractional score likewise says nothing of the spread.
    """
    score_N = np.asarray(scores, dtype=np.float64)
    if not is_fractional(score_N):
        return wilson(int(score_N.sum()), len(score_N))
    mean = math.fsum(score_N) / len(score_N)
    if len(score_N) == 1:
        return Interval(value=mean, low=0.0, high=1.0, method="bootstrap")
    low, high = _ends(resampled_means(score_N))
    return Interval(value=mean, low=min(low, mean), high=max(high, mean), method="bootstrap")


def wilson(correct: int, n: int) -> Interval:
    """Return the share correct / n with Wilson's 95 % interval (score interval without continuity correction)."""
    from scipy.stats import binomtest

    if n == 0:
        return Interval(value=0.0, low=0.0, high=1.0, method="wilson")
    found = binomtest(correct, n).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return Interval(value=correct / n, low=float(found.low), high=float(found.high), method="wilson")


def is_fractional(scores: Sequence[float] | Floats) -> bool:
    """Tell whether any score is neither 0 nor 1."""
    score_N = np.asarray(scores, dtype=np.float64)
    return bool(np.any((score_N != 0.0) & (score_N != 1.0)))


def compare_policies(scores_a: Sequence[float] | Floats, scores_b: Sequence[float] | Floats) -> Comparison:
    """Compare two policies; entry i of both is the same row. Raises ValueError where the lengths differ."""
    a_N, b_N = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if len(a_N) != len(b_N):
        raise ValueError(f"scores: {len(a_N)} of a and {len(b_N)} of b; a comparison needs the same rows of both")
    if is_fractional(a_N) or is_fractional(b_N):
        return _paired_bootstrap(a_N - b_N)
    only_a = int(np.sum((a_N == 1.0) & (b_N == 0.0)))
    only_b = int(np.sum((a_N == 0.0) & (b_N == 1.0)))
    return mcnemar(both=int(np.sum((a_N == 1.0) & (b_N == 1.0))), only_a=only_a, only_b=only_b, n=len(a_N))


def mcnemar(*, both: int, only_a: int, only_b: int, n: int) -> Comparison:
    """Compare two policies by counts of rows that both, only a, only b had right, of n.

    p is that of the exact two-sided binomial test on the rows that only one had right, 1 where there are none.
    """
    from scipy.stats import binomtest

    if n == 0:
        return Comparison(n=0, difference=0.0, low=-1.0, high=1.0, p=1.0, test=MCNEMAR)
    discordant = only_a + only_b
    p = float(binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0
    low, high = newcombe(both=both, only_a=only_a, only_b=only_b, n=n)
    return Comparison(n=n, difference=(only_a - only_b) / n, low=low, high=high, p=p, test=MCNEMAR)


def newcombe(*, both: int, only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two paired shares.

    Source: Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10: the Wilson intervals of both shares, squared
    and added, with the correlation phi of the two outcomes lowered for continuity.
    """
    neither = n - both - only_a - only_b
    a, b = wilson(both + only_a, n), wilson(both + only_b, n)
    phi = _phi(both, only_a, only_b, neither)
    difference = (only_a - only_b) / n
    below, above = a.value - a.low, b.high - b.value
    low = difference - math.sqrt(max(0.0, below**2 - 2 * phi * below * above + above**2))
    below, above = b.value - b.low, a.high - a.value
    high = difference + math.sqrt(max(0.0, below**2 - 2 * phi * below * above + above**2))
    return max(-1.0, low), min(1.0, high)


def _phi(both: int, only_a: int, only_b: int, neither: int) -> float:
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    cross = both * neither - only_a * only_b
    if cross > 0:
        n = both + only_a + only_b + neither
        return max(cross - n / 2, 0.0) / math.sqrt(margins)
    return cross / math.sqrt(margins)


def _paired_bootstrap(difference_N: Floats) -> Comparison:
    """Compare by resampling rows; p is twice the smaller share of resampled means on either side of 0, at most 1."""
    mean = math.fsum(difference_N) / len(difference_N)
    if len(difference_N) == 1:
        return Comparison(n=1, difference=mean, low=-1.0, high=1.0, p=1.0, test=BOOTSTRAP)
    means_R = resampled_means(difference_N)
    low, high = _ends(means_R)
    tail = min(int(np.sum(means_R <= 0.0)), int(np.sum(means_R >= 0.0)))
    p = min(1.0, 2 * (tail + 1) / (len(means_R) + 1))
    return Comparison(n=len(difference_N), difference=mean, low=min(low, mean), high=max(high, mean), p=p, test=BOOTSTRAP)


def resampled_means(value_N: Floats, *, chunk_cells: int = _CHUNK_CELLS) -> Floats:
    """Return [R] float64, the means of RESAMPLES samples of N values drawn with replacement.

    Drawn as multinomial counts of the distinct values, which has the same distribution as drawing rows, depends on no
    order, and costs the number of distinct values (U) instead of rows. `chunk_cells` counts are held at a time.
    """
    value_U, count_U = np.unique(value_N, return_counts=True)
    generator = np.random.default_rng(SEED)
    share_U = count_U / len(value_N)
    rows = max(1, chunk_cells // len(value_U))
    parts: list[Floats] = []
    for start in range(0, RESAMPLES, rows):
        draws_RU = generator.multinomial(len(value_N), share_U, size=min(rows, RESAMPLES - start))
        parts.append(draws_RU @ value_U / len(value_N))
    return np.concatenate(parts)


def _ends(means_R: Floats) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means_R, [tail, 100 - tail])
    return float(low), float(high)


def hierarchical_bootstrap(difference_SGR: Floats, *, seed: int = 0, draws: int = DRAWS) -> Comparison:
    """Compare two methods by their paired differences: resample sets, then gate seeds within each, then rows for all alike.

    A level with one member stays as it is, and the interval then says nothing about that level. p is twice the smaller
    share of draws on either side of 0, with one more draw counted on both: never 0, at most 1. Source: ours (a percentile
    bootstrap on crossed and nested levels).
    """
    num_sets, num_seeds, num_rows = difference_SGR.shape
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        rows_R = rng.integers(0, num_rows, num_rows)
        sets_S1 = rng.integers(0, num_sets, (num_sets, 1))
        seeds_SG = rng.integers(0, num_seeds, (num_sets, num_seeds))
        # Rows are counted, not copied: the same rows for all sets and seeds.
        weight_R = np.bincount(rows_R, minlength=num_rows) / num_rows
        by_seed_SG = difference_SGR @ weight_R
        means[draw] = by_seed_SG[sets_S1, seeds_SG].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    below, above = ((int(side.sum()) + 1) / (draws + 1) for side in (means <= 0, means >= 0))
    return Comparison(
        n=num_rows,
        difference=float(difference_SGR.mean()),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * min(below, above)),
        test="hierarchical bootstrap",
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted for their number by Holm's step-down method, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
