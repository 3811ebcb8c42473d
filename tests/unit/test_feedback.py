"""Records of finished queries: nobody's words are in them, agreement is, and a snapshot gives them back."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.core.in_step import read_classes
from dmoa.errors import ConfigError
from dmoa.feedback import SCHEMA, Feedback, feedback_of, is_held_back, read_feedback, table_of_feedback, tenant_of, write_feedback
from dmoa.testing import decision
from dmoa.trace import AnsweredQuery
from dmoa.types import AgentReply, Answer, EntropySum, Message, Query, RouteRequest, StepRecord, SummarizerRecord, TokenUsage

SALT = b"salt"
SECRET = "zebra-crossing"


def answer_of_texts(texts: Sequence[str], trace_id: str = "t1", steps: int = 1) -> Answer:
    """An answer whose steps have a reply for each text; the last agent was explored."""
    names = [f"a{i}" for i in range(len(texts))]
    replies = tuple(
        AgentReply(
            agent=name,
            status="ok",
            text=text,
            reasoning=SECRET,
            error=SECRET,
            prompt=(Message(role="user", content=SECRET),),
            entropy=EntropySum(sum_nats=1.5, sq_sum=0.75, tokens=4),
            usage=TokenUsage(prompt_tokens=9, completion_tokens=4),
            latency_ms=2.5,
            engine="scripted",
            right_probability=0.5,
        )
        for name, text in zip(names, texts, strict=True)
    )
    step = StepRecord(
        step=0,
        replies=replies,
        active=tuple(names[:-1]),
        explored=((names[-1], 0.25),),
        summary=SECRET,
        summarizer=SummarizerRecord(mode="select", verdict="rule", reasoning=SECRET),
        mass=0.75,
        decision=decision({name: 1 / (len(names) + 1) for name in (*names, "gone")}, 1, masked=("gone",)),
        route=RouteRequest(input_X=np.array([0.1, 0.2, 0.3], np.float32), max_agents=3),
    )
    return Answer(
        trace_id=trace_id,
        text=texts[0],
        reasoning=SECRET,
        policy="dmoa",
        stop_reason="agreement",
        steps=tuple(replace(step, step=number) for number in range(steps)),
        degraded=False,
        finish_reason="stop",
        gate_version="v1",
        wall_ms=12.5,
    )


def record_of(texts: Sequence[str], *, salt: bytes = SALT, **changes: object) -> Feedback:
    answer = answer_of_texts(texts, **changes)  # type: ignore[arg-type]
    query = Query(trace_id=answer.trace_id, text=SECRET, system=SECRET)
    one = AnsweredQuery(query=query, answer=answer, fingerprint="f", created_unix_s=7.0)
    return feedback_of(one, key_hash="k", salt=salt)


def texts_of(record: Feedback) -> list[str]:
    return [reply.text for reply in record.answer.steps[0].replies]


def test_no_words_are_in_a_record() -> None:
    record = record_of(
        [f"The answer is {SECRET}.", f"I thought of {SECRET}, but then I could not decide and gave up on it", "19"]
    )
    assert SECRET not in repr(record)
    assert "19" not in repr(texts_of(record))
    assert SECRET.encode() not in write_feedback([record])
    assert SECRET.encode() not in pickle.dumps(record)  # as it travels
    assert record.tenant == tenant_of("k") != tenant_of("other")
    assert "k" not in record.tenant.replace(tenant_of("k"), "")


TEXTS = st.lists(
    st.sampled_from(["It is 19.", "19.0", "The answer is 20.", "(B)", "B.", r"\boxed{1/2}", "0.5", "", "Well, who could say."])
    | st.text(max_size=40),
    min_size=2,
    max_size=6,
)


@given(TEXTS)
def test_tokens_agree_where_the_answers_did(texts: list[str]) -> None:
    tokens = texts_of(record_of(texts))
    cut = [False] * len(texts)
    assert read_classes(tokens, cut, "") == read_classes(texts, cut, SECRET)


def test_tokens_are_the_same_across_queries_and_differ_without_the_salt() -> None:
    one, other = record_of(["It is 19.", "?"]), record_of(["19", "Nobody knows what to make of any of this"], trace_id="t2")
    assert texts_of(one)[0] == texts_of(other)[0]
    assert texts_of(one)[1] != texts_of(other)[1]
    assert texts_of(record_of(["19", "?"], salt=b"pepper"))[0] != texts_of(one)[0]


def test_a_snapshot_gives_the_records_back() -> None:
    records = [record_of(["19", "20"], steps=2), record_of(["x", "y", "z"], trace_id="t2")]
    found = read_feedback(write_feedback(records), "here")
    assert [one.answer.trace_id for one in found] == ["t1", "t2"]
    for one, other in zip(found, records, strict=True):
        assert (one.tenant, one.fingerprint, one.created_unix_s) == (other.tenant, other.fingerprint, other.created_unix_s)
        assert len(one.answer.steps) == len(other.answer.steps)
        for step, before in zip(one.answer.steps, other.answer.steps, strict=True):
            assert (step.replies, step.active, step.explored) == (before.replies, before.active, before.explored)
            assert step.route is not None
            assert before.route is not None
            assert step.decision is not None
            assert before.decision is not None
            np.testing.assert_array_equal(step.route.input_X, before.route.input_X)
            np.testing.assert_array_equal(step.decision.probability_A, before.decision.probability_A)
            assert (step.decision.agents, step.decision.masked) == (before.decision.agents, before.decision.masked)
    assert read_feedback(write_feedback([]), "here") == []


def test_a_query_without_a_gate_is_not_in_a_snapshot() -> None:
    record = record_of(["19", "20"])
    bare = replace(record.answer, steps=tuple(replace(step, decision=None, route=None) for step in record.answer.steps))
    assert read_feedback(write_feedback([replace(record, answer=bare)]), "here") == []


@given(st.integers(0, 400))
def test_a_damaged_snapshot_is_an_error(place: int) -> None:
    whole = write_feedback([record_of(["19", "20"])])
    with pytest.raises(ConfigError, match="here: not a whole snapshot"):
        read_feedback(whole[: min(place, len(whole) - 1)], "here")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("probability", [float("nan")]),
        ("propensity", [float("inf")]),
        ("propensity", [0.5, 0.5, 0.5]),
        ("probability", None),
        ("replies", None),
        ("agents", None),
    ],
)
def test_numbers_of_a_snapshot_that_cannot_be_are_an_error(column: str, value: object) -> None:
    table = table_of_feedback([record_of(["19", "20"])])
    place = SCHEMA.get_field_index(column)
    data = io.BytesIO()
    pq.write_table(table.set_column(place, SCHEMA.field(column), pa.array([value], SCHEMA.field(column).type)), data)
    with pytest.raises(ConfigError, match=r"here: .*remove the file to begin anew"):
        read_feedback(data.getvalue(), "here")


def test_a_share_of_queries_is_held_back_whatever_else_is_known_of_them() -> None:
    names = [f"{number:032x}" for number in range(4000)]
    held = [name for name in names if is_held_back(name, 0.2)]
    assert len(held) == pytest.approx(800, abs=80)  # three standard deviations are 76
    assert set(held) < {name for name in names if is_held_back(name, 0.5)}
