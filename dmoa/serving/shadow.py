"""The shadow check: what a new gate would have decided lately, before it may decide anything.

Between the router's `install` and the version becoming current. Shape letters: X gate input, H gate hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from dmoa.core.gate import Gate
from dmoa.core.inference import Decider
from dmoa.errors import CheckpointError, RoutingError
from dmoa.types import FloatArray, RouteDecision, RouteRequest

_SUM_TOLERANCE = 1e-4
_PROBE_SEED = 0


class Shadow(BaseModel):
    """What a gate decides on the inputs that the router was asked about last."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    inputs: int
    """Recent inputs; 0 where nothing was routed yet, then only made-up inputs were tried."""
    same_first: float | None
    """Share of them on which the most probable agent is the current gate's too; null without inputs."""
    mean_k: float | None
    """Active agents on average; null without inputs."""
    first: dict[str, float]
    """Share of the inputs on which each agent is the most probable; agents without any are left out."""


def shadow_check(gate: Gate, version: str, current: Gate, inputs: Sequence[FloatArray]) -> Shadow:
    """Let a gate decide recent inputs [X] beside the current one, whose input width is the same, and say what comes out.

    Every input is decided twice: as a first step, and as a second from the hidden state that the first left; made-up
    inputs are tried too. Raises CheckpointError where weights or a decision are not finite or not valid. That all inputs go
    to one agent is reported and no reason to refuse: traffic of one kind does.
    """
    for name, tensor in gate.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"gate {version}: {name} holds NaN or infinity; only finite weights are allowed; train it again"
            )
    decisions = _decide(gate, version, [*inputs, *_made_up(gate.spec.input_dim)])[: len(inputs)]
    if not inputs:
        return Shadow(inputs=0, same_first=None, mean_k=None, first={})
    before = _decide(current, "current", inputs)
    first = Counter(_first(decision) for decision in decisions)
    same = sum(_first(new) == _first(old) for new, old in zip(decisions, before, strict=True))
    return Shadow(
        inputs=len(inputs),
        same_first=same / len(inputs),
        mean_k=sum(decision.k for decision in decisions) / len(inputs),
        first={name: count / len(inputs) for name, count in first.most_common()},
    )


def _made_up(input_dim: int) -> list[FloatArray]:
    """Return inputs that any gate must be able to decide: zeros, and one of unit length."""
    row_X = np.random.default_rng(_PROBE_SEED).standard_normal(input_dim)
    return [np.zeros(input_dim, np.float32), np.asarray(row_X / np.linalg.norm(row_X), dtype=np.float32)]


def _decide(gate: Gate, version: str, inputs: Sequence[FloatArray]) -> list[RouteDecision]:
    """Return the first steps' decisions, after a check of them and of the second steps'."""
    decider = Decider(gate, version)
    try:
        first = decider.decide([RouteRequest(input_X=input_X) for input_X in inputs])
        second = decider.decide(
            [RouteRequest(input_X=input_X, hidden_H=one.hidden_H) for input_X, one in zip(inputs, first, strict=True)]
        )
    except RoutingError as error:
        raise CheckpointError(f"gate {version}: shadow check: {error}") from error
    for decision in (*first, *second):
        _check(decision, version)
    return first


def _check(decision: RouteDecision, version: str) -> None:
    probability_A, count = decision.probability_A, len(decision.agents)
    is_valid = (
        bool(np.isfinite(probability_A).all())
        and bool(np.isfinite(decision.hidden_H).all())
        and abs(float(probability_A.sum()) - 1.0) <= _SUM_TOLERANCE
        and sorted(decision.ranking) == list(range(count))
        and 1 <= decision.k <= count
    )
    if not is_valid:
        raise CheckpointError(
            f"gate {version}: shadow check: a decision with probabilities {probability_A.tolist()} and k {decision.k} is not "
            "valid; probabilities must be finite and sum to 1, k must lie between 1 and the number of agents; train it again"
        )


def _first(decision: RouteDecision) -> str:
    return decision.agents[decision.ranking[0]]
