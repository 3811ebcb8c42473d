"""`dmoa demo`: its questions, what it asks over HTTP, what it prints, and its replay; the launch is the integration tests'."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.cli.demo import Outcome, Question, ask_all, generate, replay_demo
from dmoa.cli.demo_report import Report
from dmoa.cli.options import Common
from dmoa.config import load


def recomputed(text: str) -> int:
    """The answer, worked out from the words alone."""
    a, b = map(int, re.findall(r"\d+", text))
    if "more" in text or "+" in text:
        return a + b
    return a - b if "lent out" in text or " - " in text else a * b


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_questions_are_all_different_with_the_right_answers(count: int, seed: int) -> None:
    questions = generate(count, seed)
    assert len({question.text for question in questions}) == count
    for question in questions:
        assert question.expected == str(recomputed(question.text))
    assert generate(count, seed) == questions


@pytest.fixture
def common(pool: Path) -> Common:
    return Common(config=pool, overrides=("gate.seed=0",))


def demo(common: Common, url: str, out: Path, questions: list[Question]) -> tuple[list[Outcome], Report, bool]:
    config = common.load()
    report = Report(common, config, out, num_questions=len(questions))
    report.opening(url, "untrained-0")
    outcomes = asyncio.run(ask_all(url, questions, report))
    report.closing(outcomes, 1.5)
    return outcomes, report, replay_demo(common, config, report, out, outcomes)


def test_a_demo_from_questions_to_replay(
    common: Common, url: str, tmp_path: Path, dmoa: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [
        Question(text="What is 12 + 7?", expected="19"),
        Question(text="What is 12 + 8?", expected="20"),
        Question(text="Why?", expected=None),
    ]
    outcomes, report, is_identical = demo(common, url, tmp_path / "out", questions)
    shown = capsys.readouterr()
    answers = [outcome.asked.text for outcome in outcomes if outcome.asked]
    assert len(answers) == 3
    for outcome in outcomes[:2]:
        assert outcome.asked is not None
        assert outcome.is_right == (f"answer is {outcome.question.expected}." in outcome.asked.text)
    assert outcomes[2].is_right is None
    rights = sum(outcome.is_right is True for outcome in outcomes)
    assert f"{rights} of 2" in shown.out
    for number in (1, 2, 3):
        assert f"=== question {number} of 3" in shown.out
        assert f"[{number}/3] Step 1:" in shown.err
    assert "gate untrained-0: routing is arbitrary until it is trained" in shown.out
    assert is_identical
    assert "routing decisions identical" in shown.out

    command = next(line for line in shown.out.splitlines() if "--replay" in line).split()
    assert dmoa(*command[1:]).exit_code == 0, "the command that the demo prints works as it stands"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["query-01.jsonl", "query-02.jsonl", "query-03.jsonl", "traces.jsonl"]
    single = (tmp_path / "out" / "query-02.jsonl").read_text(encoding="utf-8")
    assert json.loads(single)["query"]["text"] == "What is 12 + 8?"
    record = json.loads(json.dumps(report.to_json(outcomes, is_identical=True)))
    assert [row["right"] for row in record["queries"]] == [outcome.is_right for outcome in outcomes]


def test_a_demo_with_tampered_routing_says_so(
    common: Common, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes, report, _ = demo(common, url, tmp_path, [Question(text="Why?", expected=None)])
    asked = outcomes[0].asked
    assert asked is not None
    assert asked.trace is not None
    route = asked.trace.routes[0]
    changed = route.model_copy(update={"mass": route.mass / 2})
    trace = asked.trace.model_copy(update={"routes": [changed, *asked.trace.routes[1:]]})
    other = [Outcome(question=outcomes[0].question, asked=replace(asked, trace=trace))]
    capsys.readouterr()
    assert not replay_demo(common, common.load(), report, tmp_path, other)
    assert "1 of 1 traces differ" in capsys.readouterr().out


def test_a_query_that_fails_is_reported_and_the_others_go_on(
    common: Common, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [Question(text="What is 12 + 7?", expected="19")]
    report = Report(common, load(common.config or ""), tmp_path, num_questions=1)
    (outcome,) = asyncio.run(ask_all("http://127.0.0.1:9", questions, report))
    report.closing([outcome], 0.1)
    assert outcome.asked is None
    assert outcome.is_right is False
    assert "cannot be reached" in outcome.error
    assert "0 of 1" in capsys.readouterr().out
