"""The stages of the pipeline, without Ray: the query of a task, the records of answers."""

from __future__ import annotations

import json
import pickle
from collections.abc import AsyncGenerator
from pathlib import Path

import pyarrow as pa
import pytest

from dmoa.errors import DeadlineError, NoAgentError, PluginError
from dmoa.evaluation.answering import Asking, failed, query_of_task, score_answer
from dmoa.evaluation.pipeline import AnswerStage, RunWriter
from dmoa.evaluation.records import Answered, Label, Reply, Score, Scored, Task
from dmoa.evaluation.registry import judging
from dmoa.evaluation.repeats import mean_answer
from dmoa.evaluation.run_folder import RunFolder
from dmoa.flat import flat
from dmoa.policies.registry import split_policy
from dmoa.types import AgentReply, Answer, EntropySum, Event, Limits, Query, Stage, StepRecord, SummarizerRecord, TokenUsage

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


@pytest.mark.parametrize("name", ["math", "hotpotqa", "cruxeval_o", "gsm8k", "arith", "words", "plugin"])
def test_half_a_character_that_a_reply_escapes_is_written_as_a_score(name: str) -> None:
    """JSON may spell half of a surrogate pair; a line that no file takes would end the scoring, and each one that resumes it."""

    def scorer(label: Label, reply: Reply) -> Score:
        said = json.loads(reply.text)["answer"]
        return Score(value=0.0, extracted=said, reason=f"{said} is wrong")

    text = '{"answer": "Mr \\ud83d"}'
    answer = Answered(row_id=f"{name}/test/0", benchmark=name, policy="dmoa", text=text, **flat(TokenUsage()))
    label = Label(row_id=answer.row_id, benchmark=name, gold={"answer": "7", "output": "7", "number": "7"})
    score = score_answer(answer, label, {name: scorer if name == "plugin" else judging(name).score})
    assert score.value == 0.0
    assert Scored.model_validate_json(score.model_dump_json()) == score


def test_a_shard_that_runs_twice_is_written_once(tmp_path: Path) -> None:
    writer = RunWriter(str(tmp_path))
    records = [Answered(row_id=f"arith/test/{i}", benchmark="arith", policy="dmoa", **flat(TokenUsage())) for i in range(4)]
    writer.write_answers(records[:3])
    writer.write_answers(records)
    rows = list(RunFolder(tmp_path).read_answers("arith", "dmoa"))
    assert [row.row_id for row in rows] == [f"arith/test/{i}" for i in range(4)]
    assert writer.counts()["rows"] == 4


class Swarm:
    """Implements `SwarmClient`: answers every question for the policy dmoa, none for another."""

    async def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        if policy != "dmoa":
            raise NoAgentError(f"nobody is there for {policy}")
        sure = AgentReply(agent="adder", status="ok", entropy=EntropySum(sum_nats=1.0, tokens=3), usage=SPENT)
        heard = AgentReply(agent="echo", status="ok", is_memoised=True, entropy=EntropySum(sum_nats=9.0, tokens=3), usage=SPENT)
        step = StepRecord(
            right_probability=0.9,
            step=0,
            replies=(heard, AgentReply(agent="guesser", status="late", usage=SPENT), sure),
            active=("adder", "guesser"),
            explored=(("echo", 0.1),),
            summary="19",
            summarizer=SummarizerRecord(mode="llm", verdict="final", usage=TokenUsage(prompt_tokens=1)),
        )
        yield step
        yield Answer(
            trace_id=query.trace_id,
            text="19",
            policy=policy,
            stop_reason="summarizer",
            steps=(step,),
            degraded=True,
            finish_reason="stop",
            wall_ms=7.0,
        )

    async def close(self) -> None:
        pass


SPENT = TokenUsage(prompt_tokens=10, cached_tokens=4, completion_tokens=3)


class Writer:
    """Takes what the stage hands over, through a pickle, as the actor does."""

    def __init__(self) -> None:
        self.taken: list[Answered] = []

    @property
    def write_answers(self) -> Writer:
        return self

    async def remote(self, answers: list[Answered]) -> None:
        self.taken += pickle.loads(pickle.dumps(answers))


def test_every_query_of_a_shard_becomes_a_record() -> None:
    writer = Writer()
    stage = AnswerStage(Swarm, ASKING, writer, 4, {"dmoa": 2, "single:adder": 1})
    block = pa.table({"task": [TASK.model_dump_json()], "policies": ["dmoa single:adder"]})
    assert stage(block).to_pydict() == {"queries": [2]}
    good, lost = sorted(writer.taken, key=lambda record: record.policy)
    assert (lost.policy, lost.status, lost.error) == ("single:adder", "failed", "NoAgentError: nobody is there for single")
    assert (good.row_id, good.text, good.step_texts, good.active) == (TASK.row_id, "19", ("19",), (("adder",),))
    assert good.usage == TokenUsage(prompt_tokens=31, cached_tokens=12, completion_tokens=9)
    assert (good.summarizer_tokens, good.memoised_tokens, good.wall_ms) == (1, 13, 7.0)
    assert (good.right_probability, lost.right_probability) == (0.9, None)
    assert good.entropy_nats == 0.333333, "of the active agents alone, to 6 digits, as a server tells it"


def test_a_policy_whose_code_is_wrong_is_a_bug_in_every_repeat() -> None:
    wrong = failed(TASK, "review", PluginError("policy 'review' (review.py): next_step of step 1 raised KeyError('x')"), 1.0)
    slow = failed(TASK, "review", DeadlineError("too late"), 1.0)
    assert (wrong.bugs, slow.bugs) == (1, 0)
    assert mean_answer([slow, wrong, wrong]).bugs == 2
