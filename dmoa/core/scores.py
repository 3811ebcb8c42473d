"""How sure a reply is, as one number: the score that theta, the cascade and the ranking loss compare."""

from __future__ import annotations

import math

SCORE_OFFSET_NATS = 1e-3
"""Keeps the logarithm finite for replies without any uncertainty."""


def raw_score(entropy_nats: float) -> float:
    """Return s = log(PE + 1e-3) of a mean entropy in nats per token; lower is surer. Source: ours (paper ranks PE itself)."""
    return math.log(entropy_nats + SCORE_OFFSET_NATS)
