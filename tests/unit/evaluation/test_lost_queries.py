"""A query that no agent of a recorded pool has a reply to: a failed row of a comparison, which goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from dmoa.agents.pool import build_local
from dmoa.config import Config
from dmoa.errors import NoAgentError, PluginError
from dmoa.evaluation.answering import Asking
from dmoa.evaluation.pipeline import AnswerStage
from dmoa.evaluation.records import Answered, BenchmarkInfo, Task
from dmoa.evaluation.repeats import mean_answer
from dmoa.evaluation.results import build_evaluation
from dmoa.protocols import SwarmClient, final_answer
from dmoa.swarm import Swarm
from dmoa.testing import FakeEncoder, answered, fixed_gate, query, router_of, run_info, scored
from dmoa.types import AgentReply, Event, Limits, Query, StepRecord, SummarizerRecord, TokenUsage

AGENTS = ("a", "b", "c", "d")
POLICIES = ("single:a", "dense", "majority_k", "free_agency", "knapsack", "capacity_aware:inner=majority_k", "random_router")


class Writer:
    """Takes what is answered."""

    def __init__(self) -> None:
        self.taken: list[Answered] = []
        self.write_answers = self

    async def remote(self, answers: list[Answered]) -> None:
        self.taken += answers


def write(path: Path, texts: list[str], agents: tuple[str, ...] = AGENTS) -> None:
    lines = [{"query": text, "agent": agent, "text": "Answer: 7"} for text in texts for agent in agents]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def swarm_of(path: Path) -> Swarm:
    tree: dict[str, Any] = {
        "name": "recorded",
        "llms": {"r": {"model": "recorded:replies", "engine": "recorded", "engine_kwargs": {"replies": str(path)}}},
        "agents": [{"name": name, "llm": "r", "profile": "Answers."} for name in AGENTS],
        "limits": {"max_steps": 1},
    }
    config = Config.model_validate(tree)
    agents, engines = build_local(config)
    router = router_of(fixed_gate(dict.fromkeys(AGENTS, 1 / len(AGENTS))))
    return Swarm(config, agents=agents, router=router, encoder=FakeEncoder(), engines=engines)


def test_a_file_that_lost_queries_since_they_were_listed_fails_those_rows_alone(tmp_path: Path) -> None:
    """As it came about: rows were drawn from a file of replies which another process wrote anew before the pool read it."""
    path, texts = tmp_path / "replies.jsonl", [f"What is {number} + 1?" for number in range(4)]
    write(path, texts)
    tasks = [Task(row_id=f"b/test/{number}", benchmark="b", text=text) for number, text in enumerate(texts)]
    write(path, texts[:3])
    writer = Writer()
    asking = Asking(seed=0, limits=Limits(max_steps=1), ends_schedules=True)
    swarm = swarm_of(path)
    stage = AnswerStage(lambda: swarm, asking, writer, 8, dict.fromkeys(POLICIES, 4))
    lines = [task.model_dump_json() for task in tasks]
    assert stage(pa.table({"task": lines, "policies": [" ".join(POLICIES)] * 4}))["queries"].to_pylist() == [4 * len(POLICIES)]
    asyncio.run(swarm.close())
    lost = {(answer.row_id, answer.policy): answer.error for answer in writer.taken if answer.status == "failed"}
    assert set(lost) == {("b/test/3", policy) for policy in POLICIES}
    for error in lost.values():
        assert error is not None
        assert error.startswith("NoAgentError: no agent of the pool answered (")
        assert "no reply to this query is recorded in replies.jsonl" in error
    assert len(writer.taken) == 4 * len(POLICIES)


async def test_a_query_that_one_agent_has_a_reply_to_is_answered_by_it(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    write(path, ["known"])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"query": "half", "agent": "d", "text": "Answer: 8"}) + "\n")
    swarm = swarm_of(path)
    try:
        assert (await final_answer(swarm, query("half", max_steps=1), "majority_k")).text == "Answer: 8"
        with pytest.raises(NoAgentError, match=r"a: failed, .*no reply to this query"):
            await final_answer(swarm, query("half", max_steps=1), "single", "a")
    finally:
        await swarm.close()


class Falling:
    """Takes a step of 14 tokens, then is lost: what a policy does whose second step cannot be planned."""

    async def ask(self, asked: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        said = AgentReply(agent="a", status="ok", usage=TokenUsage(prompt_tokens=10, completion_tokens=4), price=0.5)
        rule = SummarizerRecord(mode="select", verdict="rule")
        yield StepRecord(step=0, replies=(said,), active=("a",), summary="7", summarizer=rule, mass=1.0, wall_ms=1.0)
        raise PluginError("policy 'mine': next_step of step 2 raised KeyError('x')")


def test_a_query_that_fails_counts_what_its_calls_took() -> None:
    """Else a policy that fails often looks cheap."""
    writer = Writer()
    stage = AnswerStage(lambda: cast(SwarmClient, Falling()), Asking(seed=0, limits=Limits()), writer, 4, {"mine": 1})
    tasks = [Task(row_id=f"b/test/{number:04}", benchmark="b", text="What is 3 + 4?") for number in range(2)]
    stage(pa.table({"task": [task.model_dump_json() for task in tasks], "policies": ["mine"] * 2}))
    lines = writer.taken
    assert [(line.status, line.usage.total, line.calls, line.price, line.bugs) for line in lines] == [
        ("failed", 14, 1, 0.5, 1)
    ] * 2
    said = answered("b", 2, "mine", prompt_tokens=1, cached_tokens=0, completion_tokens=1, calls=1, price=0.25)
    scores = [scored("b", number, "mine", 0.0, is_failed=number < 2, is_scored=number == 2) for number in range(3)]
    run = run_info([BenchmarkInfo(name="b", rows=3)], ["mine"])
    (row,) = build_evaluation(run, [*lines, said], scores).rows
    assert (row.failed, row.usage.total, row.calls, row.price) == (2, 30, 3, 1.25)
    repeated = mean_answer([lines[0], said])
    assert (repeated.calls, repeated.price) == (1.0, 0.375)
