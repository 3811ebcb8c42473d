"""Routing decisions for serving: requests in, decisions out, in padded micro-batches.

The router actor, the ingress's local fallback, the in-process router and replay all decide through `Decider`. A
decision does not depend on what else is in its batch, so that a trace replays bit for bit. Shape letters: B rows of a
padded micro-batch, A agents in the pool, H gate hidden, X gate input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmoa.core.activation import ActivationBatch, activate
from dmoa.core.gate import Gate
from dmoa.core.inference import kernel_of
from dmoa.errors import NoAgentError, RoutingError
from dmoa.types import FloatArray, RouteDecision, RouteRequest


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
        self._has_cascade = gate.spec.cascade and gate.spec.theta is not None

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
        active = activate(
            kernel.logits_BA,
            available_BA,
            temperature=spec.temperature,
            rule=spec.rule,
            mass=spec.mass,
            max_agents_B=max_agents_B,
        )
        limit_B = max_agents_B if self._has_cascade else active.k_B
        return self._records(active, left_out, kernel.next_BH.copy(), limit_B.tolist())

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
            f"route: {name} has shape {value.shape}, allowed is {rows.shape[1:]}; "
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
        self, active: ActivationBatch, left_out: list[list[int]], next_BH: FloatArray, limits: list[int]
    ) -> list[RouteDecision]:
        agents, theta = self.spec.agents, self.spec.theta
        # Padding rows end with left_out, the shortest of these.
        rows = zip(
            left_out,
            active.probability_BA,
            active.ranking_BA.tolist(),
            active.k_B.tolist(),
            active.mass_B.tolist(),
            next_BH,
            limits,
            strict=False,
        )
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
            )
            for indices, probability_A, ranking, k, mass, next_H, limit in rows
        ]
