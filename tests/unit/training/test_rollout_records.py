"""The rows of rollouts: the contract's columns, and every value where it belongs."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmoa.training.rollouts import SCHEMA, RolloutRow, split_input, table_of
from tests.unit.training.rollout_samples import INPUT_X, POOL, answer, asked, rows

COLUMNS = {
    "query_id": "string",
    "source": "string",
    "split": "string",
    "step": "int64",
    "num_steps": "int64",
    "context": "list<item: float>",
    "feedback": "list<item: float>",
    "agent": "string",
    "probability": "double",
    "is_selected": "bool",
    "is_explored": "bool",
    "propensity": "double",
    "entropy_sum_nats": "double",
    "entropy_sq_sum": "double",
    "entropy_tokens": "int64",
    "entropy_kind": "string",
    "entropy_slack_nats": "double",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "cached_tokens": "int64",
    "completion_tokens": "int64",
    "reasoning_tokens": "int64",
    "latency_ms": "double",
    "text": "string",
    "reasoning": "string",
    "reasoning_entropy_sum_nats": "double",
    "reasoning_entropy_tokens": "int64",
    "status": "string",
    "gate_version": "string",
    "engine": "string",
    "seed": "int64",
    "pool_fingerprint": "string",
    "schema_version": "int64",
    "final_text": "string",
    "error": "string",
}
"""The contract: no column is renamed or removed."""


def parquet(table: pa.Table) -> pa.Table:
    """Return the table after a round through a Parquet file."""
    file = io.BytesIO()
    pq.write_table(table, file)
    return pq.read_table(file)


def test_the_columns_are_those_of_the_contract_and_hold_in_parquet() -> None:
    seen = parquet(rows()).schema
    assert seen.names == list(COLUMNS)
    for name, type_ in COLUMNS.items():
        assert str(seen.field(name).type).replace("element", "item") == type_
    assert "label" not in " ".join(COLUMNS)
    assert list(RolloutRow.model_json_schema()["properties"]) == list(COLUMNS) == SCHEMA.names


def by_agent(step: int) -> dict[str, dict[str, Any]]:
    return {row["agent"]: row for row in parquet(rows()).to_pylist() if row["step"] == step}


def test_who_counted_who_was_explored_and_who_was_masked() -> None:
    assert len(rows()) == 8, "two steps, each with three agents that were asked and one masked"
    found = by_agent(1)
    names = ("is_selected", "is_explored", "propensity", "probability", "status")
    assert {agent: tuple(row[name] for name in names) for agent, row in found.items()} == {
        "guesser": (False, False, 1.0, 0.25, "failed"),
        "adder": (True, False, 1.0, 0.5, "ok"),
        "echo": (False, True, 0.1, 0.25, "ok"),
        "dead": (False, False, 1.0, 0.0, "masked"),
    }


def test_measures_are_the_replys_and_the_rest_the_querys() -> None:
    row = by_agent(1)["adder"]
    assert np.allclose(row.pop("context"), INPUT_X[:8] + 1)
    assert np.allclose(row.pop("feedback"), INPUT_X[8:] + 1)
    assert row == {
        "query_id": "arith/gate/0000",
        "source": "arith",
        "split": "train",
        "step": 1,
        "num_steps": 2,
        "agent": "adder",
        "probability": 0.5,
        "is_selected": True,
        "is_explored": False,
        "propensity": 1.0,
        "entropy_sum_nats": 2.0,
        "entropy_sq_sum": 1.25,
        "entropy_tokens": 4,
        "entropy_kind": "exact",
        "entropy_slack_nats": 0.0,
        "finish_reason": "stop",
        "prompt_tokens": 30,
        "cached_tokens": 16,
        "completion_tokens": 4,
        "reasoning_tokens": 0,
        "latency_ms": 20.5,
        "text": "It is 19.",
        "reasoning": "",
        "reasoning_entropy_sum_nats": 0.0,
        "reasoning_entropy_tokens": 0,
        "status": "ok",
        "gate_version": "v1",
        "engine": "scripted",
        "seed": 5,
        "pool_fingerprint": POOL,
        "schema_version": 1,
        "final_text": "",
        "error": "",
    }
    assert {row["final_text"] for row in by_agent(0).values()} == {"It is 19."}  # what the query was answered with, once a query
    assert (by_agent(1)["echo"]["finish_reason"], by_agent(1)["dead"]["entropy_tokens"]) == ("length", 0)
    errors = {agent: row["error"] for agent, row in by_agent(1).items() if row["error"]}
    assert errors == {"guesser": "replica died: Bearer [redacted]"}


def test_the_paper_preset_has_no_feedback() -> None:
    table = table_of(asked(), answer(steps=1), preset="paper", seed=0, fingerprint=POOL)
    assert table["context"][0].as_py() == INPUT_X.tolist()
    assert table["feedback"][0].as_py() == [0.0] * 4


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_context_and_feedback_are_the_gates_input(preset: Any) -> None:
    context, feedback_F = split_input(INPUT_X, preset)
    assert np.concatenate([context, feedback_F])[:12].tolist() == INPUT_X.tolist()
    assert feedback_F.shape == (4,)


def test_a_text_that_no_file_could_hold_is_kept_readable() -> None:
    assert parquet(rows(text="half \ud800 a pair"))["text"][1].as_py() == "half ? a pair"
