"""Learning while serving, the learner's side: a long-lived job that follows the traffic of a running swarm.

The first worker reads what was answered since, draws each batch (`training/intake`) and hands it to all; every worker makes the
same update (`training/adapt`), and the first one offers what came of it to the router, which judges it by its own queries. What
the job knows can be had again from the router and the feedback, so it may die at any time: it begins with the gate that is
current, and numbers its updates upwards from the router's ledger. No query waits for it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from dmoa.checkpoint import files_of, read_files
from dmoa.core.scores import scores
from dmoa.core.shift import ShiftDetector
from dmoa.errors import DmoaError
from dmoa.feedback import Feedback, query_part
from dmoa.training.adapt import Adapter, AdaptUpdate, Lesson, episodes_of, lesson_of
from dmoa.training.dataset import Episodes
from dmoa.training.distributed import WorkerGroup
from dmoa.training.intake import Intake, IntakeRules
from dmoa.training.options import OnlineOptions
from dmoa.training.outcomes import Outcome

_LOG = logging.getLogger("dmoa.adapt")
LATE_S = 600.0
"""How much older than the newest query one that is heard of for the first time may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What is known of the running swarm since the last time."""

    records: list[Feedback]
    """Finished queries, new ones first heard of now; oldest first."""
    outcomes: list[Outcome]
    """All that clients said so far, by trace id."""
    version: str
    """The gate that is current."""
    installed_unix_s: float
    mode: str
    """`router.adaptation`."""
    ledger: int
    """The last update that the router judged."""
    on_trial: str | None
    """The candidate that some queries try; None: no trial runs."""
    closed: str | None = None
    """Why no offer is taken for now; None: offers are taken."""
    distrusted: tuple[str, ...] = ()
    """Agents that the router found surer and less confirmed."""
    pool_version: str = ""
    """Of all that is deployed."""


class Exchange(Protocol):
    """The running swarm, as the job sees it. Every call may raise DmoaError while a part of it is away."""

    def pull(self) -> Pulled:
        """Return what came since the last call."""

    def gate(self, version: str) -> dict[str, bytes]:
        """Return the files of a version's checkpoint."""

    def offer(self, files: dict[str, bytes], evidence: dict[str, Any]) -> dict[str, Any]:
        """Offer a gate and return what the router said."""

    def explore(self, share: float, for_s: float) -> None:
        """Have a share of queries asked of all agents for some time."""

    def is_asked_to_stop(self) -> bool:
        """Tell whether the job is to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineJob:
    """What the workers of a long-lived adaptation need; the same for all of them."""

    rules: IntakeRules
    settings: OnlineOptions
    open_exchange: Callable[[], Exchange]
    """Called by the first worker."""
    log: Callable[[dict[str, float], int], None]
    """Takes numbers of an update, and its number; called by the first worker."""
    say: Callable[[str], None] = _LOG.info
    """Takes a line for a person; called by the first worker."""
    explore_after_shift: float = 0.5
    explore_for_s: float = 600.0
    replay: Episodes | None = None
    """Of old domains, beside the traffic from before the current gate."""
    pool_version: str = ""
    """Of the deployment that rules and replay are of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all workers do next."""

    kind: Literal["begin", "learn", "wait", "end"]
    files: Mapping[str, bytes] = field(default_factory=dict)
    replay: Episodes | None = None
    lessons: Sequence[Lesson] = ()
    shift: bool = False


def run_online(job: OnlineJob, world: WorkerGroup, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Follow the traffic until the job is asked to stop, or another pool version is deployed; returns the number of updates.

    Every worker calls it.
    """
    driver = Driver(job, sleep) if world.rank == 0 else None
    adapter: Adapter | None = None
    updates = 0
    while True:
        cpu_s, wall_s = time.process_time(), time.monotonic()
        work = world.share(Work(kind="wait") if driver is None else driver.next())
        if work.kind == "end":
            return updates
        if work.kind == "begin":
            adapter = Adapter(*read_files(work.files, "the gate that is served"), work.replay, job.settings, world)
        elif work.kind == "learn" and adapter is not None:
            update = adapter.learn(work.lessons, shift=work.shift)
            updates += update.loss is not None
            if driver is not None:
                driver.learned(adapter, update, work)
        sleep(max(0.0, (time.process_time() - cpu_s) / job.settings.cpu_share - (time.monotonic() - wall_s)))


class Driver:
    """The first worker's part: what is learned next, and what becomes of it."""

    def __init__(self, job: OnlineJob, sleep: Callable[[float], None] = time.sleep) -> None:
        self.offers: Counter[str] = Counter()
        """Offers by what the router said."""
        self._job, self._sleep = job, sleep
        self._exchange = job.open_exchange()
        self._intake: Intake | None = None
        self._replay: Episodes | None = None
        self._base = ""
        """The version that the weights began with, or that was made current of them since."""
        self._offered = ""
        """The last version that the router accepted and did not take back."""
        self._number = self._since_offer = self._fresh = 0
        self._shift = self._untold_shift = False
        self._said_closed: str | None = None
        self._oldest_unix_s: float | None = None
        self._newest_unix_s = 0.0
        self._unread: list[Feedback] = []
        """Pulled while a part of the swarm went away: the next pull does not give them again."""
        self._stream: dict[str, float] = {}

    def next(self) -> Work:
        """Return what all do now; waits while there is nothing."""
        if self._exchange.is_asked_to_stop():
            return Work(kind="end")
        try:
            found = self._exchange.pull()
            self._unread = [*self._unread, *found.records]
            found = dataclasses.replace(found, records=self._unread)
            if found.pool_version != self._job.pool_version:
                self._job.say(f"pool version {found.pool_version} is deployed now; what was not offered yet is given up")
                return Work(kind="end")
            self._number = max(self._number, found.ledger)
            self._say_closed(found.closed)
            intake = None if self._intake is None or self._is_astray(found) else self._intake
            work = self._begin(found) if intake is None else self._taken(intake, found)
            self._unread = []
            return work
        except DmoaError as error:
            self._say_closed(str(error))
            self._sleep(self._job.settings.poll_s)
            return Work(kind="wait")

    def _is_astray(self, found: Pulled) -> bool:
        """Tell whether the current gate is not what was learned: installed by somebody, or taken back."""
        if found.on_trial is not None or found.version in (self._base, self._offered):
            if found.version == self._offered:
                self._base = self._offered
            return found.on_trial is None and bool(self._offered) and found.version != self._offered
        return True

    def _begin(self, found: Pulled) -> Work:
        """Begin with the current gate; what was answered before it came is known, and replayed.

        What was learned from since is given up where it led to a gate that was refused or taken back.
        """
        files = self._exchange.gate(found.version)
        gate, _ = read_files(files, "the gate that is served")
        rules = dataclasses.replace(self._job.rules, agents=gate.spec.agents)
        new = found.records
        if not self._base:
            new = [one for one in found.records if one.created_unix_s >= found.installed_unix_s]
            old = [one for one in found.records if one.created_unix_s < found.installed_unix_s]
            kept = [self._job.replay, *(episodes_of(lesson_of(record), gate.spec) for record in _vetted(rules, old))]
            there = [one for one in kept if isinstance(one, Episodes)]
            self._replay = Episodes.joined(there) if there else None
        detector = ShiftDetector(seed=self._job.settings.seed)
        if self._replay is not None:
            detector.prime(*_signals(self._replay, rules))
        self._intake = Intake(rules, seed=self._number, detector=detector)
        self._base, self._offered, self._since_offer = found.version, "", 0
        self._shift = self._untold_shift = False
        replayed = 0 if self._replay is None else len(self._replay.key_Q)
        self._job.say(f"adaptation ({found.mode}) begins with gate {found.version}; {replayed} queries are replayed")
        self._hear(self._intake, new, found)
        return Work(kind="begin", files=files, replay=self._replay)

    def _hear(self, intake: Intake, records: Sequence[Feedback], found: Pulled) -> None:
        # A feedback that came back with its snapshot tells of old queries again, also of those that were forgotten here.
        records = [one for one in records if one.created_unix_s > self._newest_unix_s - LATE_S]
        self._newest_unix_s = max([self._newest_unix_s, *(min(one.created_unix_s, time.time()) for one in records)])
        intake.hear(found.outcomes)
        intake.distrusted = found.distrusted
        before = intake.taken
        shift = intake.take(records)
        self._fresh += intake.taken - before
        if records:
            self._stream = stream_numbers(records, found.outcomes)
            self._oldest_unix_s = self._oldest_unix_s or records[0].created_unix_s
        if shift is not None:
            self._shift = True
            self._job.say(f"the stream of queries changed ({shift.cause}) at query {shift.at}: exploration rises")
            self._exchange.explore(self._job.explore_after_shift, self._job.explore_for_s)

    def _taken(self, intake: Intake, found: Pulled) -> Work:
        self._hear(intake, found.records, found)
        if self._fresh < self._job.settings.every or found.mode == "off":
            self._sleep(self._job.settings.poll_s)
            return Work(kind="wait")
        self._fresh -= self._job.settings.every
        lessons = intake.draw()
        # A shift is declared to the update once what is usual is known again: anchors need some of the new queries.
        shift = bool(lessons) and self._shift and not intake.detector.is_settling
        self._shift = self._shift and not shift
        return Work(kind="learn", lessons=lessons, shift=shift) if lessons else Work(kind="wait")

    def learned(self, adapter: Adapter, update: AdaptUpdate, work: Work) -> None:
        """Log an update, and offer what was learned where it is time."""
        lag_s = 0.0 if self._oldest_unix_s is None else max(0.0, time.time() - self._oldest_unix_s)
        self._oldest_unix_s = None
        self._since_offer += update.loss is not None
        self._untold_shift |= work.shift  # until an offer that says so was looked at
        is_due = self._since_offer >= self._job.settings.offer_every or self._untold_shift
        told: dict[str, Any] = {}
        if update.loss is not None and is_due and self._said_closed is None:
            try:
                told = self._offer(adapter, update, shift=self._untold_shift)
                self._untold_shift = told["state"] == "refused" and not told.get("verdicts")
            except DmoaError as error:  # the number was used: whether it was judged, the ledger will say
                self._job.say(f"update {self._number} was not offered: {error}")
        self._job.log(self._numbers(adapter, update, lag_s, told), adapter.updates)

    def _offer(self, adapter: Adapter, update: AdaptUpdate, *, shift: bool) -> dict[str, Any]:
        self._number += 1
        self._since_offer = 0
        gate, record = adapter.candidate()
        signal = "outcomes" if adapter.outcomes else "posterior" if gate.spec.score == "posterior" else "entropy"
        evidence = {"base_version": self._base, "update": self._number, "source": "adapt --online", "used": adapter.used}
        told = self._exchange.offer(files_of(gate, record), evidence | {"shift": shift, "signal": signal})
        self.offers[told["state"]] += 1
        self._job.say(" ".join([f"update {self._number} (gate {record.version}): {told['state']}", "; ".join(told["reasons"])]))
        if told["state"] == "installed":
            self._base = self._offered = record.version
        elif told["state"] == "canary":
            self._offered = record.version
        elif told["state"] == "refused" and told.get("verdicts"):
            self._intake = None  # a guard spoke: what was learned is given up
        return told

    def _numbers(self, adapter: Adapter, update: AdaptUpdate, lag_s: float, told: Mapping[str, Any]) -> dict[str, float]:
        intake = self._intake
        found = {"used": float(update.used), "drift_nats": update.drift, "distance": update.distance, "lag_s": lag_s}
        found |= {"updates": float(adapter.updates), "replayed": float(update.replayed), "number": float(self._number)}
        found |= self._stream | ({} if update.loss is None else {"loss": update.loss})
        if intake is not None:
            found |= {"shifts": float(len(intake.shifts)), "shift_evidence": intake.detector.evidence}
            found |= {"waiting": float(intake.waiting), "left_out_agents": float(len(intake.left_out))}
            found |= {"refused": float(intake.refused.total()), "false_keys": float(len(intake.false_keys))}
        found |= {f"offers_{state}": float(count) for state, count in self.offers.items()}
        return found

    def _say_closed(self, closed: str | None) -> None:
        if closed != self._said_closed and closed is not None:
            self._job.say(f"no offers for now: {closed}")
        self._said_closed = closed


def stream_numbers(records: Sequence[Feedback], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return what finished queries came to, means over them: sureness, agents that counted, tokens; and, where known, truth."""
    steps = [step for record in records for step in record.answer.steps]
    nats = [
        reply.entropy.mean_nats
        for step in steps
        for reply in step.replies
        if reply.agent in step.active and reply.entropy.mean_nats is not None and np.isfinite(reply.entropy.mean_nats)
    ]
    tokens = [sum(reply.usage.total for step in record.answer.steps for reply in step.replies) for record in records]
    right = [record.answer.steps[-1].right_probability for record in records if record.answer.steps]
    known = [value for value in right if value is not None]
    traces = {record.answer.trace_id for record in records}
    rewards = [one.reward for one in outcomes if one.trace_id in traces]
    found: dict[str, Sequence[float]] = {
        "entropy_nats": nats,
        "tokens": tokens,
        "active_agents": [len(step.active) for step in steps],
        "right_probability": known,
        "reward": rewards,
    }
    return {f"stream/{name}": float(np.mean(values)) for name, values in found.items() if values}


def _vetted(rules: IntakeRules, records: Sequence[Feedback]) -> list[Feedback]:
    """Return the records that may teach, cleaned."""
    sieve = Intake(rules)
    sieve.take(records)
    return sieve.records()


def _signals(replay: Episodes, rules: IntakeRules) -> tuple[Any, Any]:
    """Return the embeddings [Q, D] and raw scores [Q, A] of the first steps."""
    first = replay.start_Q[:-1]
    inputs = np.stack([query_part(input_X, rules.preset) for input_X in replay.input_NX[first]])
    return inputs, scores(replay.sum_NA[first], replay.tokens_NA[first])
