"""Outcomes: the checked file, and whom an outcome credits among the replies of rollouts."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.errors import ConfigError
from dmoa.testing import rollout_row
from dmoa.training.outcomes import Credited, Outcome, credit_replies, read_outcomes, rollout_trace_id
from dmoa.training.rollouts import LATER_COLUMNS

AGENTS = ("one", "two", "three")


def outcome(**values: Any) -> Outcome:
    return Outcome.model_validate({"reward": 1.0} | values)


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows))


def reply(query: str, agent: str, text: str, *, nats: float = 0.5, step: int = 0, **changes: Any) -> dict[str, Any]:
    return LATER_COLUMNS | rollout_row(query, step, agent, nats, np.zeros(2, np.float32), text=text, **changes)


ROWS = table(
    reply("q1", "one", "The answer is 19.", is_selected=True),
    reply("q1", "two", "It is $19.00", is_selected=True),
    reply("q1", "three", "The answer is 19.", is_selected=False),
    reply("q2", "one", "The answer is 4.", nats=0.9, is_selected=True),
    reply("q2", "two", "The answer is 5.", nats=0.1, is_selected=True),
    reply("q2", "three", "", status="failed", is_selected=True),
)


def credits(*outcomes: Outcome, rows: pa.Table = ROWS) -> Credited:
    return credit_replies(outcomes, rows, seed=3, round_=1)


def test_an_agents_outcome_is_that_of_its_own_reply() -> None:
    found = credits(outcome(query_id="q1", agent="three", reward=0.25), outcome(query_id="q2", agent="One"))
    assert found.credit == {("q1", "three"): 0.25, ("q2", "one"): 1.0}
    assert found.places == {0, 1}
    expected_RA = [[np.nan, np.nan, 0.25], [1.0, np.nan, np.nan], [np.nan] * 3]
    np.testing.assert_array_equal(found.array(["q1", "q2", "q3"], AGENTS), expected_RA)
    assert found.array([], AGENTS).shape == (0, 3)


def test_a_final_answers_outcome_credits_the_selected_agents_that_gave_it() -> None:
    found = credits(outcome(query_id="q1"), outcome(query_id="q2", reward=0.0))
    # On q1 one and two agree and three was not selected; on q2 the surer of two differing replies is the answer.
    assert found.credit == {("q1", "one"): 1.0, ("q1", "two"): 1.0, ("q2", "two"): 0.0}


def test_the_final_answer_is_that_of_the_last_step() -> None:
    rows = table(
        reply("q", "one", "The answer is 7.", is_selected=True),
        reply("q", "two", "The answer is 8.", nats=0.1, is_selected=True),
        reply("q", "one", "The answer is 7.", step=1, is_selected=True),
    )
    assert credits(outcome(query_id="q"), rows=rows).credit == {("q", "one"): 1.0}


def test_the_final_answer_is_the_one_that_was_given_where_it_was_kept() -> None:
    """A trained gate's leading answer may be that of the less sure agent."""
    trained = {"is_selected": True, "gate_version": "v1"}
    texts = {"one": ("The answer is 4.", 0.9), "two": ("The answer is 5.", 0.1)}

    def asked(**changes: Any) -> pa.Table:
        return table(*(reply("q", name, text, nats=nats, **trained, **changes) for name, (text, nats) in texts.items()))

    assert credits(outcome(query_id="q"), rows=asked(final_text="So it is 4.")).credit == {("q", "one"): 1.0}
    found = credits(outcome(query_id="q"), outcome(query_id="q", agent="two"), rows=asked())
    assert (found.credit, found.places) == ({("q", "two"): 1.0}, {1})  # of a trained gate nobody can say


def test_traces_are_found_and_repeated_outcomes_are_averaged() -> None:
    trace = rollout_trace_id("q2", 3, 1)
    found = credits(
        outcome(trace_id=trace, agent="one", reward=1.0),
        outcome(query_id="q2", agent="one", reward=0.0),
        outcome(query_id="q2", agent="one", reward=0.5),
    )
    assert found.credit == {("q2", "one"): 0.5}
    assert rollout_trace_id("q2", 4, 1) != trace != rollout_trace_id("q2", 3, 2)


def test_outcomes_of_what_is_not_there_are_counted() -> None:
    found = credits(
        outcome(query_id="q9"),
        outcome(trace_id="0" * 32),
        outcome(query_id="q1", agent="four"),
        outcome(query_id="q2", agent="three"),
        outcome(query_id="q1", agent="two"),
    )
    assert found.places == {4}


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    good = [
        '{"query_id": "q1", "agent": null, "reward": 1, "source": "users"}',
        "",
        '{"trace_id": "t", "agent": "a", "reward": 0.5}',
    ]
    assert read_outcomes(write(tmp_path / "o.jsonl", *good)) == (
        Outcome(query_id="q1", reward=1.0, source="users"),
        Outcome(trace_id="t", agent="a", reward=0.5),
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"query_id": "q", "reward": 1.5}', "reward is 1.5; expected a number less than or equal to 1"),
        ('{"query_id": "q", "reward": -0.1}', "reward is -0.1"),
        ('{"query_id": "q", "reward": NaN}', "line 2"),
        ('{"query_id": "q"}', "reward: missing"),
        ('{"reward": 1}', "query_id, trace_id: both are missing"),
        ('{"query_id": "q", "trace_id": "t", "reward": 1}', "query_id, trace_id: both are given"),
        ('{"query_id": "q", "reward": 1, "agnet": "a"}', "agnet: unknown key"),
        ('{"query_id": "", "reward": 1}', "query_id is ''"),
        ("[1]", "line 2"),
        ("{", "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_outcomes(write(tmp_path / "o.jsonl", '{"query_id": "q", "reward": 1}', line))
    assert str(caught.value).startswith(f"--outcomes: {tmp_path / 'o.jsonl'}, line 2")
    assert said in str(caught.value)


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_outcomes(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="holds no outcome"):
        read_outcomes(write(tmp_path / "o.jsonl", " "))


@given(st.lists(st.builds(dict, query_id=st.text(min_size=1), reward=st.floats(0, 1), agent=st.none() | st.text(min_size=1))))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = write(tmp_path_factory.mktemp("o") / "o.jsonl", *map(json.dumps, rows))
    if rows:
        assert [(item.query_id, item.reward, item.agent) for item in read_outcomes(path)] == [
            (row["query_id"], row["reward"], row["agent"]) for row in rows
        ]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("o") / "o.jsonl"
    path.write_bytes(data)
    with suppress(ConfigError):
        read_outcomes(path)
