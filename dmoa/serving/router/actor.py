"""The central router: one named, detached actor per app, reached through `serving/router/client`.

The actor decides in micro-batches, masks dead agents until they answer again, says in its decisions which agents are cold
(scaled to zero: those it never pings, which would wake them), and takes new gate versions while it runs:
queries under way finish with the version they began with. Versions and history lie under `router.state_uri`, so that
after a crash it comes back with the same gate. It ends when its app is gone.

An ingress creates the actor by its class, and must not pay for torch: what needs torch is imported where the actor starts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_put

from dmoa.agents.pool import fingerprint
from dmoa.config import Config
from dmoa.errors import ConfigError, DmoaError
from dmoa.serving.actors import (
    ClusterMemory,
    default_state_uri,
    end_actors,
    find_actor,
    pack_record,
    served_before_restart,
    unpack_record,
)
from dmoa.serving.agent_client import ServeAgentClient
from dmoa.serving.placement import deployment_names
from dmoa.serving.rollover import check_version, pool_version
from dmoa.serving.router.client import LOOK_S, told
from dmoa.serving.router.replica_health import presence, read_status, sleepers
from dmoa.types import FloatArray, RouteRequest, RouterStatus, is_untrained, supervision_of

if TYPE_CHECKING:
    from dmoa.core.gate import Gate
    from dmoa.serving.router.state import RouterState
    from dmoa.serving.router.versions import Change


_LOG = logging.getLogger("dmoa.router")
WATCH_INTERVAL_S = 1.0
"""How often the router looks whether its app and its agents' replicas are still there."""
MAX_MISSED = 5
"""Looks in a row without the app after which its actors end."""
MAX_RECENT = 256
"""Inputs that are kept for the shadow check of the next install."""
COME_BACK_S = 2.0
"""How long a router that could not come back after a crash waits before it tries again."""
HEAL_EVERY = 10
"""Looks after each of which what could not be written is tried again."""
LOOK_AGAIN_S = 0.05
"""How old news may be for an ingress that decides by itself."""
LISTEN_TIMEOUT_S = 10.0
JUDGE_SHARE = 0.006
"""Most of one core that judging offers takes on average: it has the process of those decisions that queries wait for."""
MAX_PAUSE_S = 20.0
"""Longest that an offer waits for that."""
SWITCH_S = 5e-4
"""How long a decision may wait for a thread that judges offers: Python's own 5 ms are longer than a step's routing."""


class RouterActor:
    """Gate weights by version, micro-batched decisions, health masks, installs on a running swarm."""

    def __init__(
        self, config_json: str, app: str, configured: str | None = None, *, watch_interval_s: float = WATCH_INTERVAL_S
    ) -> None:
        """`configured` is the version of the configured checkpoint, None where none is configured."""
        self._app = app
        self._watch_interval_s = watch_interval_s
        self._started_unix_s = time.time()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._probing: dict[str, float] = {}  # agent -> when it may be tried
        self._changing = asyncio.Lock()
        self._judge_at = 0.0
        self._recent: deque[FloatArray] = deque(maxlen=MAX_RECENT)
        served = served_before_restart(app)
        if served is None:
            ClusterMemory.forget(app)  # what another deployment of this name has left
            self._configure(Config.model_validate_json(config_json), configured)
        else:
            self._come_back(Config.model_validate(served["config"]), served["configured"])

    def _come_back(self, config: Config, configured: str | None) -> None:
        """Serve after a crash what was served before; Ray never restarts an actor whose constructor raises."""
        while True:
            try:
                self._configure(config, configured, is_patient=True)
            except (DmoaError, OSError) as error:
                _LOG.warning("router: it cannot come back yet: %s", error)
                time.sleep(COME_BACK_S)
            else:
                return

    def _begin(self) -> None:
        """Begin to watch the app; also after a restart, when nobody but queries calls."""
        if self._watcher is None or self._watcher.done():
            self._watcher = self._spawn(self._watch())

    async def configure(self, config_json: str, configured: str | None = None) -> str:
        """Serve a configuration from now on; returns the current gate version. The same one, checkpoint too, changes nothing."""
        config = Config.model_validate_json(config_json)
        async with self._changing:
            if (config, configured) != (self._config, self._configured):
                self._configure(config, configured, before=self._state, frozen=self._adaptation.status()["frozen"])
        self._begin()
        return self._local.current

    def _configure(
        self,
        config: Config,
        configured: str | None,
        *,
        is_patient: bool = False,
        before: RouterState | None = None,
        frozen: str | None = None,
    ) -> None:
        """Serve a configuration; `before`: the state served from, which moves along with the pool; `frozen` in any case."""
        from dmoa.routing import LocalRouter
        from dmoa.serving.router.adaptation import FILE, Adaptation
        from dmoa.serving.router.state import RouterState
        from dmoa.serving.router.versions import GateVersions

        uri = config.router.state_uri or default_state_uri(self._app)
        state = RouterState(uri, ClusterMemory(self._app, uri), is_patient=is_patient)
        try:
            state.sweep()
            if before is not None and before.place != state.place and self._fingerprint == fingerprint(config):
                state.take_over(before, FILE)
            versions = GateVersions(state, config, configured)
            adaptation = Adaptation(state, config, versions, frozen=frozen)
        except OSError as error:
            raise ConfigError(f"router.state_uri is {uri!r}; it must be a place that can be read and written: {error}") from error
        state.is_patient = False
        self._config, self._configured = config, configured
        served = {"config": config.model_dump(mode="json"), "configured": configured}
        _internal_kv_put(f"dmoa/config/{self._app}".encode(), json.dumps(served).encode(), overwrite=True)
        self._fingerprint: str = fingerprint(config)
        self._pool_version = pool_version(config)
        self._state, self._versions, self._adaptation = state, versions, adaptation
        handles = {name: serve.get_deployment_handle(where, self._app) for name, where in deployment_names(config).items()}
        self._agents = ServeAgentClient(handles, self._pool_version)
        self._recent.clear()
        self._local = LocalRouter(reload=self._reload)
        self._local.max_wait_ms = config.router.max_wait_ms
        self._local.cold = sleepers(config)  # as they start; the next look at Serve's status knows better
        self._seen: frozenset[str] | None = None
        self._deserted: frozenset[str] = frozenset()
        self._local.install(self._versions.version, self._versions.gate)
        self._local.share(*(self._adaptation.split or (None,)))
        self._heard = ("", 0)
        if config.router.adaptation != "off":
            sys.setswitchinterval(SWITCH_S)

    async def install(self, files: dict[str, bytes], note: str = "") -> dict[str, Any]:
        """Make the gate of a checkpoint's files current, once it passed the checks; running queries keep theirs.

        Returns what changed and what the shadow check found. Raises CheckpointError: then nothing has changed.
        """
        return await self._change(lambda: self._versions.install(files, note, list(self._recent)))

    async def rollback(self, version: str | None = None, note: str = "") -> dict[str, Any]:
        """Make an earlier version current again: by default the one before the trial, else the one before the current one.

        A trial is over then. Raises CheckpointError.
        """
        return await self._change(lambda: self._adaptation.rollback(version, note))

    async def _change(self, work: Callable[[], Change]) -> dict[str, Any]:
        async with self._changing:
            change = await asyncio.to_thread(work)
            await asyncio.to_thread(self._adaptation.operated)
            self._take(change)
        return change.to_json()

    def _take(self, change: Change | None) -> None:
        """Serve what was decided: the current version, and the one beside it."""
        if change is not None:
            self._local.install(change.version, change.gate)
            _LOG.info("gate %s is current, before it was %s", change.version, change.previous)
        self._local.share(*(self._adaptation.split or (None,)))

    async def offer(self, files: dict[str, bytes], evidence: dict[str, Any]) -> dict[str, Any]:
        """Judge the gate of a checkpoint's files that a learner offers, and try, install or refuse it (`router.adaptation`).

        `evidence` as `adaptation.Evidence`. Returns accepted, state (refused, observed, canary, installed), reasons, ledger,
        current, and what the guards found. Off the decision path, and looked at once the offers before it have taken no more
        than `JUDGE_SHARE` of the time. Raises ConfigError for evidence that cannot be read.
        """
        pause_s = self._judge_at - time.monotonic()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        async with self._changing:
            told, change = await asyncio.to_thread(self._judged, files, evidence)
            self._take(change)
        return told

    def _judged(self, files: dict[str, bytes], evidence: dict[str, Any]) -> tuple[dict[str, Any], Change | None]:
        """Judge an offer in a thread of its own, and note when the next one's turn is."""
        began_s = time.thread_time()
        try:
            return self._adaptation.offer(files, evidence, list(self._recent))
        finally:
            self._judge_at = time.monotonic() + min((time.thread_time() - began_s) / JUDGE_SHARE, MAX_PAUSE_S)

    async def freeze(self, note: str = "") -> dict[str, Any]:
        """Take no offer until `thaw`, also after a restart; a trial ends with the version before it. Returns the status."""
        async with self._changing:
            self._take(await asyncio.to_thread(self._adaptation.freeze, note))
        return self._adaptation.status()

    async def thaw(self, note: str = "") -> dict[str, Any]:
        """Take offers again. Returns the status of adaptation."""
        async with self._changing:
            await asyncio.to_thread(self._adaptation.thaw, note)
        return self._adaptation.status()

    async def _listen(self) -> None:
        """Take the queries that were finished since, from the app's feedback, while gates are offered."""
        try:
            feedback = find_actor("feedback", self._app)
            async with asyncio.timeout(LISTEN_TIMEOUT_S):
                life, count, packed = await feedback.newest.remote(*self._heard)
        except (ValueError, RayError, TimeoutError):
            return  # it is not there yet, or comes back with its last snapshot
        is_again, is_new, self._heard = life != self._heard[0], (life, count) != self._heard, (life, count)

        def observe() -> Change | None:  # in a thread: to read a second's records takes longer than many decisions
            records = unpack_record(packed) if is_new else []
            return self._adaptation.observe(records, self._local.decided.begun, again=is_again)

        try:
            async with self._changing:
                self._take(await asyncio.to_thread(observe))
        except (DmoaError, OSError) as error:
            _LOG.warning("adaptation: finished queries were not read: %s", error)

    async def history(self) -> list[dict[str, Any]]:
        """Return the changes of the current version and what became of offers, oldest first."""
        return sorted([*self._versions.history(), *self._adaptation.events()], key=lambda entry: float(entry["unix_s"]))

    def _reload(self, version: str) -> Gate | None:
        found = self._state.load_version(version)
        return found[0] if found else None

    async def route(self, packed: bytes, version: str) -> bytes:
        """Decide packed RouteRequests of a version of the pool: packed RouteDecisions, or errors. Raises PoolChangedError."""
        self._begin()
        check_version(version, self._pool_version)
        requests: list[RouteRequest] = unpack_record(packed)
        decisions = await asyncio.gather(*map(self._local.route, requests), return_exceptions=True)
        for request, decision in zip(requests, decisions, strict=True):
            if not isinstance(decision, BaseException):
                self._recent.append(request.input_X)
        return pack_record([told(found) if isinstance(found, BaseException) else found for found in decisions])

    async def look(self, packed: bytes, version: str) -> bytes:
        """Return the packed view by which ingresses decide (`router.decide`), once it is not the one seen, after a while at most.

        `packed`: the RouterView seen, None for none, and a `Decided`: what the ingress decided since. Raises as `route`.
        """
        self._begin()
        check_version(version, self._pool_version)
        seen, decided = unpack_record(packed)
        self._local.add_decided(decided)
        self._recent.extend(decided.inputs)
        until = time.monotonic() + LOOK_S
        while (view := self._local.view) == seen and time.monotonic() < until:  # noqa: ASYNC110 -- much may change it
            await asyncio.sleep(LOOK_AGAIN_S)
        check_version(version, self._pool_version)  # the pool may have changed meanwhile
        return pack_record(view)

    async def report_unavailable(self, agent: str, reason: str, masked_s: float = 0.0) -> None:
        """Mask an agent and, after `masked_s` at least, try it again until it answers."""
        if agent not in self._config.agent_names:
            return
        self._local.report_unavailable(agent, reason)
        is_probed, until_s = agent in self._probing, time.monotonic() + masked_s
        self._probing[agent] = max(until_s, self._probing.get(agent, until_s))
        if not is_probed:
            self._spawn(self._probe(agent))

    async def _probe(self, agent: str) -> None:
        is_back = is_gone = False
        while not is_back or self._probing[agent] > time.monotonic():
            interval = self._config.router.probe_interval_s
            await asyncio.sleep(max(interval, self._probing[agent] - time.monotonic()))
            is_gone = agent not in self._config.agent_names  # a new configuration does without it
            # One that is called from the ingress no ping could tell more of.
            is_back = is_gone or agent not in deployment_names(self._config) or await self._answers(agent, 10 * interval)
        del self._probing[agent]
        self._local.restore(agent)
        _LOG.info("agent %s is %s", agent, "gone" if is_gone else "back")

    async def _answers(self, agent: str, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._agents.ping(agent)
        except (DmoaError, TimeoutError):
            return False
        return True

    async def weights(self, version: str) -> dict[str, bytes]:
        """Return the files of a version's checkpoint, by name, for an ingress to hold."""
        return await asyncio.to_thread(self._state.read_version, version)

    async def status(self) -> RouterStatus:
        """Return versions, masks and counters."""
        return RouterStatus(
            app=self._app,
            pool=self._config.name,
            pool_fingerprint=self._fingerprint,
            pool_version=self._pool_version,
            gate_version=self._local.current,
            configured_version=self._versions.configured,
            untrained=is_untrained(self._local.current),
            installed_unix_s=self._versions.since_unix_s,
            recent_inputs=len(self._recent),
            masked=tuple(sorted(self._local.masked)),
            cold=tuple(sorted(self._local.cold - self._local.masked)),
            gone=tuple(sorted(self._deserted)),
            supervision=supervision_of(self._local.current),
            score=self._versions.gate.spec.score,
            agents=tuple(sorted(deployment_names(self._config))),
            activations=dict(self._local.decided.activations),
            decisions=self._local.decided.num_decisions,
            batches=self._local.decided.num_batches,
            started_unix_s=self._started_unix_s,
            adaptation=self._adaptation.status(),
            state_lost=self._state.lost,
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _watch(self) -> None:
        """Mask agents whose replicas are gone, note the cold ones; end the app's actors once the app is gone."""
        missed = looks = 0
        while missed < MAX_MISSED:
            await asyncio.sleep(self._watch_interval_s)
            looks += 1
            if self._state.lost is not None and looks % HEAL_EVERY == 0:
                async with self._changing:
                    await asyncio.to_thread(self._state.heal)
            if self._config.router.adaptation != "off":
                await self._listen()
            config, snapshot = self._config, await asyncio.to_thread(read_status, self._app, self._seen)
            if snapshot is None:
                continue
            missed = 0 if snapshot.deployments is not None else missed + 1
            if snapshot.deployments is None or config is not self._config:  # a new configuration came in while Serve was asked
                self._seen = None
                continue
            known = presence(config, snapshot.deployments)
            self._seen = snapshot.actors if known.is_settled else None
            self._local.cold, self._deserted = known.cold, known.deserted
            for agent in known.gone:
                await self.report_unavailable(agent, "it has no running replica")
        _LOG.info("app %s is gone: its actors end", self._app)
        await asyncio.to_thread(end_actors, self._app)
