"""Exports of traces and runs: which answers and pairs they hold, and what stands beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmoa.answer_form import FinalCall
from dmoa.errors import ConfigError, TraceError
from dmoa.evaluation.records import BenchmarkInfo, Task
from dmoa.evaluation.run_folder import RunFolder, write_lines
from dmoa.orchestrator import advance, begin, finish
from dmoa.testing import answered, decision, failed, query, run_info, scored, write_run
from dmoa.trace import AnsweredQuery, write_traces
from dmoa.training.options import ExportOptions
from dmoa.types import AgentReply, Message, Stage, StepRecord, SummarizerRecord
from dmoa.workflows.export import export


def step(*right: float | None, finish_reason: Any = "stop") -> StepRecord:
    replies = tuple(
        AgentReply(agent=name, status="ok", text=f"{name} says", right_probability=p, finish_reason=finish_reason)
        for name, p in zip("abc", right, strict=False)
    )
    return StepRecord(
        step=0,
        replies=replies,
        active=tuple(reply.agent for reply in replies),
        summary="a says",
        summarizer=SummarizerRecord(mode="select", verdict="rule", finish_reason=finish_reason),
        decision=decision({"a": 0.5, "b": 0.25, "c": 0.25}, 2),
    )


def lines(path: Path, **options: Any) -> list[dict[str, Any]]:
    out = path / "out.jsonl"
    count = export(ExportOptions.parse({"out": str(out), **options}))
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(found) == count
    return found


def traces(path: Path, *steps: StepRecord, **changes: Any) -> Path:
    """Traces of a query; `changes`: of it."""
    asked = replace(query("Why?"), system="Be kind.", turns=(Message(role="user", content="Hi"),), **changes)
    made = (
        AnsweredQuery(query=asked, answer=finish(advance(begin(asked), one), "dmoa", "sure", wall_ms=1.0)).trace()
        for one in steps
    )
    return write_traces(path / "traces.jsonl", made)


def test_a_trace_is_a_conversation_with_the_chosen_answer(tmp_path: Path) -> None:
    (line,) = lines(tmp_path, format="sft", traces=str(traces(tmp_path, step(0.9, 0.1), step(0.9, finish_reason="length"))))
    assert [message["role"] for message in line["messages"]] == ["system", "user", "user", "assistant"]
    assert [message["content"] for message in line["messages"]] == ["Be kind.", "Hi", "Why?", "a says"]
    assert line["dmoa"]["steps"] == [{"step": 0, "k": 2, "agents": {"a": 0.5, "b": 0.25}}]
    assert (line["dmoa"]["policy"], line["dmoa"]["stop_reason"], line["dmoa"]["gate_version"]) == ("dmoa", "sure", "v1")


@pytest.mark.parametrize(
    ("changes", "exported"),
    [
        ({}, 1),
        ({"exchange": "The weather tool said: rain."}, 0),
        ({"stages": (Stage(part="First."),)}, 0),
        ({"final": FinalCall(n=2)}, 1),
        ({"final": FinalCall(schema={"type": "object"})}, 0),
    ],
)
def test_what_the_conversation_does_not_show_is_not_learnt(changes: dict[str, Any], exported: int, tmp_path: Path) -> None:
    found = lines(tmp_path, format="sft", traces=str(traces(tmp_path, step(0.9, 0.1), **changes)))
    assert len(found) == exported


@pytest.mark.parametrize("asked", [{}, {"text": 5}, {"text": "x", "turns": [{"role": "user"}]}, {"text": "x", "turns": ["x"]}])
def test_a_query_of_another_shape_is_one_message(asked: dict[str, Any], tmp_path: Path) -> None:
    path = traces(tmp_path, step(0.9, 0.1))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"query": asked}))
    with pytest.raises(TraceError, match=r"trace 't1': query is .*; expected text, system and turns"):
        lines(tmp_path, format="sft", traces=str(path))


def test_replies_that_are_judged_apart_are_a_pair(tmp_path: Path) -> None:
    source = traces(tmp_path, step(0.2, 0.9, 0.5), step(0.5, 0.55), step(None, 0.9), step(None, None))
    (line,) = lines(tmp_path, format="dpo", traces=str(source))
    assert line["chosen"] == [{"role": "assistant", "content": "b says"}]
    assert line["rejected"] == [{"role": "assistant", "content": "a says"}]
    assert (line["dmoa"]["chosen"], line["dmoa"]["rejected"], line["dmoa"]["right"]) == ("b", "a", [0.9, 0.2])
    assert line["prompt"][-1] == {"role": "user", "content": "Why?"}
    assert len(lines(tmp_path, format="dpo", traces=str(source), margin=0.04)) == 2


def test_a_run_gives_right_answers_and_pairs_by_its_scores(tmp_path: Path) -> None:
    info = run_info([BenchmarkInfo(name="gsm8k", rows=3)], policies=("dmoa", "single"))
    answers = [answered("gsm8k", row, policy, text=f"{policy} {row}") for policy in info.policies for row in (0, 1)]
    answers += [failed("gsm8k", 2, "dmoa"), answered("gsm8k", 2, "single", text="single 2")]
    values = {("dmoa", 0): 1.0, ("dmoa", 1): 0.0, ("single", 0): 0.0, ("single", 1): 0.5, ("single", 2): 1.0}
    scores = [scored("gsm8k", row, policy, value) for (policy, row), value in values.items()]
    scores.append(scored("gsm8k", 2, "dmoa", 0.0, is_failed=True, is_scored=False))
    folder = write_run(tmp_path / "run", info, answers, scores)
    write_lines(
        folder.tasks("gsm8k"),
        [
            Task(row_id=line.row_id, benchmark="gsm8k", text=f"ask {number}")
            for number, line in enumerate([*answers[:2], answers[-1]])
        ],
    )
    pairs = lines(tmp_path, format="dpo", run=str(folder.root))
    assert [(line["prompt"][0]["content"], line["chosen"][0]["content"], line["rejected"][0]["content"]) for line in pairs] == [
        ("ask 0", "dmoa 0", "single 0")
    ]
    assert pairs[0]["dmoa"]["rejected"]["policy"] == "single"
    told = lines(tmp_path, format="sft", run=str(folder.root))
    assert [line["messages"][-1]["content"] for line in told] == ["dmoa 0", "single 2"]


def run_of(path: Path, answers: dict[str, Any], values: dict[str, float], **changes: Any) -> Path:
    """A run of one row, in whose folder exports may lie: policy -> the changes of its answer, and its score."""
    info = run_info([BenchmarkInfo(name="gsm8k", rows=1)], policies=tuple(answers), **changes)
    made = [answered("gsm8k", 0, policy, **{"text": f"{policy} says"} | changed) for policy, changed in answers.items()]
    folder = write_run(path, info, made, [scored("gsm8k", 0, policy, value) for policy, value in values.items()])
    write_lines(folder.tasks("gsm8k"), [Task(row_id=made[0].row_id, benchmark="gsm8k", text="ask")])
    return folder.root


def test_what_an_adversary_had_a_part_in_is_never_chosen(tmp_path: Path) -> None:
    """The pool's agents are adder and echo; its last one buries the true reply, which is right all the same."""
    answers = {"dense": {"active": (("adder", "echo"),)}, "single": {"active": (("adder",),)}, "moa": {"active": (("echo",),)}}
    run = run_of(tmp_path, answers, {"dense": 1.0, "single": 1.0, "moa": 0.0}, options={"adversaries": 1, "kind": "verbose"})
    assert [line["messages"][-1]["content"] for line in lines(tmp_path, format="sft", run=str(run))] == ["single says"]
    (pair,) = lines(tmp_path, format="dpo", run=str(run))
    assert (pair["dmoa"]["chosen"]["policy"], pair["dmoa"]["rejected"]["policy"]) == ("single", "moa")


def test_what_an_adversary_said_in_an_earlier_step_counts(tmp_path: Path) -> None:
    answers = {"moa": {"active": (("adder", "echo"), ("adder",))}, "single": {"active": (("adder",), ("adder",))}}
    run = run_of(tmp_path, answers, {"moa": 1.0, "single": 1.0}, options={"adversaries": 1, "kind": "verbose"})
    assert [line["messages"][-1]["content"] for line in lines(tmp_path, format="sft", run=str(run))] == ["single says"]


def test_what_was_right_in_some_repeats_only_is_rejected_by_nobody(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"dmoa": {}, "moa": {}, "dense": {}}, {"dmoa": 1.0, "moa": 0.5, "dense": 0.0}, repeats=2)
    (pair,) = lines(tmp_path, format="dpo", run=str(run))
    assert pair["dmoa"]["rejected"]["policy"] == "dense"


def test_what_could_not_be_judged_is_rejected_by_nobody(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"dmoa": {}, "moa": {}, "dense": {}}, {"dmoa": 1.0, "dense": 0.0})
    broken = scored("gsm8k", 0, "moa", 0.0, is_scored=False, reason="the checker itself failed: timed out")
    write_lines(RunFolder(run).scores("gsm8k", "moa"), [broken])
    (pair,) = lines(tmp_path, format="dpo", run=str(run))
    assert pair["dmoa"]["rejected"]["policy"] == "dense"


def test_tasks_with_stages_are_passed_over(tmp_path: Path) -> None:
    """Their text is the same for all rows: what is asked lies in the stages."""
    run = run_of(tmp_path, {"dmoa": {}}, {"dmoa": 1.0})
    folder = RunFolder(run)
    (task,) = folder.read_tasks("gsm8k")
    assert len(lines(tmp_path, format="sft", run=str(run))) == 1
    write_lines(folder.tasks("gsm8k"), [task.model_copy(update={"stages": (Stage(part="Wait."),)})])
    assert lines(tmp_path, format="sft", run=str(run)) == []


def test_cut_answers_and_pairs_of_the_same_text_are_left_out(tmp_path: Path) -> None:
    cut, same = {"finish_reason": "length"}, {"text": " 19 "}
    run = run_of(tmp_path / "a", {"dmoa": cut, "moa": cut, "dense": {}}, {"dmoa": 1.0, "moa": 0.0, "dense": 1.0})
    assert lines(tmp_path, format="dpo", run=str(run)) == []
    assert [line["messages"][-1]["content"] for line in lines(tmp_path, format="sft", run=str(run))] == ["dense says"]
    run = run_of(tmp_path / "b", {"dmoa": {"text": "19"}, "moa": same, "dense": {}}, {"dmoa": 1.0, "moa": 0.0, "dense": 0.0})
    (pair,) = lines(tmp_path, format="dpo", run=str(run))
    assert pair["rejected"] == [{"role": "assistant", "content": "dense says"}]
    one = step(0.9, 0.1)
    alike = replace(one, replies=tuple(replace(x, text=f"19{' ' * (x.agent == 'a')}") for x in one.replies))
    assert lines(tmp_path, format="dpo", traces=str(traces(tmp_path, alike))) == []


def test_keys_are_taken_out_and_code_is_left_as_it_is(tmp_path: Path) -> None:
    code = "sorted(d, key=lambda x: x[1])  # naïve \u2028 😀"
    run = run_of(tmp_path, {"dmoa": {"text": f"sk-abcdefgh12345678 {code}"}, "moa": {}}, {"dmoa": 1.0, "moa": 0.0})
    out = tmp_path / "out.jsonl"
    export(ExportOptions.parse({"format": "dpo", "out": str(out), "run": str(run)}))
    (line,) = [json.loads(line) for line in out.read_bytes().split(b"\n") if line]
    assert line["chosen"][0]["content"] == f"[redacted] {code}"


@pytest.mark.parametrize("sources", [{}, {"run": "r", "traces": "t"}])
def test_there_is_one_source(sources: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="run and traces: give one of the two"):
        ExportOptions.parse({"format": "sft", "out": "o.jsonl", **sources})
