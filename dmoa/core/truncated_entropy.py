"""Predictive entropy from listed log-probabilities: what an engine that shows only the most probable tokens lets one know.

The probability that is not listed belongs to tokens nobody sees, so the entropy of a token lies between two bounds. Engines
without the logits add up both here, and report the middle, marked `truncated`. All in nats; pure Python, so that a process
which only talks to endpoints loads no torch. `core/entropy` is the exact counterpart. Shape letter: V listed log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    if not listed_V or any(math.isnan(logprob) or logprob > _MAX_EXCESS for logprob in listed_V):
        return None
    probability_V = [math.exp(logprob) for logprob in listed_V]
    total = math.fsum(probability_V)
    if not 0.0 < total <= 1.0 + _MAX_EXCESS:
        return None
    known = math.fsum(-p * logprob for p, logprob in zip(probability_V, listed_V, strict=True) if p > 0.0)
    missing = max(0.0, 1.0 - total)
    lower = max(0.0, known) - (missing * math.log(missing) if missing else 0.0)
    return EntropyBounds(lower, lower + missing * math.log(max(1, vocab_size - len(listed_V))))


class TruncatedSums:
    """Sums over the tokens of a call: the middle of the bounds, its square, and half the distance between the bounds.

    The middle, because the tail of a language model's distribution is neither one token nor flat. On SmolLM2-135M and four
    of its specialists, 20 listed of 49,152: as good as no pair of replies changes order by it (1 of 160), by the lower bound 10.
    """

    __slots__ = ("slack_nats", "sq_sum", "sum_nats", "tokens")

    def __init__(self) -> None:
        self.sum_nats = 0.0
        self.sq_sum = 0.0
        self.slack_nats = 0.0
        self.tokens = 0

    def take(self, listed_V: Sequence[float], vocab_size: int) -> None:
        """Count the token that these log-probabilities are listed of, if they are part of a distribution.

        NaN or +inf among them says that the engine's numbers broke: all sums are NaN from then on.
        """
        if any(math.isnan(logprob) or logprob == math.inf for logprob in listed_V):
            self.add(EntropyBounds(math.nan, math.nan))
            return
        bounds = entropy_bounds(listed_V, vocab_size)
        if bounds is not None:
            self.add(bounds)

    def add(self, bounds: EntropyBounds) -> None:
        """Count one more token."""
        middle = (bounds.lower + bounds.upper) / 2
        self.sum_nats += middle
        self.sq_sum += middle * middle
        self.slack_nats += (bounds.upper - bounds.lower) / 2
        self.tokens += 1
