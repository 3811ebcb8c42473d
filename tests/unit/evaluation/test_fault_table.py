"""Reply shapes that were once read as another answer: each through the reader of answers and the scorer of its benchmark.

Number rows go through the scorer of word problems and that of the generated suites. What happens to a whole query (an agent that
never ran, a thought that never ended) goes through a scripted pool, the pipeline's stage, the scorer, the result and the tables.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local, build_pool_gate
from dmoa.config import Config
from dmoa.core.answers import read_answer
from dmoa.core.forms import answer_classes
from dmoa.errors import DmoaError, EmptyAnswerError
from dmoa.evaluation.answering import Asking, score_answer, unanswered
from dmoa.evaluation.pipeline import AnswerStage
from dmoa.evaluation.records import Answered, BenchmarkInfo, Label, Reply, Scored, Task
from dmoa.evaluation.registry import build_scorer, judging
from dmoa.evaluation.results import Evaluation, build_evaluation
from dmoa.flat import flat
from dmoa.protocols import AgentClient
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm
from dmoa.testing import run_info
from dmoa.types import AgentCall, AgentReply, Limits, TokenUsage
from dmoa.workflows.console import print_evaluation
from dmoa.workflows.evaluate import check_ran
from tests.examples import examples

FOUR = ["4", "6", "7", "9"]
PERCENT = ["50%", "25%", "10%", "5%", "none of these"]
FRACTIONS = ["\\frac{1}{4}", "\\frac{3}{4}", "\\frac{1}{3}", "\\frac{2}{3}", "\\frac{1}{6}"]
UNSCORED = "unscored"
LONG = "12345678901234567890123456789.5"


def number(gold: str) -> dict[str, Any]:
    return {"number": gold}


def letter(gold: str, choices: list[str] = FOUR) -> dict[str, Any]:
    return {"letter": gold, "choices": choices}


MADE_UP = "\nAnn has 4 pens and buys 5 more. How many has she?\n4 + 5 = 9\n#### 9"
TABLE: list[tuple[str, dict[str, Any], str, str | bool, str | None]] = [
    # benchmark, gold, reply, verdict, what the reader of answers reads
    ("gsm8k", number("42"), "<think>\nI cannot be sure. The answer is 41", UNSCORED, None),
    ("gsm8k", number("42"), "analysisWe compute. The answer is 40? no 42.assistantfinal42", True, "42"),
    ("mmlu", letter("C"), "<think>\nMaybe the answer is A. Hmm", UNSCORED, None),
    ("gsm8k", number("5"), f"#### 5{MADE_UP}", True, "5"),
    ("gsm8k", number("5"), f"2 + 3 = 5\n#### 5\n\nQuestion:{MADE_UP}", True, "5"),
    ("gsm8k", number("5"), "#### 5\nTom has 4 pens and buys 5 more. Find how many he has.\n#### 9", True, "5"),
    ("gsm8k", number("70000"), "The profit is $70,000 (150% of the value).", True, "70000"),
    ("gsm8k", number("18"), "She earns $18 a day (9 eggs at $2 each).", True, "18"),
    ("gsm8k", number("-7"), "The temperature is minus 7.", True, "-7"),
    ("gsm8k", number("-15"), "Answer: \u2013 15", True, "-15"),
    ("gsm8k", number("12500"), "The answer is 12 500.", True, "12500"),
    ("gsm8k", number("1234.5"), "The answer is 1.234,50.", True, "1234.5"),
    ("gsm8k", number("1250"), "The answer is 1'250.", True, "1250"),
    ("gsm8k", number("1.25"), "The answer is 1,25 euros.", True, "1.25"),
    ("gsm8k", number("6"), "Answer: between 5 and 6", UNSCORED, None),
    ("gsm8k", number("829"), "The answer is not 829.", UNSCORED, None),
    ("gsm8k", number("829"), "Answer: none of 1, 2, 829", UNSCORED, None),
    ("mmlu", letter("B"), "It is not (B)", UNSCORED, None),
    ("gsm8k", number("1024"), "Answer: 2^10", True, "1024"),
    ("gsm8k", number("1000"), "Answer: 10^3", True, "1000"),
    ("gsm8k", number("2"), "Answer: \u221a4", True, "2"),
    ("gsm8k", number("12345678901234567890123456790"), f"Answer: {LONG}", False, LONG),
    ("gsm8k", number("70000"), "Answer: $70k", True, "70000"),
    ("gsm8k", number("36"), "Answer: 3 dozen", True, "36"),
    ("mmlu", letter("C"), '{"answer": "C"}', True, "c"),
    ("mmlu", letter("C"), '```json\n{"answer": "C"}\n```', True, "c"),
    ("gsm8k", number("18"), '{"reasoning": "9 eggs at 2 each", "answer": "18"}', True, "18"),
    ("mmlu", letter("B"), "Answer: Let's think step by step. B is right, so (B).", True, "b"),
    ("aqua_rat", letter("A", PERCENT), "Answer: 50 percent", True, "50"),
    ("aqua_rat", letter("A", PERCENT), "Answer: \\frac{1}{2}, so 50%", True, "50"),
    ("aqua_rat", letter("B", FRACTIONS), "Answer: 0.75", True, "0.75"),
    ("hotpotqa", {"answer": "Paris"}, '{"answer": "Paris"}', True, "paris"),
]  # fmt: skip


def judged(benchmark: str, gold: dict[str, Any], text: str) -> Any:
    label = Label(row_id=f"{benchmark}/test/0", benchmark=benchmark, gold=gold)
    return (
        build_scorer(benchmark).score(label, Reply(text=text))
        if benchmark != "arith"
        else judging("arith").score(label, Reply(text=text))
    )


@pytest.mark.parametrize(
    ("benchmark", "gold", "text", "verdict", "reads"), TABLE, ids=[f"{i}-{row[2][:24]}" for i, row in enumerate(TABLE)]
)
def test_each_row_of_the_table(benchmark: str, gold: dict[str, Any], text: str, verdict: str | bool, reads: str | None) -> None:
    scores = [judged(benchmark, gold, text)]
    if benchmark == "gsm8k":
        scores.append(judged("arith", {"answer": gold["number"]}, text))
    for score in scores:
        assert (score.value == 1.0 if score.is_scored else UNSCORED) == verdict, score
    found = read_answer(text)
    assert found.value == reads, found
    assert found.reason


PATIENT = {"pathology": "GERD", "differential": [["GERD", 0.9], ["Croup", 0.1]], "conditions": ["GERD", "Croup", "SLE"]}
ELSEWHERE: list[tuple[str, dict[str, Any], str, str | bool]] = [
    # the same kinds at other places
    ("mmlu", letter("B"), '{"answer": "B) 6"}', True),
    ("mmlu", letter("B"), '{"answer": 6}', True),
    ("mmlu", letter("B"), "Answer: A or B", UNSCORED),
    ("mmlu", letter("B"), "(A) is wrong. (B) is wrong as well.", UNSCORED),
    ("mmlu", letter("B"), "I can rule out (B).", UNSCORED),
    ("mmlu", letter("B"), "It isn't B.", UNSCORED),
    ("mmlu", letter("B"), "(A) is not right, so (B).", True),
    ("mmlu", letter("B"), "analysisA? no.assistantfinalB", True),
    ("mmlu", letter("B"), "Answer: B\n\nQuestion: the next one?\nAnswer: C", True),
    ("aqua_rat", letter("A", ["$12,000", "$1,200", "10", "5", "none"]), "Answer: 12 000 dollars", True),
    ("gsm8k", number("8"), "Answer: 2**3", True),
    ("gsm8k", number("8"), "**Answer: 2 ** 3**", True),
    ("gsm8k", number("5"), "**Step 1** 5 apples", True),
    ("gsm8k", number("1250"), "Answer: 1.250 \u20ac", UNSCORED),
    ("gsm8k", number("5"), "Answer: 5 (not 6)", True),
    ("gsm8k", number("6"), "It is not 5 but 6.", True),
    ("arith", {"answer": "5"}, "Answer: 5\n\nProblem: 4 + 5?\nAnswer: 9", True),
    ("arith", {"answer": "5"}, 'Answer: {"answer": 5}', True),
    ("hotpotqa", {"answer": "Paris"}, 'Answer: {"answer": "Paris"}', True),
    ("hotpotqa", {"answer": "Paris"}, "Answer: Paris\n\nQuestion: What next?\nAnswer: Rome", True),
    ("hotpotqa", {"answer": "Paris"}, "<think>\nThe answer is Paris", UNSCORED),
    ("ddxplus", PATIENT, '{"diagnosis": "GERD", "differential": ["GERD", "Croup"]}', True),
    ("ddxplus", PATIENT, '```json\n{"answer": "GERD"}\n```', True),
    ("ddxplus", PATIENT, "<think>\nDiagnosis: GERD", UNSCORED),
    ("math", {"answer": "5"}, "The answer is not 5.", UNSCORED),
    ("math", {"answer": "5"}, "It is not 5.", UNSCORED),
    ("math", {"answer": "5"}, "Answer: between 5 and 6", UNSCORED),
    ("math", {"answer": "6"}, "The answer is not 5 but 6.", True),
    ("math", {"answer": "12500"}, "The answer is 12 500.", True),
    ("math", {"answer": "1.25"}, "The answer is 1,25 euros.", True),
    ("math", {"answer": r"5"}, r"\boxed{.5}", False),
    ("math", {"answer": r"25"}, r"\boxed{.25}", False),
    ("math", {"answer": r"0.5"}, r"\boxed{.5}", True),
    ("math", {"answer": r"\frac{3}{4}"}, r"\boxed{.75}", True),
    ("math", {"answer": r"-\frac{1}{2}"}, r"\boxed{-.5}", True),
    ("math", {"answer": r"10101_2"}, r"\boxed{10101_3}", False),
    ("math", {"answer": r"2516_8"}, r"\boxed{2516_{9}}", False),
    ("math", {"answer": r"2516_8"}, r"\boxed{2516_{8}}", True),
    ("math", {"answer": r"12"}, r"\boxed{12_5}", False),
    ("math", {"answer": r"1112112_3"}, r"\boxed{1112112}", True),
    ("math", {"answer": r"1112112_3"}, r"\boxed{1112113}", False),
    ("math", {"answer": r"5"}, r"\boxed{x = 3 \text{ or } x = 5}", False),
    ("math", {"answer": r"3"}, r"\boxed{x=2, y=3}", False),
    ("math", {"answer": r"4"}, r"\boxed{f(x)=x^2, f(2)=4}", False),
    ("math", {"answer": r"3"}, r"\boxed{1 \le x = 3}", False),
    ("math", {"answer": r"9"}, r"\boxed{x^2=9}", False),
    ("math", {"answer": r"0"}, r"\boxed{2x+1=0}", False),
    ("math", {"answer": r"5"}, r"\boxed{x = 5}", True),
    ("math", {"answer": r"4"}, r"\boxed{f(1,2) = 4}", True),
    ("math", {"answer": r"17"}, r"\boxed{AB + BC = 17}", True),
    ("math", {"answer": r"60"}, r"\boxed{\angle ABC = 60^\circ}", True),
    ("math", {"answer": r"\frac{3}{5}"}, r"\boxed{\sin A = \frac{3}{5}}", True),
    ("math", {"answer": r"2"}, r"\boxed{S = \frac{a}{1-r} = 2}", True),
    ("math", {"answer": r"x"}, r"\boxed{|x|}", False),
    ("math", {"answer": r"|x-3|"}, r"\boxed{|3-x|}", True),
    ("math", {"answer": r"|x|"}, r"\boxed{x}", False),
    ("math", {"answer": r"5"}, r"\boxed{5\text{ cm}^2}", True),
    ("math", {"answer": r"5\text{ cm}^2"}, r"\boxed{5}", True),
    ("math", {"answer": r"12"}, r"\boxed{12\text{ m}^3}", True),
    ("math", {"answer": r"5\pi"}, r"\boxed{5\pi\text{ cm}^2}", True),
    ("math", {"answer": r"5"}, r"\boxed{5x^2}", False),
    ("math", {"answer": r"5"}, r"\boxed{5m^2}", False),
    ("math", {"answer": r"\frac{3}{2}"}, r"\boxed{1\frac{1}{2}}", True),
    ("math", {"answer": r"-\frac{3}{2}"}, r"\boxed{-1\frac{1}{2}}", True),
    ("math", {"answer": "5"}, f"#### 5{MADE_UP}", True),
    ("cruxeval_o", {"output": "5"}, "The answer is not 5.", UNSCORED),
    ("cruxeval_o", {"output": "'not here'"}, "Answer: not here", True),
    ("cruxeval_o", {"output": "None"}, "Answer: None", True),
    ("cruxeval_o", {"output": "'a'"}, "analysisIt is 'b'.assistantfinal'a'", True),
]


@pytest.mark.parametrize(
    ("benchmark", "gold", "text", "verdict"), ELSEWHERE, ids=[f"{row[0]}-{row[2][:24]}" for row in ELSEWHERE]
)
def test_the_kinds_at_their_other_places(benchmark: str, gold: dict[str, Any], text: str, verdict: str | bool) -> None:
    score = judged(benchmark, gold, text)
    assert (score.value == 1.0 if score.is_scored else UNSCORED) == verdict, score


def test_a_diagnosis_in_json_brings_its_differential() -> None:
    score = judged("ddxplus", PATIENT, '{"diagnosis": "GERD", "differential": ["GERD", "Croup"]}')
    assert score.metrics == {"ddr": 1.0, "ddp": 1.0, "ddf1": 1.0}


def test_reasons_say_why_nothing_was_read() -> None:
    unended = [judged(*row[:3]) for row in TABLE if row[2].startswith("<think>")]
    assert {score.reason for score in unended} == {"the thought never ended"}
    assert judged("gsm8k", number("6"), "Answer: between 5 and 6").reason == "no number, or several, where the answer stands"
    assert judged("gsm8k", number("829"), "The answer is not 829.").reason == "it says what the answer is not"
    assert judged("gsm8k", number("1"), "Answer: 1,5").reason == "ambiguous separators"


@settings(max_examples=examples(1500), derandomize=True, database=None)
@given(st.text("0123456789.,' -/$%^\u221a\u2013\u20ac()[]", max_size=24))
def test_no_run_of_digits_and_separators_raises(text: str) -> None:
    for shape in ("{}", "Answer: {}", "#### {}", "\\boxed{{{}}}", "It is {} euros."):
        said = shape.format(text)
        judged("gsm8k", number("5"), said)
        judged("arith", {"answer": "5"}, said)
        judged("aqua_rat", letter("A", PERCENT), said)


@pytest.mark.parametrize("run", ["1,234.567,8", "1.234,567.8"])
def test_separators_that_fit_no_country_name_no_number(run: str) -> None:
    assert judged("gsm8k", number("1"), f"Answer: {run}").reason == "ambiguous separators"
    assert read_answer(f"Answer: {run}").kind != "number"


def test_equal_to_the_last_digit_and_no_further() -> None:
    assert answer_classes([f"Answer: {LONG}", "Answer: 12345678901234567890123456790", f"It is {LONG}0."]) == [0, 1, 0]


def test_a_row_whose_right_answer_is_empty_to_the_script_is_left_out_for_everybody() -> None:
    for text in ("Answer: A", "A", "Paris", "", "I cannot say."):
        score = judged("hotpotqa", {"answer": "A"}, text)
        assert (score.is_scored, score.is_left_out, score.metrics) == (False, True, {"f1": 0.0})
        assert "no reply can be right" in score.reason


@pytest.mark.contract
@pytest.mark.parametrize("fence", ["```", "~~~", "```python"])
def test_a_docstring_with_a_fence_leaves_the_program_whole(fence: str) -> None:
    doc = f'    """Twice x.\n\n    {fence}\n    >>> twice(2)\n    4\n    {fence[:3]}\n    """\n'
    prompt = f"def twice(x: int) -> int:\n{doc}"
    gold = {
        "prompt": prompt,
        "test": "def check(f):\n    assert f(2) == 4\n",
        "entry_point": "twice",
        "canonical_solution": "    return 2 * x\n",
    }
    for text in (
        f"```python\n{prompt}    return 2 * x\n```\nDone.",
        f"```python\n{prompt}    return 2 * x\n",
        f"{prompt}    return 2 * x\n",
    ):
        assert judged("humaneval", gold, text).value == 1.0, text
    assert judged("humaneval", gold, f"```python\n{prompt}    return x\n```").value == 0.0
    inner = json.dumps({"answer": f"{prompt}    return 2 * x\n"})
    assert judged("humaneval", gold, inner).value == 1.0, "of JSON the answer's code"


class Writer:
    """Takes what the stage hands over, through a pickle, as the actor does."""

    def __init__(self) -> None:
        self.taken: list[Answered] = []

    @property
    def write_answers(self) -> Writer:
        return self

    async def remote(self, answers: list[Answered]) -> None:
        self.taken += pickle.loads(pickle.dumps(answers))


def swarm_of(replies: dict[str, str], failing: list[str], wrap: Callable[[AgentClient], AgentClient] | None = None) -> Swarm:
    config = Config.model_validate(
        {
            "name": "pair",
            "llms": {
                "s": {"model": "scripted:x", "engine": "scripted", "engine_kwargs": {"replies": replies, "failing": failing}}
            },
            "agents": [{"name": name, "llm": "s", "profile": "Adds."} for name in replies],
            "gate": {"hidden": 8},
        }
    )
    gate, record = build_pool_gate(config)
    router = LocalRouter()
    router.install(record.version, gate)
    agents, engines = build_local(config)
    return Swarm(config, agents=wrap(agents) if wrap else agents, router=router, encoder=HashEncoder(), engines=engines)


class BuggyAgents:
    """Agents of whom `b` calls a tool whose code is wrong."""

    def __init__(self, agents: AgentClient) -> None:
        self.call_others, self.stream, self.ping = agents.call, agents.stream, agents.ping

    async def call(self, call: AgentCall) -> AgentReply:
        if call.agent != "b":
            return await self.call_others(call)
        return AgentReply(agent="b", status="failed", error="TypeError: run() takes no arguments", engine="e", is_bug=True)


def evaluated(
    replies: dict[str, str], failing: list[str], policies: list[str], wrap: Callable[[AgentClient], AgentClient] | None = None
) -> tuple[Evaluation, list[Answered], list[Scored]]:
    """Ask four tasks of a scripted pool, judge the answers and sum them up, as an evaluation does."""
    tasks = [Task(row_id=f"arith/test/{i}", benchmark="arith", text=f"What is {i} + {7 - i}?") for i in range(4)]
    writer = Writer()
    asking = Asking(seed=0, limits=Limits(max_steps=2, max_agents=2))
    stage = AnswerStage(partial(swarm_of, replies, failing, wrap), asking, writer, 4, dict.fromkeys(policies, 2))
    lines = [task.model_dump_json() for task in tasks]
    stage(pa.table({"task": lines, "policies": [" ".join(policies)] * len(lines)}))
    scorers = {"arith": judging("arith").score}
    scores = [
        score_answer(answer, Label(row_id=answer.row_id, benchmark="arith", gold={"answer": "7"}), scorers)
        for answer in writer.taken
    ]
    run = run_info([BenchmarkInfo(name="arith", rows=4)], policies)
    return build_evaluation(run, writer.taken, scores), writer.taken, scores


def test_a_policy_whose_agent_never_ran_did_not_run_and_has_no_test() -> None:
    evaluation, _, _ = evaluated({"a": "Answer: 7", "b": "Answer: 7"}, ["b"], ["single:a", "single:b", "dense"])
    rows = {row.policy: row for row in evaluation.rows}
    assert [(row.did_run, row.correct, row.failed) for row in rows.values()] == [(True, 4, 0), (False, 0, 4), (True, 4, 0)]
    assert [(pair.a, pair.b) for pair in evaluation.paired] == [("single:a", "dense")]
    console = Console(file=io.StringIO(), width=160, highlight=False)
    print_evaluation(evaluation, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in shown.splitlines() if "single:b" in line and not line.startswith("failed:")]
    assert "did not run" in line
    with pytest.raises(DmoaError, match=r"did not run: single:b on arith \(4 of 4 queries failed\).*scripted to fail"):
        check_ran(evaluation)


def test_code_that_is_wrong_is_counted_apart_and_ends_the_command_with_an_error() -> None:
    evaluation, answers, _ = evaluated({"a": "Answer: 7", "b": "Answer: 7"}, [], ["single:a", "single:b", "dense"], BuggyAgents)
    assert [(row.bugs, row.failed, row.correct) for row in evaluation.rows] == [(0, 0, 4), (4, 4, 0), (8, 0, 4)]
    with pytest.raises(DmoaError, match=r"did not run: single:b on arith .*TypeError: run\(\) takes no arguments"):
        check_ran(evaluation)
    with pytest.raises(DmoaError, match=r"code raised what says that it is wrong, .*: dense on arith \(8\); its traceback"):
        check_ran(evaluation.model_copy(update={"rows": [row for row in evaluation.rows if row.did_run]}))
    sound = evaluation.model_copy(update={"rows": [row for row in evaluation.rows if not row.bugs]})
    assert check_ran(sound) is None
    assert len(answers) == 12


@pytest.mark.parametrize(
    ("said", "reason", "ending"),
    [
        ("<think>\nSurely the answer is 7", "the thought never ended, and nothing else was said; raise max_tokens", "length"),
        (" \n ", "every contribution was empty; ask again, or raise max_tokens", "stop"),
        ("<think>7</think>\n", "every contribution was empty; ask again, or raise max_tokens", "stop"),
    ],
)
def test_a_query_of_empty_contributions_is_unscored_and_wrong_and_did_run(said: str, reason: str, ending: str) -> None:
    evaluation, answers, scores = evaluated({"a": "Answer: 7", "b": said}, [], ["single:a", "single:b"])
    mine = [answer for answer in answers if answer.policy == "single:b"]
    assert {(a.status, a.text, a.error, a.stop_reason, a.finish_reason, a.active) for a in mine} == {
        ("ok", "", reason, "empty", ending, (("b",),))
    }
    assert all(answer.prompt_tokens > 0 for answer in mine), "what it cost is counted"
    judged = [score for score in scores if score.policy == "single:b"]
    assert {(s.value, s.is_scored, s.is_failed, s.reason) for s in judged} == {(0.0, False, False, reason)}
    row = next(row for row in evaluation.rows if row.policy == "single:b")
    assert (row.n, row.correct, row.unscored, row.failed, row.did_run) == (4, 0, 4, 0, True)
    (pair,) = evaluation.paired
    assert (pair.n, pair.difference) == (4, 1.0)
    check_ran(evaluation)


def test_one_unfinished_thought_among_answers_changes_nothing() -> None:
    evaluation, _, _ = evaluated({"a": "Answer: 7", "b": "<think>\nThe answer is 9"}, [], ["dense"])
    assert evaluation.rows[0].correct == 4


def test_what_a_server_says_was_empty_is_judged_without_its_cost() -> None:
    task = Task(row_id="arith/test/0", benchmark="arith", text="What is 3 + 4?")
    record = unanswered(task, "dmoa", EmptyAnswerError("every contribution was empty"), 5.0)
    assert (record.status, record.usage, record.active, record.wall_ms) == ("ok", TokenUsage(), (), 5.0)
    spent = AgentReply(agent="a", status="ok", usage=TokenUsage(prompt_tokens=3, completion_tokens=2, reasoning_tokens=2))
    kept = pickle.loads(pickle.dumps(EmptyAnswerError("empty", (spent, spent))))
    assert unanswered(task, "dmoa", kept, 5.0).usage == spent.usage + spent.usage


DS1000 = {
    "code_context": "def test_execution(solution):\n    space = {}\n    exec(solution, space)\n    assert space['result'] == 3\n",
    "reference_code": "result = nowhere",
    "library": "Numpy",
    "prompt": "Three.\nBEGIN SOLUTION\n<code>\n",
    "problem_id": 1,
}


@pytest.mark.contract
def test_rows_whose_reference_cannot_run_leave_every_denominator_alike(tmp_path: Path) -> None:
    """Row 0 has a reference that fails here, row 1 a good one, row 2 a library that is not installed."""
    golds = [DS1000, DS1000 | {"reference_code": "result = 3"}, DS1000 | {"library": "Nosuchlib"}]
    replies = {"right": "```python\nresult = 3\n```", "wrong": "```python\nresult = 4\n```", "prose": "It is three."}
    scorers = {"ds1000": judging("ds1000").score}
    answers, scores = [], []
    for policy, text in replies.items():
        for i, gold in enumerate(golds):
            answer = Answered(row_id=f"ds1000/test/{i}", benchmark="ds1000", policy=policy, text=text, **flat(TokenUsage()))
            answers.append(answer)
            scores.append(score_answer(answer, Label(row_id=answer.row_id, benchmark="ds1000", gold=gold), scorers))
    run = run_info([BenchmarkInfo(name="ds1000", rows=3)], list(replies))
    rows = build_evaluation(run, answers, scores).rows
    assert [(row.n, row.left_out, row.correct) for row in rows] == [(1, 2, 1), (1, 2, 0), (1, 2, 0)]
    alone = build_evaluation(run_info([BenchmarkInfo(name="ds1000", rows=3)], ["prose"]), answers[6:], scores[6:]).rows
    assert [(row.n, row.left_out) for row in alone] == [(1, 2)]
