"""Says how sure a figure is: intervals of accuracies, and comparisons of two policies on the same rows.

Scores that are all 0 or 1 get Wilson's interval, McNemar's exact test and Newcombe's interval of a difference; fractional
ones Student's interval and a sign-flip test. Everything depends only on the scores, whatever their order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FLIPS = 10_000
"""Sign flips drawn where there are too many to try them all."""
SEED = 0
"""Seed of everything that is drawn."""
CONFIDENCE = 0.95
_MOST_EXACT = 14
"""Differences other than 0 up to which all of their 2^n signs are tried."""

Method = Literal["wilson", "student", "bootstrap"]
"""`bootstrap` is in results of earlier versions only."""
MCNEMAR = "McNemar, exact; Newcombe's interval"
"""How 0/1 scores are compared."""
SIGN_FLIP = f"sign-flip test, exact or {FLIPS} flips; Student's interval"
"""How fractional scores are compared."""
CROSSED = "Student's t over sets or seeds, and rows"
"""How studies over seeds are compared."""
Floats = npt.NDArray[np.float64]


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
    """Return the mean of scores and its interval: Wilson's for 0/1 scores, else Student's, within 0..1.

    Without scores nothing is known: value 0, interval 0..1; one fractional score likewise says nothing of the spread.
    Raises ValueError for a score that is not a number from 0 to 1.
    """
    score_N = _checked(scores)
    if not is_fractional(score_N):
        return wilson(int(score_N.sum()), len(score_N))
    mean = math.fsum(score_N) / len(score_N)
    low, high = _student(score_N, mean)
    return Interval(value=mean, low=max(0.0, low), high=min(1.0, high), method="student")


def _checked(scores: Sequence[float] | Floats) -> Floats:
    """Return the scores as an array. Raises ValueError where one is not a number from 0 to 1."""
    score_N = np.asarray(scores, dtype=np.float64)
    bad_N = score_N[~((score_N >= 0.0) & (score_N <= 1.0))]
    if len(bad_N):
        raise ValueError(f"scores: {len(bad_N)} of {len(score_N)} are outside 0..1, the first is {bad_N[0]}; mend the scorer")
    return score_N


def _student(value_N: Floats, mean: float) -> tuple[float, float]:
    """Return the ends of Student's 95 % interval of a mean of values that lie at most 1 apart from it.

    One value says nothing. Where all are alike, the next may still differ: the half width is then Wilson's for none of n.
    """
    from scipy.stats import norm, t

    n = len(value_N)
    if n == 1:
        return -1.0, 1.0
    spread = math.sqrt(math.fsum((value_N - mean) ** 2) / (n - 1))
    tail = (1 + CONFIDENCE) / 2
    if spread <= 1e-12:
        half = float(norm.ppf(tail)) ** 2 / (n + float(norm.ppf(tail)) ** 2)
    else:
        half = float(t.ppf(tail, n - 1)) * spread / math.sqrt(n)
    return mean - half, mean + half


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
    """Compare two policies, entry i of both the same row. Raises ValueError for other lengths, or scores outside 0..1."""
    a_N, b_N = _checked(scores_a), _checked(scores_b)
    if len(a_N) != len(b_N):
        raise ValueError(f"scores: {len(a_N)} of a and {len(b_N)} of b; a comparison needs the same rows of both")
    if is_fractional(a_N) or is_fractional(b_N):
        return _sign_flip(a_N - b_N)
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


def _sign_flip(difference_N: Floats) -> Comparison:
    """Compare by flipping the signs of differences: without an effect both signs of each are equally likely."""
    mean = math.fsum(difference_N) / len(difference_N)
    low, high = _student(difference_N, mean)
    return Comparison(
        n=len(difference_N),
        difference=mean,
        low=max(-1.0, low),
        high=min(1.0, high),
        p=sign_flip_p(difference_N),
        test=SIGN_FLIP,
    )


def sign_flip_p(difference_N: Floats) -> float:
    """Return the two-sided p of a sign-flip test of the mean: the share of all signs whose sum is as far from 0 as the seen one.

    Exact up to `_MOST_EXACT` differences other than 0, else over `FLIPS` drawn ones, the seen one counted among them. The
    number of positive signs of equal differences is binomial, so that the cost depends on the different values only.
    """
    size_U, count_U = np.unique(np.abs(difference_N[difference_N != 0.0]).round(12), return_counts=True)
    seen = abs(math.fsum(difference_N)) - 1e-9
    if not len(size_U):
        return 1.0
    if count_U.sum() <= _MOST_EXACT:
        signs = np.asarray(list(itertools.product((-1.0, 1.0), repeat=int(count_U.sum()))))
        return float(np.mean(np.abs(signs @ np.repeat(size_U, count_U)) >= seen))
    generator = np.random.default_rng(SEED)
    sums = np.zeros(FLIPS)
    for size, count in zip(size_U, count_U, strict=True):
        sums += size * (2 * generator.binomial(count, 0.5, FLIPS) - count)
    return float((np.sum(np.abs(sums) >= seen) + 1) / (FLIPS + 1))


def compare_crossed(difference_SGR: Floats) -> Comparison:
    """Compare two methods by their paired differences over sets, gate seeds within each, and rows that all of them share.

    The variance of the mean is that of the members of the highest level with several (sets, else seeds) plus that of the
    rows; p and the interval are Student's, with Satterthwaite's degrees of freedom: a bootstrap over five seeds covers 84 to
    92 % where 95 are promised. Where all differences are alike, the half width is Wilson's for none of the rows. With one
    set and one seed, the interval says nothing about either. Source: ours (two-way layout; Satterthwaite 1946).
    """
    from scipy.stats import norm, t

    difference = float(difference_SGR.mean())
    by_set_S, by_seed_G, by_row_R = (
        difference_SGR.mean(axis=(1, 2)),
        difference_SGR.mean(axis=(0, 2)),
        difference_SGR.mean(axis=(0, 1)),
    )
    levels = [by_set_S if len(by_set_S) > 1 else by_seed_G, by_row_R]
    parts = [(float(level.var(ddof=1)) / len(level), len(level)) for level in levels if len(level) > 1]
    variance = sum(part for part, _ in parts)
    if variance <= 1e-18:
        low, high = _student(np.full(max((members for _, members in parts), default=1), difference), difference)
        half = (high - low) / 2
        p = float(2 * norm.sf(norm.ppf((1 + CONFIDENCE) / 2) * abs(difference) / half))
    else:
        degrees = variance**2 / sum(part**2 / (members - 1) for part, members in parts)
        half = float(t.ppf((1 + CONFIDENCE) / 2, degrees)) * math.sqrt(variance)
        low, high = difference - half, difference + half
        p = float(2 * t.sf(abs(difference) / math.sqrt(variance), degrees))
    return Comparison(n=len(by_row_R), difference=difference, low=low, high=high, p=p, test=CROSSED)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted for their number by Holm's step-down method, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
