"""A query that no agent of a recorded pool has a reply to: a failed row of a comparison, which goes on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dmoa.agents.pool import build_local
from dmoa.config import Config
from dmoa.errors import NoAgentError
from dmoa.evaluation.answering import Asking
from dmoa.evaluation.pipeline import AnswerStage
from dmoa.evaluation.records import Answered, Task
from dmoa.protocols import final_answer
from dmoa.swarm import Swarm
from dmoa.testing import FakeEncoder, fixed_gate, query, router_of
from dmoa.types import Limits

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
