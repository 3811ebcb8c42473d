"""The stages of the pipeline, without Ray: the query of a task, the records of answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmoa.evaluation.answering import Asking, failed, query_of_task, split_policy
from dmoa.evaluation.pipeline import RunWriter, score_answer
from dmoa.evaluation.records import Answered, Label, Reply, Score, Task
from dmoa.evaluation.run_folder import RunFolder
from dmoa.flat import flat
from dmoa.types import Limits, Stage, TokenUsage

TASK = Task(row_id="arith/test/1", benchmark="arith", text="What is 12 + 7?", group="carry")
ASKING = Asking(seed=3, limits=Limits(max_steps=3, max_agents=2, max_tokens=96))


def test_a_query_depends_on_task_policy_and_seed_alone() -> None:
    one = query_of_task(TASK, "dmoa", ASKING)
    assert one == query_of_task(TASK, "dmoa", ASKING)
    others = [
        query_of_task(TASK, "single", ASKING),
        query_of_task(TASK.model_copy(update={"row_id": "arith/test/2"}), "dmoa", ASKING),
        query_of_task(TASK, "dmoa", Asking(seed=4, limits=ASKING.limits)),
    ]
    assert len({query.trace_id for query in (one, *others)}) == 4
    assert (one.text, one.limits.max_steps, one.limits.max_agents, one.limits.max_tokens) == (TASK.text, 3, 2, 96)


def test_a_task_with_more_stages_than_steps_runs_them_all() -> None:
    staged = TASK.model_copy(update={"stages": (Stage(part="1"),) * 4})
    query = query_of_task(staged, "dmoa", ASKING)
    assert (query.limits.max_steps, len(query.stages)) == (4, 4)


@pytest.mark.parametrize(("policy", "expected"), [("dmoa", ("dmoa", None)), ("single:math-solver", ("single", "math-solver"))])
def test_a_policy_may_name_an_agent(policy: str, expected: tuple[str, str | None]) -> None:
    assert split_policy(policy) == expected


def judge(label: Label, reply: Reply) -> Score:
    return Score(value=float(reply.text == label.gold["answer"]), extracted=reply.text or None, metrics={"f1": 0.5})


def test_scores_carry_the_row_and_failed_rows_are_worth_nothing() -> None:
    label = Label(row_id=TASK.row_id, benchmark="arith", gold={"answer": "19"})
    good = Answered(row_id=TASK.row_id, benchmark="arith", policy="dmoa", group="carry", text="19", **flat(TokenUsage()))
    lost = failed(TASK, "dmoa", RuntimeError("no agent"), 5.0)
    right, nothing = (score_answer(answer, label, {"arith": judge}) for answer in (good, lost))
    assert (right.value, right.is_scored, right.is_failed, right.group, right.metrics) == (1.0, True, False, "carry", {"f1": 0.5})
    assert (nothing.value, nothing.is_scored, nothing.is_failed, nothing.metrics) == (0.0, False, True, {"f1": 0.0})
    assert nothing.reason == "RuntimeError: no agent"


def test_a_shard_that_runs_twice_is_written_once(tmp_path: Path) -> None:
    writer = RunWriter(str(tmp_path))
    records = [Answered(row_id=f"arith/test/{i}", benchmark="arith", policy="dmoa", **flat(TokenUsage())) for i in range(4)]
    writer.write_answers(records[:3])
    writer.write_answers(records)
    rows = list(RunFolder(tmp_path).read_answers("arith", "dmoa"))
    assert [row.row_id for row in rows] == [f"arith/test/{i}" for i in range(4)]
    assert writer.counts()["rows"] == 4
