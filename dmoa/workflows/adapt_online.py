"""`dmoa adapt --online`: follows the traffic of a running swarm on Ray Train, and offers what it learns to the router.

What `training/online` does is put together here with the running app: its router, its feedback, its configuration.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmoa.agents.pool import fingerprint
from dmoa.config import Config
from dmoa.errors import ConfigError
from dmoa.feedback import MARK, is_held_back, read_feedback, tenants_of
from dmoa.serving.launch import AUTO, ray_address
from dmoa.serving.rollover import pool_version
from dmoa.serving.router.admin import RouterAdmin, running_apps
from dmoa.storage import check_local, only_one
from dmoa.tracking import Mode, Tracker, open_tracker
from dmoa.training.options import OnlineOptions
from dmoa.workflows.console import Common, refuse_together
from dmoa.workflows.terminal import goes_on
from dmoa.workflows.traffic import traffic_of

if TYPE_CHECKING:
    from dmoa.serving.router.state import Memory
    from dmoa.training.dataset import Episodes
    from dmoa.training.online import Exchange, OnlineJob, Pulled

LOG = "adapt.log"
"""Lines for a person, in the run's folder."""
STOP_S = 20.0
"""Seconds that a job which is told to end may take; an update and an offer are shorter."""
LEASE_S = 60.0
"""How long after its last sign of life a learner counts as following its app; it gives one six times as often."""
_DEPLOYED = "deployed"
"""What a job returns that ends because another version of the pool is served."""
NICENESS = 19
"""How far the learner stands back behind what serves, on systems without a class for idle work."""


def run_online_adaptation(options: OnlineOptions, common: Common, command: str) -> None:
    """Learn until a signal comes. Raises ConfigError where there is no such app, it takes no offers, or is followed already.

    Raises ConfigError for `--json` too, and DmoaError where it stops.

    The same command goes on: from the gate that is current then, and what the feedback holds.
    """
    refuse_together({"--json": common.json_path}, "on a learner, which ends with no result; its curves lie in --out")
    address = ray_address(options.address) or AUTO  # before Ray is imported: it reads then whether to send its token
    from dmoa.serving.actors import ClusterMemory
    from dmoa.workflows.evaluate import opened_ray

    check_local(options.out, "--out", "where a Ray has several machines, name a folder that they share")
    out = options.out.absolute()
    advice = "what was installed serves on, and the same command goes on from it"
    with goes_on(advice), only_one(out, "learner", "adapt"), opened_ray(address):
        job = build_job(options, served_config(options.app), command)
        lease = Lease(options.app, f"{socket.gethostname()}:{out}", ClusterMemory(options.app, "learner"))
        lease.take(common.say)
        tail = _Tail(out / LOG, common, lease)
        _stop_key(options.app, clear=True)
        try:
            while _followed(job, out, options.workers, tail.tick):  # deployed since: perhaps it allows less
                job = build_job(options, served_config(options.app), command)
        except KeyboardInterrupt:
            common.say("ending after the update that is under way")
            _stop_key(options.app)
            deadline = time.monotonic() + STOP_S
            while _stop_key(options.app, look=True) and time.monotonic() < deadline:
                time.sleep(0.1)
            tail.tick()
            raise
        finally:
            lease.give_up()


def _followed(job: OnlineJob, out: Path, workers: int, tick: Callable[[], None]) -> bool:
    """Follow the traffic of one deployment on Ray Train; tell whether another one has come. Raises DmoaError where it stops."""
    from dmoa.training.ray_train import fit_on_ray

    place = str(out / "state" / f"{time.time():.0f}")
    ended = fit_on_ray(_worker, {"job": job}, place, workers, max_failures=-1, tick=tick, shares_place=False)
    return ended == _DEPLOYED


@dataclass(slots=True)
class Lease:
    """Lets one learner at a time follow an app: while it lives nobody else may, and soon after its death anybody."""

    app: str
    holder: str
    """The learner, by its folder, which one process at a time has: the same command goes on at once."""
    memory: Memory
    _due_unix_s: float = 0.0

    def take(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """Take the lease, also that of a learner that died, once its time is over. Raises ConfigError where it lives."""
        held = None
        while True:
            try:
                return self.keep(clock())
            except ConfigError as error:
                found = self.memory.get("lease")
                if held not in (None, found):
                    raise
                if held is None:
                    say(f"{error}; waiting whether it gives a sign of life, {LEASE_S:.0f} s at most")
                held = found
            sleep(1.0)

    def keep(self, now: float) -> None:
        """Take the lease, or give a sign of life where one is due. Raises ConfigError while another learner has it."""
        if now < self._due_unix_s:
            return
        held = json.loads(self.memory.get("lease") or b"{}")
        if held.get("until_unix_s", 0.0) > now and held["holder"] != self.holder:
            raise ConfigError(f"--app: {self.app!r} is followed by another learner ({held['holder']}); end that one first")
        self._due_unix_s = now + LEASE_S / 6
        self.memory["lease"] = json.dumps({"holder": self.holder, "until_unix_s": now + LEASE_S}).encode()

    def give_up(self) -> None:
        """Let others follow the app, if nobody does already."""
        if json.loads(self.memory.get("lease") or b"{}").get("holder") == self.holder:
            self.memory["lease"] = b"{}"


def served_config(app: str) -> Config:
    """Return the configuration that an app on the Ray that is joined serves now. Raises ConfigError where there is none."""
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(f"dmoa/config/{app}".encode())
    if not found or app not in running_apps():
        running = ", ".join(running_apps()) or "none"
        raise ConfigError(f"--app is {app!r}; running on this Ray: {running}; name one of them, or the Ray (--address)")
    config = Config.model_validate(json.loads(found)["config"])
    if config.router.adaptation == "off":
        raise ConfigError(
            f"router.adaptation of app {app!r} is 'off'; set it to observe, canary or on in the pool file, and deploy it again"
        )
    return config


def build_job(options: OnlineOptions, config: Config, command: str) -> OnlineJob:
    """Return what the workers need. Raises ConfigError for rollouts of another pool."""
    from dmoa.core.gate import GateSpec
    from dmoa.training.dataset import read_episodes, read_manifests
    from dmoa.training.intake import IntakeRules
    from dmoa.training.online import OnlineJob

    router = config.router
    replay: Episodes | None = None
    if options.replay:
        spec, folders = GateSpec.from_config(config.gate, config.agent_names), [path.absolute() for path in options.replay]
        read_manifests(folders, spec, fingerprint(config))
        replay = read_episodes(folders, spec, fingerprint(config), on_ray=False)
        names, share = [key.query_id for key in replay.key_Q], router.guards.held_back
        open_Q = [q for q, name in enumerate(names) if name == (bare := name.removeprefix(MARK)) or not is_held_back(bare, share)]
        replay = replay.take(np.array(open_Q, np.int64)) if open_Q else None  # gates are judged by the rest of the traffic
    return OnlineJob(
        rules=IntakeRules(
            agents=config.agent_names,
            preset=config.gate.preset,
            fingerprint=fingerprint(config),
            batch_queries=options.batch_queries,
            mixes_keys=router.feedback_mix_keys,
            key_share=router.feedback_key_share,
            anonymous=router.feedback_anonymous,
            exclude=tenants_of(router.feedback_exclude),
            held_back=router.guards.held_back,
        ),
        settings=options,
        open_exchange=partial(SwarmExchange, options.app),
        log=OnlineLog(out=options.out.absolute(), mode=options.track, app=options.app, command=command),
        say=partial(_add_line, options.out.absolute() / LOG),
        explore_after_shift=router.explore_after_shift,
        replay=replay,
        pool_version=pool_version(config),
    )


class SwarmExchange:
    """The running swarm as a worker sees it: implements `training/online.Exchange`."""

    def __init__(self, app: str) -> None:
        """Find the app on the Ray that this process is part of."""
        self._app = app
        self._admin = RouterAdmin(app)
        self._heard = ("", 0)

    def pull(self) -> Pulled:
        """Return what came since."""
        from dmoa.training.online import Pulled

        status = self._admin.status()
        life, count, data, state = self._admin.feedback_since(*self._heard)
        found = traffic_of(read_feedback(data, f"feedback of {self._app}"), state)
        self._heard = life, count
        told = status.adaptation
        closed = f"learning is frozen ({told['frozen']})" if told.get("frozen") is not None else None
        if closed is None and told.get("cooldown_s", 0.0) > 0:
            closed = "a gate was taken back lately"
        if closed is None and told["mode"] == "canary" and told.get("trial") is not None:
            closed = f"gate {told['trial']['candidate']} is on trial"
        return Pulled(
            records=found.records,
            outcomes=found.outcomes,
            version=status.gate_version,
            installed_unix_s=status.installed_unix_s or 0.0,
            mode=told["mode"],
            ledger=told["ledger"],
            on_trial=told["trial"]["candidate"] if told.get("trial") else None,
            closed=closed,
            distrusted=tuple(told.get("distrusted", ())),
            pool_version=status.pool_version,
        )

    def gate(self, version: str) -> dict[str, bytes]:
        """Return the files of a version."""
        return self._admin.weights(version)

    def offer(self, files: dict[str, bytes], evidence: dict[str, Any]) -> dict[str, Any]:
        """Offer a gate."""
        return self._admin.offer(files, evidence)

    def explore(self, share: float, for_s: float) -> None:
        """Have more queries explored."""
        from dmoa.serving.feedback import explore_more

        explore_more(self._app, share, for_s)

    def stopped(self) -> None:
        """Tell the command that the job has ended."""
        _stop_key(self._app, clear=True)

    def is_asked_to_stop(self) -> bool:
        """Tell whether the command was told to end."""
        return _stop_key(self._app, look=True)


def _stop_key(app: str, *, look: bool = False, clear: bool = False) -> bool:
    """Ask the job of an app to stop; or tell whether it is asked to, or take that back."""
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

    key = f"dmoa/adapt-stop/{app}".encode()
    if look:
        return bool(_internal_kv_get(key))
    if clear:
        _internal_kv_del(key)
        return False
    return bool(_internal_kv_put(key, b"1", overwrite=True))


def _worker(config: dict[str, OnlineJob]) -> str | None:
    """Be one Ray Train worker of the job."""
    from dmoa.training.online import run_online
    from dmoa.training.ray_train import world_of_worker

    stand_back()
    job, world = config["job"], world_of_worker()
    updates = run_online(job, world)
    if world.rank != 0:
        return None
    job.say(f"ended after {updates} updates of this session")
    exchange: Exchange = job.open_exchange()
    if not exchange.is_asked_to_stop():
        return _DEPLOYED
    if isinstance(exchange, SwarmExchange):
        exchange.stopped()
    return None


def stand_back() -> None:
    """Take only the CPU that nothing which serves wants, in this thread and those that it starts."""
    os.nice(NICENESS)
    if hasattr(os, "sched_setscheduler"):
        with suppress(OSError):  # a container may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@dataclass(slots=True)
class OnlineLog:
    """Logs the numbers of updates: curves (JSON Lines, W&B) and Ray's metrics `dmoa_adapt_*`. Opened where it is first called."""

    out: Path
    mode: Mode
    app: str
    command: str
    _tracker: Tracker | None = None
    _gauges: dict[str, Any] = field(default_factory=dict)

    def __call__(self, numbers: dict[str, float], step: int) -> None:
        """Log the numbers of an update."""
        from ray.util import metrics

        if self._tracker is None:
            self.out.mkdir(parents=True, exist_ok=True)
            name = f"adapt-{self.app}"
            self._tracker = open_tracker(self.mode, run_dir=self.out, name=name, config={"command": self.command})
        self._tracker.log(numbers, step=None)
        for key, value in numbers.items():
            name = f"dmoa_adapt_{key.replace('/', '_')}"
            if name not in self._gauges:
                self._gauges[name] = metrics.Gauge(name, "Of learning while serving, at the last update.", ("app",))
            self._gauges[name].set(value, {"app": self.app})


def _add_line(path: Path, line: str) -> None:
    """Add a line to the log of the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {line}\n")


class _Tail:
    """Tells a person what is added to the log, and others that somebody follows the app."""

    def __init__(self, path: Path, common: Common, lease: Lease) -> None:
        self._path, self._common, self._lease = path, common, lease
        self._place = path.stat().st_size if path.exists() else 0

    def tick(self) -> None:
        """Tell what is new. Raises ConfigError where another learner has taken the app over."""
        self._lease.keep(time.time())
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._place)
            for line in file:
                self._place += len(line)
                self._common.say(line.decode("utf-8").rstrip("\n"))
