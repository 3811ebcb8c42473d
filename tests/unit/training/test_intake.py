"""What may teach: no number that cannot be, no key without leave, nobody more than a share, every kind of question in turn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dmoa.core.shift import ShiftDetector
from dmoa.feedback import MARK, Feedback, tenant_of
from dmoa.training.adapt import Lesson
from dmoa.training.intake import (
    ANONYMOUS,
    MAX_COPIES,
    MAX_KEPT,
    MAX_USES,
    Intake,
    IntakeRules,
    Judged,
    false_witnesses,
    is_possible,
)
from dmoa.training.outcomes import Outcome
from dmoa.types import AgentReply, EntropySum
from tests.streams import FINGERPRINT, KEYS, ScriptedPool


def rules(pool: ScriptedPool, **changes: object) -> IntakeRules:
    values: dict[str, object] = {"agents": pool.agents, "preset": "paper", "fingerprint": FINGERPRINT}
    return IntakeRules(**values | changes)  # type: ignore[arg-type]


def keys_of(batch: Sequence[Lesson], records: Sequence[Feedback]) -> Counter[str]:
    tenant = {f"{MARK}{record.answer.trace_id}": record.tenant for record in records}
    return Counter(tenant[lesson.query_id] for lesson in batch)


@pytest.mark.parametrize(
    ("sum_nats", "sq_sum", "tokens", "possible"),
    [
        (1.5, 0.75, 4, True),  # mean 0.375, mean of squares 0.19
        (0.0, 0.0, 3, True),
        (0.0, 0.0, 0, True),
        (1.5, 0.0, 4, True),  # squares were not kept
        (1.5, 0.5, 4, False),  # 0.125 is less than 0.375 squared
        (-1.5, 0.75, 4, False),
        (math.nan, 0.75, 4, False),
        (math.inf, math.inf, 4, False),
        (53.0, 703.0, 4, False),  # 13.25 nats a token: a vocabulary of half a million
        (1.5, 0.75, 0, False),
    ],
)
def test_only_entropies_that_can_be_are_possible(sum_nats: float, sq_sum: float, tokens: int, possible: bool) -> None:
    reply = AgentReply(agent="a", status="ok", entropy=EntropySum(sum_nats=sum_nats, sq_sum=sq_sum, tokens=tokens))
    assert is_possible(reply) is possible


def test_replies_that_cannot_be_are_taken_out_and_counted() -> None:
    pool = ScriptedPool()
    asked = pool.ask(0)
    asked.nats_A[2] = -asked.nats_A[2]
    intake = Intake(rules(pool))
    intake.take([pool.record(asked)])
    (record,) = intake.draw()
    assert [reply.agent for reply in record.answer.steps[0].replies] == ["arith", "words", "code", "law"]
    assert intake.refused == {"entropies of dates that cannot be": 1}


def test_who_does_not_teach_and_why() -> None:
    pool = ScriptedPool()
    excluded, anonymous, other, mine = pool.records(pool.mixed(4))
    intake = Intake(rules(pool, exclude=[KEYS[0]]))
    records = [
        replace(excluded, tenant=KEYS[0]),
        replace(anonymous, tenant=tenant_of("")),
        replace(other, tenant=KEYS[1], fingerprint="another"),
        replace(mine, tenant=KEYS[1]),
    ]
    intake.take(records)
    intake.take(records)
    assert intake.taken == 1
    assert sorted(intake.refused.elements()) == [
        "another version of the pool answered it",
        *["its key is excluded (router.feedback_exclude)", "no API key (router.feedback_anonymous is off)"],
    ]
    open_to_all = Intake(rules(pool, anonymous=True, mixes_keys=True))
    open_to_all.take(records)
    assert keys_of(open_to_all.draw(), records) == {KEYS[0]: 1, ANONYMOUS: 1, KEYS[1]: 1}


def test_keys_take_turns_unless_they_may_mix() -> None:
    pool = ScriptedPool()
    records = [pool.record(pool.ask(number % 5, KEYS[number % 10 == 0])) for number in range(100)]  # nine in ten of the first
    apart = Intake(rules(pool, batch_queries=1))
    apart.take(records)
    turns = Counter(next(iter(keys_of(apart.draw(), records)), "nobody") for _ in range(60))
    # Nine in ten are cut to one in two, and the tenth gets no more for it: 30, 6 and 24, give or take three deviations.
    assert [turns[name] for name in (KEYS[0], KEYS[1], "nobody")] == pytest.approx([30, 6, 24], abs=12)
    mixed = Intake(rules(pool, mixes_keys=True, key_share=0.25))
    mixed.take(records)
    assert keys_of(mixed.draw(), records) == {KEYS[0]: 2, KEYS[1]: 2}
    alone = Intake(rules(pool, mixes_keys=True, key_share=0.25))
    alone.take([record for record in records if record.tenant == KEYS[0]])
    assert keys_of(alone.draw(), records) == {KEYS[0]: 8}


def test_a_batch_is_balanced_over_contexts_and_scattered_garbage_is_none() -> None:
    pool = ScriptedPool(seed=1)
    rare = pool.records([pool.ask(1) for _ in range(10)])
    common = pool.records([pool.ask(0) for _ in range(80)])
    garbage = [pool.ask(0) for _ in range(10)]
    for one in garbage:
        one.input_D = np.asarray(pool.rng.normal(size=one.input_D.shape), np.float32)
    intake = Intake(rules(pool, batch_queries=12))
    intake.take([*rare, *common, *pool.records(garbage)])
    groups: Counter[str] = Counter()
    names = {record.answer.trace_id: "rare" for record in rare} | {record.answer.trace_id: "common" for record in common}
    for _ in range(4):
        groups.update(names.get(record.query_id.removeprefix(MARK), "garbage") for record in intake.draw())
    assert groups["rare"] == groups["common"] >= 8
    assert groups["garbage"] <= groups["rare"]


def test_copies_of_one_query_teach_twice_at_most_and_a_query_thrice() -> None:
    pool = ScriptedPool()
    asked = pool.ask(0)
    intake = Intake(rules(pool))
    intake.take([pool.record(asked) for _ in range(50)])
    assert intake.refused == {"a copy of queries that teach already": 50 - MAX_COPIES}
    assert [len(intake.draw()) for _ in range(MAX_USES + 1)] == [*[MAX_COPIES] * MAX_USES, 0]
    assert intake.waiting == 0


def test_copies_that_one_agent_answered_take_no_place_of_one_that_was_explored() -> None:
    pool = ScriptedPool()
    records = [pool.record(pool.ask(0))] * 5
    step = records[0].answer.steps[0]
    alone = replace(step, replies=step.replies[:1])
    records = [
        replace(one, answer=replace(one.answer, trace_id=f"t{number}", steps=(step if number >= 3 else alone,)))
        for number, one in enumerate(records)
    ]
    intake = Intake(rules(pool))
    intake.take(records)
    assert intake.refused == {"a copy of queries that teach already": 1}
    assert sorted(one.query_id for one in intake.draw()) == [f"{MARK}t{number}" for number in (0, 1, 3, 4)]


def test_what_was_explored_is_drawn_before_what_one_agent_alone_answered() -> None:
    pool = ScriptedPool()
    records = pool.records([pool.ask(0) for _ in range(60)])
    for number in set(range(60)) - {7, 41}:
        step = records[number].answer.steps[0]
        alone = replace(step, replies=step.replies[:1])
        records[number] = replace(records[number], answer=replace(records[number].answer, steps=(alone,)))
    intake = Intake(rules(pool, batch_queries=4))
    intake.take(records)
    batch = intake.draw()
    assert len(batch) == 4
    explored = {f"{MARK}{records[number].answer.trace_id}" for number in (7, 41)}
    assert explored < {lesson.query_id for lesson in batch}


def test_copies_are_counted_by_key_so_that_nobody_silences_another_by_asking_first() -> None:
    pool = ScriptedPool()
    asked = [pool.ask(0) for _ in range(5)]
    intake = Intake(rules(pool, mixes_keys=True))
    intake.take([pool.record(replace(one, tenant=KEYS[1])) for one in asked for _ in range(MAX_COPIES)])
    intake.take([pool.record(one) for one in asked])
    assert (intake.refused, intake.taken) == ({}, 5 * MAX_COPIES + 5)


def test_an_agent_that_is_sure_of_everything_stops_teaching() -> None:
    pool = ScriptedPool(seed=2)
    before = pool.mixed(100)
    detector = ShiftDetector(seed=2)
    detector.prime(np.stack([one.input_D for one in before]), np.log(np.stack([one.nats_A for one in before]) + 1e-3))
    intake = Intake(rules(pool), detector=detector)
    for asked in pool.mixed(40):
        asked.nats_A[3] = 0.0
        intake.take([pool.record(asked)])
    assert intake.left_out == ("code",)
    assert {reply.agent for record in intake.draw() for reply in record.answer.steps[0].replies} == {*pool.agents} - {"code"}


@pytest.mark.parametrize(("others", "is_shift"), [(2, False), (1, True)])
def test_ten_odd_queries_of_a_key_are_a_shift_where_nobody_else_teaches_alone(others: int, is_shift: bool) -> None:
    pool = ScriptedPool(seed=3)
    intake = Intake(rules(pool), detector=ShiftDetector(seed=3))
    intake.take([pool.record(pool.ask(number % 3, KEYS[number % others])) for number in range(120)])
    assert intake.shifts == []
    intake.take([pool.record(pool.ask(4)) for _ in range(10)])
    assert [shift.cause for shift in intake.shifts] == ["inputs"] * is_shift


def test_what_waits_is_bounded_and_no_key_fills_it() -> None:
    pool = ScriptedPool()
    intake = Intake(rules(pool, mixes_keys=True), detector=ShiftDetector())
    template = pool.record(pool.ask(0))
    (step,) = template.answer.steps
    input_ND = pool.rng.normal(size=(MAX_KEPT // 2 + 100, 48)).astype(np.float32)
    for number, input_X in enumerate(input_ND):
        assert step.route is not None
        route = replace(step.route, input_X=input_X)
        answer = replace(template.answer, trace_id=str(number), steps=(replace(step, route=route, replies=()),))
        intake.take([replace(template, answer=answer, tenant=KEYS[number % 100 == 0])])
    assert intake.taken == len(input_ND)
    assert intake.waiting == MAX_KEPT // 2 + len(input_ND[::100])


def test_a_key_whose_outcomes_contradict_more_than_the_others_do_is_found() -> None:
    rng = np.random.default_rng(0)
    honest = [Judged("good", float(rng.uniform() < 0.9), 0.9) for _ in range(40)]
    liar = [Judged("bad", float(rng.uniform() < 0.1), 0.9) for _ in range(20)]
    assert set(false_witnesses([*honest, *liar])) == {"bad"}
    assert not false_witnesses(liar)  # nobody to compare it with
    # Where the replies mislead, all outcomes contradict them: nobody lies.
    assert not false_witnesses([Judged(name, 0.0, 0.9) for name in ("a", "b") for _ in range(20)])
    assert not false_witnesses([*honest, *liar[:4]])


def outcomes(trace_id: str, *said: tuple[str | None, float]) -> list[Outcome]:
    return [
        Outcome(trace_id=trace_id, agent=agent, reward=reward, source=str(place)) for place, (agent, reward) in enumerate(said)
    ]


def test_outcomes_reach_the_lessons_of_their_queries() -> None:
    pool = ScriptedPool()
    record = pool.record(pool.ask(0))
    (author, *_) = record.answer.steps[0].active
    intake = Intake(rules(pool))
    intake.take([record])
    intake.hear(outcomes(record.answer.trace_id, (None, 1.0), (None, 0.0), ("law", 1.0)) + outcomes("unknown", (None, 1.0)))
    (lesson,) = intake.draw()
    assert lesson.outcomes == {author: 0.5, "law": 1.0}


def test_an_outcome_of_an_agent_that_was_not_asked_is_none() -> None:
    pool = ScriptedPool()
    record = pool.record(pool.ask(0), among=[0, 1])
    intake = Intake(rules(pool))
    intake.take([record])
    intake.hear(outcomes(record.answer.trace_id, ("law", 1.0), ("words", 0.0)))
    (lesson,) = intake.draw()
    assert lesson.outcomes == {"words": 0.0}


def test_outcomes_of_a_key_that_contradicts_the_others_do_not_teach() -> None:
    pool = ScriptedPool()
    intake = Intake(rules(pool, batch_queries=30))
    records, said = [], []
    for number in range(60):
        record = pool.record(pool.ask(0, KEYS[number % 2]))
        (step,) = record.answer.steps
        first, *others = step.replies
        sure = replace(record.answer, steps=(replace(step, replies=(replace(first, right_probability=0.9), *others)),))
        records.append(replace(record, answer=sure))
        said += outcomes(record.answer.trace_id, (first.agent, float(number % 2 == 0)))
    intake.take(records)
    intake.hear(said)
    assert intake.false_keys == (KEYS[1],)
    batches = [intake.draw() for _ in range(12)]
    told = {(name, any(one.outcomes for one in batch)) for batch in batches for name in keys_of(batch, records)}
    assert told == {(KEYS[0], True), (KEYS[1], False)}
