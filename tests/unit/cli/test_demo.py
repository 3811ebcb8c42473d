"""`dmoa demo`: its questions, what it asks over HTTP, what it prints, its replay, its closing table; the acceptance run does
the launch and the learning."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.cli.demo import DEMO_SUITES, ask_and_replay, gained, generate, name_methods, replay_first
from dmoa.config import ActivationConfig, GateConfig
from dmoa.core.gate import Gate, GateSpec
from dmoa.evaluation.answer_matrix import AnswerMatrix, add_oracle
from dmoa.evaluation.figures import overall
from dmoa.evaluation.records import BenchmarkInfo, Label, Row, Task
from dmoa.evaluation.results import build_evaluation, rebuild_evaluation
from dmoa.evaluation.run_folder import RunFolder, write_lines, write_whole
from dmoa.testing import answered as answer
from dmoa.testing import failed as lost
from dmoa.testing import run_info as run_of
from dmoa.testing import scored as score
from dmoa.trace import read_traces, write_traces
from dmoa.types import AgentReply, EntropySum, TokenUsage
from dmoa.workflows.console import Common, print_overall


def question(text: str, expected: str) -> Row:
    task = Task(row_id=text, benchmark="arith", text=text)
    return Row(task=task, label=Label(row_id=text, benchmark="arith", gold={"answer": expected}), row_hash="")


@settings(max_examples=20)
@given(count=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_questions_are_held_out_rows_of_every_suite_in_turns(count: int, seed: int) -> None:
    rows = generate(count, seed)
    assert [row.label.benchmark for row in rows] == ([*DEMO_SUITES] * count)[:count]
    assert len({row.task.text for row in rows}) == count
    assert all(row.label.row_id.split("/")[1] == "test" for row in rows)
    assert generate(count, seed) == rows


@pytest.fixture
def common(pool: Path) -> Common:
    return Common(config=pool, overrides=("gate.seed=0",))


def test_a_demo_from_questions_to_replay(
    common: Common, url: str, tmp_path: Path, dmoa: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [question("What is 12 + 7?", "19"), question("What is 12 + 8?", "20")]
    told, is_identical = ask_and_replay(common, common.load(), url, rows, tmp_path / "out")
    shown = capsys.readouterr()
    assert [(asked["question"], asked["suite"], asked["error"]) for asked in told] == [
        ("What is 12 + 7?", "arith", None),
        ("What is 12 + 8?", "arith", None),
    ]
    for asked in json.loads(json.dumps(told)):
        assert asked["right"] == (f"answer is {asked['expected']}." in asked["reply"]["answer"])
    for number in (1, 2):
        assert f"question {number} of 2: " in shown.out
    assert (shown.out + shown.err).lower().count("step 1 ") == 2, "each step is printed once"
    assert "routing is arbitrary until it is trained" in shown.out
    assert is_identical
    assert "replayed 2 traces together: identical" in shown.out

    command = next(line for line in shown.out.splitlines() if "--replay" in line).split("`")[1].split()
    assert dmoa(*command[1:]).exit_code == 0, "the command that the demo prints works as it stands"
    traces = (tmp_path / "out" / "traces.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(trace)["query"]["text"] for trace in traces] == [row.task.text for row in rows]


def test_a_demo_with_other_routing_than_was_recorded_says_so(
    common: Common, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first question's trace is recorded, changed, and then routed again beside the second one's."""
    ask_and_replay(common, common.load(), url, [question("Why?", "1")], tmp_path)
    path = tmp_path / "traces.jsonl"
    (trace,) = read_traces(path)
    changed = trace.routes[0].model_copy(update={"mass": trace.routes[0].mass / 2})
    path.unlink()
    write_traces(path, [trace.model_copy(update={"routes": [changed, *trace.routes[1:]]})])
    capsys.readouterr()
    _, is_identical = ask_and_replay(common, common.load(), url, [question("How?", "1")], tmp_path)
    assert not is_identical
    assert "1 of 2 traces differ" in capsys.readouterr().out


def test_a_query_that_fails_is_reported_and_the_others_go_on(
    common: Common, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [question("What is 12 + 7?", "19"), question("What is 12 + 8?", "20")]
    told, _ = ask_and_replay(common, common.load(), "http://127.0.0.1:9", rows, tmp_path)
    for asked in told:
        assert (asked["reply"], asked["right"]) == (None, False)
        assert "cannot be reached" in asked["error"]
    assert capsys.readouterr().out.count("failed: ") == 2


def test_the_closing_table_pools_the_suites_and_knows_the_best_agent_and_the_oracle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two agents, each right on its own suite; the trained gate finds both, the untrained one none."""
    values = {
        ("arith", "single:adder"): [1, 1], ("arith", "single:echo"): [0, 0], ("arith", "dmoa"): [0, 0],
        ("words", "single:adder"): [0, 0], ("words", "single:echo"): [1, 0], ("words", "dmoa"): [0, 0],
        ("arith", "dmoa:trained"): [1, 1], ("words", "dmoa:trained"): [1, 0],
        ("arith", "dense"): [1, 0], ("words", "dense"): [0, 0], ("arith", "random"): [0, 1], ("words", "random"): [0, 0],
    }  # fmt: skip
    folder = RunFolder(tmp_path)
    policies = list(dict.fromkeys(policy for _, policy in values))
    for benchmark in ("arith", "words"):
        tasks = [Task(row_id=f"{benchmark}/test/{n:04}", benchmark=benchmark, text=f"question {n}") for n in range(2)]
        write_lines(folder.tasks(benchmark), tasks)
        for policy in policies:
            rows = [answer(benchmark, n, policy, active=(("adder",),)) for n in range(2)]
            write_lines(folder.answers(benchmark, policy), rows)
            judged = [score(benchmark, n, policy, value) for n, value in enumerate(values[benchmark, policy])]
            write_lines(folder.scores(benchmark, policy), judged)
    info = run_of([BenchmarkInfo(name=name, rows=2) for name in ("arith", "words")], policies)
    write_whole(folder.run, info.model_dump_json())
    for _ in range(2):
        add_oracle(folder, ("arith", "words"), ("adder", "echo"))
    evaluation = rebuild_evaluation(tmp_path)
    rows = {row.policy: row for row in overall(evaluation)}
    names = name_methods(evaluation, ("adder", "echo"))
    assert [(name, rows[policy].accuracy) for policy, name in names.items()] == [
        ("trained gate", 0.75),
        ("untrained gate", 0.0),
        ("best single agent (adder)", 0.5),
        ("everybody once", 0.25),
    ]
    said = gained({name: rows[policy] for policy, name in names.items()}, 0.25, 0.4)
    assert "75.0% of the answers are right, with 1.00 agents a step" in said
    assert "+50 points against 20 untrained gates on average, +25 against the best single agent (adder)" in said
    assert said.endswith("+50 against asking everybody, at 40% of the tokens")
    print_overall(evaluation, names)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained gate")]
    assert re.split(r"  +", line.strip()) == ["trained gate", "75.0", "[30.1, 95.4]", "100.0", "50.0", "1.00", "110"]


def test_the_oracle_takes_a_wrong_answer_before_none_at_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    policies = ["single:adder", "single:echo"]
    write_lines(folder.tasks("arith"), [Task(row_id="arith/test/0000", benchmark="arith", text="question")])
    write_lines(folder.answers("arith", "single:adder"), [lost("arith", 0, "single:adder")])
    failed = score("arith", 0, "single:adder", 0.0, is_scored=False, is_failed=True)
    write_lines(folder.scores("arith", "single:adder"), [failed])
    write_lines(folder.answers("arith", "single:echo"), [answer("arith", 0, "single:echo")])
    write_lines(folder.scores("arith", "single:echo"), [score("arith", 0, "single:echo", 0.0)])
    write_whole(folder.run, run_of([BenchmarkInfo(name="arith", rows=1)], policies).model_dump_json())
    add_oracle(folder, ("arith",), ("adder", "echo"))
    assert {row.policy: row.did_run for row in rebuild_evaluation(tmp_path).rows} == {
        "single:adder": False,
        "single:echo": True,
        "oracle": True,
    }


def test_a_method_that_never_ran_has_no_figures_and_is_never_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    policies = ["dmoa", "dmoa:trained", "single:adder", "single:echo", "dense", "oracle"]
    suites = ("arith", "words", "calendar")
    answered, scored = [], []
    for suite in suites:
        for policy in policies:
            if policy == "dense" or (policy, suite) == ("single:adder", "words"):
                answered.append(lost(suite, 0, policy))
                scored.append(score(suite, 0, policy, 0.0, is_scored=False, is_failed=True))
            else:
                answered.append(answer(suite, 0, policy, active=(("adder",),)))
                scored.append(score(suite, 0, policy, 0.0 if policy == "single:echo" else 1.0))
    run = run_of([BenchmarkInfo(name=name, rows=1) for name in suites], policies)
    evaluation = build_evaluation(run, answered, scored)
    names = name_methods(evaluation, ("adder", "echo"))
    assert "single:adder" not in names, "an agent that ran everywhere is the best before one that did not"
    print_overall(evaluation, names)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("everybody once")]
    assert line.count("did not run") == 3
    assert re.split(r"  +", line.replace("did not run", "").strip()) == ["everybody once", "-", "-", "-"]
    rows = {names[row.policy]: row for row in overall(evaluation) if row.policy in names}
    assert gained(rows, 0.2, 0.4) == "some methods did not run on every suite: see the report"


def gate_that_asks(agent: int) -> Gate:
    """A gate of two agents that asks one of them, whatever the question."""
    config = GateConfig(activation=ActivationConfig(rule="fixed", max_agents=1))
    spec = replace(GateSpec.from_config(config, ("adder", "echo")), hidden=2, embedding_dim=4)
    gate = Gate(spec)
    with torch.no_grad():
        for _, weight in gate.named_parameters():
            weight.zero_()
        gate.head_bias[agent] = 1.0
    return gate


def test_first_steps_of_gates_are_replayed_from_what_agents_said_alone() -> None:
    """Values by hand: `adder` is right on both rows of arith, `echo` on one row of words."""
    value_by_suite = {"arith": [[1.0, 0.0], [1.0, 0.0]], "words": [[0.0, 1.0], [0.0, 0.0]]}
    matrices = [
        AnswerMatrix(
            benchmark=suite,
            agents=("adder", "echo"),
            tasks=tuple(Task(row_id=f"{suite}/{n}", benchmark=suite, text=str(n)) for n in range(2)),
            replies=(
                tuple(
                    AgentReply(
                        agent=name,
                        status="ok",
                        text="1",
                        entropy=EntropySum(sum_nats=1.0, tokens=1),
                        usage=TokenUsage(prompt_tokens=tokens),
                    )
                    for name, tokens in (("adder", 10), ("echo", 30))
                ),
            )
            * 2,
            value_RA=np.array(values),
        )
        for suite, values in value_by_suite.items()
    ]
    embedded = [np.zeros((2, 4), np.float32)] * 2
    gates = [gate_that_asks(0), gate_that_asks(1)]
    assert replay_first(gates, matrices, embedded).tolist() == [0.5, 0.25]
