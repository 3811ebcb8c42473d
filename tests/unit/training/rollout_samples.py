"""Small rollouts made by hand, for the tests of what writes and what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dmoa.storage import write_whole
from dmoa.training.rollouts import SCHEMA, Manifest, RolloutFolder, RolloutQuery, table_of
from dmoa.types import AgentReply, Answer, EntropySum, RouteDecision, RouteRequest, StepRecord, SummarizerRecord, TokenUsage

AGENTS = ("adder", "guesser", "echo", "dead")
POOL = "f" * 64
INPUT_X = np.arange(12, dtype=np.float32) / 8
"""The first gate input: 2D = 8 numbers of context, F = 4 of feedback."""


def asked(number: int = 0) -> RolloutQuery:
    """Return one query."""
    return RolloutQuery(query_id=f"arith/gate/{number:04}", source="arith", split="train", text=f"What is {number} + 7?")


def step_of(number: int, *, text: str = "It is 19.") -> StepRecord:
    """Return a step: the adder counts, the guesser was lost, echo was explored, and one agent was masked."""
    return StepRecord(
        step=number,
        replies=(
            AgentReply(agent="guesser", status="failed", error="replica died: Bearer " + "k1" * 12, latency_ms=3.0),
            AgentReply(
                agent="adder",
                status="ok",
                text=text,
                entropy=EntropySum(sum_nats=2.0, sq_sum=1.25, tokens=4),
                usage=TokenUsage(prompt_tokens=30, cached_tokens=16, completion_tokens=4),
                latency_ms=20.5,
                engine="scripted",
            ),
            AgentReply(agent="echo", status="ok", text="?", finish_reason="length", entropy=EntropySum(sum_nats=6.0, tokens=3)),
        ),
        active=("adder",),
        explored=(("echo", 0.1),),
        summary=text,
        summarizer=SummarizerRecord(mode="select", verdict="rule"),
        decision=RouteDecision(
            gate_version="v1",
            agents=AGENTS,
            probability_A=np.asarray([0.5, 0.25, 0.25, 0.0], np.float32),
            ranking=(0, 1, 2),
            k=1,
            mass=0.5,
            masked=("dead",),
            hidden_H=np.zeros(3, np.float32),
        ),
        route=RouteRequest(input_X=INPUT_X + number),
    )


def answer(steps: int = 2, **changes: Any) -> Answer:
    """Return an answer of some steps."""
    return Answer(
        trace_id="t",
        text="It is 19.",
        policy="exploring",
        stop_reason="max_steps",
        steps=tuple(step_of(number, **changes) for number in range(steps)),
        degraded=True,
        finish_reason="stop",
    )


def rows(number: int = 0, **changes: Any) -> pa.Table:
    """Return the rows of one query: two steps, four rows each."""
    return table_of(asked(number), answer(**changes), preset="default", seed=5, fingerprint=POOL)


def manifest(**changes: Any) -> Manifest:
    """Return the manifest of a collection of the pool."""
    values: dict[str, Any] = {
        "pool": "tiny",
        "pool_fingerprint": POOL,
        "agents": list(AGENTS),
        "gate_version": "v1",
        "preset": "default",
        "engines": ["s: scripted/{}"],
        "sources": [],
        "mode": "epsilon",
        "epsilon": 0.2,
        "seed": 5,
        "options": {"limit": 3},
        "config": {},
        "dmoa_version": "0.1.0",
        "started_unix_s": 1_790_000_000.0,
    }
    return Manifest(**values | changes)


def write_rollouts(root: Path, parts: Sequence[pa.Table], **changes: Any) -> RolloutFolder:
    """Write a collection's folder with these parts."""
    import pyarrow.parquet as pq

    folder = RolloutFolder(root)
    folder.parts.mkdir(parents=True)
    write_whole(folder.manifest, manifest(**changes).model_dump_json().encode())
    for number, part in enumerate(parts):
        pq.write_table(part, folder.parts / f"part-{number:06d}.parquet", write_page_checksum=True)
    return folder


def replaced(table: pa.Table, name: str, value: Any) -> pa.Table:
    """Return the table with one value in every row of a column."""
    place = table.schema.names.index(name)
    return table.set_column(place, SCHEMA.field(name), pa.array([value] * table.num_rows, SCHEMA.field(name).type))
