"""What the gate reads: embeddings of query and summary, and a few numbers of feedback from the last step.

Stands between `agents/embedder` and `core/gate`. Shape letters: D embedding, F feedback features, X gate input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dmoa.types import FloatArray

FEEDBACK_FEATURES = 4
"""F: mean and spread of the last step's entropies, share of K that was active, share of the budget used."""

Preset = Literal["default", "paper"]


def gate_input(
    preset: Preset, query_D: FloatArray, summary_D: FloatArray | None = None, feedback_F: FloatArray | None = None
) -> FloatArray:
    """Return the gate's input [X] float32: X = 2D + F in the default preset, D in `paper`.

    In `paper` the first array is the one embedding of query and summary together, and the others are not read. A
    missing summary or feedback (first step) is all zeros. Source: context from the paper, the default layout ours.
    """
    if preset == "paper":
        return np.array(query_D, dtype=np.float32)
    dim = query_D.shape[0]
    input_X = np.zeros(2 * dim + FEEDBACK_FEATURES, dtype=np.float32)
    input_X[:dim] = query_D
    if summary_D is not None:
        input_X[dim : 2 * dim] = summary_D
    if feedback_F is not None:
        input_X[2 * dim :] = feedback_F
    return input_X


def feedback(last_step_entropies: Sequence[float], k: int, max_agents: int, budget_share: float) -> FloatArray:
    """Return the feedback features [F] float32 of the last step; all zeros before the first (k = 0).

    `last_step_entropies` are mean entropies in nats per token of the agents that replied; their spread is the
    population standard deviation, both are 0 where nobody replied. `budget_share` is clipped to 0..1. Source: ours.
    """
    feedback_F = np.zeros(FEEDBACK_FEATURES, dtype=np.float32)
    if k == 0:
        return feedback_F
    if last_step_entropies:
        # In plain Python: numpy takes a tenth of a millisecond for a handful of numbers.
        mean = sum(last_step_entropies) / len(last_step_entropies)
        feedback_F[0] = mean
        feedback_F[1] = math.sqrt(sum((value - mean) ** 2 for value in last_step_entropies) / len(last_step_entropies))
    feedback_F[2] = k / max_agents
    feedback_F[3] = min(max(budget_share, 0.0), 1.0)
    return feedback_F
