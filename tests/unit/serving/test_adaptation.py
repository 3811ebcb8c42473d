"""Offers to a router: what is refused and why, trials on a share of queries, rollback, freeze, and what a restart takes up."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dmoa.agents.pool import fingerprint
from dmoa.checkpoint import describe_gate, files_of
from dmoa.errors import CheckpointError, ConfigError
from dmoa.feedback import Feedback
from dmoa.serving.router.adaptation import FILE, Adaptation
from dmoa.serving.router.replayed import HeldBack
from dmoa.serving.router.state import RouterState
from dmoa.serving.router.versions import GateVersions
from dmoa.types import RouteRequest
from dmoa.workflows.probe import known_answers
from tests.adapting import AGENTS, KEYS, D, LearningSwarm, pool

HOME = (0, 1, 2, 3)
TO_LAST = (3, 1, 2, 3)
"""Domain 0 is sent to agent 3, who knows nothing of it."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


def swarm(root: Path, adaptation: str = "canary", warm: int = 0, **options: Any) -> LearningSwarm:
    """A swarm that has answered `warm` dense queries."""
    guards = {name: options.pop(name) for name in list(options) if name not in LearningSwarm.__dataclass_fields__}
    found = LearningSwarm(root, pool(adaptation, **guards), **options)
    for _ in range(warm):
        found.ask(is_dense=True)
    return found


def actions(found: LearningSwarm) -> list[str]:
    return [event["action"] for event in found.adaptation.events()]


def until(found: LearningSwarm, action: str, most: int) -> int:
    """Ask until the event; returns after how many queries."""
    for number in range(1, most + 1):
        found.ask()
        if actions(found)[-1:] == [action]:
            return number
    raise AssertionError(f"no {action!r} within {most} queries: {found.adaptation.status()}")


def test_off_refuses_and_remembers_nothing(root: Path) -> None:
    found = swarm(root, "off")
    told = found.offer(found.files(HOME, seed=1), 1)
    assert (told["accepted"], told["state"], told["ledger"]) == (False, "refused", 0)
    assert "router.adaptation is 'off'" in told["reasons"][0]


def test_observe_says_what_would_have_changed_and_installs_nothing(root: Path) -> None:
    found = swarm(root, "observe", warm=40)
    before = found.versions.version
    told = found.offer(found.files(HOME, seed=1, sharpness=1.1), 1)
    assert (told["accepted"], told["state"], told["ledger"], told["current"]) == (True, "observed", 1, before)
    assert "0% get another first agent" in told["reasons"][0]
    assert (found.versions.version, found.adaptation.split, found.changes[1:]) == (before, None, [])
    assert found.adaptation.status()["counts"] == {"observed": 1}
    assert {verdict["guard"] for verdict in told["verdicts"]} == {
        "finite",
        "drift",
        "distance",
        "held_back",
        "load",
        "disagreement",
    }


def bad_offers(found: LearningSwarm) -> dict[str, dict[str, bytes]]:
    nan_gate, _ = found.gate(HOME, seed=2)
    with torch.no_grad():
        nan_gate.head_bias[0] = float("nan")
    record = describe_gate(nan_gate, fingerprint=fingerprint(found.config), trained_on={"rows": 1})
    return {
        "finite": files_of(nan_gate, record),
        "drift": found.files((1, 0, 3, 2), sharpness=20.0),
        "distance": found.files(HOME, sharpness=1.6),
        "held_back": found.files((1, 0, 3, 2)),
        "load": found.files((0, 0, 0, 0)),
    }


@pytest.mark.parametrize("guard", ["finite", "drift", "distance", "held_back", "load"])
def test_each_guard_refuses_names_itself_and_can_be_switched_off(root: Path, tmp_path: Path, guard: str) -> None:
    found = swarm(root, warm=120)
    before = found.versions.version
    told = found.offer(bad_offers(found)[guard], 1)
    assert (told["accepted"], told["state"], told["ledger"]) == (False, "refused", 1)
    failed = [verdict["guard"] for verdict in told["verdicts"] if not verdict["passed"]] or ["finite"]
    assert guard in failed
    assert found.versions.version == before
    assert found.adaptation.status()["failures"][guard] == 1
    assert (actions(found)[-1], guard == "finite" or f"{guard}: " in found.adaptation.events()[-1]["note"]) == ("refused", True)
    if guard != "finite":
        open_one = swarm(tmp_path / "other", warm=120, skip=failed)
        assert open_one.offer(bad_offers(open_one)[guard], 1)["accepted"]


def test_drift_is_bounded_right_after_a_start_too(root: Path) -> None:
    found = swarm(root, warm=120)
    bad = bad_offers(found)["drift"]
    found.inputs = []  # nothing was routed yet; what was finished before is heard of
    (drift,) = [verdict for verdict in found.offer(bad, 1)["verdicts"] if verdict["guard"] == "drift"]
    assert not drift["passed"], drift["words"]


def test_one_key_with_many_kinds_of_queries_does_not_crowd_the_others_out_of_what_is_held_back(root: Path) -> None:
    found = swarm(root)
    answer = found.ask()
    held = HeldBack(found.config, max_held=32)
    for number in range(2000):
        kind = number % 8 if number % 2 else 15  # one key asks of four kinds, the other of one
        input_X = np.eye(D, dtype=np.float32)[kind % D]
        step = replace(answer.steps[0], route=RouteRequest(input_X=input_X))
        record = replace(answer, trace_id=str(number), steps=(step,))
        held.put(Feedback(answer=record, tenant=KEYS[number % 2], fingerprint="", created_unix_s=float(number)))
    assert Counter(record.tenant for record in held.records()) == {KEYS[0]: 16, KEYS[1]: 16}


def test_kinds_are_told_apart_key_by_key_in_what_is_held_back(root: Path) -> None:
    found = swarm(root)
    answer = found.ask()
    held = HeldBack(found.config, max_held=80)
    weak_D = np.zeros(D, np.float32)  # what the other key's first kind has a little of
    weak_D[0] = 0.2
    kinds = [np.eye(D, dtype=np.float32)[kind] for kind in range(16)]
    mine = [np.eye(D, dtype=np.float32)[100 + kind] + weak_D for kind in (0, 1)]
    asked = [(KEYS[1], row_D) for _ in range(50) for row_D in kinds]
    asked += [(KEYS[0], mine[number < 100]) for number in range(2000)]
    for number, (tenant, row_D) in enumerate(asked):
        step = replace(answer.steps[0], route=RouteRequest(input_X=row_D))
        record = replace(answer, trace_id=str(number), steps=(step,))
        held.put(Feedback(answer=record, tenant=tenant, fingerprint="", created_unix_s=float(number)))
    routes = [record.answer.steps[0].route for record in held.records() if record.tenant == KEYS[0]]
    # Of 2,000 queries some 200 are held back, of the kind that came first some ten: they stay.
    assert any(route is not None and route.input_X[101] for route in routes)


def test_queries_that_are_never_heard_of_pass_no_canary(root: Path) -> None:
    """Of an excluded key, or with `store: false`: the router begins them, and no record of them comes, with either gate."""
    found = swarm(root, warm=60, canary_queries=5)
    assert found.offer(found.files(HOME, seed=1), 1)["accepted"]
    found.heard_every = 10**9
    for _ in range(300):
        found.ask()
        found.took(found.adaptation.observe([], found.router.decided.begun))
    assert actions(found)[-1] == "canary"
    assert found.adaptation.status()["trial"]["queries"] == {"candidate": 0, "control": 0}


def test_what_is_lost_with_either_gate_alike_ends_no_trial(root: Path) -> None:
    """One query in four is never heard of, and the router hears of a hundred at a time: of what is lost last."""
    found = swarm(root, canary_queries=1000, limits={"deadline_s": 5.0}, heard_every=100, silent=("sums",))
    assert found.offer(found.files(HOME, seed=1), 1)["accepted"]
    for _ in range(2000):
        found.ask()
    assert actions(found)[-1] == "canary"
    assert found.adaptation.status()["trial"]["signals"]["lost"]["pairs"] > 300


def test_a_feedback_that_was_started_anew_is_not_counted_twice(root: Path) -> None:
    found = swarm(root, warm=40, canary_queries=1000)
    assert found.offer(found.files(HOME, seed=1), 1)["accepted"]
    found.heard_every = 10**9
    for _ in range(30):
        found.ask()
    records = list(found.unheard)
    found.adaptation.observe(records[:-2], found.router.decided.begun)
    before = Counter(found.adaptation.status()["trial"]["queries"])
    found.adaptation.observe(records, found.router.decided.begun, again=True)  # the last two had not been heard of
    assert (before.total(), Counter(found.adaptation.status()["trial"]["queries"]).total()) == (28, 30)


def test_an_update_is_taken_once_and_from_the_current_gate_alone(root: Path) -> None:
    found = swarm(root, "observe")
    assert found.offer(found.files(HOME, seed=1), 5)["state"] == "observed"
    for update in (5, 4):
        told = found.offer(found.files(HOME, seed=2), update)
        assert (told["accepted"], told["ledger"]) == (False, 5)
        assert "the ledger is 5" in told["reasons"][0]
    found.start()  # a new process knows it too
    assert not found.offer(found.files(HOME, seed=2), 5)["accepted"]
    told = found.offer(found.files(HOME, seed=2), 6, base_version="elsewhere")
    assert (told["accepted"], told["ledger"]) == (False, 5)  # an offer that was not looked at may come again
    with pytest.raises(ConfigError, match="evidence: update is 0"):
        found.offer(found.files(HOME, seed=2), 0)
    with pytest.raises(ConfigError, match=r"update is 1000.*expected at most 1000000000 above 5"):
        found.offer(found.files(HOME, seed=2), 10**40)  # else nobody could number the next one higher for ever
    assert found.offer(found.files(HOME, seed=3), 6)["ledger"] == 6


def test_a_good_canary_gets_its_share_and_then_all(root: Path) -> None:
    found = swarm(root, warm=60, canary_queries=20, margin=0.1)
    before, files = found.versions.version, found.files(HOME, seed=1)
    told = found.offer(files, 1)
    assert (told["state"], told["current"]) == ("canary", before)
    again = found.offer(found.files(HOME, seed=2), 2)
    assert (again["state"], again["ledger"]) == ("refused", 1)  # one trial at a time
    given = [found.ask().gate_version for _ in range(60)]
    assert 4 <= given.count(told["version"]) <= 22  # 12 expected
    until(found, "passed", 150)
    assert found.versions.version == told["version"]
    assert found.versions.history()[-1]["action"] == "adapted"
    assert (found.adaptation.split, found.adaptation.status()["counts"]) == (None, {"refused": 1, "canary": 1, "passed": 1})


@pytest.mark.parametrize(
    ("kind", "signal"), [("broken", "failures"), ("wordy", "tokens"), ("plain", "quality"), ("silent", "failures")]
)
def test_a_worse_canary_is_taken_back(root: Path, kind: str, signal: str) -> None:
    options = {} if kind == "plain" else {kind: ("code",)}
    off = {"skip": ("drift", "distance", "held_back", "load")}  # as if nothing of it showed before
    found = swarm(root, warm=40, canary_queries=500, limits={"deadline_s": 5.0} if kind == "silent" else {}, **off)
    before = found.versions.version
    for name, agents in options.items():
        setattr(found, name, agents)
    assert found.offer(found.files((3, 3, 3, 3)), 1)["state"] == "canary"
    late = until(found, "rolled back", 400)
    assert found.versions.version == before
    assert found.adaptation.status()["failures"].get(signal) == 1
    assert f"{signal} worse by" in found.adaptation.events()[-1]["note"]
    if kind == "broken":
        assert late <= 90
    told = found.offer(found.files(HOME, seed=3), 2)
    assert "taken back lately" in told["reasons"][0]  # it cools down
    found.now += 61
    assert found.offer(found.files(HOME, seed=3), 2)["state"] == "canary"


def test_on_installs_at_once_and_goes_back_when_it_is_worse(root: Path) -> None:
    off = {"skip": ("drift", "distance", "held_back", "load")}
    found = swarm(root, "on", warm=40, **off)
    good, found.broken = found.versions.version, ("code",)
    told = found.offer(found.files((3, 3, 3, 3)), 1)
    assert (told["state"], told["current"]) == ("installed", told["version"])
    assert found.versions.version == told["version"] != good
    assert found.adaptation.split == (good, 0.2)
    until(found, "rolled back", 120)
    assert (found.versions.version, found.adaptation.split) == (good, None)


@pytest.mark.parametrize(("mode", "most"), [("canary", 120), ("on", 50)])
def test_what_fails_in_one_of_three_domains_is_taken_back(root: Path, mode: str, most: int) -> None:
    """With `canary` the domain is on trial in one query of 15; the first failure doubles that and more."""
    off = {"skip": ("drift", "distance", "held_back", "load")}
    found = swarm(root, mode, warm=60, canary_queries=1000, **off)
    before = found.versions.version
    assert found.offer(found.files(TO_LAST, seed=1), 1)["accepted"]
    found.broken, share, number = ("code",), 0.2, 0
    while actions(found)[-1:] != ["rolled back"]:
        found.ask(int(found.rng.integers(3)))
        number += 1
        assert number <= most
        share = max(share, 0.0 if found.adaptation.split is None else found.adaptation.split[1])
    assert (found.versions.version, share) == (before, 0.5 if mode == "canary" else 0.2)
    assert "failures worse by" in found.adaptation.events()[-1]["note"]


def test_a_restart_counts_no_query_twice_and_remembers_what_is_usual(root: Path) -> None:
    """A router that starts anew is told of all the queries that the feedback keeps."""
    off = {"skip": ("drift", "distance", "held_back", "load")}
    found, told = swarm(root, warm=40, canary_queries=500, **off), []
    observe = found.adaptation.observe
    found.adaptation.observe = lambda records, begun: told.extend(records) or observe(records, begun)  # type: ignore[method-assign]
    found.offer(found.files((3, 3, 3, 3)), 7)
    for _ in range(30):
        found.ask()
    before = found.adaptation.status()["trial"]
    usual = found.adaptation._arms["failures"].whole.usual
    found.start()
    found.adaptation.observe(told, found.router.decided.begun)
    assert len(told) == 30
    assert found.adaptation.status()["trial"] == before
    assert found.adaptation._arms["failures"].whole.usual == usual < 0.03
    found.ask()
    assert sum(found.adaptation.status()["trial"]["queries"].values()) == sum(before["queries"].values()) + 1


def test_on_takes_update_after_update_and_the_control_follows_a_window_behind(root: Path) -> None:
    found = swarm(root, "on", warm=40, canary_queries=10, margin=0.1)
    first = found.versions.version
    versions = []
    for update in range(1, 7):
        versions.append(found.offer(found.files(HOME, seed=update), update)["version"])
        for _ in range(30):
            found.ask()
    assert found.versions.version == versions[-1]
    assert "rolled back" not in actions(found)
    assert found.adaptation.split is not None
    assert found.adaptation.split[0] not in (first, versions[-1])
    until(found, "passed", 400)  # the learner rests: the last version stands alone in the end
    assert found.adaptation.split is None


def test_the_anchor_stays_behind_until_a_shift_is_declared(root: Path) -> None:
    found = swarm(root, "on", skip=("canary",))
    deployed = found.versions.version
    assert found.offer(found.files(HOME, sharpness=1.3), 1)["accepted"]
    assert found.adaptation.status()["anchor"] == deployed
    told = found.offer(found.files(HOME, sharpness=1.6), 2)  # a step as large as the first, and too far from where it began
    assert [verdict["guard"] for verdict in told["verdicts"] if not verdict["passed"]] == ["distance"]
    told = found.offer(found.files(HOME, sharpness=1.6), 3, shift=True)
    assert told["accepted"]
    assert found.adaptation.status()["anchor"] == told["version"]


def test_a_cooldown_lasts_no_longer_where_the_clock_is_set_back(root: Path) -> None:
    found = swarm(root, "on", warm=40)
    found.offer(found.files(HOME, seed=1), 1)
    found.broken = AGENTS
    until(found, "rolled back", 200)
    found.now -= 3600.0
    assert found.adaptation.status()["cooldown_s"] == 60.0
    found.now += 61.0
    assert "cooldown" not in str(found.offer(found.files(HOME, seed=2), 2)["reasons"])
    assert found.adaptation.status()["cooldown_s"] == 0.0


def test_the_anchor_after_a_shift_is_the_gate_that_followed_it(root: Path) -> None:
    found = swarm(root, "on", warm=40, canary_queries=5, margin=0.1)
    deployed = found.versions.version
    found.offer(found.files(HOME, seed=1), 1)
    while not json.loads((root / FILE).read_text())["trial"]["pending"]:
        found.ask()  # the first window ends
    shifted = found.offer(found.files(HOME, seed=2), 2, shift=True)["version"]
    anchors = [deployed]
    for _ in range(400):
        found.ask()
        anchors += [anchor] if (anchor := found.adaptation.status()["anchor"]) != anchors[-1] else []
    assert anchors == [deployed, shifted]


def test_freezing_ends_the_trial_and_lasts(root: Path) -> None:
    found = swarm(root, "on")
    good = found.versions.version
    found.offer(found.files(HOME, seed=1), 1)
    found.took(found.adaptation.freeze("release day"))
    assert (found.versions.version, found.adaptation.split) == (good, None)
    found.start()
    told = found.offer(found.files(HOME, seed=2), 2)
    assert told["reasons"] == ["learning is frozen (release day); `dmoa router thaw` ends that"]
    found.adaptation.thaw()
    assert found.offer(found.files(HOME, seed=2), 2)["accepted"]
    assert [name for name in actions(found) if name in ("freeze", "thaw", "withdrawn")] == ["freeze", "withdrawn", "thaw"]


def test_offers_that_are_not_looked_at_are_told_once_for_each_reason_and_counted(root: Path) -> None:
    found = swarm(root, "on", skip=("canary",))
    assert found.offer(found.files(HOME, sharpness=1.2), 5)["accepted"]
    for update in (5, 4, 5):
        assert not found.offer(found.files(HOME, sharpness=1.4), update)["accepted"]
    found.adaptation.freeze()
    for update in (6, 7):
        assert not found.offer(found.files(HOME, sharpness=1.4), update)["accepted"]
    found.start()
    told = [event["note"] for event in found.adaptation.events() if event["action"] == "refused"]
    assert told == [
        "update 5: update 5 was judged before, the ledger is 5; number the next one higher",
        "update 6: learning is frozen (by an operator); `dmoa router thaw` ends that",
    ]
    status = found.adaptation.status()
    assert (status["counts"]["refused"], status["failures"]) == (5, {"ledger": 3, "frozen": 2})


def test_a_restart_in_the_middle_of_a_canary_goes_on_with_it(root: Path) -> None:
    off = {"skip": ("drift", "distance", "held_back", "load")}
    found = swarm(root, warm=40, canary_queries=500, **off)
    found.broken = ("code",)
    told = found.offer(found.files((3, 3, 3, 3)), 7)
    found.heard_every, told_of = 10**9, 0
    while found.adaptation.status()["trial"]["signals"]["failures"]["pairs"] < 2:
        found.ask()
        found.took(found.adaptation.observe(found.unheard[told_of:], found.router.decided.begun))
        told_of = len(found.unheard)
    before = found.adaptation.status()["trial"]
    found.start()
    found.took(found.adaptation.observe(found.unheard, found.router.decided.begun, again=True))  # it hears of all once more
    found.heard_every, found.unheard = 1, []
    after = found.adaptation.status()
    counted = [{name: of["pairs"] for name, of in trial["signals"].items()} for trial in (before, after["trial"])]
    assert (after["ledger"], after["trial"]["queries"], counted[1]) == (7, before["queries"], counted[0])
    assert after["trial"]["signals"]["failures"] == before["signals"]["failures"]
    assert found.adaptation.split == (told["version"], 0.5)  # two failures in two queries
    until(found, "rolled back", 120)


def test_the_tests_of_a_trial_are_written_every_few_seconds_not_with_every_query(root: Path) -> None:
    found = swarm(root, warm=40, canary_queries=500)
    assert found.offer(found.files(HOME, seed=1), 1)["accepted"]
    written = []
    for _ in range(20):  # a second each
        found.ask()
        written.append((root / FILE).read_text())
    assert 3 <= len(set(written)) <= 5
    assert json.loads(written[-1])["trial"]["queries"]["control"] > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mean": float("inf")}, "not JSON"),
        ({"mean": "1e400"}, "mean"),
        ({"log_wealth": []}, r"log_wealth has 0 numbers"),
        ({"log_wealth": None}, "log_wealth"),
        ({"control": "01x"}, "control"),
        ({"parts": {"zero": {}}}, "parts"),
        ({"parts": {"0": {}}}, "parts"),
    ],
)
def test_tests_of_a_trial_that_are_none_are_refused(root: Path, changes: dict[str, Any], told: str) -> None:
    found = swarm(root, warm=4, canary_queries=500, skip=("drift", "distance", "held_back", "load"))
    found.offer(found.files((3, 3, 3, 3)), 7)
    found.ask()
    tree = json.loads((root / FILE).read_text())
    tree["trial"]["tests"]["failures"] |= changes
    tree["serial"] += 1
    for place in (FILE, f"{FILE}.last"):
        (root / place).write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=told):
        found.start()


def test_a_trial_ends_with_the_gate_before_it_where_learning_is_switched_off(root: Path) -> None:
    found = swarm(root, "on")
    good = found.versions.version
    found.offer(found.files(HOME, seed=1), 1)
    router = found.config.router.model_copy(update={"adaptation": "off"})
    found.config = found.config.model_copy(update={"router": router})
    found.start()
    assert (found.versions.version, found.router.current, found.adaptation.split) == (good, good, None)
    assert actions(found)[-1] == "withdrawn"


def test_queries_of_other_policies_are_heard_of_and_not_compared(root: Path) -> None:
    found = swarm(root, warm=20, canary_queries=500, limits={"deadline_s": 5.0})
    found.offer(found.files(HOME, seed=1), 1)
    found.policy = "exploring"
    for _ in range(60):
        found.ask()
    trial = found.adaptation.status()["trial"]
    assert (trial["queries"], trial["signals"]["failures"]["pairs"]) == ({}, 0)


def test_an_operator_ends_a_trial_and_sets_the_anchor(root: Path) -> None:
    found = swarm(root)
    found.offer(found.files(HOME, seed=1), 1)
    found.took(found.versions.install(found.files(HOME, sharpness=3.0), "by hand", []))
    found.adaptation.operated()
    found.took(None)
    assert (found.adaptation.split, actions(found)[-1]) == (None, "withdrawn")
    assert found.adaptation.status()["anchor"] == found.versions.version


def test_another_pool_and_a_damaged_state(root: Path) -> None:
    found = swarm(root, "observe")
    found.offer(found.files(HOME, seed=1), 3)
    tree = json.loads((root / FILE).read_text())
    assert tree["ledger"] == 3
    (root / FILE).write_text(json.dumps(tree | {"ledger": "many"}))
    with pytest.raises(CheckpointError, match=r"adaptation.json: ledger is 'many'"):
        found.start()
    (root / FILE).write_text(json.dumps(tree | {"source": {"fingerprint": "another"}}))
    found.start()
    assert found.adaptation.status()["ledger"] == 0


def test_a_liar_that_grows_sure_is_distrusted_and_gains_no_load(root: Path) -> None:
    found = swarm(root, warm=160, held_back=0.5, redundant=True)
    found.liars = ("code",)
    for _ in range(160):
        found.ask(is_dense=True)
    told = found.offer(found.files(TO_LAST), 1)
    assert told["distrusted"] == ["code"]
    failed = [verdict["guard"] for verdict in told["verdicts"] if not verdict["passed"]]
    assert "disagreement" in failed


def test_who_is_distrusted_is_looked_at_again_without_an_offer(root: Path) -> None:
    """The learner leaves it out, so there may be nothing to learn and nothing to offer."""
    found = swarm(root, warm=160, held_back=0.5, redundant=True)
    found.liars = ("code",)
    for _ in range(160):
        found.ask(is_dense=True)
    found.offer(found.files(TO_LAST), 1)
    assert found.adaptation.status()["distrusted"] == ["code"]
    found.liars = ()
    for _ in range(800):
        found.ask(is_dense=True)
        if not found.adaptation.status()["distrusted"]:
            break
    assert found.adaptation.status()["distrusted"] == []


def test_known_answers_are_a_guard_of_their_own(root: Path, tmp_path: Path) -> None:
    found = swarm(root)
    rows = [
        {"query_id": f"q{c}-{n}", "step": 0, "agent": name, "context": centre_D.tolist(), "feedback": [0.0]}
        for c, centre_D in enumerate(found.centre_CD)
        for n in range(20)
        for name in AGENTS
    ]
    judged = {(row["query_id"], row["agent"]): float(row["agent"] == AGENTS[int(row["query_id"][1])]) for row in rows}
    place = tmp_path / "probes.jsonl"
    place.write_text(known_answers(pa.Table.from_pylist(rows), judged, "paper"))
    assert len(place.read_text().splitlines()) == 80
    guarded = swarm(tmp_path / "other", known_answers=str(place), skip=("drift", "distance", "held_back", "load"))
    told = guarded.offer(guarded.files(TO_LAST), 1)
    (verdict,) = [verdict for verdict in told["verdicts"] if not verdict["passed"]]
    assert (verdict["guard"], verdict["words"].endswith("(uses probe labels)")) == ("known_answers", True)
    assert guarded.adaptation.status()["uses_probe_labels"]
    assert guarded.offer(guarded.files(HOME, seed=1), 2)["accepted"]
    line = json.loads(place.read_text().splitlines()[0])
    for bad in ({}, line | {"input": [float("nan")] * len(line["input"])}, line | {"right": {"one": float("inf")}}):
        place.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match=r"router.guards.known_answers is .*; write it with `dmoa probe --known-answers`"):
            swarm(tmp_path / "third", known_answers=str(place))


def long_trial(root: Path, updates: int = 20) -> LearningSwarm:
    """A trial in `on` with so many updates that the history no longer names the version before it."""
    found = swarm(root, "on", warm=40, canary_queries=1000, skip=("drift", "distance", "held_back", "load"))
    found.took(found.versions.adopt(*found.gate(HOME, seed=99), "what was learned before"))
    for update in range(1, updates + 1):
        assert found.offer(found.files(HOME, seed=update), update)["state"] == "installed"
    return found


@pytest.mark.parametrize("how", ["freeze", "guards", "off", "operator"])
def test_a_trial_of_many_updates_ends_with_the_gate_before_it(root: Path, how: str) -> None:
    found = long_trial(root)
    assert found.adaptation.split is not None
    good = found.adaptation.split[0]
    assert good not in {entry["version"] for entry in found.versions.history()}
    if how == "freeze":
        found.took(found.adaptation.freeze("release day"))
    elif how == "guards":
        found.offer(found.files((3, 3, 3, 3)), 21)
        found.broken = ("code",)
        until(found, "rolled back", 200)
    elif how == "off":
        router = found.config.router.model_copy(update={"adaptation": "off"})
        found.config = found.config.model_copy(update={"router": router})
        found.start()
    else:
        found.took(found.adaptation.rollback(None, "by hand"))
        found.adaptation.operated()
    assert (found.versions.version, found.adaptation.split) == (good, None)


def test_learning_is_frozen_though_the_trial_cannot_be_ended(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = swarm(root, "on")
    good = found.versions.version
    found.offer(found.files(HOME, seed=1), 1)

    def rollback(version: str | None, note: str) -> None:
        raise CheckpointError("its files are gone")

    monkeypatch.setattr(found.versions, "rollback", rollback)
    with pytest.raises(CheckpointError, match="its files are gone"):
        found.adaptation.freeze("release day")
    found.start()
    assert found.adaptation.status()["frozen"] == "release day"
    assert (found.versions.version, found.adaptation.split) == (good, None)  # now it has ended


def in_the_way(root: Path, *names: str) -> None:
    """Let files of the state be written no more."""
    for name in names:
        (root / name).unlink()
        (root / name / "in the way").mkdir(parents=True)


def test_a_worse_gate_is_taken_back_though_nothing_can_be_written(root: Path) -> None:
    found = swarm(root, "on", warm=40, canary_queries=500, skip=("drift", "distance", "held_back", "load"))
    good, found.broken = found.versions.version, ("code",)
    found.offer(found.files((3, 3, 3, 3)), 1)
    in_the_way(root, FILE, "state.json")
    until(found, "rolled back", 120)
    assert (found.versions.version, found.router.current, found.adaptation.split) == (good, good, None)


@pytest.mark.parametrize("mode", ["canary", "on"])
def test_what_an_operator_makes_current_is_served_though_the_end_of_the_trial_cannot_be_written(root: Path, mode: str) -> None:
    found = swarm(root, mode)
    found.offer(found.files(HOME, seed=1), 1)
    in_the_way(root, FILE)
    change = found.versions.install(found.files(HOME, seed=2), "", [])
    found.adaptation.operated()
    found.took(change)
    assert (found.versions.version, found.router.current, found.adaptation.split) == (change.version, change.version, None)


def test_an_update_that_goes_back_to_the_control_ends_the_trial(root: Path) -> None:
    found = swarm(root, "on", canary_queries=5)
    good = found.versions.version
    found.offer(found.files(HOME, seed=1), 1)
    assert found.offer(found.files(range(4)), 2)["version"] == good  # what was installed first
    assert (found.versions.version, found.router.current, found.adaptation.split) == (good, good, None)


class _Dies(BaseException):
    pass


class _Mortal(dict[str, bytes]):
    """The cluster's memory, at which the router dies when a file of the state is written: it is remembered last."""

    at = ""

    def __setitem__(self, name: str, data: bytes) -> None:
        if name == self.at:
            raise _Dies
        super().__setitem__(name, data)


def dies(found: LearningSwarm, at: str) -> None:
    memory = _Mortal()
    memory.at = at
    found.versions._state._memory = memory


@pytest.mark.parametrize("updates", [1, 2])
def test_an_update_that_never_became_current_is_not_tried(root: Path, updates: int) -> None:
    """The router dies when the ledger and the trial are kept: that update is lost, and the one before it is tried on."""
    found = swarm(root, "on")
    for update in range(1, updates):
        found.offer(found.files(HOME, seed=update), update)
    before, split = found.versions.version, found.adaptation.split
    dies(found, FILE)
    with pytest.raises(_Dies):
        found.offer(found.files(HOME, seed=updates), updates)
    found.start()
    assert (found.versions.version, found.router.current, found.adaptation.status()["ledger"]) == (before, before, updates)
    assert found.adaptation.split == split


def test_what_an_operator_took_back_is_not_tried_again(root: Path) -> None:
    """The router dies when the version before the trial is current, and the end of the trial is not kept yet."""
    found = swarm(root, "on")
    good = found.versions.version
    found.offer(found.files(HOME, seed=1), 1)
    dies(found, "state.json")
    with pytest.raises(_Dies):
        found.adaptation.rollback(None, "by hand")
    found.start()
    assert (found.versions.version, found.adaptation.split) == (good, None)


def test_the_version_that_is_to_become_the_control_is_kept_over_a_restart(root: Path) -> None:
    found = swarm(root, "on", warm=40, canary_queries=5, skip=("drift", "distance", "held_back", "load"))
    pending = found.offer(found.files(HOME, seed=1), 1)["version"]
    while json.loads((root / FILE).read_text())["trial"]["pending"] != pending:
        found.ask()
    for update in range(2, 25):
        found.offer(found.files(HOME, seed=update), update)
    found.start()
    found.offer(found.files(HOME, seed=25), 25)  # of the versions that nobody wants the files go
    assert (root / "versions" / pending / "gate.json").exists()
    for _ in range(60):
        found.ask()
        if found.adaptation.status()["trial"]["control"] == pending:
            break  # the window ended
    assert found.adaptation.split == (pending, 0.2)


def test_queries_that_are_lost_after_a_restart_are_noticed(root: Path) -> None:
    found = swarm(root, warm=40, canary_queries=1000, canary_share=0.5, limits={"deadline_s": 5.0})
    candidate = found.offer(found.files(HOME, seed=1), 1)["version"]
    for _ in range(200):
        found.ask()
    found.start()
    observe = found.adaptation.observe
    found.adaptation.observe = lambda records, begun: observe(  # type: ignore[method-assign] # the candidate's hang
        [one for one in records if one.answer.gate_version != candidate], begun
    )
    until(found, "rolled back", 120)
    assert found.adaptation.status()["failures"] == {"failures": 1}


def test_an_operator_who_goes_back_in_a_trial_ends_it_and_changes_nothing_else(root: Path, tmp_path: Path) -> None:
    found = swarm(root)
    good = found.versions.version
    found.offer(found.files(HOME, seed=1), 1)
    with pytest.raises(CheckpointError, match=r"never current here.*the trial of gate .* goes on, `dmoa router freeze` ends it"):
        found.adaptation.rollback("nothing", "")
    change = found.adaptation.rollback(None, "")
    found.adaptation.operated()
    assert (change.version, change.is_change, found.adaptation.split) == (good, False, None)
    assert (found.versions.version, found.adaptation.status()["anchor"]) == (good, good)
    before = found.adaptation.rollback(None, "")  # no trial runs: the one before the current one
    assert (before.version == good, before.previous) == (False, good)
    updated = swarm(tmp_path / "on", "on")
    good = updated.versions.version
    for update in (1, 2):
        updated.offer(updated.files(HOME, seed=update), update)
    assert updated.adaptation.rollback(None, "").version == good  # and not the update before the last


def test_a_freeze_and_the_ledger_move_along_to_another_place(root: Path, tmp_path: Path) -> None:
    found = swarm(root, "on")
    found.offer(found.files(HOME, seed=1), 3)
    found.took(found.adaptation.freeze("release day"))
    there = RouterState((tmp_path / "there").as_uri())
    there.take_over(RouterState(root.as_uri()), FILE)
    again = Adaptation(there, found.config, GateVersions(there, found.config, None)).status()
    assert (again["frozen"], again["ledger"]) == ("release day", 3)


def test_a_freeze_holds_at_a_place_that_has_a_state_of_its_own(root: Path, tmp_path: Path) -> None:
    found = swarm(tmp_path / "there", "on")
    good = found.versions.version
    found.offer(found.files(HOME, seed=1), 1)  # on trial there
    state = RouterState((tmp_path / "there").as_uri())
    Adaptation(state, found.config, GateVersions(state, found.config, None), frozen="release day")
    found.start()
    assert found.adaptation.status()["frozen"] == "release day"
    assert (found.versions.version, found.adaptation.split) == (good, None)


def test_a_freeze_outlasts_the_deploy_of_another_gate(root: Path) -> None:
    found = swarm(root, "on")
    found.offer(found.files(HOME, seed=1), 3)
    found.took(found.adaptation.freeze("release day"))
    for _ in range(2):  # the deploy, and a restart after it
        state = RouterState(root.as_uri())
        again = Adaptation(state, found.config, GateVersions(state, found.config, "another"))
        assert (again.status()["frozen"], again.status()["ledger"]) == ("release day", 0)
        assert [(event["action"], event["note"]) for event in again.events()] == [
            ("freeze", "still frozen after a deploy: release day")
        ]
    again.thaw()
    assert again.status()["frozen"] is None
