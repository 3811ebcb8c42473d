"""HumanEval and DS-1000: which code is read, what program it makes, and how it is judged in the sandbox."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.evaluation import registry as table
from dmoa.evaluation.benchmarks import ds1000
from dmoa.evaluation.benchmarks.ds1000 import read_solution
from dmoa.evaluation.benchmarks.humaneval import program, read_completion
from dmoa.evaluation.benchmarks.programs import bare_code, indented, judge_program, require_sandbox
from dmoa.evaluation.records import Label, Reply
from dmoa.sandbox.launch import SandboxLimits
from tests.examples import examples

PROMPT = '''from typing import List


def double(x: int) -> int:
    """Return twice x."""
    return 2 * x


def total(numbers: List[int]) -> int:
    """Return the sum of the doubles.

    >>> total([1, 2])
    6
    """
'''
TEST = "def check(candidate):\n    assert candidate([1, 2]) == 6\n    assert candidate([]) == 0\n"
BODY = "    result = 0\n    for number in numbers:\n        result += double(number)\n    return result\n"
HUMANEVAL = Label(
    row_id="humaneval/test/0",
    benchmark="humaneval",
    gold={"prompt": PROMPT, "test": TEST, "entry_point": "total", "canonical_solution": BODY},
)
WHOLE = "def total(numbers: List[int]) -> int:\n" + BODY
_DOCSTRING = '    """Add.\n\n    ```\n    >>> total([1])\n    2\n    ```\n    """\n'
WITH_FENCE = f"def total(numbers: List[int]) -> int:\n{_DOCSTRING}{BODY}"

PASSING = {
    "prompt and body in a block": f"Here it is:\n```python\n{PROMPT}{BODY}```\nIt doubles.",
    "function alone, on the prompt's imports and helpers": f"```python\n{WHOLE}```",
    "body in a block": f"```python\n{BODY}```",
    "body as text": BODY,
    "body whose edges were stripped": BODY.strip(),
    "body in a block, not indented": "```\nreturn sum(double(n) for n in numbers)\n```",
    "body of two levels, not indented": "```\nresult = 0\nfor n in numbers:\n    result += double(n)\nreturn result\n```",
    "function as text with prose around it": f"Sure, here is the function:\n\n{WHOLE}\nThis function doubles and adds.",
    "an example in a later block": f"```python\n{WHOLE}```\nUse it so:\n```python\nprint(total([1]))\n```",
    "a correction in a later block": f"```python\n{WHOLE.replace('+=', '-=')}```\nWrong, rather:\n```python\n{WHOLE}```",
    "a block that is not closed": f"```python\n{WHOLE}",
    "a fence in the docstring": f"```python\n{WITH_FENCE}```\nThat is all.",
    "a thought with another program": f"<think>\n```python\nx = 0\n```\n</think>\n```python\n{WHOLE}```",
    "imports from the future": f"```python\nfrom __future__ import annotations\n{WHOLE}```",
    "a script's part that would end it": f"```python\n{WHOLE}\nif __name__ == '__main__':\n    raise SystemExit(input())\n```",
    "prints much": f"```python\n{WHOLE.replace('result = 0', 'result = len(str(print(200_000 * chr(65)))) - 4')}```",
    "JSON in a block": f"```json\n{json.dumps({'reasoning': 'It adds.', 'answer': WHOLE})}\n```",
    "a helper in a block before": "```python\ndef add(a, b):\n    return a + b\n```\nThen:\n```python\ndef total(numbers):\n"
    "    found = 0\n    for number in numbers:\n        found = add(found, double(number))\n    return found\n```",
    "an example in a block before": f"```python\nresult = total([1, 2])\n```\nThat is:\n```python\n{WHOLE}```",
    "what it prints in a block behind": "```\n    return sum(double(n) for n in numbers)\n```\nIt prints:\n```text\n6\n```",
    "an indented block in a list": "1. Write\n" + "".join(f"   {line}\n" for line in ["```python", *WHOLE.splitlines(), "```"]),
}
FAILING = {
    "wrong": "```python\ndef total(numbers):\n    return 0\n```",
    "raises": "```python\ndef total(numbers):\n    raise ValueError(numbers)\n```",
    "not Python": "```python\ndef total(numbers:\n```",
    "another function": "```python\ndef sums(numbers):\n    return 6\n```",
    "ends early": "```python\nimport os\nos._exit(0)\ndef total(numbers): ...\n```",
    "equal to everything": "```python\nimport sys\ndef total(numbers):\n    sys.exit(0)\n```",
}
REFUSALS = ["I cannot help with that.", "I'm sorry, as an AI I can't write code."]
NO_CODE = ["", " \n ", *REFUSALS, "It adds the numbers.", "``````", "```\n\n```"]


@pytest.mark.parametrize("name", PASSING)
def test_humaneval_passes(name: str) -> None:
    score = table.build_scorer("humaneval").score(HUMANEVAL, Reply(text=PASSING[name]))
    assert (score.value, score.is_scored) == (1.0, True), score.reason


@pytest.mark.parametrize("name", FAILING)
def test_humaneval_fails(name: str) -> None:
    score = table.build_scorer("humaneval").score(HUMANEVAL, Reply(text=FAILING[name]))
    assert (score.value, score.is_scored) == (0.0, True)
    assert score.extracted
    assert score.reason


@pytest.mark.parametrize("text", NO_CODE)
def test_without_code_nothing_runs(text: str) -> None:
    for name, label in (("humaneval", HUMANEVAL), ("ds1000", DS1000)):
        score = table.build_scorer(name).score(label, Reply(text=text))
        assert (score.value, score.is_scored, score.extracted, score.reason) == (0.0, False, None, "no code found")


def test_an_endless_program_is_stopped_and_is_its_own_failure() -> None:
    limits = SandboxLimits(wall_s=1.0, cpu_s=1)
    verdict = judge_program("while True: pass", "", limits, allow_weak=False)
    assert (verdict.passed, verdict.is_judged) == (False, True)
    assert verdict.reason.startswith("timeout")


def test_the_error_is_named_however_many_lines_it_has() -> None:
    verdict = judge_program("raise ValueError('one\\ntwo\\nthree')", "", SandboxLimits(), allow_weak=False)
    assert verdict.reason == "failed: ValueError: one"


def test_require_sandbox_accepts_this_host() -> None:
    require_sandbox(allow_weak=False)
    assert judge_program("answer = 42", "assert answer == 42", SandboxLimits(), allow_weak=False).passed


def test_program_puts_future_imports_first() -> None:
    made = program(PROMPT, f"from __future__ import annotations\n{WHOLE}", "total")
    assert made.startswith("from __future__ import annotations\nfrom typing import List\n")
    compile(made, "made", "exec")


CONTEXT = '''
def generate_test_case(test_case_id):
    return [1, 2, test_case_id], 3 + test_case_id


exec_context = r"""
numbers = test_input
[insert]
"""


def test_execution(solution: str):
    code = exec_context.replace("[insert]", solution)
    for case in (1, 2):
        test_input, expected = generate_test_case(case)
        env = {"test_input": test_input}
        exec(code, env)
        assert env["result"] == expected


def test_string(solution: str):
    assert "for" not in solution.split()
'''
DS1000 = Label(
    row_id="ds1000/test/0",
    benchmark="ds1000",
    gold={
        "code_context": CONTEXT,
        "reference_code": "result = sum(numbers)",
        "library": "Numpy",
        "prompt": "Sum.\nA:\n<code>\nx = load()\n</code>\nresult = ... # put solution in this variable\nBEGIN SOLUTION\n<code>\n",
        "problem_id": 1,
    },
)


def ds_label(**changes: str) -> Label:
    return DS1000.model_copy(update={"gold": DS1000.gold | changes})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("```python\nresult = sum(numbers)\n```", 1.0),
        ("result = sum(numbers)\n</code>\nEND SOLUTION", 1.0),
        ("<code>\nresult = sum(numbers)\n</code>", 1.0),
        ("BEGIN SOLUTION\nresult = sum(numbers)\nEND SOLUTION\nThat is it.", 1.0),
        ("```\nprint(3)\n```\n```python\nresult = sum(numbers)\n```\n```\n6\n```", 1.0),
        ("```python\nresult = 4\n```", 0.0),
        ("```python\nresult = 0\nfor n in numbers:\n    result += n\n```", 0.0),
        ("```python\nimport os\nos._exit(0)\n```", 0.0),
        ("```python\nraise SystemExit(0)\n```", 0.0),
        ("```python\nresult = (\n```", 0.0),
    ],
)
def test_ds1000_runs_both_tests(text: str, value: float) -> None:
    score = table.build_scorer("ds1000").score(DS1000, Reply(text=text))
    assert (score.value, score.is_scored) == (value, True), score.reason


def test_ds1000_indents_where_the_prompt_ends_inside_a_function() -> None:
    context = CONTEXT.replace("[insert]\n", "def f(numbers):\n[insert]\nresult = f(numbers)\n", 1)
    prompt = "def f(numbers):\n    # return the solution\n    ### BEGIN SOLUTION\n"
    label = ds_label(code_context=context, prompt=prompt, reference_code="return sum(numbers)")
    score = table.build_scorer("ds1000").score
    bodies = [
        "return sum(numbers)",
        "    return sum(numbers)",
        "s = sum(numbers)\n    return s",
        "# sum\n    return sum(numbers)",
    ]
    for code in bodies:
        assert score(label, Reply(text=f"```python\n{code}\n```")).value == 1.0, code


def test_a_row_whose_reference_fails_here_is_unscored_with_library_and_version() -> None:
    label = ds_label(reference_code="result = numbers.sums()")
    score = table.build_scorer("ds1000").score
    failed = score(label, Reply(text="```python\nresult = 0\n```"))
    assert (failed.value, failed.is_scored) == (0.0, False)
    assert failed.reason.startswith(f"the reference fails with Numpy {ds1000.library_version('Numpy')}: ")
    assert failed.is_left_out
    assert "no attribute 'sums'" in failed.reason
    # nor does one that passes count: the rows that are judged do not depend on the replies
    passing = score(label, Reply(text="```python\nresult = sum(numbers)\n```"))
    assert (passing.value, passing.is_scored, passing.is_left_out) == (0.0, False, True)


def test_a_reference_runs_once_and_the_oldest_is_forgotten() -> None:
    references = ds1000.References(max_verdicts=2)
    first = references.judge(CONTEXT, "result = sum(numbers)", allow_weak=False)
    assert first.passed
    assert references.judge(CONTEXT, "result = sum(numbers)", allow_weak=False) is first
    assert not references.judge(CONTEXT, "result = 0", allow_weak=False).passed
    references.judge(CONTEXT, "result = 1", allow_weak=False)
    assert [reference for _, reference in references.verdicts] == ["result = 0", "result = 1"]


def test_a_row_whose_library_is_missing_is_unscored() -> None:
    score = table.build_scorer("ds1000").score(ds_label(library="Nosuchlib"), Reply(text="```python\nresult = 3\n```"))
    assert (score.value, score.is_scored) == (0.0, False)
    assert "Nosuchlib" in score.reason


def test_a_context_that_is_no_python_says_nothing_about_a_candidate() -> None:
    score = table.build_scorer("ds1000").score(ds_label(code_context="def broken(:"), Reply(text="```python\nresult = 3\n```"))
    assert (score.value, score.is_scored) == (0.0, False)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("return x", "    return x"),
        ("    return x", "    return x"),
        ("  return x", "    return x"),
        ("y = 1\n    return y", "    y = 1\n    return y"),
        ("y = 1\nreturn y", "    y = 1\n    return y"),
        ("if x:\n    return 1\nreturn 2", "    if x:\n        return 1\n    return 2"),
        ("if x:\n    y = 1", "    if x:\n        y = 1"),
        ("if x:\n        y = 1\n    return y", "    if x:\n        y = 1\n    return y"),
        ("# note\n    y = 1\n    return y", "# note\n    y = 1\n    return y"),
        ("\treturn x", "    return x"),
        ("", ""),
    ],
)
def test_indented(code: str, expected: str) -> None:
    assert indented(code, 4) == expected


def test_bare_code_ends_where_prose_begins() -> None:
    text = "Here you are:\nimport os\n\nx = [\n    1,\n]\n# a note\nprint(x)\nThis prints a list."
    assert bare_code(text) == "import os\n\nx = [\n    1,\n]\n# a note\nprint(x)\n"
    assert bare_code("for example, this one: it works") is None


PIECES = [
    *("```", "```python\n", "~~~", "<code>", "</code>", "BEGIN SOLUTION\n", "def total(", "return ", "x = 1"),
    *("\n", "    ", "\t", "#", "\ud800", "\x00"),
]
TEXTS = st.text(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@settings(max_examples=examples(400), derandomize=True, database=None)
@given(TEXTS)
def test_reading_code_never_raises(text: str) -> None:
    completion = read_completion(text, "total")
    if completion is not None:
        assert completion.strip()
        assert program(PROMPT, completion, "total")
    solution = read_solution(text, "def f():\n    ### BEGIN SOLUTION")
    assert solution is None or solution.strip()


@pytest.mark.parametrize("text", [*(piece * 70_000 for piece in PIECES), "a" * 1_000_000, "a(" * 500_000, "a," * 500_000])
def test_huge_replies_are_read_in_bounded_time(text: str) -> None:
    started = time.process_time()
    read_completion(text, "total")
    read_solution(text, "x = 1\n    ### BEGIN SOLUTION")
    assert time.process_time() - started < 3.0


def test_surrogates_and_null_bytes_run_as_failures() -> None:
    for code in ("x = '\ud800'", "x = 1\x00"):
        score = table.build_scorer("humaneval").score(HUMANEVAL, Reply(text=f"```python\n{code}\n```"))
        assert (score.value, score.is_scored) == (0.0, True)
        assert table.build_scorer("ds1000").score(DS1000, Reply(text=f"```python\n{code}\n```")).value == 0.0
