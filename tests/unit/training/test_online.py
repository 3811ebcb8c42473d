"""The long-lived job in process: what it learns from, what it offers, in which order, and that it begins anew where it must."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from dmoa.checkpoint import describe_gate, files_of, read_files
from dmoa.errors import DmoaError
from dmoa.feedback import Feedback
from dmoa.training.distributed import SingleWorker
from dmoa.training.intake import IntakeRules
from dmoa.training.online import Driver, OnlineJob, Pulled, Work, run_online
from dmoa.training.options import OnlineOptions
from tests.attacks import Deployed, accuracy, deployed
from tests.streams import FINGERPRINT, KEYS

CPU = torch.device("cpu")


@dataclass
class FakeSwarm:
    """Implements `Exchange`: batches of records, and a router that says what it is told to."""

    start: Deployed
    batches: list[list[Feedback]]
    says: list[str] = field(default_factory=list)
    """What becomes of each offer; installed at the end of the list."""
    ledger: int = 7
    away: set[int] = field(default_factory=set)
    """Pulls that fail."""
    mode: str = "on"
    pulls: int = 0
    version: str = ""
    offers: list[dict[str, Any]] = field(default_factory=list)
    explored: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.version = self.start.record.version
        self.files = {self.version: files_of(self.start.gate, self.start.record)}

    def pull(self) -> Pulled:
        self.pulls += 1
        if self.pulls in self.away:
            raise DmoaError("router: it is away")
        return Pulled(
            records=self.batches.pop(0) if self.batches else [],
            outcomes=[],
            version=self.version,
            installed_unix_s=0.0,
            mode=self.mode,
            ledger=self.ledger,
            on_trial=None,
        )

    def gate(self, version: str) -> dict[str, bytes]:
        return self.files[version]

    def offer(self, files: dict[str, bytes], evidence: dict[str, Any]) -> dict[str, Any]:
        state = self.says.pop(0) if self.says else "installed"
        self.ledger = evidence["update"]
        self.offers.append(evidence | {"state": state})
        version = read_files(files, "the gate")[1].version
        if state == "installed":
            self.version, self.files[version] = version, files
        return {"state": state, "reasons": [], "verdicts": [{}] if state == "refused" else []}

    def explore(self, share: float, for_s: float) -> None:
        self.explored.append((share, for_s))

    def is_asked_to_stop(self) -> bool:
        return not self.batches


@pytest.fixture(scope="module", name="start")
def _start() -> Deployed:
    return deployed(0)


def job_of(swarm: FakeSwarm, **changes: Any) -> OnlineJob:
    values: dict[str, Any] = {
        "rules": IntakeRules(agents=swarm.start.pool.agents, preset="paper", fingerprint=FINGERPRINT, mixes_keys=True),
        "settings": OnlineOptions(offer_every=2),
        "open_exchange": lambda: swarm,
        "log": lambda numbers, step: None,
        "replay": swarm.start.replay,
    }
    return OnlineJob(**values | changes)


def batches(start: Deployed, count: int, domains: tuple[int, ...]) -> list[list[Feedback]]:
    return [start.pool.records(start.pool.mixed(8, domains)) for _ in range(count)]


def test_a_new_domain_is_noticed_explored_learned_and_offered(start: Deployed) -> None:
    new = [start.pool.ask(4) for _ in range(200)]
    before = accuracy(start.gate, new)
    swarm = FakeSwarm(start, [*batches(start, 1, (0, 1, 2, 3)), *batches(start, 8, (4,)), []])
    logged: list[tuple[dict[str, float], int]] = []
    updates = run_online(job_of(swarm, log=lambda numbers, step: logged.append((numbers, step))), SingleWorker(CPU), sleep=_no)
    assert updates == len(logged) >= 7
    assert swarm.explored == [(0.5, 600.0)]
    # Numbers go on from the router's ledger, each offer from the gate that the last one became.
    assert [one["update"] for one in swarm.offers] == list(range(8, 8 + len(swarm.offers)))
    assert len({one["base_version"] for one in swarm.offers}) == len(swarm.offers)
    assert sum(one["shift"] for one in swarm.offers) == 1
    learnt, record = read_files(swarm.files[swarm.version], "the gate")
    assert before < 0.4
    assert accuracy(learnt, new) > 0.7
    assert accuracy(learnt, start.rows) > accuracy(start.gate, start.rows) - 0.03
    assert record.trained_on is not None
    assert record.trained_on["source"] == "adaptation"


def test_a_refused_gate_is_given_up_and_a_swarm_that_is_away_waited_for(start: Deployed) -> None:
    swarm = FakeSwarm(start, [*batches(start, 9, (0, 1, 2, 3, 4)), []], says=["refused"], away={3, 4})
    slept: list[float] = []
    said: list[str] = []
    run_online(job_of(swarm, say=said.append), SingleWorker(CPU), sleep=slept.append)
    first, second, *_ = swarm.offers
    assert (first["state"], second["state"]) == ("refused", "installed")
    assert first["base_version"] == second["base_version"] == start.record.version
    assert (second["used"], second["update"]) == (first["used"], first["update"] + 1)  # it began anew
    assert slept.count(2.0) >= 2
    assert said.count("no offers for now: router: it is away") == 1


def test_observed_offers_and_an_operators_gate(start: Deployed) -> None:
    swarm = FakeSwarm(start, [*batches(start, 12, (0, 1, 2, 3, 4)), []], says=["observed"] * 2)
    theirs, _ = read_files(files_of(start.gate, start.record), "the gate")
    with torch.no_grad():
        theirs.head_bias.add_(0.01)
    record = describe_gate(theirs, fingerprint=FINGERPRINT, metrics=start.record.metrics, anchor_set=start.record.anchor_set)

    def install(numbers: dict[str, float], step: int) -> None:
        if len(swarm.offers) == 2 and swarm.version == start.record.version:
            swarm.version = record.version
            swarm.files[swarm.version] = files_of(theirs, record)

    run_online(job_of(swarm, log=install), SingleWorker(CPU), sleep=_no)
    assert [one["base_version"] for one in swarm.offers[:3]] == [start.record.version] * 2 + [record.version]


def test_what_was_answered_before_the_gate_came_is_replayed_and_teaches_nothing(start: Deployed) -> None:
    class Later(FakeSwarm):
        def pull(self) -> Pulled:
            found = super().pull()
            return replace(found, installed_unix_s=1e9) if self.pulls == 1 else found

    swarm = Later(start, [*batches(start, 3, (0, 1, 2, 3)), []])
    logged: list[dict[str, float]] = []
    run_online(job_of(swarm, replay=None, log=lambda numbers, step: logged.append(numbers)), SingleWorker(CPU), sleep=_no)
    assert [numbers["used"] for numbers in logged] == [8.0, 8.0]  # the first batch teaches nothing
    assert logged[0]["replayed"] > 0


def test_a_shift_that_was_noticed_while_no_offer_is_taken_is_told_with_the_next_one(start: Deployed) -> None:
    class Closed(FakeSwarm):
        def pull(self) -> Pulled:
            found = super().pull()
            return replace(found, closed="learning is frozen") if self.pulls <= 9 else found

    swarm = Closed(start, [*batches(start, 1, (0, 1, 2, 3)), *batches(start, 12, (4,)), []])
    run_online(job_of(swarm), SingleWorker(CPU), sleep=_no)
    assert [one["shift"] for one in swarm.offers] == [True, *[False] * (len(swarm.offers) - 1)]


def test_it_ends_where_another_version_of_the_pool_is_deployed(start: Deployed) -> None:
    class Redeployed(FakeSwarm):
        def pull(self) -> Pulled:
            found = super().pull()
            return replace(found, pool_version="old" if self.pulls < 4 else "new")

    swarm, said = Redeployed(start, [*batches(start, 9, (0, 1, 2, 3)), []]), list[str]()
    assert run_online(job_of(swarm, pool_version="old", say=said.append), SingleWorker(CPU), sleep=_no) == 2
    assert swarm.pulls == 4
    assert said[-1].startswith("pool version new is deployed now")


def test_what_was_pulled_while_the_gate_could_not_be_had_is_not_lost(start: Deployed) -> None:
    class Shy(FakeSwarm):
        def pull(self) -> Pulled:
            return replace(super().pull(), installed_unix_s=1e9)

        def gate(self, version: str) -> dict[str, bytes]:
            if self.pulls == 1:
                raise DmoaError("router: it is away")
            return super().gate(version)

    swarm, said = Shy(start, [*batches(start, 3, (0, 1, 2, 3)), []]), list[str]()
    run_online(job_of(swarm, replay=None, say=said.append), SingleWorker(CPU), sleep=_no)
    assert said[0] == "no offers for now: router: it is away"
    assert said[1].endswith("; 16 queries are replayed")


def test_a_shift_is_declared_however_the_keys_take_turns(start: Deployed) -> None:
    """Where one key has nine queries in ten, many a turn is nobody's."""
    for ledger in range(8):
        asked = [start.pool.ask(number % 4 if number < 8 else 4, KEYS[number % 10 == 0]) for number in range(160)]
        records = [replace(start.pool.record(one), created_unix_s=float(number)) for number, one in enumerate(asked)]
        swarm = FakeSwarm(start, [*(records[at : at + 8] for at in range(0, 160, 8)), []], ledger=ledger)
        job = job_of(swarm)
        driver, works = Driver(replace(job, rules=replace(job.rules, mixes_keys=False)), _no), []
        while (work := driver.next()).kind != "end":
            works.append(work)
        assert sum(work.shift for work in works) == 1, ledger
        assert all(work.lessons for work in works if work.shift)


def test_a_feedback_that_came_back_teaches_nothing_again(start: Deployed) -> None:
    records = [replace(start.pool.record(start.pool.ask(0)), created_unix_s=at) for at in (5.0, 5000.0, 5001.0, 5002.0)]
    records[3] = replace(records[3], answer=replace(records[3].answer, trace_id="unlike"))
    swarm, works = FakeSwarm(start, [[], records[1:3], [records[0], *records[1:]], []]), list[Work]()
    driver = Driver(job_of(swarm, settings=OnlineOptions(offer_every=2, every=1)), _no)
    while (work := driver.next()).kind != "end":
        works.append(work)
    assert driver._intake is not None
    assert driver._intake.taken == 3  # the oldest is not taken for new


def test_a_clock_that_is_ahead_shuts_nobody_else_out(start: Deployed) -> None:
    now = time.time()
    ahead, *others = [replace(start.pool.record(start.pool.ask(0)), created_unix_s=at) for at in (now + 1e5, now, now + 1.0)]
    swarm = FakeSwarm(start, [[], [ahead], others, []])
    driver = Driver(job_of(swarm, settings=OnlineOptions(offer_every=2, every=1)), _no)
    while driver.next().kind != "end":
        pass
    assert driver._intake is not None
    assert driver._intake.taken == 3


def _no(seconds: float) -> None:
    del seconds
