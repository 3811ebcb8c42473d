"""The feedback buffer: bounded, fair between keys, an even sample, and outcomes by the key that asked alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmoa.errors import ConfigError
from dmoa.feedback import MAX_CONTEXTS, Feedback, write_feedback
from dmoa.serving import feedback_buffer
from dmoa.serving.feedback import FeedbackStore
from dmoa.serving.feedback_buffer import FeedbackBuffer, KeptOutcome, size_of
from dmoa.types import FloatArray
from tests.logged import Logged
from tests.unit.test_feedback import record_of

ONE = record_of(["19", "20"])
SIZE = size_of(ONE)
D = 8


def buffer(num_records: int = 100, **changes: float) -> FeedbackBuffer:
    values = {"outcomes_per_minute": 100, "max_age_s": 1000.0, "seed": 1} | changes
    # A step's input of 20 numbers takes 68 bytes more than one of 3.
    return FeedbackBuffer(preset="default", max_bytes=num_records * (SIZE + 68), **values)  # type: ignore[arg-type]


def made(number: int, tenant: str = "mine", direction: int = 0) -> Feedback:
    """A record whose query points in one of D directions: 2D numbers of context, 4 of feedback."""
    input_X: FloatArray = np.zeros(2 * D + 4, np.float32)
    input_X[direction] = 2.0
    (step,) = ONE.answer.steps
    assert step.route is not None
    steps = (replace(step, route=replace(step.route, input_X=input_X)),)
    return replace(ONE, tenant=tenant, answer=replace(ONE.answer, trace_id=f"{tenant}{number}", steps=steps))


def said(trace_id: str, reward: float = 1.0, **changes: object) -> KeptOutcome:
    values: dict[str, object] = {"agent": None, "step": None, "source": ""}
    return KeptOutcome(trace_id=trace_id, reward=reward, **values | changes)  # type: ignore[arg-type]


def test_the_buffer_never_holds_more_than_it_may() -> None:
    kept = buffer(10)
    for number in range(200):
        kept.put(made(number, direction=number % D))
        assert kept.bytes <= kept.max_bytes
        assert kept.bytes == sum(map(size_of, kept.records()))
    assert (kept.seen, len(kept.records())) == (200, 10)
    assert max(kept.groups().values()) - min(kept.groups().values()) <= 1


def test_one_key_takes_no_place_of_another() -> None:
    kept = buffer(20)
    for number in range(5):
        kept.put(made(number, "small"))
    for number in range(500):
        kept.put(made(number, "large"))
    assert Counter(record.tenant for record in kept.records()) == {"small": 5, "large": 15}


def test_a_sample_is_even_over_time() -> None:
    times: Counter[bool] = Counter()
    for seed in range(40):
        kept = buffer(10, seed=seed)
        for number in range(100):
            kept.put(made(number))
        times.update(int(record.answer.trace_id.removeprefix("mine")) < 50 for record in kept.records())
    # 400 draws, half of them early: 10 standard deviations of a fair coin are 100.
    assert times[True] == pytest.approx(200, abs=50)


def test_queries_that_are_alike_are_one_context_and_contexts_are_bounded() -> None:
    kept = buffer(1000)
    for number in range(30):
        kept.put(made(number, direction=number % 3))
    assert sorted(kept.groups().values()) == [10, 10, 10]
    wide = FeedbackBuffer(preset="paper", max_bytes=2**20, outcomes_per_minute=1, max_age_s=1.0)
    (step,) = ONE.answer.steps
    assert step.route is not None
    for number, row_D in enumerate(np.eye(40, dtype=np.float32)):
        steps = (replace(step, route=replace(step.route, input_X=row_D)),)
        wide.put(replace(ONE, answer=replace(ONE.answer, trace_id=str(number), steps=steps)))
    assert len(wide.groups()) == MAX_CONTEXTS
    assert sum(wide.groups().values()) == 40


def test_a_query_is_taken_once() -> None:
    kept = buffer()
    kept.put(made(1))
    kept.put(made(1))
    assert (kept.seen, len(kept.records())) == (1, 1)


def test_outcomes_are_of_the_key_that_asked() -> None:
    kept = buffer()
    kept.put(made(1))
    assert kept.judge("mine", said("mine1"), 10.0) == "new"
    assert kept.judge("mine", said("mine1"), 11.0) == "same"
    assert kept.judge("mine", said("mine1", 0.0), 12.0) == "changed"
    assert kept.judge("mine", said("mine1", source="tests"), 13.0) == "new"
    assert kept.judge("mine", said("mine1", agent="a0"), 13.0) == "new"
    assert kept.judge("other", said("mine1"), 14.0) == kept.judge("other", said("nothing"), 14.0) == "unknown"
    assert kept.judge("mine", said("mine1"), 7.0 + 1000.1) == "unknown"  # ONE was answered at 7 s
    assert [(one.reward, one.source, one.agent) for one in kept.outcomes()] == [
        (0.0, "", None),
        (1.0, "tests", None),
        (1.0, "", "a0"),
    ]


def test_outcomes_are_bounded_by_the_minute_of_each_key() -> None:
    kept = buffer(outcomes_per_minute=2)
    kept.put(made(1))
    kept.put(made(1, "other"))
    assert [kept.judge("mine", said(trace), 10.0) for trace in ("mine1", "guess", "mine1")] == ["new", "unknown", "too_many"]
    assert kept.judge("other", said("other1"), 10.0) == "new"
    assert kept.judge("mine", said("mine1"), 69.9) == "too_many"
    assert kept.judge("mine", said("mine1"), 70.0) == "same"


def test_a_clock_that_is_set_back_locks_no_key_out() -> None:
    kept = buffer(outcomes_per_minute=2)
    kept.put(made(1))
    assert [kept.judge("mine", said("mine1"), now) for now in (4000.0, 4000.0, 4000.0)][-1] == "too_many"
    assert [kept.judge("mine", said("mine1"), 400.0) == "too_many" for _ in range(3)] == [False, False, True]


def test_traces_of_a_key_are_bounded() -> None:
    kept = buffer(5)
    for number in range(feedback_buffer.MAX_TRACES + 1):
        feedback_buffer._remember(kept._tenants.setdefault("mine", feedback_buffer._Tenant()).traces, f"mine{number}", 7.0)
    assert kept.judge("mine", said("mine0"), 8.0) == "unknown"
    assert kept.judge("mine", said("mine1"), 8.0) == "new"


def test_a_snapshot_is_taken_up(tmp_path: Path) -> None:
    kept, store = buffer(10), FeedbackStore((tmp_path / "state").as_uri())
    assert store.load() is None
    for number in range(30):
        kept.put(made(number, direction=number % 2))
    kept.judge("mine", said("mine3", 0.25), 10.0)
    store.save(write_feedback(kept.records()), kept.state())
    found, again = store.load(), buffer(10)
    assert found is not None
    again.restore(*found)
    assert [one.answer.trace_id for one in again.records()] == [one.answer.trace_id for one in kept.records()]
    assert (again.groups(), again.outcomes()) == (kept.groups(), kept.outcomes())
    assert again.judge("mine", said("mine0"), 10.0) == "new", "a query that is no longer in the sample can still be judged"
    assert sorted(path.name for path in (tmp_path / "state" / "feedback").iterdir()) == ["feedback.json", "queries.parquet"]


def test_a_snapshot_that_cannot_be_read_now_is_taken_up_later_below_what_came_since(tmp_path: Path) -> None:
    kept, store, folder = buffer(), FeedbackStore((tmp_path / "state").as_uri()), tmp_path / "state" / "feedback"
    newer = buffer()
    assert store.under(newer, buffer()) is newer, "there is none"
    kept.put(made(1))
    kept.judge("mine", said("mine1", 0.25), 10.0)
    store.save(write_feedback(kept.records()), kept.state())
    newer.put(replace(made(2), created_unix_s=9.0))
    whole = (folder / "queries.parquet").read_bytes()
    (folder / "queries.parquet").unlink()
    (folder / "queries.parquet").symlink_to("/proc/self/mem")  # it is there, and no read of it succeeds
    with pytest.raises(OSError, match="Input/output error"):
        store.under(newer, buffer())
    (folder / "queries.parquet").unlink()
    (folder / "queries.parquet").write_bytes(whole)
    found = store.under(newer, buffer())
    assert [one.answer.trace_id for one in found.records()] == ["mine1", "mine2"]
    assert (found.outcomes(), found.judge("mine", said("mine2"), 10.0)) == (kept.outcomes(), "new")
    (folder / "queries.parquet").write_bytes(whole[:-9])
    assert store.under(newer, buffer()) is newer, "what is damaged never becomes whole"


def test_outcomes_that_came_while_a_snapshot_could_not_be_read_are_kept(tmp_path: Path) -> None:
    kept, newer, store = buffer(), buffer(), FeedbackStore((tmp_path / "state").as_uri())
    kept.put(made(1))
    kept.judge("mine", said("mine1", 0.25), 10.0)
    kept.judge("mine", said("mine1", 0.5, source="tests"), 10.0)
    store.save(write_feedback(kept.records()), kept.state())
    for number in (1, 2, 3):
        newer.put(replace(made(number), created_unix_s=9.0))
    newer._tenants["mine"].traces["undecided"] = 9.0  # no gate decided it: there is no record of it
    assert newer.judge("mine", said("mine1", 1.0), 11.0) == newer.judge("mine", said("undecided", 0.0), 11.0) == "new"
    found = store.under(newer, buffer())
    assert {(one.trace_id, one.source): one.reward for one in found.outcomes()} == {
        ("mine1", ""): 1.0,
        ("mine1", "tests"): 0.5,
        ("undecided", ""): 0.0,
    }
    assert [found.judge("mine", said(name, 0.0), 12.0) for name in ("undecided", "mine3")] == ["same", "new"]


def test_feedback_that_is_gone_is_missed_aloud(tmp_path: Path, logged: Logged) -> None:
    store, newer, folder = FeedbackStore((tmp_path / "state").as_uri()), buffer(), tmp_path / "state" / "feedback"
    store.under(newer, buffer())
    assert logged.messages == []
    assert store.under(newer, buffer(), is_expected=True) is newer
    (said,) = logged.messages
    assert said.startswith(f"feedback begins empty: {store.place} holds none")
    store.save(write_feedback([]), newer.state())
    (folder / "queries.parquet").unlink()
    with pytest.raises(ConfigError, match=r"queries.parquet is gone, and feedback.json is there"):
        store.load()


def test_a_first_save_that_was_cut_off_keeps_its_queries(tmp_path: Path, logged: Logged) -> None:
    store, newer = FeedbackStore((tmp_path / "state").as_uri()), buffer()
    store.save(write_feedback([made(1)]), newer.state())
    (tmp_path / "state" / "feedback" / "feedback.json").unlink()  # the rows are written first
    found = store.under(newer, buffer())
    assert [record.answer.trace_id for record in found.records()] == ["mine1"]
    assert found.judge("mine", said("mine1"), 10.0) == "new"
    assert logged.messages == [f"{store.place}: feedback.json is not there; queries are taken up without outcomes"]


def test_queries_that_were_saved_after_the_state_can_be_judged_too() -> None:
    kept, again = buffer(), buffer()
    kept.put(made(1))
    state = kept.state()  # of the save before: the next one was cut off between its two files
    kept.put(replace(made(2), created_unix_s=9.0))
    again.restore(kept.records(), state)
    assert [again.judge("mine", said(f"mine{number}"), 10.0) for number in (1, 2, 3)] == ["new", "new", "unknown"]


OUTCOME = b'{"tenants": {"a": {"traces": {}, "outcomes": [%s]}}}' % (
    b'{"trace_id": "t", "agent": null, "step": 0, "reward": %s, "source": ""}'
)


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"tenants": {"a": {"traces": {}, "outcomes": [{}]}}}',
        b'{"tenants": {"a": {"traces": {"t": 1e999}, "outcomes": []}}}',
        *(OUTCOME % reward for reward in (b"NaN", b'"1"', b"null", b"[]")),
    ],
)
def test_a_damaged_state_is_an_error(state: bytes) -> None:
    with pytest.raises(ConfigError, match="feedback state"):
        buffer().restore([], state)


def test_a_bad_place_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"router\.state_uri is 'nowhere://x'; expected file:///DIR"):
        FeedbackStore("nowhere://x")


def test_one_key_fills_its_share_and_an_excluded_one_nothing() -> None:
    kept = buffer(20, key_share=0.5, exclude=["bad"])  # type: ignore[arg-type] # names
    for number in range(100):
        kept.put(made(number, "large", number % 3))
        kept.put(made(number, "bad"))
    assert Counter(record.tenant for record in kept.records()) == {"large": 10}
    assert kept.judge("bad", said("bad3"), 8.0) == "new"  # its queries are known, they teach nothing
    for number in range(4):
        kept.put(made(number, "small"))
    assert Counter(record.tenant for record in kept.records()) == {"large": 10, "small": 4}


def test_what_came_since() -> None:
    kept = buffer()
    for number in range(5):
        kept.put(made(number))
    count, records = kept.since(3)
    assert (count, [record.answer.trace_id for record in records]) == (5, ["mine3", "mine4"])
    assert kept.since(count) == (5, [])


def test_whoever_follows_the_stream_sees_all_of_it_where_the_sample_is_full() -> None:
    kept = buffer(3)
    for number in range(50):
        kept.put(made(number))
    assert len(kept.records()) == 3
    _, records = kept.since(40)
    assert [record.answer.trace_id for record in records] == [f"mine{number}" for number in range(40, 50)]
