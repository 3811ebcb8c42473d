"""The ingress's side of the router: calls the actor, and stands in for it while it is away.

It makes itself ready for that soon after it has started, beside the queries: to import torch takes seconds, which the queries of
the moment at which the router dies would wait for. That costs an ingress some 200 MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorDiedError, RayError, RayTaskError

from dmoa.config import Config
from dmoa.errors import CheckpointError, ConfigError, DmoaError, NoAgentError, RoutingError
from dmoa.serving.actors import once_up, pack_record, unpack_record
from dmoa.serving.agent_client import MissingReplicas
from dmoa.serving.failures import raised
from dmoa.serving.placement import deployment_names
from dmoa.serving.rollover import pool_version
from dmoa.types import FloatArray, RouteDecision, RouteRequest, RouterStatus

if TYPE_CHECKING:
    from dmoa.core.gate import Gate
    from dmoa.routing import LocalRouter, RouterView


_LOG = logging.getLogger("dmoa.router")
ROUTE_TIMEOUT_S = 0.7
"""How long an ingress waits at most for the router, which answers within milliseconds, before it decides by itself."""
PATIENCE_S, PATIENCE_FACTOR, NUM_ANSWERED = 0.2, 4.0, 64
"""It waits less where its last `NUM_ANSWERED` answers came soon: `PATIENCE_FACTOR` times the slowest, `PATIENCE_S` at least."""
STATUS_TIMEOUT_S = 2.0
AWAY_S = 1.0
"""How long an ingress then goes on by itself before it tries the router again: one query does, the others go on without it."""
TRIAL_S = 0.3
"""How long that query waits."""
READY_S = 3.0
"""How long an ingress that has started waits until it makes itself ready for that: what else starts now needs the CPU first."""
MASKED_S = 2.0
"""How long a dead agent is left out while nobody can say whether it is back; one query then tries it."""
TRIED_S = 0.5
"""How long the others wait for word that it failed there before they ask it too."""
LOOK_S = 1.0
"""How long the router may keep an ingress that follows it waiting for news."""
MAX_TOLD = 64
"""Inputs of decisions that an ingress tells the router of at a time."""
MAX_HELD = 8
"""Copies of weights that an ingress holds beside the current version's."""


def told(error: BaseException | None) -> DmoaError:
    """Return an error of a decision as it is told to a query."""
    return error if isinstance(error, DmoaError) else NoAgentError(f"router: {error}")


class RemoteRouter:
    """Routes by the router actor, or here while it is away; implements `protocols.Router`."""

    def __init__(
        self,
        actor: Any,
        config: Config,
        configured: str | None = None,
        *,
        away_s: float = AWAY_S,
        trial_s: float = TRIAL_S,
        ready_s: float = READY_S,
    ) -> None:
        """`configured` is the version of the configured checkpoint, None where none is configured.

        An actor that went away is tried again after `away_s`, by one query that waits for it for `trial_s` at most. What it takes
        to decide here is made ready after `ready_s`, or once it is needed.
        """
        self.away_s, self.trial_s, self._ready_s = away_s, trial_s, ready_s
        self._actor = actor
        self._config = config
        self._configured = configured
        self._version = pool_version(config)
        self._weights: dict[str, dict[str, bytes]] = {}
        self._current: str | None = None
        self._fetching: set[str] = set()
        self._building: asyncio.Task[LocalRouter] | None = None
        self._later: asyncio.TimerHandle | None = None
        self._masked_until: dict[str, float] = {}
        self._tried: set[str] = set()
        self._answered_s: deque[float] = deque([ROUTE_TIMEOUT_S], maxlen=NUM_ANSWERED)
        self._masked: tuple[str, ...] = ()
        self._cold: frozenset[str] = frozenset()
        self._is_away, self._away_until = False, 0.0
        self._waiting: list[tuple[RouteRequest, asyncio.Future[RouteDecision]]] = []
        self._is_asking = False
        self._view: RouterView | None = None
        self._view_until = 0.0
        self._inputs: deque[FloatArray] = deque(maxlen=MAX_TOLD)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Hand the configuration to the actor, once up, and copy its weights; returns the gate version. Raises ConfigError."""
        try:
            text = self._config.model_dump_json()
            version: str = await once_up(lambda: self._actor.configure.remote(text, self._configured))
        except (RayTaskError, ActorDiedError) as error:
            found = raised(str(error))
            if found is None or found[0] not in (ConfigError.__name__, CheckpointError.__name__):
                raise
            raise ConfigError(found[1]) from error
        self._current = version
        await self._fetch(version)
        self._later = asyncio.get_running_loop().call_later(self._ready_s, self._stand_in)
        if self._config.router.decide == "ingress":
            self._spawn(self._follow())
        return version

    async def route(self, request: RouteRequest) -> RouteDecision:
        """Decide one step. Raises NoAgentError, RoutingError, PoolChangedError."""
        if self._follows and (request.gate_version or self._current) in self._weights:
            with contextlib.suppress(RoutingError):  # the router may know a version to fall back on
                return await self._decide_here(request)
        if (began := time.monotonic()) >= self._away_until:
            is_trial = self._is_away
            if is_trial:
                self._away_until = began + self.away_s
            try:
                async with asyncio.timeout(self.trial_s if is_trial else self._patience_s):
                    decision = await self._ask(request)
            except RayTaskError as error:
                raise told(error.cause) from error
            except (RayError, TimeoutError) as error:
                self._goes_away(error)
            else:
                self._is_away, self._away_until = False, 0.0
                self._answered_s.append(time.monotonic() - began)
                self._masked, self._cold = decision.masked, frozenset(decision.cold)
                self._keep(decision.gate_version, is_current=request.gate_version is None and not decision.is_beside)
                return decision
        return await self._decide_here(request)

    @property
    def _patience_s(self) -> float:
        return min(ROUTE_TIMEOUT_S, max(PATIENCE_S, PATIENCE_FACTOR * max(self._answered_s)))

    def _goes_away(self, error: Exception) -> None:
        """Decide here from now on, without the agents that the router left out at last."""
        _LOG.warning("router is away (%s): deciding here", type(error).__name__)
        now = time.monotonic()
        if not self._is_away:
            held = {agent: until for agent, until in self._masked_until.items() if until > now}
            self._masked_until, self._tried = dict.fromkeys(self._masked, now + MASKED_S) | held, set()
        self._is_away, self._away_until = True, now + self.away_s

    async def _ask(self, request: RouteRequest) -> RouteDecision:
        """Have the actor decide, in one call with whatever waits when its last one is over: a call costs more than a decision."""
        future: asyncio.Future[RouteDecision] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if not self._is_asking:
            self._is_asking = True
            self._spawn(self._ask_all())
        return await future

    async def _ask_all(self) -> None:
        try:
            while self._waiting:
                asked, self._waiting = [item for item in self._waiting if not item[1].done()], []
                try:
                    async with asyncio.timeout(ROUTE_TIMEOUT_S):
                        packed = await self._actor.route.remote(pack_record([request for request, _ in asked]), self._version)
                    found: list[RouteDecision | Exception] = unpack_record(packed)
                except (RayError, TimeoutError) as error:
                    found = [error] * len(asked)
                for (_, future), one in zip(asked, found, strict=True):
                    if future.done():
                        continue
                    if isinstance(one, Exception):
                        future.set_exception(one)
                    else:
                        future.set_result(one)
        finally:
            self._is_asking = False

    def report_unavailable(self, agent: str, reason: str, masked_s: float = 0.0) -> None:
        """Tell the actor; while it is away the agent is masked here for a short while."""
        self._masked_until[agent] = max(self._masked_until.get(agent, 0.0), time.monotonic() + max(MASKED_S, masked_s))
        self._tried.discard(agent)
        self._spawn(self._tell(agent, reason, masked_s))

    async def status(self) -> RouterStatus | None:
        """Return the actor's own account of itself; None while it is away."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                return await self._actor.status.remote()
        except (RayError, TimeoutError):
            return None

    async def missing_replicas(self) -> MissingReplicas:
        """Return the agents that no replica can be answering, though they should have one; nobody while the router is away.

        Those too that a newer pool no longer has: their deployments are deleted, and Serve keeps calls to them for ever.
        """
        status = await self.status()
        if status is None:
            return MissingReplicas()
        deleted = frozenset(deployment_names(self._config)) - frozenset(status.agents)
        return MissingReplicas(frozenset(status.gone) | deleted, status.pool_version, frozenset(status.cold))

    async def _tell(self, agent: str, reason: str, masked_s: float) -> None:
        with contextlib.suppress(RayError):
            await self._actor.report_unavailable.remote(agent, reason, masked_s)

    def _keep(self, version: str, *, is_current: bool) -> None:
        """Take a copy of a version not seen before, off the critical path."""
        if is_current:
            self._current = version
        if version not in self._weights and version not in self._fetching:
            self._spawn(self._fetch(version))

    async def _fetch(self, version: str) -> None:
        self._fetching.add(version)
        try:
            self._weights[version] = await self._actor.weights.remote(version)
            for old in [held for held in self._weights if held not in (version, self._current)][:-MAX_HELD]:
                del self._weights[old]
        except RayError as error:
            _LOG.warning("no copy of gate %s: %s", version, type(error).__name__)
        finally:
            self._fetching.discard(version)

    async def _decide_here(self, request: RouteRequest) -> RouteDecision:
        version = request.gate_version or self._current
        if version not in self._weights:
            # The orchestrator asks again while the query's patience lasts, and the router comes back with all versions.
            raise NoAgentError(f"router: it is away, and there is no copy of gate {version} here yet; ask again")
        local, now = await asyncio.shield(self._stand_in()), time.monotonic()
        lost = frozenset(agent for agent, until in self._masked_until.items() if until > now)
        if self._view is not None and self._follows:
            local.masked = self._view.masked | lost
            self._inputs.append(request.input_X)
            return await local.route(request)
        if self._current in self._weights:
            local.use(self._current)
        local.cold = self._cold  # as the router last knew
        tried = self._over(now)
        local.masked = lost | tried
        if not tried:
            return await local.route(request)
        local.masked = lost - tried
        try:
            decision = local.decide([request], version)[0]
        finally:
            local.masked = lost | tried
        asked = {decision.agents[index] for index in decision.ranking[: decision.k]} & tried
        self._tried |= asked
        self._masked_until.update(dict.fromkeys(asked, now + TRIED_S))
        return decision

    def _over(self, now: float) -> frozenset[str]:
        """Return the agents whose time is over and which nobody has tried; those that were tried, and did not fail, are back.

        Where else nobody could be asked, an agent is tried again after `TRIED_S`.
        """
        for agent in [tried for tried in self._tried if self._masked_until[tried] <= now]:
            del self._masked_until[agent]
            self._tried.remove(agent)
        early_s = MASKED_S - TRIED_S if set(self._config.agent_names) <= self._masked_until.keys() else 0.0
        return frozenset(agent for agent, until in self._masked_until.items() if until <= now + early_s) - self._tried

    def _stand_in(self) -> asyncio.Task[LocalRouter]:
        """Return what builds, or has built, the router of this process: once, whoever asks."""
        if self._building is None or (self._building.done() and self._building.exception() is not None):
            self._building = asyncio.get_running_loop().create_task(asyncio.to_thread(self._build_local))
        return self._building

    @property
    def _follows(self) -> bool:
        """Whether the router's view is known, and not too old."""
        return time.monotonic() < self._view_until

    async def _follow(self) -> None:
        """Keep up with the router's view and weights, and tell it what was decided by them."""
        local = await asyncio.shield(self._stand_in())
        while True:
            try:
                view = await self._look(local)
                for version in (view.current, view.beside):
                    if version is not None and version not in self._weights:
                        await self._fetch(version)
                local.follow(view)
            except (RayError, TimeoutError, DmoaError) as error:  # weights that cannot be read among them
                _LOG.warning("router is not followed (%s): asking it", type(error).__name__)
                self._view, self._view_until = None, 0.0
                await asyncio.sleep(self.away_s)
            else:
                self._view, self._current, self._view_until = view, view.current, time.monotonic() + LOOK_S + ROUTE_TIMEOUT_S

    async def close(self) -> None:
        """Follow the router no longer, and end what is under way."""
        if self._later is not None:
            self._later.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look(self, local: LocalRouter) -> RouterView:
        """Return the router's next view. Raises RayError, TimeoutError: what was decided is then told the next time."""
        decided = local.take_decided()
        inputs = list(self._inputs)
        self._inputs.clear()
        packed = pack_record((self._view, replace(decided, inputs=inputs)))
        try:
            async with asyncio.timeout(ROUTE_TIMEOUT_S + LOOK_S):
                return unpack_record(await self._actor.look.remote(packed, self._version))
        except (RayError, TimeoutError):
            local.add_decided(decided)
            raise

    def _build_local(self) -> LocalRouter:
        from dmoa.routing import LocalRouter

        local = LocalRouter(routed_by="ingress", reload=self._load)
        if self._current in self._weights:
            local.use(self._current)
        return local

    def _load(self, version: str) -> Gate | None:
        from dmoa.checkpoint import read_files

        files = self._weights.get(version)
        return None if files is None else read_files(files, f"gate {version}")[0]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
