"""Predictive entropy from listed log-probabilities: what an engine that shows only the most probable tokens lets one know.

The probability that is not listed belongs to tokens nobody sees, so the entropy of a token lies between two bounds. Engines
without the logits add up both here, and report the middle, marked `truncated`. All in nats; pure Python, so that a process
which only talks to endpoints loads no torch. `core/entropy` is the exact counterpart. Shape letter: V listed log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dmoa.types import EntropySum

_MAX_EXCESS = 0.01
"""Listed probabilities may exceed 1 by this much, by rounding; more than that is not a distribution."""


class EntropyBounds(NamedTuple):
    """Between what the entropy of one token's distribution lies, in nats."""

    lower: float
    upper: float


def entropy_bounds(listed_V: Sequence[float], vocab_size: int) -> EntropyBounds | None:
    """Return the bounds that the listed natural log-probabilities set; None where they are not part of a distribution.

    H = -sum_listed p log p + h, with m the missing probability: h is least, -m log m, where one token has all of it, and
    greatest, m log((vocab_size - V) / m), where all others share it evenly. -inf is probability 0. No part of a distribution:
    nothing listed, NaN, a positive log-probability, a sum above 1.01 or of 0. Source: ours (grouping property of the entropy).
    """
    if not listed_V or any(map(math.isnan, listed_V)) or max(listed_V) > _MAX_EXCESS:
        return None
    probability_V = list(map(math.exp, listed_V))
    total = math.fsum(probability_V)
    if not 0.0 < total <= 1.0 + _MAX_EXCESS:
        return None
    known = math.fsum([-p * logprob for p, logprob in zip(probability_V, listed_V, strict=True) if p > 0.0])
    missing = max(0.0, 1.0 - total)
    lower = max(0.0, known) - (missing * math.log(missing) if missing else 0.0)
    return EntropyBounds(lower, lower + missing * math.log(max(1, vocab_size - len(listed_V))))


def listed_entropy(listed_V: Sequence[float], vocab_size: int) -> EntropySum:
    """Return the entropy of the one token that these log-probabilities are listed of: the middle of its bounds.

    Zero tokens where they are not part of a distribution. NaN or +inf among them says that the engine's numbers broke: all sums
    are NaN then, and whatever they are added to. The middle, because the tail of a language model's distribution is neither one
    token nor flat. On SmolLM2-135M and four of its specialists, 20 listed of 49,152: as good as no pair of replies changes order
    by it (1 of 160), by the lower bound 10.
    """
    if any(map(math.isnan, listed_V)) or math.inf in listed_V:
        return EntropySum(sum_nats=math.nan, sq_sum=math.nan, slack_nats=math.nan, tokens=1, kind="truncated")
    bounds = entropy_bounds(listed_V, vocab_size)
    if bounds is None:
        return EntropySum(kind="truncated")
    middle, slack = (bounds.lower + bounds.upper) / 2, (bounds.upper - bounds.lower) / 2
    return EntropySum(sum_nats=middle, sq_sum=middle * middle, slack_nats=slack, tokens=1, kind="truncated")
