"""`dmoa demo`: its questions, what it asks over HTTP, what it prints, its replay, its closing table; the launch and the
learning are the integration tests'."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.agents.pool import load_pool
from dmoa.cli.demo import (
    DEMO_SUITES,
    DemoOutcome,
    DemoQuestion,
    DemoReport,
    _replayed,
    ask_all,
    generate,
    print_comparison,
    replay_demo,
    summarise,
)
from dmoa.config import ActivationConfig, GateConfig, load
from dmoa.core.gate import Gate, GateSpec
from dmoa.evaluation.answer_matrix import AnswerMatrix, add_oracle
from dmoa.evaluation.records import BenchmarkInfo, Label, Task
from dmoa.evaluation.results import build_evaluation, rebuild_evaluation
from dmoa.evaluation.run_folder import RunFolder, write_lines, write_whole
from dmoa.evaluation.statistics import wilson
from dmoa.testing import answered as answer
from dmoa.testing import failed as lost
from dmoa.testing import run_info as run_of
from dmoa.testing import scored as score
from dmoa.training.probe import ProbeReport
from dmoa.types import AgentReply, EntropySum, TokenUsage
from dmoa.workflows.console import Common


def question(text: str, expected: str) -> DemoQuestion:
    return DemoQuestion(text=text, label=Label(row_id=text, benchmark="arith", gold={"answer": expected}))


@settings(max_examples=20)
@given(count=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_questions_are_held_out_rows_of_every_suite_in_turns(count: int, seed: int) -> None:
    questions = generate(count, seed)
    assert [asked.label.benchmark for asked in questions] == [*DEMO_SUITES] * count
    assert len({asked.text for asked in questions}) == 3 * count
    assert all(asked.label.row_id.split("/")[1] == "test" for asked in questions)
    assert generate(count, seed) == questions


@pytest.fixture
def common(pool: Path) -> Common:
    return Common(config=pool, overrides=("gate.seed=0",))


def demo(common: Common, url: str, out: Path, questions: list[DemoQuestion]) -> tuple[list[DemoOutcome], bool]:
    config = common.load()
    report = DemoReport(common, config, num_questions=len(questions))
    report.opening(url, "untrained-0")
    outcomes = asyncio.run(ask_all(url, questions, report))
    report.closing(outcomes, 1.5)
    return outcomes, replay_demo(common, config, out, outcomes)


def test_a_demo_from_questions_to_replay(
    common: Common, url: str, tmp_path: Path, dmoa: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [question("What is 12 + 7?", "19"), question("What is 12 + 8?", "20")]
    outcomes, is_identical = demo(common, url, tmp_path / "out", questions)
    shown = capsys.readouterr()
    assert all(outcome.asked for outcome in outcomes)
    for outcome in outcomes:
        assert outcome.asked is not None
        assert outcome.is_right == (f"answer is {outcome.question.expected}." in outcome.asked.answer.text)
    assert f"{sum(outcome.is_right for outcome in outcomes)} of 2" in shown.out
    for number in (1, 2):
        assert f"=== question {number} of 2" in shown.out
    assert (shown.out + shown.err).lower().count("step 1 ") == 2, "each step is printed once"
    assert "gate untrained-0: routing is arbitrary until it is trained" in shown.out
    assert is_identical
    assert "replayed 2 traces together: identical" in shown.out

    command = next(line for line in shown.out.splitlines() if "--replay" in line).split()
    assert dmoa(*command[1:]).exit_code == 0, "the command that the demo prints works as it stands"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["query-01.jsonl", "query-02.jsonl", "traces.jsonl"]
    single = (tmp_path / "out" / "query-02.jsonl").read_text(encoding="utf-8")
    assert json.loads(single)["query"]["text"] == "What is 12 + 8?"
    record = json.loads(json.dumps([outcome.to_json() for outcome in outcomes]))
    assert [(row["right"], row["suite"]) for row in record] == [(outcome.is_right, "arith") for outcome in outcomes]


def test_a_demo_with_tampered_routing_says_so(
    common: Common, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes, _ = demo(common, url, tmp_path, [question("Why?", "1")])
    asked = outcomes[0].asked
    assert asked is not None
    assert asked.trace is not None
    route = asked.trace.routes[0]
    changed = route.model_copy(update={"mass": route.mass / 2})
    trace = asked.trace.model_copy(update={"routes": [changed, *asked.trace.routes[1:]]})
    other = [DemoOutcome(question=outcomes[0].question, asked=replace(asked, trace=trace))]
    capsys.readouterr()
    assert not replay_demo(common, common.load(), tmp_path, other)
    assert "1 of 1 traces differ" in capsys.readouterr().out


def test_a_query_that_fails_is_reported_and_the_others_go_on(
    common: Common, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = DemoReport(common, load(common.config or ""), num_questions=1)
    (outcome,) = asyncio.run(ask_all("http://127.0.0.1:9", [question("What is 12 + 7?", "19")], report))
    report.closing([outcome], 0.1)
    assert outcome.asked is None
    assert outcome.is_right is False
    assert "cannot be reached" in outcome.error
    assert "0 of 1" in capsys.readouterr().out


def test_the_closing_table_pools_the_suites_and_knows_the_best_agent_and_the_oracle(tmp_path: Path) -> None:
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
    found = summarise(rebuild_evaluation(tmp_path), ("adder", "echo"))
    assert [(method.name, method.accuracy) for method in found] == [
        ("untrained gate", 0.0),
        ("trained gate", 0.75),
        ("best single agent (adder)", 0.5),
        ("dense (every agent)", 0.25),
        ("random agent", 0.25),
        ("oracle (knows the labels)", 0.75),
    ]
    assert found[1].by_suite == {"arith": 1.0, "words": 0.5}
    assert (found[1].tokens, found[1].active) == (110.0, 1.0)


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
    policies = ["dmoa", "dmoa:trained", "single:adder", "single:echo", "dense", "random", "oracle"]
    suites = ("arith", "words", "calendar")
    answered, scored = [], []
    for suite in suites:
        for policy in policies:
            if policy == "random" or (policy, suite) == ("single:adder", "words"):
                answered.append(lost(suite, 0, policy))
                scored.append(score(suite, 0, policy, 0.0, is_scored=False, is_failed=True))
            else:
                answered.append(answer(suite, 0, policy, active=(("adder",),)))
                scored.append(score(suite, 0, policy, 0.0 if policy == "single:echo" else 1.0))
    run = run_of([BenchmarkInfo(name=name, rows=1) for name in suites], policies)
    found = {method.policy: method for method in summarise(build_evaluation(run, answered, scored), ("adder", "echo"))}
    assert found["random"].not_run == suites
    assert not found["random"].did_run
    assert (found["random"].low, found["random"].high, found["random"].tokens) == (0.0, 1.0, 0.0)
    assert "single:echo" in found, "an agent that ran everywhere is the best before one that did not"
    probe = ProbeReport.model_construct(verdict="can", reasons=[])
    print_comparison(list(found.values()), load_pool("default"), probe)
    lines = capsys.readouterr().out.splitlines()
    (random_line,) = [line for line in lines if line.startswith("random agent")]
    assert random_line.count("did not run") == 4
    assert "%" not in random_line


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


def test_the_mean_of_several_gates_is_replayed_from_what_agents_said_alone() -> None:
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
    both = _replayed("both", "dmoa", [gate_that_asks(0), gate_that_asks(1)], matrices, embedded)
    assert (both.accuracy, both.by_suite) == (0.375, {"arith": 0.5, "words": 0.25})
    assert (both.active, both.tokens) == (1.0, 20.0)
    assert (both.low, both.high) == pytest.approx((0.25 + 0.025 * 0.25, 0.5 - 0.025 * 0.25))
    one = _replayed("one", "dmoa:trained", [gate_that_asks(0)], matrices, embedded)
    assert (one.accuracy, one.tokens) == (0.5, 10.0)
    assert (one.low, one.high) == pytest.approx((wilson(2, 4).low, wilson(2, 4).high))
