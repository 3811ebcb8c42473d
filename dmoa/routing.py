"""Routes in this process: gate weights by version, masks, micro-batched decisions. No Ray here.

`dmoa run` uses it as it is, the router actor holds one, and an ingress falls back on one while the actor is away. The hidden
state travels with the request, so nothing of a query is kept here.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from dmoa.config import GateConfig
from dmoa.core.gate import Gate, GateSpec, init_gate
from dmoa.core.inference import Decider
from dmoa.errors import RoutingError
from dmoa.types import FloatArray, RoutedBy, RouteDecision, RouteRequest
from dmoa.validation import redact_text

_LOG = logging.getLogger("dmoa.routing")
MAX_VERSIONS = 64
"""Versions kept in memory; older ones are loaded again when a query still names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterView:
    """What decisions hang on beside their requests and the weights."""

    current: str
    beside: str | None
    beside_below: int
    """A query begins with `beside` where the hash of its trace id, 32 bits, is below this."""
    masked: frozenset[str]
    cold: frozenset[str]


@dataclass(slots=True, kw_only=True)
class Decided:
    """What a router has counted, to be added to what another one counts."""

    begun: tuple[int, int] = (0, 0)
    """Queries that began with the current version and with the one beside it, while there was one."""
    activations: Counter[str] = field(default_factory=Counter)
    num_decisions: int = 0
    num_batches: int = 0
    inputs: list[FloatArray] = field(default_factory=list)
    """Of the newest decisions."""


class LocalRouter:
    """Routes with the weights it holds; implements `protocols.Router`."""

    def __init__(self, *, routed_by: RoutedBy = "router", reload: Callable[[str], Gate | None] | None = None) -> None:
        """`reload` fetches the weights of a version that is not in memory, or returns None."""
        self._deciders: OrderedDict[str, Decider] = OrderedDict()
        self._current: str | None = None
        self._previous: str | None = None
        self._reload = reload
        self._routed_by: RoutedBy = routed_by
        self.masked: frozenset[str] = frozenset()
        """Agents that are left out of every decision."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.cold: frozenset[str] = frozenset()
        """Agents known to have no replica running: decisions name them and are otherwise what they would be."""
        self._pending: list[tuple[RouteRequest, asyncio.Future[RouteDecision]]] = []
        self.max_wait_ms = 0.0
        """How long a decision may wait for others to share its batch."""
        self._beside: str | None = None
        self._beside_below = 0
        self.decided = Decided()
        """Counts; inputs are not kept here."""

    @property
    def current(self) -> str:
        """Version that new queries begin with. Raises RoutingError before the first install."""
        if self._current is None:
            raise RoutingError("the router holds no gate yet; install one first")
        return self._current

    @property
    def view(self) -> RouterView:
        """What decisions hang on here."""
        return RouterView(
            current=self.current, beside=self._beside, beside_below=self._beside_below, masked=self.masked, cold=self.cold
        )

    def follow(self, view: RouterView) -> None:
        """Decide from now on as the router whose view it is, with versions that can be reloaded. Raises RoutingError as `use`."""
        self.use(view.current)
        self.share(view.beside)
        self._beside_below, self.masked, self.cold = view.beside_below, view.masked, view.cold

    def take_decided(self) -> Decided:
        """Return what was counted since the last call, without inputs."""
        decided, self.decided = self.decided, Decided()
        return decided

    def add_decided(self, decided: Decided) -> None:
        """Count what another router decided."""
        own = self.decided
        own.begun = (own.begun[0] + decided.begun[0], own.begun[1] + decided.begun[1])
        own.activations.update(decided.activations)
        own.num_decisions += decided.num_decisions
        own.num_batches += decided.num_batches

    def install(self, version: str, gate: Gate) -> None:
        """Make `gate` the version that new queries begin with; running ones keep theirs."""
        self._add(version, gate)
        self._make_current(version)

    def _make_current(self, version: str) -> None:
        if self._current != version:
            self._previous, self._current = self._current, version

    def share(self, version: str | None, share: float = 0.0) -> None:
        """Let a share of new queries begin with another version that is here or can be reloaded, by a hash of their trace id.

        None: with the current one alone. Raises RoutingError as `use`.
        """
        if version is not None:
            self._decider(version)
        self._beside, self._beside_below = version, int(share * 2**32)

    def _version_for(self, request: RouteRequest) -> str | None:
        if request.gate_version is not None or self._beside is None:
            return request.gate_version or self._current
        # With the version: the next trial draws other queries.
        drawn = hashlib.blake2b(f"{self._beside}/{request.trace_id}".encode(), digest_size=4).digest()
        is_beside = int.from_bytes(drawn) < self._beside_below
        current, beside = self.decided.begun
        self.decided.begun = (current + (not is_beside), beside + is_beside)
        return self._beside if is_beside else self._current

    def use(self, version: str) -> None:
        """Make a version current that is here or can be reloaded. Raises RoutingError if it is neither."""
        self._decider(version)
        self._make_current(version)

    def _add(self, version: str, gate: Gate) -> Decider:
        decider = self._deciders[version] = Decider(gate, version)
        self._deciders.move_to_end(version)
        spare = [name for name in self._deciders if name not in (version, self._current, self._previous, self._beside)]
        for old in spare[: max(0, len(self._deciders) - MAX_VERSIONS)]:
            del self._deciders[old]
        return decider

    def report_unavailable(self, agent: str, reason: str, masked_s: float = 0.0) -> None:
        """Mask an agent until `restore` is called, which with `masked_s` is then; of several reports the longest counts."""
        if masked_s:
            loop, timer = asyncio.get_running_loop(), self._timers.get(agent)
            if timer is None or timer.when() < loop.time() + masked_s:
                if timer is not None:
                    timer.cancel()
                self._timers[agent] = loop.call_later(masked_s, self.restore, agent)
        if agent not in self.masked:
            _LOG.warning("agent %s masked: %s", agent, redact_text(reason))
        self.masked |= {agent}

    def restore(self, agent: str) -> None:
        """Let an agent take part again."""
        self.masked -= {agent}

    async def route(self, request: RouteRequest) -> RouteDecision:
        """Decide one step, in one padded batch with the requests that wait at the same moment."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[RouteDecision] = loop.create_future()
        if not self._pending:
            if self.max_wait_ms > 0:
                loop.call_later(self.max_wait_ms / 1e3, self._flush)
            else:
                loop.call_soon(self._flush)
        self._pending.append((request, future))
        return await future

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        by_version: dict[str | None, list[tuple[RouteRequest, asyncio.Future[RouteDecision]]]] = {}
        for item in pending:
            by_version.setdefault(self._version_for(item[0]), []).append(item)
        for version, items in by_version.items():
            self._answer(version, items)

    def _answer(self, version: str | None, items: list[tuple[RouteRequest, asyncio.Future[RouteDecision]]]) -> None:
        """Decide one version's requests; a request that cannot be decided must not spoil the others' batch."""
        try:
            results = self.decide([request for request, _ in items], version)
        except Exception as error:  # whatever it is belongs to those who wait: uncaught here, they would wait for ever
            if len(items) > 1:
                for item in items:
                    self._answer(version, [item])
            elif not items[0][1].done():
                items[0][1].set_exception(error)
            return
        for (_, future), result in zip(items, results, strict=True):
            if not future.done():
                future.set_result(result)

    def decide(self, requests: list[RouteRequest], version: str | None = None) -> list[RouteDecision]:
        """Decide a batch with one gate version, by default the one that its requests name.

        A request alone whose version gives non-finite output falls back to the last good one. Raises NoAgentError, RoutingError.
        """
        decider = self._decider(version or requests[0].gate_version)
        is_beside = decider.version == self._beside
        try:
            decisions = decider.decide(requests, self.masked)
        except RoutingError:
            good = self._current if is_beside else self._previous
            if good is None or decider.version == good or len(requests) > 1:  # whose fault it is the others must not feel
                raise
            _LOG.exception("gate %s failed; falling back to %s", decider.version, good)
            decisions = self._decider(good).decide(requests, self.masked)
        self.decided.num_batches += 1
        self.decided.num_decisions += len(requests)
        for decision in decisions:
            self.decided.activations.update(decision.agents[index] for index in decision.ranking[: decision.k])
        if is_beside:
            decisions = [replace(decision, is_beside=True) for decision in decisions]
        if self._routed_by == "router" and not self.cold:  # as decisions say by themselves
            return decisions
        return [replace(decision, routed_by=self._routed_by, cold=self._cold_of(decision)) for decision in decisions]

    def _cold_of(self, decision: RouteDecision) -> tuple[str, ...]:
        return tuple(name for name in decision.agents if name in self.cold and name not in decision.masked)

    def _decider(self, version: str | None) -> Decider:
        name = version or self.current
        found = self._deciders.get(name)
        if found is not None:
            return found
        gate = self._reload(name) if self._reload else None
        if gate is None:
            raise RoutingError(f"gate version {name!r} is not known; known: {', '.join(self._deciders)}")
        return self._add(name, gate)


def build_gate(config: GateConfig, agents: tuple[str, ...], profile_AD: FloatArray | None = None) -> Gate:
    """Return the untrained gate that a configuration describes: deterministic in its seed.

    `profile_AD` are the embeddings of the agents' profiles, needed by the `profile` head.
    """
    spec = GateSpec.from_config(config, agents)
    return init_gate(spec, seed=config.seed, profile_AD=None if profile_AD is None else torch.from_numpy(profile_AD))


def adopt_gate(gate: Gate, agents: tuple[str, ...], profile_AD: FloatArray) -> Gate:
    """Return a gate with the weights of a `profile` gate over other agents, described by their profiles' embeddings."""
    profiles = torch.from_numpy(profile_AD)
    spec = gate.spec.for_agents(agents)
    if gate.label_model is not None:  # which knows the other agents only, and theta is a score of its own
        spec = replace(spec, theta=None)
    adopted = Gate(spec, profile_AD=profiles)
    adopted.load_state_dict({**gate.state_dict(), "profile_AD": profiles})
    return adopted
