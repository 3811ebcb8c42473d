"""Guards against values worked out by hand, and error rates of the sequential test over simulated sequences."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dmoa.core.guards import (
    BETS,
    HIGHER,
    ArmComparison,
    ByContext,
    RateComparison,
    RateTest,
    SequentialTest,
    disagreement,
    distance,
    distrusted,
    drift,
    effective_agents,
    finite,
    load,
    not_worse,
)


def test_one_weight_that_is_no_number_is_named() -> None:
    weights = {"head.weight": np.ones((2, 2)), "head.bias": np.array([0.0, np.nan])}
    assert (finite(weights).passed, finite(weights).words) == (False, "head.bias holds NaN or infinity")
    assert finite({"head.weight": np.ones(3)}).passed


def test_drift_is_the_mean_divergence_in_nats() -> None:
    old, new = [[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.75, 0.25]]
    by_hand = (0.0 + 0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert drift(new, old, 1.0).value == pytest.approx(by_hand)
    assert [drift(new, old, bound).passed for bound in (by_hand + 1e-9, by_hand - 1e-9)] == [True, False]
    assert drift([[1.0, 0.0]], [[0.0, 1.0]], 14.0).value == pytest.approx(math.log(1e6), rel=1e-4)  # bounded, not infinite
    assert drift(np.zeros((0, 2)), np.zeros((0, 2)), 1.0).passed


def test_distance_is_relative_to_the_anchor() -> None:
    anchor = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    new = {"a": np.array([3.0, 1.0]), "b": np.array([[2.0]])}
    assert distance(new, anchor, 0.5).value == pytest.approx(math.sqrt(5) / 5)
    assert [distance(new, anchor, bound).passed for bound in (0.45, 0.44)] == [True, False]
    assert not distance(new, {name: 0 * array for name, array in anchor.items()}, 10.0).passed


def test_effective_agents_and_a_collapse() -> None:
    even, one = np.full((4, 4), 0.25), np.tile([1.0, 0, 0, 0], (4, 1))
    assert effective_agents(even) == pytest.approx(4.0)
    assert effective_agents(np.eye(4)) == pytest.approx(4.0)  # each query has its own agent: nothing has collapsed
    assert effective_agents(one) == pytest.approx(1.0)
    assert [load(one, even, 1.5).passed, load(even, one, 1.5).passed, load(one, one, 1.5).passed] == [False, True, True]
    assert load(one, np.tile([0.9, 0.1, 0, 0], (4, 1)), 1.5).bound == pytest.approx(0.75 * math.exp(0.325083), rel=1e-5)


def test_wealth_is_what_a_bettor_has() -> None:
    test = SequentialTest(0.1, 0.05)
    for difference in (1.0, -0.5, float("nan"), 7.0):
        test.update(difference)
    by_hand = [(1 + s / 1.1 * 0.9) * (1 - s / 1.1 * 0.6) * (1 + s / 1.1 * 0.9) for s in BETS]
    assert test.evidence == pytest.approx(sum(by_hand) / len(BETS))
    assert test.threshold == 20
    again = SequentialTest(0.1, 0.05)
    again.log_wealth = list(test.log_wealth)
    assert again.evidence == test.evidence


def found_after(differences: np.ndarray, margin: float, error_rate: float, *, restarts: bool = False) -> int | None:
    test = SequentialTest(margin, error_rate, restarts=restarts)
    for number, difference in enumerate(differences, start=1):
        test.update(float(difference))
        if test.is_found:
            return number
    return None


def test_false_findings_stay_below_the_stated_rate_however_often_one_looks() -> None:
    """400 sequences of 200 differences whose mean is the margin itself, the worst case: of ten percent no more are found."""
    rng = np.random.default_rng(1)
    kinds = [
        0.1 + rng.choice([-0.9, 0.9], (150, 200)),
        0.1 + rng.uniform(-0.5, 0.5, (150, 200)),
        rng.choice([1.0, 0.0, -1.0], p=[0.15, 0.8, 0.05], size=(100, 200)),
    ]
    found = [found_after(row, 0.1, 0.1) is not None for rows in kinds for row in rows]
    assert len(found) == 400
    assert 0.01 < np.mean(found) < 0.1 + 2 * math.sqrt(0.1 * 0.9 / 400)  # it does look, and does not overspend


def test_true_losses_are_found_and_total_failure_in_ten() -> None:
    rng = np.random.default_rng(2)
    worse = rng.choice([1.0, 0.0, -1.0], p=[0.4, 0.5, 0.1], size=(200, 200))  # mean 0.3
    assert np.mean([found_after(row, 0.05, 0.05) is not None for row in worse]) > 0.97
    assert found_after(np.ones(20), 0.05, 0.05 / 4) == 10
    late = np.concatenate([np.full(400, -0.3), np.ones(30)])
    assert found_after(late, 0.05, 0.05 / 4) is None  # what was lost in the quiet time is missing
    assert found_after(late, 0.05, 0.05 / 4, restarts=True) == 410


def test_restarts_keep_false_findings_as_rare_as_stated() -> None:
    rng = np.random.default_rng(3)
    rows = 0.05 + rng.choice([-0.9, 0.9], (60, 200))
    alarms = sum(found_after(row, 0.05, 0.01, restarts=True) is not None for row in rows)
    assert 0 < alarms <= 60 * 200 * 0.01


def test_not_worse_skips_what_is_unknown_and_says_how_many_rows_it_saw() -> None:
    verdict = not_worse("held_back", [float("nan"), *[0.5] * 40], margin=0.02, error_rate=0.05)
    assert (verdict.passed, verdict.guard, verdict.bound) == (False, "held_back", 20.0)
    assert verdict.words.startswith("quality on 40 queries -0.500")
    assert not_worse("held_back", [0.0] * 500, margin=0.02, error_rate=0.05).passed
    assert not_worse("held_back", [], margin=0.02, error_rate=0.05).passed


def liar(rng: np.random.Generator, rows: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three agents in two contexts; the first becomes surer half-way, and fewer agree with it."""
    late = (np.arange(rows) >= rows // 2).astype(float)
    context = np.arange(rows) % 2
    sure = rng.normal(0, 0.3, (rows, 3)) + 3.0 * context[:, None]
    agree = np.clip(0.7 + rng.normal(0, 0.1, (rows, 3)), 0, 1)
    sure[:, 0] += 1.5 * late
    agree[:, 0] -= 0.6 * late
    return sure, agree, context


def test_an_agent_that_grows_surer_while_fewer_agree_is_distrusted() -> None:
    sure, agree, context = liar(np.random.default_rng(4))
    assert distrusted(sure, agree, context).tolist() == [True, False, False]
    assert distrusted(sure, np.full_like(agree, 0.7), context).tolist() == [False] * 3  # surer alone is no crime
    assert distrusted(np.zeros_like(sure), agree, context).tolist() == [False] * 3
    assert distrusted(sure[:8], agree[:8], context[:8]).tolist() == [False] * 3  # too few replies to tell


def test_a_change_of_traffic_makes_nobody_a_liar() -> None:
    """At home an agent is sure, and alone with its answer: that is what specialists are."""
    rng = np.random.default_rng(5)
    context = (np.arange(100) >= 50).astype(int)
    sure, agree = rng.normal(0, 0.3, (100, 2)), np.clip(rng.normal(0.8, 0.1, (100, 2)), 0, 1)
    sure[context == 1, 0] += 2.0
    agree[context == 1, 0] -= 0.7
    assert distrusted(sure, agree, context).tolist() == [False, False]


def test_load_must_not_move_to_the_distrusted() -> None:
    old, bad = np.tile([0.5, 0.5], (10, 1)), np.array([True, False])
    assert disagreement(np.tile([0.54, 0.46], (10, 1)), old, bad, ["liar", "b"]).passed
    verdict = disagreement(np.tile([0.6, 0.4], (10, 1)), old, bad, ["liar", "b"])
    assert (verdict.passed, verdict.value) == (False, pytest.approx(0.1))
    assert "liar became surer" in verdict.words
    assert disagreement(np.tile([0.0, 1.0], (10, 1)), old, np.array([False, False]), ["liar", "b"]).passed


def test_arms_are_compared_by_what_is_new_of_each() -> None:
    arms = ArmComparison(SequentialTest(0.0, 0.05))
    for value, is_suspect in ((0.2, False), (0.4, False), (float("nan"), True), (0.9, True), (0.5, True), (0.5, False)):
        arms.add(value, is_suspect=is_suspect)
    assert (arms.pairs, arms.mean) == (2, pytest.approx((0.6 + 0.0) / 2))


def test_values_far_off_are_cut_before_they_are_averaged() -> None:
    arms = ArmComparison(SequentialTest(0.0, 0.05))
    for value, is_suspect in ((6.0, False), (6.0, False), (6.0, False), (0.0, False), (6.0, True)):
        arms.add(value, is_suspect=is_suspect)
    alike = SequentialTest(0.0, 0.05)
    alike.update(0.25)  # 1 of the four that lies far off, and 0 of the others
    assert (arms.mean, arms.test.evidence) == (0.25, pytest.approx(alike.evidence))


@pytest.mark.parametrize(("share", "long"), [(0.1, 0.8), (0.9, 0.2)])
def test_arms_alike_stay_so_where_queries_take_few_tokens_or_a_thousand_times_as_many(share: float, long: float) -> None:
    rng, found = np.random.default_rng(8), 0
    for _ in range(40):
        arms, is_found = ArmComparison(SequentialTest(0.161, 0.01)), False
        for is_suspect in rng.uniform(size=1500) < share:
            arms.add(5.0 * float(rng.uniform() < long), is_suspect=bool(is_suspect))
            is_found |= arms.test.is_found
        found += is_found
    assert found <= 1


def test_a_rate_is_tested_by_likelihood_ratios() -> None:
    test = RateTest(0.05)
    for event in (1.0, 0.0):
        test.update(event, 0.2)
    rates = [0.2 + part * 0.8 for part in HIGHER]
    assert test.evidence == pytest.approx(sum(r / 0.2 * (1 - r) / 0.8 for r in rates) / len(HIGHER))


def failing(rng: np.random.Generator, control: float, suspect: float, count: int = 400) -> RateComparison:
    """A comparison of two arms that fail at set rates, one query in five the suspect's, until found or through."""
    found = RateComparison(RateTest(0.05 / 4), 0.05)
    for is_suspect in rng.uniform(size=count) < 0.2:
        found.add(float(rng.uniform() < (suspect if is_suspect else control)), is_suspect=bool(is_suspect))
        if found.test.is_found:
            break
    return found


def test_a_kind_of_queries_is_compared_where_the_control_has_failed_alone() -> None:
    whole = RateComparison(RateTest(0.05 / 4), 0.05)
    found = ByContext(whole, lambda: RateComparison(RateTest(0.05 / 4), 0.05, whole), 16)
    found.add(1.0, 0, is_suspect=False)
    found.add(0.0, 1, is_suspect=True)
    assert whole.usual == 1.0  # 0.75 and a standard error of 0.31
    assert found.evidence == 1.0  # not before the control is heard of again
    found.add(1.0, 0, is_suspect=False)
    assert 0.0 < found.evidence < 1.0


def test_failures_are_found_in_a_few_queries_and_equal_rates_are_not() -> None:
    rng = np.random.default_rng(6)
    late = [failing(rng, 0.02, 1.0) for _ in range(100)]
    assert all(one.test.is_found for one in late)
    assert np.mean([one.pairs for one in late]) < 6
    for rate in (0.0, 0.02, 0.1, 0.3):
        assert np.mean([failing(rng, rate, rate).test.is_found for _ in range(100)]) <= 0.05


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_what_fails_with_both_gates_at_once_is_no_evidence(share: float) -> None:
    rng, found = np.random.default_rng(3), 0
    for number in range(100):
        arms = by_context()
        for place in range(200):
            rate = 0.0 if place < 60 else (1.0, 0.5)[number % 2]
            arms.add(float(rng.uniform() < rate), 0, is_suspect=bool(rng.uniform() < share))
        found += arms.is_found
    assert found <= 2


def by_context() -> ByContext:
    """A comparison of failures as the router has it."""
    whole = RateComparison(RateTest(0.05 / 4), 0.05)
    return ByContext(whole, lambda: RateComparison(RateTest(0.05 / 4), 0.05, whole), 16)


def test_evidence_by_context_is_a_mean_of_wealth() -> None:
    found = by_context()
    assert found.evidence == 1.0
    for _ in range(50):
        found.add(0.0, 0, is_suspect=False)
    found.add(1.0, 1, is_suspect=True)
    found.add(1.0, None, is_suspect=True)
    found.add(0.0, 0, is_suspect=False)
    usual = 0.5 / 51 + math.sqrt(0.5 / 51 * (1 - 0.5 / 51) / 51)
    prior = usual + math.sqrt(usual * (1 - usual) / 4)  # of a context without a query of the control

    def wealth(rate: float, failures: int) -> float:
        return sum((rate + part * (1 - rate)) ** failures / rate**failures for part in HIGHER) / len(HIGHER)

    whole, there = wealth(usual + 0.05, 2), wealth(prior + 0.05, 1)
    assert found.evidence == pytest.approx(whole / 2 + (there + 1.0 + 14.0) / 32)
    assert found.suspicion == pytest.approx(max(whole, there))
    assert found.where == f"worse by {found.whole.mean:.3f}"


def test_a_comparison_goes_on_from_its_state() -> None:
    rng, found = np.random.default_rng(3), by_context()
    for number in range(80):
        found.add(float(rng.uniform() < 0.1), number % 5, is_suspect=number % 3 == 0)
    again = by_context()
    again.take_up(json.loads(json.dumps(found.state())))
    for one in (found, again):
        one.add(1.0, 2, is_suspect=True)
    assert again.state() == found.state()
    assert again.evidence == found.evidence != 1.0


@pytest.mark.parametrize("contexts", [3, 8])
def test_what_fails_in_one_context_is_found_there(contexts: int) -> None:
    late, pooled = [], []
    for seed in range(20):
        rng, found = np.random.default_rng(seed), by_context()
        for number in range(20 * contexts):
            found.add(0.0, number % contexts, is_suspect=False)
        for number in range(600):
            is_suspect, context = bool(rng.uniform() < 0.5), int(rng.integers(contexts))
            found.add(float(is_suspect and context == 0), context, is_suspect=is_suspect)
            pooled += [number] if len(pooled) == seed and found.whole.test.is_found else []
            if found.is_found:
                break
        late.append(number)
        pooled += [600] if len(pooled) == seed else []
    assert max(late) < 600
    assert np.median(late) <= 12 * contexts  # four failures come in eight queries for each context
    assert "in one kind of queries" in found.where
    assert np.median(late) < np.median(pooled)


def test_contexts_that_always_fail_more_are_no_finding() -> None:
    rates, wrong = (0.0, 0.0, 0.0, 0.3), 0
    for seed in range(100):
        rng, found = np.random.default_rng(seed), by_context()
        for number in range(300):
            context = int(rng.integers(4))
            is_suspect = number >= 50 and bool(rng.uniform() < 0.2)
            found.add(float(rng.uniform() < rates[context]), context, is_suspect=is_suspect)
        wrong += found.is_found
    assert wrong <= 2
