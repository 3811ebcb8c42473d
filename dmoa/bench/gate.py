"""P1: what a gate decision costs beside the bare matrix products that it cannot do without.

Runs in process, without Ray and without a model: sixteen agents, the default preset's sizes, random weights and
inputs, one full padded batch, one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import linear

from dmoa.bench.harness import BenchResult, interleave, ratio, record, seconds_per_call, spread
from dmoa.config import GateConfig
from dmoa.core.activation import activate
from dmoa.core.gate import Gate, GateSpec, init_gate, weights_version
from dmoa.core.inference import Decider, GateKernel
from dmoa.types import RouteRequest

NUM_AGENTS = 16
BATCH_SIZE = 8
BAR = 1.5
_CALLS = 300
"""Calls per figure, their median: some 50 ms, and a call that lost its core does not count."""


def run(rounds: int = 15) -> list[BenchResult]:
    """Return P1 (GRU, head and activation against bare products) and, reported beside it, the whole decision and times."""
    spec = GateSpec.from_config(GateConfig(), tuple(f"agent-{i}" for i in range(NUM_AGENTS)))
    gate = init_gate(spec, seed=0)
    requests = _requests(spec)
    arms = {"products": _products(gate), "core": _core(gate, requests), "decide": _decide(gate, requests)}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = interleave({name: _timed(call) for name, call in arms.items()}, rounds)
    finally:
        torch.set_num_threads(num_threads)
    return [
        _ratio_result("P1", seconds, "core", "GRU + head + activation of a full padded batch, inputs in place", at_most=BAR),
        _ratio_result("P1.decide", seconds, "decide", "Decider.decide: stacking, core, checks and building the records"),
        *(_time_result(name, figures) for name, figures in seconds.items()),
    ]


def _requests(spec: GateSpec) -> list[RouteRequest]:
    rng = np.random.default_rng(0)
    return [
        RouteRequest(
            input_X=(rng.standard_normal(spec.input_dim) / np.sqrt(spec.embedding_dim)).astype(np.float32),
            hidden_H=rng.uniform(-1, 1, spec.hidden).astype(np.float32),
        )
        for _ in range(BATCH_SIZE)
    ]


def _products(gate: Gate) -> Callable[[], object]:
    """Return the reference: two `linear` of the GRU's sizes and one of the head's, same batch, weights as torch keeps them."""
    spec = gate.spec
    x_BX, hidden_BH = torch.randn(BATCH_SIZE, spec.input_dim), torch.randn(BATCH_SIZE, spec.hidden)
    head_weight_AH, head_bias_A = (tensor.detach() for tensor in gate.head())
    weights = [tensor.detach() for tensor in (gate.weight_ih, gate.bias_ih, gate.weight_hh, gate.bias_hh)]
    weight_ih, bias_ih, weight_hh, bias_hh = weights

    def call() -> object:
        with torch.inference_mode():
            linear(x_BX, weight_ih, bias_ih)
            linear(hidden_BH, weight_hh, bias_hh)
            return linear(hidden_BH, head_weight_AH, head_bias_A)

    return call


def _core(gate: Gate, requests: list[RouteRequest]) -> Callable[[], object]:
    """Return GRU, head and activation as `Decider` runs them, without filling rows and building records."""
    spec = gate.spec
    kernel = GateKernel(gate, BATCH_SIZE)
    for row, request in enumerate(requests):
        kernel.x_BX[row], kernel.hidden_BH[row] = request.input_X, request.hidden_H
    available_BA = np.ones((BATCH_SIZE, NUM_AGENTS), dtype=np.bool_)
    max_agents_B = np.full(BATCH_SIZE, spec.max_agents, dtype=np.int64)

    def call() -> object:
        kernel.run()
        return activate(
            kernel.logits_BA,
            available_BA,
            temperature=spec.temperature,
            rule=spec.rule,
            mass_left=spec.mass_left,
            max_agents_B=max_agents_B,
        )

    return call


def _decide(gate: Gate, requests: list[RouteRequest]) -> Callable[[], object]:
    decider = Decider(gate, weights_version(gate), batch_size=BATCH_SIZE)
    return lambda: decider.decide(requests)


def _timed(call: Callable[[], object]) -> Callable[[], float]:
    return lambda: statistics.median(seconds_per_call(call, 1) for _ in range(_CALLS))


def _ratio_result(id_: str, seconds: dict[str, list[float]], arm: str, what: str, at_most: float | None = None) -> BenchResult:
    found = ratio(seconds[arm], seconds["products"])
    return record(
        id_,
        found,
        "x",
        engine="gate",
        note=f"{what}; against two linear of the GRU's sizes and one of the head's; A={NUM_AGENTS}, B={BATCH_SIZE}, one thread",
        at_most=at_most,
    )


def _time_result(arm: str, figures: list[float]) -> BenchResult:
    found = spread([1e6 * figure for figure in figures])
    return record(f"P1.{arm}_us", found, "us", engine="gate", note=f"time of one full padded batch of {BATCH_SIZE}")
