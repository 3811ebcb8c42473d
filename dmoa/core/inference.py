"""The gate's arithmetic for serving: one fixed batch, few operations, rows that do not depend on each other.

`core/decision` fills the input rows, runs the kernel and hands the logits to `core/activation`; training uses
`Gate.forward`, which computes the same function. `GateKernel` is for the cores with a GRU, `MemorylessKernel` for the
others. Shape letters: B rows of the fixed batch, A agents in the pool, H gate hidden, X gate input, K inputs and N
outputs of one matrix product (in this file alone).

A matrix product may round a row by its place in the batch, its neighbours' number, or the number of threads. Here the
batch has one fixed shape, widths are padded to whole vectors, one thread computes, and a probe at start makes sure
that equal rows give equal bits; where they do not, every row is multiplied by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dmoa.core.gate import Gate
from dmoa.core.threads import one_thread
from dmoa.types import FloatArray

_LANES = 16
"""Floats of the widest CPU vector: padded widths leave no remainder that would be rounded in another way."""
_NUM_PROBES = 4

Product = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Writes x_BK @ weight_KN + bias_N to out_BN: (x_BK, weight_KN, bias_N, out_BN)."""


def product_together(x_BK: Tensor, weight_KN: Tensor, bias_N: Tensor, out_BN: Tensor) -> None:
    """Multiply all rows at once. The weight is stored inputs first: for few rows twice as fast as outputs first."""
    torch.addmm(bias_N, x_BK, weight_KN, out=out_BN)


def product_apart(x_BK: Tensor, weight_KN: Tensor, bias_N: Tensor, out_BN: Tensor) -> None:
    """Multiply every row by itself: slower, and independent of the batch on any machine."""
    for row in range(len(x_BK)):
        torch.addmm(bias_N, x_BK[row : row + 1], weight_KN, out=out_BN[row : row + 1])


def rows_agree(product: Product, num_rows: int, weight_KN: Tensor, bias_N: Tensor) -> bool:
    """Return whether a product gives equal rows equal bits, wherever they stand in the batch."""
    generator = torch.Generator().manual_seed(0)
    out_BN = torch.empty(num_rows, len(bias_N))
    for _ in range(_NUM_PROBES):
        x_BK = torch.randn(len(weight_KN), generator=generator).repeat(num_rows, 1)
        product(x_BK, weight_KN, bias_N, out_BN)
        if not bool((out_BN == out_BN[0]).all()):
            return False
    return True


class _Linear:
    """One affine map with padded, transposed weights and an output buffer of the fixed batch."""

    def __init__(self, weight_KN: Tensor, bias_N: Tensor, num_rows: int) -> None:
        self._weight_KN = weight_KN.contiguous()
        self._bias_N = bias_N
        self._out_BN = torch.zeros(num_rows, len(bias_N))
        self.out_BN: FloatArray = self._out_BN.numpy()
        finite_KN, finite_N = torch.nan_to_num(self._weight_KN), torch.nan_to_num(bias_N)
        is_safe = rows_agree(product_together, num_rows, finite_KN, finite_N)
        self._product: Product = product_together if is_safe else product_apart

    def run(self, x_BK: Tensor) -> None:
        self._product(x_BK, self._weight_KN, self._bias_N, self._out_BN)


class GateKernel:
    """One step of a GRU for a fixed number of rows, in place: fill `x_BX` and `hidden_BH`, `run`, read the results.

    Holds a copy of the weights. Rows that are not filled cost the same. Not safe to use from two
    threads at once.
    """

    def __init__(self, gate: Gate, batch_size: int) -> None:
        spec = gate.spec
        num_agents, hidden = len(spec.agents), spec.hidden
        input_pad, hidden_pad = _padded(spec.input_dim), _padded(hidden)
        self._is_reset = spec.core == "reset"
        with torch.no_grad(), one_thread():
            self._input = _Linear(*_gru_blocks(gate.weight_ih, gate.bias_ih, input_pad), batch_size)
            self._state = _Linear(*_gru_blocks(gate.weight_hh, gate.bias_hh, hidden_pad), batch_size)
            self._head = _head_linear(gate, hidden_pad, batch_size)
        self._x, self._hidden, self._next = (torch.zeros(batch_size, n) for n in (input_pad, hidden_pad, hidden_pad))
        self._next_padded: FloatArray = self._next.numpy()
        self._hidden_padded: FloatArray = self._hidden.numpy()
        self._gates: FloatArray = np.zeros((batch_size, 2 * hidden_pad), dtype=np.float32)
        self._new: FloatArray = np.zeros((batch_size, hidden_pad), dtype=np.float32)
        self.x_BX: FloatArray = self._x.numpy()[:, : spec.input_dim]
        """Input rows [B, X]."""
        self.hidden_BH: FloatArray = self._hidden_padded[:, :hidden]
        """State rows before the step [B, H]."""
        self.next_BH: FloatArray = self._next_padded[:, :hidden]
        """State rows after the step [B, H]; overwritten by the next run."""
        self.logits_BA: FloatArray = self._head.out_BN[:, :num_agents]
        """Logits [B, A]; overwritten by the next run."""

    def run(self) -> None:
        """Take one step of every row."""
        if self._is_reset:
            self._hidden.zero_()
        with one_thread(), np.errstate(invalid="ignore", over="ignore"):
            self._input.run(self._x)
            self._state.run(self._hidden)
            self._combine()
            self._head.run(self._next)

    def _combine(self) -> None:
        """next = n + z (h - n), n = tanh(input_n + r state_n); sigmoid(a) as (tanh(a/2) + 1)/2, a halved in the weights."""
        width = self._new.shape[1]
        input_B3H, state_B3H, gates, new, after = (
            self._input.out_BN,
            self._state.out_BN,
            self._gates,
            self._new,
            self._next_padded,
        )
        np.add(input_B3H[:, : 2 * width], state_B3H[:, : 2 * width], out=gates)
        np.tanh(gates, out=gates)
        gates += 1.0
        gates *= 0.5
        np.multiply(gates[:, :width], state_B3H[:, 2 * width :], out=new)
        new += input_B3H[:, 2 * width :]
        np.tanh(new, out=new)
        np.subtract(self._hidden_padded, new, out=after)
        after *= gates[:, width:]
        after += new


class MemorylessKernel:
    """The same in place of `GateKernel` for the cores `linear` and `mlp`: `hidden_BH` is not read, `next_BH` is 0."""

    def __init__(self, gate: Gate, batch_size: int) -> None:
        spec = gate.spec
        input_pad = _padded(spec.input_dim)
        self._layer: _Linear | None = None
        with torch.no_grad(), one_thread():
            if spec.core == "mlp":
                hidden_pad = _padded(spec.hidden)
                weight_KN = _filled((input_pad, hidden_pad), gate.layer_weight.t())
                self._layer = _Linear(weight_KN, _filled((hidden_pad,), gate.layer_bias), batch_size)
                self._head = _head_linear(gate, hidden_pad, batch_size)
            else:
                self._head = _head_linear(gate, input_pad, batch_size)
        self._x = torch.zeros(batch_size, input_pad)
        self.x_BX: FloatArray = self._x.numpy()[:, : spec.input_dim]
        """Input rows [B, X]."""
        self.hidden_BH: FloatArray = np.zeros((batch_size, spec.hidden), dtype=np.float32)
        """State rows before the step [B, H]; not read."""
        self.next_BH: FloatArray = np.zeros((batch_size, spec.hidden), dtype=np.float32)
        """State rows after the step [B, H]: zeros."""
        self.logits_BA: FloatArray = self._head.out_BN[:, : len(spec.agents)]
        """Logits [B, A]; overwritten by the next run."""

    def run(self) -> None:
        """Take one step of every row."""
        with one_thread(), np.errstate(invalid="ignore", over="ignore"):
            if self._layer is None:
                self._head.run(self._x)
                return
            self._layer.run(self._x)
            np.tanh(self._layer.out_BN, out=self._layer.out_BN)
            self._head.run(torch.from_numpy(self._layer.out_BN))


def kernel_of(gate: Gate, batch_size: int) -> GateKernel | MemorylessKernel:
    """Return the kernel for a gate's core."""
    return (GateKernel if gate.spec.core in ("gru", "reset") else MemorylessKernel)(gate, batch_size)


def _head_linear(gate: Gate, input_pad: int, num_rows: int) -> _Linear:
    weight_AC, bias_A = gate.head()
    agents_pad = _padded(len(gate.spec.agents))
    return _Linear(_filled((input_pad, agents_pad), weight_AC.t()), _filled((agents_pad,), bias_A), num_rows)


def _padded(width: int) -> int:
    return -(-width // _LANES) * _LANES


def _filled(shape: tuple[int, ...], values: Tensor) -> Tensor:
    """Return zeros of `shape` with `values` in the corner, as float32 on the CPU."""
    padded = torch.zeros(shape)
    padded[tuple(slice(0, n) for n in values.shape)] = values.detach().to("cpu", torch.float32)
    return padded


def _gru_blocks(weight: Tensor, bias: Tensor, input_pad: int) -> tuple[Tensor, Tensor]:
    """Return weight [K, 3 x padded H] and bias of a GRU's map, each gate padded; r and z halved for the tanh form."""
    width = _padded(len(bias) // 3)
    weights, biases = [], []
    for gate_weight, gate_bias, scale in zip(weight.chunk(3), bias.chunk(3), (0.5, 0.5, 1.0), strict=True):
        weights.append(_filled((input_pad, width), gate_weight.t() * scale))
        biases.append(_filled((width,), gate_bias * scale))
    return torch.cat(weights, dim=1), torch.cat(biases)
