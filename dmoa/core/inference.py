"""Runs a gate for serving: kernels of a fixed batch size, so that a decision does not depend on what else is in the batch.

`Decider` takes requests to decisions, through `core/activation`, on one thread. Short work is slower on several threads wherever
other processes want the cores too, and may round differently there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dmoa.core.activation import ActivationBatch, activate
from dmoa.core.gate import Gate
from dmoa.core.in_step import context_part
from dmoa.core.sequential import AGENT_PRICE
from dmoa.errors import NoAgentError, RoutingError
from dmoa.types import FloatArray, RouteDecision, RouteRequest

_LANES = 16
"""Floats of the widest CPU vector: padded widths leave no remainder that would be rounded in another way."""
_NUM_PROBES = 4

Product = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Writes x_BK @ weight_KN + bias_N to out_BN: (x_BK, weight_KN, bias_N, out_BN)."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread in this block. The setting is the calling thread's own: others keep theirs."""
    # On several threads every operation of short work waits for the last thread to be scheduled.
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def product_together(x_BK: Tensor, weight_KN: Tensor, bias_N: Tensor, out_BN: Tensor) -> None:
    """Multiply all rows at once. The weight is stored inputs first: for few rows twice as fast as outputs first."""
    torch.addmm(bias_N, x_BK, weight_KN, out=out_BN)


def product_apart(x_BK: Tensor, weight_KN: Tensor, bias_N: Tensor, out_BN: Tensor) -> None:
    """Multiply every row by itself: slower, and independent of the batch on any machine."""
    for row in range(len(x_BK)):
        torch.addmm(bias_N, x_BK[row : row + 1], weight_KN, out=out_BN[row : row + 1])


@cache
def rows_agree(product: Product, num_rows: int, num_inputs: int, num_outputs: int) -> bool:
    """Return whether a product of this shape gives equal rows equal bits, wherever they stand in the batch."""
    generator = torch.Generator().manual_seed(0)
    weight_KN = torch.randn(num_inputs, num_outputs, generator=generator)
    bias_N, out_BN = torch.randn(num_outputs, generator=generator), torch.empty(num_rows, num_outputs)
    for _ in range(_NUM_PROBES):
        x_BK = torch.randn(num_inputs, generator=generator).repeat(num_rows, 1)
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
        is_safe = rows_agree(product_together, num_rows, *weight_KN.shape)
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
        input_B3H, state_B3H = self._input.out_BN, self._state.out_BN
        gates, new, after = self._gates, self._new, self._next_padded
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
    """The same in place of `GateKernel` for the cores `linear` and `mlp`: `hidden_BH` is not read, `next_BH` is zeros."""

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
        self.hidden_BH: FloatArray = np.zeros((batch_size, spec.hidden), dtype=np.float32)
        self.next_BH: FloatArray = np.zeros((batch_size, spec.hidden), dtype=np.float32)
        self.logits_BA: FloatArray = self._head.out_BN[:, : len(spec.agents)]

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


class Decider:
    """Decides steps with one version of the gate. Not safe to use from two threads at once."""

    def __init__(self, gate: Gate, version: str, *, batch_size: int = 8) -> None:
        """Copy the gate's weights; `batch_size` is the fixed number of rows of a micro-batch."""
        self.version = version
        self.spec = gate.spec
        self.batch_size = batch_size
        self._kernel = kernel_of(gate, batch_size)
        self._index = {name: i for i, name in enumerate(gate.spec.agents)}
        self._anchors = gate.spec.anchors if gate.spec.score == "anchored" else None
        self._label_model = model = gate.label_model
        self._models = [None] if model is None else [model.in_context(context) for context in range(len(model.ability_CA))]
        self._agent_price = AGENT_PRICE if model is None else gate.spec.agent_price
        self._competence_CA = model.competence() if model is not None and model.lead_C.any() else None
        self._has_cascade = gate.spec.cascade and (gate.spec.theta is not None or gate.label_model is not None)

    def decide(self, requests: Sequence[RouteRequest], masked: frozenset[str] = frozenset()) -> list[RouteDecision]:
        """Decide one step of every request, in order. A decision does not depend on the other requests, bit for bit.

        `masked` are unavailable agents, to which a request adds its own; names outside the pool are ignored. A
        request's `max_agents` lowers K and never raises it. Raises NoAgentError if a request has no agent left,
        RoutingError for a wrong shape or a non-finite input or output; one such request fails the whole call.
        """
        size = self.batch_size
        batches = (requests[start : start + size] for start in range(0, len(requests), size))
        return [decision for batch in batches for decision in self._decide_batch(batch, masked)]

    def _decide_batch(self, requests: Sequence[RouteRequest], masked: frozenset[str]) -> list[RouteDecision]:
        spec, kernel = self.spec, self._kernel
        available_BA = np.ones((self.batch_size, len(spec.agents)), dtype=np.bool_)
        max_agents_B = np.full(self.batch_size, spec.max_agents, dtype=np.int64)
        left_out = [self._left_out(masked, request.unavailable) for request in requests]
        for row, (request, indices) in enumerate(zip(requests, left_out, strict=True)):
            self._fill(row, request)
            if indices:
                available_BA[row, indices] = False
            if request.max_agents is not None:
                max_agents_B[row] = min(spec.max_agents, max(1, request.max_agents))
        kernel.x_BX[len(requests) :] = 0.0
        kernel.hidden_BH[len(requests) :] = 0.0
        kernel.run()
        if not np.isfinite(kernel.logits_BA).all():
            raise self._not_finite(requests)
        contexts = self._contexts(requests)
        if self._competence_CA is not None:
            self._led(contexts)
        active = activate(
            kernel.logits_BA,
            available_BA,
            temperature=spec.temperature,
            rule=spec.rule,
            mass_left=spec.mass_left,
            max_agents_B=max_agents_B,
        )
        limit_B = max_agents_B if self._has_cascade else active.k_B
        return self._records(active, left_out, kernel.next_BH.copy(), limit_B.tolist(), contexts)

    def _contexts(self, requests: Sequence[RouteRequest]) -> list[int]:
        """Return the label model's context of each query, one by one; 0 where there is no model."""
        model, preset = self._label_model, self.spec.preset
        if model is None:
            return [0] * len(requests)
        inputs = (context_part(request.input_X, preset)[None].astype(np.float64) for request in requests)
        return [int(model.context(context_1D, 1)[0]) for context_1D in inputs]

    def _led(self, contexts: Sequence[int]) -> None:
        """Let competences rank the agents in contexts that outcomes speak of and the gate does not know (`core/told`)."""
        model, competence_CA = self._label_model, self._competence_CA
        assert model is not None
        assert competence_CA is not None
        for logits_A, context in zip(self._kernel.logits_BA, contexts, strict=False):
            lead = float(model.lead_C[context])
            if lead > 0:
                logits_A[:] = (1 - lead) * logits_A + lead * self.spec.temperature * competence_CA[context]

    def _left_out(self, masked: frozenset[str], unavailable: tuple[str, ...]) -> list[int]:
        """Return the indices of the unavailable agents in pool order."""
        if not masked and not unavailable:
            return []
        indices = sorted(self._index[name] for name in masked.union(unavailable) if name in self._index)
        if len(indices) == len(self._index):
            raise NoAgentError("route: every agent of the pool is unavailable; wait until one answers again")
        return indices

    def _fill(self, row: int, request: RouteRequest) -> None:
        x_BX, hidden_BH = self._kernel.x_BX, self._kernel.hidden_BH
        x_X, hidden_H = request.input_X, request.hidden_H
        if x_X.shape != x_BX.shape[1:]:
            raise self._misshapen("input_X", x_X, x_BX)
        x_BX[row] = x_X
        if hidden_H is None:
            hidden_BH[row] = 0.0
        elif hidden_H.shape != hidden_BH.shape[1:]:
            raise self._misshapen("hidden_H", hidden_H, hidden_BH)
        else:
            hidden_BH[row] = hidden_H

    def _misshapen(self, name: str, value: FloatArray, rows: FloatArray) -> RoutingError:
        return RoutingError(
            f"route: {name} has shape {value.shape}, expected {rows.shape[1:]}; "
            f"build it for gate {self.version} (preset {self.spec.preset!r})"
        )

    def _not_finite(self, requests: Sequence[RouteRequest]) -> RoutingError:
        for request in requests:
            for name, value in (("input_X", request.input_X), ("hidden_H", request.hidden_H)):
                if value is not None and not np.isfinite(value).all():
                    return RoutingError(
                        f"route: {name} holds NaN or infinity; only finite numbers are allowed; embed the text again"
                    )
        return RoutingError(f"route: gate {self.version} gave NaN or infinity; go back to the last good version")

    def _records(
        self, active: ActivationBatch, left_out: list[list[int]], next_BH: FloatArray, limits: list[int], contexts: list[int]
    ) -> list[RouteDecision]:
        agents, theta = self.spec.agents, self.spec.theta
        found = (array.tolist() for array in (active.ranking_BA, active.k_B, active.mass_B))
        # Padding rows end with left_out and contexts, the shortest of these.
        rows = zip(left_out, contexts, active.probability_BA, *found, next_BH, limits, strict=False)
        return [
            RouteDecision(
                gate_version=self.version,
                agents=agents,
                probability_A=probability_A,
                ranking=tuple(ranking[: len(agents) - len(indices)]),
                k=k,
                mass=mass,
                masked=tuple(agents[index] for index in indices) if indices else (),
                hidden_H=next_H,
                theta=theta,
                limit=min(limit, len(agents) - len(indices)),
                anchors=self._anchors,
                max_agents=self.spec.max_agents,
                label_model=self._models[context],
                agent_price=self._agent_price,
            )
            for indices, context, probability_A, ranking, k, mass, next_H, limit in rows
        ]
