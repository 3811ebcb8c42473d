"""The answering stage without Ray: every query of a shard becomes rows, by the gate that the pool names, or an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dmoa import checkpoint
from dmoa.agents.pool import build_pool_gate, fingerprint
from dmoa.config import Config, loads
from dmoa.training.collect import Collected, CollectStage, RolloutAsking, query_of_rollout
from dmoa.training.rollouts import RolloutQuery
from dmoa.types import Limits, Stage
from dmoa.workflows.backends import OpenCollectingPool, OpenPool
from tests.unit.training.rollout_samples import asked

POOL = """
name: tiny
llms:
  fake: {model: "scripted:fake", engine: scripted, engine_kwargs: {entropies_nats: {adder: 0.25, guesser: 1.5}, failing: FAILING}}
agents:
  - {name: adder, llm: fake, profile: Adds numbers.}
  - {name: guesser, llm: fake, profile: Guesses.}
  - {name: echo, llm: fake, profile: Repeats the question.}
gate: {activation: {rule: fixed, max_agents: 1}}
limits: {max_steps: 2}
"""
ASKING = RolloutAsking(seed=3, round=0, limits=Limits(max_steps=2), preset="default", fingerprint="f" * 64)


class Writer:
    """Takes what the stage hands over, as the actor does."""

    def __init__(self) -> None:
        self.taken: list[Collected] = []

    @property
    def take(self) -> Writer:
        return self

    async def remote(self, collected: list[Collected]) -> None:
        self.taken += collected


def pool(failing: str = "[]", **gate: Any) -> Config:
    config = loads(POOL.replace("FAILING", failing))
    return config.model_copy(update={"gate": config.gate.model_copy(update=gate)})


def collected(config: Config, *, epsilon: float | None = None, number: int = 6) -> list[Collected]:
    """Run one shard through a stage of the pool."""
    writer = Writer()
    opened = OpenCollectingPool(pool=OpenPool(config_json=config.model_dump_json()), epsilon=epsilon)
    stage = CollectStage(opened, ASKING, writer, 6, 3)
    block = pa.table({"query": [asked(n).model_dump_json() for n in range(number)]})
    assert stage(block).to_pydict() == {"queries": [number]}
    return sorted(writer.taken, key=lambda query: query.query_id)


def test_every_query_of_a_shard_becomes_rows() -> None:
    config = pool()
    found = collected(config)
    assert [query.query_id for query in found] == [asked(n).query_id for n in range(6)]
    for query in found:
        assert query.table is not None
        rows = query.table.to_pylist()
        assert {(row["step"], row["agent"]) for row in rows} == {(s, a) for s in range(2) for a in config.agent_names}
        assert {row["query_id"] for row in rows} == {query.query_id}
        assert [sum(row["is_selected"] for row in rows if row["step"] == step) for step in range(2)] == [1, 1]
        means = {row["agent"]: row["entropy_sum_nats"] / row["entropy_tokens"] for row in rows}
        assert means["adder"] == pytest.approx(0.25)
        assert (rows[0]["seed"], rows[0]["pool_fingerprint"], rows[0]["num_steps"]) == (3, "f" * 64, 2)


def test_the_same_shard_gives_the_same_rows() -> None:
    one, two = collected(pool(), epsilon=0.5), collected(pool(), epsilon=0.5)
    for first, second in zip(one, two, strict=True):
        assert first.table is not None
        assert second.table is not None
        assert first.table.drop_columns(["latency_ms"]).equals(second.table.drop_columns(["latency_ms"]))


def test_an_agent_that_fails_is_a_row_and_a_query_without_any_answer_an_error() -> None:
    for query in collected(pool("[guesser]"), number=2):
        assert query.table is not None
        lost = [row for row in query.table.to_pylist() if row["agent"] == "guesser"]
        assert {(row["entropy_tokens"], row["is_selected"]) for row in lost} == {(0, False)}
        # An active agent that failed is left out of the query's next step.
        assert [row["status"] for row in lost] == ["failed", "failed" if lost[0]["is_explored"] else "masked"]
    for query in collected(pool("[adder, guesser, echo]"), number=2):
        assert query.table is None
        assert "NoAgentError" in query.error
        assert "scripted to fail" in query.error


def test_the_checkpoint_of_the_pool_decides(tmp_path: Path) -> None:
    config = pool(seed=5)
    gate, _ = build_pool_gate(config)
    record = checkpoint.describe_gate(gate, fingerprint=fingerprint(config), trained_on={"rollouts": "r"})
    checkpoint.save(tmp_path / "gate", gate, record)
    trained = pool(checkpoint=str(tmp_path / "gate"))
    versions = {v for q in collected(trained) if q.table is not None for v in q.table["gate_version"].to_pylist()}
    assert versions == {record.version}
    assert not record.version.startswith("untrained-")


def test_a_query_hangs_on_its_id_seed_and_round_alone() -> None:
    one = query_of_rollout(asked(1), ASKING)
    assert one == query_of_rollout(asked(1), replace(ASKING, fingerprint="0" * 64))
    others = [
        query_of_rollout(asked(2), ASKING),
        query_of_rollout(asked(1), replace(ASKING, seed=4)),
        query_of_rollout(asked(1), replace(ASKING, round=1)),
    ]
    assert len({query.trace_id for query in (one, *others)}) == 4
    assert (one.text, one.limits, one.is_streamed) == ("What is 1 + 7?", Limits(max_steps=2), False)


def test_a_query_with_more_stages_than_steps_runs_them_all() -> None:
    staged = RolloutQuery(query_id="q", source="relay", split="train", text="?", stages=(Stage(part="1"),) * 4)
    assert query_of_rollout(staged, ASKING).limits.max_steps == 4
