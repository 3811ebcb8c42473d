"""The shadow check: what it says of a new gate, and which gates it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmoa.core.gate import Gate, init_gate
from dmoa.errors import CheckpointError
from dmoa.serving.router.versions import Shadow, shadow_check
from dmoa.testing import DIM, fixed_gate, gate_spec
from dmoa.types import FloatArray

X = 2 * DIM + 4
P = {"a": 0.6, "b": 0.3, "c": 0.1}


def inputs(num: int) -> list[FloatArray]:
    generator = np.random.default_rng(1)
    return [generator.standard_normal(X).astype(np.float32) for _ in range(num)]


def test_it_says_what_would_have_been_decided() -> None:
    new = fixed_gate({"a": 0.1, "b": 0.2, "c": 0.7}, mass=0.8)
    found, _ = shadow_check(new, "v2", fixed_gate(P), inputs(5))
    assert found == Shadow(inputs=5, same_first=0.0, mean_k=2.0, first={"c": 1.0})
    assert shadow_check(fixed_gate(P), "v2", fixed_gate(P), inputs(3))[0].same_first == 1.0


def test_shares_add_up_and_come_largest_first() -> None:
    gate = init_gate(gate_spec("abcde", temperature=0.1), seed=3)
    found, _ = shadow_check(gate, "v2", init_gate(gate_spec("abcde", temperature=0.1), seed=4), inputs(64))
    assert sum(found.first.values()) == pytest.approx(1.0)
    assert list(found.first.values()) == sorted(found.first.values(), reverse=True)
    assert len(found.first) > 1
    assert found.same_first is not None
    assert 0 < found.same_first < 1


def test_without_inputs_the_gate_is_tried_all_the_same() -> None:
    found, _ = shadow_check(fixed_gate(P), "v2", fixed_gate(P), [])
    assert found == Shadow(inputs=0, same_first=None, mean_k=None, first={})
    with pytest.raises(CheckpointError, match="shadow check: route: gate v2 gave NaN or infinity"):
        shadow_check(overflowing(), "v2", fixed_gate(P), [])


def overflowing() -> Gate:
    """Finite weights whose logits are not."""
    gate = init_gate(gate_spec("abc"), seed=0)
    with torch.no_grad():
        gate.head_weight.fill_(3e38)
        gate.bias_ih[3:6] = -50.0  # nothing of the old state is kept,
        gate.bias_ih[6:] = 50.0  # and the new one is 1 everywhere
    return gate


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_hh", "head_bias"])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    gate = fixed_gate(P)
    with torch.no_grad():
        gate.get_parameter(name).view(-1)[0] = value
    with pytest.raises(CheckpointError, match=rf"gate v2: {name} holds NaN or infinity; only finite weights"):
        shadow_check(gate, "v2", fixed_gate(P), inputs(2))


def test_a_gate_that_fails_at_its_second_step_is_refused() -> None:
    gate = fixed_gate(P)
    with torch.no_grad():
        gate.bias_ih[6:] = 50.0  # the first state is about 1/2 everywhere ...
        gate.weight_hh[6:] = 3e38  # ... and overflows the second step's new state: 0 * inf
        gate.bias_ih[:3] = -200.0
        gate.head_weight.fill_(1.0)
    with pytest.raises(CheckpointError, match="shadow check"):
        shadow_check(gate, "v2", fixed_gate(P), inputs(1))
