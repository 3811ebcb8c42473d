"""Shift detection: bets that pay nothing on chance, false alarms as seldom as stated, and short delays."""

from __future__ import annotations

import numpy as np
import pytest

from dmoa.core.scores import Array
from dmoa.core.shift import MAX_SEEN, SETTLE, ShiftDetector, _Evidence, bet
from dmoa.errors import ConfigError

D, A = 48, 4


class Stream:
    """Queries around a few centres; each agent is as sure as it is of that centre, give or take."""

    def __init__(self, seed: int, num_centres: int = 4) -> None:
        self.rng = np.random.default_rng(seed)
        centre_CD = self.rng.normal(size=(num_centres, D))
        self.centre_CD = centre_CD / np.linalg.norm(centre_CD, axis=1, keepdims=True)
        self.mean_CA = self.rng.normal(size=(num_centres, A))

    def next(self, centre: int) -> tuple[Array, Array]:
        row_D = 0.6 * self.centre_CD[centre] + 0.8 * self.rng.normal(size=D) / np.sqrt(D)
        return row_D / np.linalg.norm(row_D), self.mean_CA[centre] + 0.3 * self.rng.normal(size=A)

    def mixed(self, detector: ShiftDetector, count: int, centres: int = 3) -> None:
        for _ in range(count):
            detector.see(*self.next(int(self.rng.integers(centres))))

    def of_three(self, detector: ShiftDetector, count: int) -> None:
        """Usual queries of the keys a, b and c."""
        for _ in range(count):
            detector.see(*self.next(int(self.rng.integers(3))), "abc"[int(self.rng.integers(3))], 0.5)


def test_a_bet_on_chance_pays_one_on_average() -> None:
    grid = (np.arange(200_000) + 0.5) / 200_000
    # The integral over p of the mixture of power bets is 1; the end at 0, where it grows without bound, is missing.
    assert np.mean([bet(float(p)) for p in grid]) == pytest.approx(1.0, abs=0.1)
    # The integral over k of k p^(k - 1), by the trapezoidal rule.
    k = np.linspace(0, 1, 100_001)
    assert bet(0.03) == pytest.approx(float(np.trapezoid(k * 0.03 ** (k - 1), k)), rel=1e-6)


def test_false_alarms_are_no_oftener_than_stated() -> None:
    alarms = 0
    for seed in range(8):
        stream, detector = Stream(seed), ShiftDetector(run_length=400, seed=seed)
        stream.mixed(detector, 500)
        alarms += len(detector.shifts)
    # 4,000 queries at a mean run of 400 or more: ten at most on average.
    assert alarms <= 10


def test_questions_of_a_new_kind_are_noticed_within_a_few() -> None:
    delays = []
    for seed in range(6):
        stream, detector = Stream(seed), ShiftDetector(seed=seed)
        stream.mixed(detector, 200)
        assert not detector.shifts
        delays.append(next(n for n in range(1, 30) if detector.see(*stream.next(3))))
        assert detector.shifts[0].cause == "inputs"
        assert detector.is_settling
        for _ in range(100):  # what was new is usual now, and so is what was usual before
            detector.see(*stream.next(3))
        stream.mixed(detector, 100)
        assert len(detector.shifts) == 1
    assert max(delays) <= 10


def test_an_agent_that_says_it_is_sure_of_everything_is_odd_and_stays_so() -> None:
    stream, detector = Stream(1), ShiftDetector(seed=1)
    stream.mixed(detector, 200)
    for _ in range(30):
        row_D, signal_A = stream.next(0)
        signal_A[2] = -6.9
        detector.see(row_D, signal_A)
    assert (detector.odd_agents, detector.shifts) == ({2}, [])
    for _ in range(2 * SETTLE):  # a change of questions does not wash it clean
        row_D, signal_A = stream.next(3)
        signal_A[2] = -6.9
        detector.see(row_D, signal_A)
    assert detector.odd_agents == {2}
    assert [shift.cause for shift in detector.shifts] == ["inputs"]


@pytest.mark.parametrize("changes", [False, True])
def test_an_odd_agent_that_is_again_what_it_was_is_heard_again(changes: bool) -> None:
    """Also after a change of questions in between; one that is itself now and then only is not."""
    stream, detector = Stream(1), ShiftDetector(seed=1)
    stream.mixed(detector, 200)

    def see(count: int, place: int | None, *, lies: float) -> None:
        for number in range(count):
            row_D, signal_A = stream.next(number % 3 if place is None else place)
            if stream.rng.uniform() < lies:
                signal_A[2] = -6.9
            detector.see(row_D, signal_A)

    see(30, 0, lies=1.0)
    assert detector.odd_agents == {2}
    if changes:
        see(2 * SETTLE, 3, lies=1.0)
    see(6 * SETTLE, None, lies=0.5)
    assert detector.odd_agents == {2}
    see(6 * SETTLE, None, lies=0.0)
    assert detector.odd_agents == set()
    see(SETTLE, None, lies=1.0)  # and is watched as before
    assert detector.odd_agents == {2}


def test_all_agents_at_once_are_a_shift_of_signals() -> None:
    stream, detector = Stream(2), ShiftDetector(seed=2)
    stream.mixed(detector, 200)
    for _ in range(40):
        row_D, signal_A = stream.next(1)
        if shift := detector.see(row_D, signal_A + 3.0):
            break
    assert shift is not None
    assert shift.cause == "signals"
    assert detector.odd_agents == set()


def test_one_key_declares_no_shift_where_others_teach_and_hides_none_of_theirs() -> None:
    for seed in range(4):
        stream, detector = Stream(seed, 5), ShiftDetector(seed=seed)
        stream.of_three(detector, 120)
        for _ in range(10):
            detector.see(*stream.next(3), "d", 0.5)
        for _ in range(20):  # half of the traffic, and it goes on
            detector.see(*stream.next(3), "d", 0.5)
            stream.of_three(detector, 1)
        assert detector.shifts == [], seed
        assert any(detector.see(*stream.next(4), "abc"[number % 3], 0.5) for number in range(15)), seed


@pytest.mark.parametrize(("keys", "most"), [("abc", 15), ("ab", 15), ("a", 10)])
def test_what_several_keys_ask_anew_is_noticed_and_what_one_does_where_it_is_the_only_one(keys: str, most: int) -> None:
    for seed in range(4):
        stream, detector = Stream(seed), ShiftDetector(seed=seed)
        share = 0.5 if len(keys) > 1 else 1.0
        for number in range(120):
            detector.see(*stream.next(int(stream.rng.integers(3))), keys[number % len(keys)], share)
        assert detector.shifts == []
        assert any(detector.see(*stream.next(3), keys[number % len(keys)], share) for number in range(most)), seed


@pytest.mark.parametrize("is_shift", [True, False])
def test_agents_that_are_unlike_themselves_on_one_keys_queries_alone_go_on_teaching(is_shift: bool) -> None:
    stream, detector = Stream(2), ShiftDetector(seed=2)
    stream.of_three(detector, 200)
    for number in range(60):
        row_D, signal_A = stream.next(1)
        detector.see(row_D, signal_A + 3.0, "abc"[number % 3] if is_shift else "d", 0.5)
        if not is_shift:
            stream.of_three(detector, 1)
    assert detector.odd_agents == set()
    assert [shift.cause for shift in detector.shifts] == ["signals"] * is_shift


def test_a_detector_that_was_primed_judges_at_once_and_knows_who_was_never_heard() -> None:
    stream, detector = Stream(3), ShiftDetector(seed=3)
    rows = [stream.next(int(stream.rng.integers(3))) for _ in range(120)]
    signal_RA = np.stack([signal_A for _, signal_A in rows])
    signal_RA[:, 1] = np.nan
    detector.prime(np.stack([row_D for row_D, _ in rows]), signal_RA)
    assert not detector.is_settling
    assert detector.odd_agents == {1}
    stream.mixed(detector, 100)
    assert not detector.shifts
    assert any(detector.see(*stream.next(3)) for _ in range(15))


def test_of_two_kinds_that_take_turns_both_become_usual_and_a_third_is_noticed() -> None:
    for seed in range(6):
        stream, detector = Stream(seed), ShiftDetector(seed=seed)
        for number in range(200):
            detector.see(*stream.next(number % 2))
        assert not detector.shifts
        assert any(detector.see(*stream.next(3)) for _ in range(20)), seed


def test_a_long_stream_takes_no_more_memory() -> None:
    rng = np.random.default_rng(0)
    evidence = _Evidence([])
    for score in rng.uniform(size=MAX_SEEN + 100):
        evidence.add(float(score), rng)
    assert len(evidence._seen) == MAX_SEEN
    for number in range(500):
        evidence.add(0.5, rng, key=str(number))
    assert len(evidence._without) < 100, "keys that were heard of long ago make no difference"


def test_what_is_not_finite_is_not_looked_at() -> None:
    detector = ShiftDetector()
    assert detector.see(np.full(D, np.nan), np.zeros(A)) is None
    assert detector.seen == 0
    with pytest.raises(ConfigError, match=r"run_length is 1\.5; expected a number of queries from 2"):
        ShiftDetector(run_length=1.5)
