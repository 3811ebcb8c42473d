"""Routing decisions for serving: requests in, decisions out, in padded micro-batches.

The router actor, the ingress's local fallback, the in-process router and replay all decide through `Decider`. A
decision must not depend on what else is in its batch, so that a trace replays bit for bit. Shape letters: B rows of a
padded micro-batch, A agents in the pool, H gate hidden, X gate input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dmoa.core.activation import ActivationBatch, activate
from dmoa.core.gate import Gate
from dmoa.errors import NoAgentError, RoutingError
from dmoa.types import FloatArray, RouteDecision, RouteRequest


class Decider:
    """Decides steps with one version of the gate. Not safe to use from two threads at once."""

    def __init__(self, gate: Gate, version: str, *, batch_size: int = 8) -> None:
        """Keep a copy of the gate's weights; `batch_size` is the fixed number of rows of a micro-batch."""
        self.version = version
        self.spec = gate.spec
        self.batch_size = batch_size
        self._gate = gate
        self._index = {name: i for i, name in enumerate(gate.spec.agents)}

    def decide(self, requests: Sequence[RouteRequest], masked: frozenset[str] = frozenset()) -> list[RouteDecision]:
        """Decide one step of every request, in order. A decision does not depend on the other requests, bit for bit.

        `masked` are unavailable agents, to which a request adds its own; names outside the pool are ignored. Raises
        NoAgentError if a request has no agent left, RoutingError for a wrong shape or a non-finite input or output.
        """
        decisions: list[RouteDecision] = []
        for start in range(0, len(requests), self.batch_size):
            decisions += self._decide_batch(requests[start : start + self.batch_size], masked)
        return decisions

    def _decide_batch(self, requests: Sequence[RouteRequest], masked: frozenset[str]) -> list[RouteDecision]:
        spec = self.spec
        x_BX = np.zeros((self.batch_size, spec.input_dim), dtype=np.float32)
        hidden_BH = np.zeros((self.batch_size, spec.hidden), dtype=np.float32)
        available_BA = np.ones((self.batch_size, len(spec.agents)), dtype=np.bool_)
        max_agents_B = np.full(self.batch_size, spec.max_agents, dtype=np.int64)
        for row, request in enumerate(requests):
            if request.input_X.shape != (spec.input_dim,):
                raise RoutingError(
                    f"route: input_X has shape {request.input_X.shape}, allowed is ({spec.input_dim},); "
                    "embed with the gate's preset and encoder"
                )
            x_BX[row] = request.input_X
            if request.hidden_H is not None:
                hidden_BH[row] = request.hidden_H
            if request.max_agents is not None:
                max_agents_B[row] = min(spec.max_agents, max(1, request.max_agents))
            for name in masked.union(request.unavailable):
                if name in self._index:
                    available_BA[row, self._index[name]] = False
        if not available_BA.any(axis=1).all():
            raise NoAgentError("route: every agent of the pool is unavailable; wait until one answers again")
        with torch.inference_mode():
            logits, state = self._gate(torch.from_numpy(x_BX), torch.from_numpy(hidden_BH))
        logits_BA, next_BH = logits.numpy(), state.numpy()
        if not (np.isfinite(logits_BA).all() and np.isfinite(next_BH).all()):
            raise RoutingError(f"route: gate {self.version} gave a non-finite output; go back to the last good version")
        active = activate(
            logits_BA,
            available_BA,
            temperature=spec.temperature,
            rule=spec.rule,
            mass=spec.mass,
            max_agents_B=max_agents_B,
        )
        return [self._record(row, active, available_BA, next_BH) for row in range(len(requests))]

    def _record(
        self,
        row: int,
        active: ActivationBatch,
        available_BA: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
        next_BH: FloatArray,
    ) -> RouteDecision:
        agents = self.spec.agents
        available_A = available_BA[row]
        num_available = int(available_A.sum())
        return RouteDecision(
            gate_version=self.version,
            agents=agents,
            probability_A=active.probability_BA[row].copy(),
            ranking=tuple(active.ranking_BA[row, :num_available].tolist()),
            k=int(active.k_B[row]),
            mass=float(active.mass_B[row]),
            masked=tuple(name for name, ok in zip(agents, available_A, strict=True) if not ok),
            hidden_H=next_BH[row].copy(),
        )
