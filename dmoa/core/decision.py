"""Routing decisions for serving: requests in, decisions out, in padded micro-batches.

The router actor, the ingress's local fallback, the in-process router and replay all decide through `Decider`. A
decision does not depend on what else is in its batch, so that a trace replays bit for bit. Shape letters: B rows of a
padded micro-batch, A agents in the pool, H gate hidden, X gate input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmoa.core.activation import ActivationBatch, BoolArray, activate
from dmoa.core.gate import Gate
from dmoa.core.inference import GateKernel
from dmoa.errors import NoAgentError, RoutingError
from dmoa.types import FloatArray, RouteDecision, RouteRequest


class Decider:
    """Decides steps with one version of the gate. Not safe to use from two threads at once."""

    def __init__(self, gate: Gate, version: str, *, batch_size: int = 8) -> None:
        """Copy the gate's weights; `batch_size` is the fixed number of rows of a micro-batch."""
        self.version = version
        self.spec = gate.spec
        self.batch_size = batch_size
        self._kernel = GateKernel(gate, batch_size)
        self._index = {name: i for i, name in enumerate(gate.spec.agents)}

    def decide(self, requests: Sequence[RouteRequest], masked: frozenset[str] = frozenset()) -> list[RouteDecision]:
        """Decide one step of every request, in order. A decision does not depend on the other requests, bit for bit.

        `masked` are unavailable agents, to which a request adds its own; names outside the pool are ignored. A
        request's `max_agents` lowers K and never raises it. Raises NoAgentError if a request has no agent left,
        RoutingError for a wrong shape or a non-finite input or output; one such request fails the whole call.
        """
        available_A = np.ones(len(self._index), dtype=np.bool_)
        self._mask(available_A, masked)
        size = self.batch_size
        batches = (requests[start : start + size] for start in range(0, len(requests), size))
        return [decision for batch in batches for decision in self._decide_batch(batch, available_A)]

    def _decide_batch(self, requests: Sequence[RouteRequest], available_A: BoolArray) -> list[RouteDecision]:
        spec, kernel, num_rows = self.spec, self._kernel, len(requests)
        available_BA = available_A[None].repeat(self.batch_size, axis=0)
        max_agents_B = np.full(self.batch_size, spec.max_agents, dtype=np.int64)
        for row, request in enumerate(requests):
            self._fill(row, request)
            if request.unavailable:
                self._mask(available_BA[row], request.unavailable)
            if request.max_agents is not None:
                max_agents_B[row] = min(spec.max_agents, max(1, request.max_agents))
        if not available_BA[:num_rows].any(axis=1).all():
            raise NoAgentError("route: every agent of the pool is unavailable; wait until one answers again")
        kernel.x_BX[num_rows:] = 0.0
        kernel.hidden_BH[num_rows:] = 0.0
        kernel.run()
        if not np.isfinite(kernel.logits_BA).all():
            raise self._not_finite(requests)
        active = activate(
            kernel.logits_BA,
            available_BA,
            temperature=spec.temperature,
            rule=spec.rule,
            mass=spec.mass,
            max_agents_B=max_agents_B,
        )
        return self._records(num_rows, active, available_BA, kernel.next_BH.copy())

    def _fill(self, row: int, request: RouteRequest) -> None:
        kernel = self._kernel
        for name, value, rows in (("input_X", request.input_X, kernel.x_BX), ("hidden_H", request.hidden_H, kernel.hidden_BH)):
            if value is None:
                rows[row] = 0.0
            elif value.shape != rows.shape[1:]:
                raise RoutingError(
                    f"route: {name} has shape {value.shape}, allowed is {rows.shape[1:]}; "
                    f"build it for gate {self.version} (preset {self.spec.preset!r})"
                )
            else:
                rows[row] = value

    def _mask(self, available_A: BoolArray, names: Sequence[str] | frozenset[str]) -> None:
        for name in names:
            if name in self._index:
                available_A[self._index[name]] = False

    def _not_finite(self, requests: Sequence[RouteRequest]) -> RoutingError:
        for request in requests:
            for name, value in (("input_X", request.input_X), ("hidden_H", request.hidden_H)):
                if value is not None and not np.isfinite(value).all():
                    return RoutingError(
                        f"route: {name} holds NaN or infinity; only finite numbers are allowed; embed the text again"
                    )
        return RoutingError(f"route: gate {self.version} gave NaN or infinity; go back to the last good version")

    def _records(
        self, num_rows: int, active: ActivationBatch, available_BA: BoolArray, next_BH: FloatArray
    ) -> list[RouteDecision]:
        agents, num_agents = self.spec.agents, len(self.spec.agents)
        ranking, ks, masses = active.ranking_BA.tolist(), active.k_B.tolist(), active.mass_B.tolist()
        decisions = []
        for row, order in enumerate(ranking[:num_rows]):
            num_available = int(np.count_nonzero(available_BA[row]))
            decisions.append(
                RouteDecision(
                    gate_version=self.version,
                    agents=agents,
                    probability_A=active.probability_BA[row],
                    ranking=tuple(order[:num_available]),
                    k=ks[row],
                    mass=masses[row],
                    # The masked ones end the ranking, in pool order.
                    masked=() if num_available == num_agents else tuple(agents[i] for i in order[num_available:]),
                    hidden_H=next_BH[row],
                )
            )
        return decisions
