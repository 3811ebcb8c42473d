"""Which replies agree: numbers, letters, Python literals, expressions and words, each by the equality that its scorer uses."""

from __future__ import annotations

import pytest

from dmoa.core.forms import agreement_key, answer_classes
from dmoa.core.literals import literal_key, read_literal

OUTPUT = "Complete the assertion.\ndef f(x):\n    return x\nassert f([1, 2]) == ??"

SAME = [
    ("", ["Answer: 18", "$18.00", '{"answer": "18 dollars"}', "\\boxed{18}", "#### 18", "x = 18", "36/2"]),
    ("", ["(B)", '{"answer": "B"}', "Answer: (b)", "B. because it is"]),
    ("", ["Paris", "Answer: paris.", '{"answer": "Paris"}']),
    (
        "",
        [
            "32\u03c0/3",
            "\\frac{32\\pi}{3}",
            "Answer: $\\frac{32}{3}\\pi$",
            "\\boxed{\\dfrac{32 \\pi}{3}}",
            '{"answer": "32*pi/3"}',
        ],
    ),
    ("", ["91 - 2x", "\\boxed{-2x+91}", "Answer: $91-2\\cdot x$"]),
    ("", ["2\u221a3", "\\boxed{2\\sqrt{3}}", "2*sqrt(3)", "The answer is $\\sqrt{12}$."]),
    ("", ["(3, 4)", "Answer: $\\left(3,4\\right)$", "\\boxed{(3,\\,4)}"]),
    ("", ["$(-\\infty, 2] \\cup [3, \\infty)$", "Answer: [3, \u221e) \u222a (-\u221e, 2]"]),
    ("", ["3 + 4i", "\\boxed{4i+3}"]),
    ("", ["\\frac12", "0.5", "1/2", "\\boxed{\\dfrac{1}{2}}"]),
    (
        OUTPUT,
        [
            "[1, 2]",
            "Answer: [1,2]",
            '{"answer": "[1, 2]"}',
            '{"answer": [1, 2]}',
            "assert f([1, 2]) == [1, 2]",
            "```python\n[1, 2]\n```",
        ],
    ),
    (OUTPUT, ["'UppEr'", '{"answer": "UppEr"}', 'Answer: `"UppEr"`', "assert f('x') == 'UppEr'", '{"answer": "\'UppEr\'"}']),
    (OUTPUT, ["{1: 'a', 2: None}", '{"answer": {2: None, 1: "a"}}', "Answer: {2: None, 1: 'a'}."]),
    (OUTPUT, ["True", '{"answer": true}', '{"answer": "True"}']),
]


@pytest.mark.parametrize(("query", "replies"), SAME)
def test_replies_that_say_the_same_agree(query: str, replies: list[str]) -> None:
    assert answer_classes(replies, query) == [0] * len(replies), [agreement_key(reply, query) for reply in replies]


DIFFERENT = [
    ("", ["2\u221a3", "2", "3", "2\u221a5"]),
    ("", ["5\u03c0", "5", "25\u03c0"]),
    ("", ["91 - 2x", "91", "2", "91 + 2x"]),
    ("", ["(3, 4)", "3", "4", "(4, 3)", "[3, 4]"]),
    (OUTPUT, ["'UppEr'", "'upper'", "'UppEr '"]),
    (OUTPUT, ["[1, 2]", "(1, 2)", "[2, 1]", "{1, 2}", "'[1, 2]'"]),
    (OUTPUT, ["'5'", "5", "[5]"]),
]


@pytest.mark.parametrize(("query", "replies"), DIFFERENT)
def test_replies_that_say_something_else_do_not_agree(query: str, replies: list[str]) -> None:
    assert answer_classes(replies, query) == list(range(len(replies)))


def test_replies_without_an_answer_agree_with_nobody() -> None:
    assert answer_classes(["", "<think>5", "5", ""]) == [-1, -1, 0, -1]
    assert answer_classes(["", "<think>[5]", "[5]"], OUTPUT) == [-1, -1, 0]


def test_a_literal_is_never_run_and_read_within_bounds() -> None:
    assert literal_key("__import__('os').getcwd()") is None
    assert literal_key("[" * 1000 + "]" * 1000) is None
    assert literal_key("9" * 20_000) is None
    assert literal_key("1e999") == "inf"
    assert read_literal("[" * 50_000).key is None
