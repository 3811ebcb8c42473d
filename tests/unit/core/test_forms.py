"""Which replies agree: numbers, letters, Python literals, expressions and words, each by the equality that its scorer uses."""

from __future__ import annotations

import gc
import json
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.core.expressions import expression_key
from dmoa.core.forms import agreement_key, answer_classes, form_of
from dmoa.core.literals import literal_key, read_literal
from tests.examples import examples
from tests.unit.core.test_reading import SHAPES

OUTPUT = "Complete the assertion.\ndef f(x):\n    return x\nassert f([1, 2]) == ??"
CHOICE = "Which?\nA) cat\nB) dog\nC) 1\n\nWhich is it?\nA) Paris\nB) a dog\nC) 12\nD) None of the above"

SAME = [
    ("", ["Answer: 18", "$18.00", '{"answer": "18 dollars"}', "\\boxed{18}", "#### 18", "x = 18", "36/2"]),
    ("", ["Answer: 6th", "6", '{"answer": "6th"}']),
    ("", ["86 glasses and 42 plates", "Answer: 86 glasses and 42 plates"]),
    ("", ["Answer: 7 when x = 2", "7", "7 (x = 2)", "Answer: 7\n\nThe answer is rounded to 2 decimals."]),
    (
        "",
        [
            "(B)",
            '{"answer": "B"}',
            "Answer: (b)",
            "B. because it is",
            "Answer: [B]",
            "Answer: B!",
            "$\\mathbf{B}$",
            "B )",
            "B\n\nIt is",
        ],
    ),
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
    ("", ["Answer: $-4 \\le x \\leq 1$", "-4 <= x <= 1", "\\boxed{1 \\ge x \\ge -4}"]),
    ("", ["Answer: $4\\cos^2 w$", "\\boxed{4(\\cos w)^2}"]),
    (
        OUTPUT,
        [
            "[1, 2]",
            "<answer>\n[1, 2]\n</answer>",
            "Answer:\n```python\n[1, 2]\n```",
            "Answer: [1,\n 2]\nas said",
            "The answer is:\n\n```\n[1,\n 2]\n```",
        ],
    ),
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
    ("", ["Answer: it is B", "<answer>B</answer>", "Answer: Option B!", "B"]),
    ("", ["<answer>The Beatles</answer>", "Answer: The Beatles", "Beatles", '{"answer": "the Beatles."}']),
    ("", ["Answer: U.S. Navy", "the US Navy"]),
    (CHOICE, ["Answer: B", "Answer: a dog", "A dog.", "(B) a dog", '{"answer": "a dog"}']),
    (CHOICE, ["Answer: C", "Answer: 12", "12.0", "C) 12", "A: 12"]),
    (CHOICE, ["Answer: D", "None of the above"]),
    (OUTPUT, ["True", '{"answer": true}', '{"answer": "True"}']),
]


@pytest.mark.parametrize(("query", "replies"), SAME)
def test_replies_that_say_the_same_agree(query: str, replies: list[str]) -> None:
    assert answer_classes(replies, query) == [0] * len(replies), [agreement_key(reply, query) for reply in replies]


DIFFERENT = [
    ("", ["2\u221a3", "2", "3", "2\u221a5"]),
    (CHOICE, ["Answer: Paris", "Answer: a dog", "Answer: 12", "Answer: 13", "Answer: dogs", "None of these"]),
    ("", ["A, B", "Answer: A", "Answer: 12", "Answer: the", "a dog"]),
    ("", ["x < 5", "x > 5", "x \\le 5", "5", "x"]),
    ("", ["$4\\cos^2 w$", "4", "4\\cos w"]),
    ("", ["5\u03c0", "5", "25\u03c0"]),
    ("", ["91 - 2x", "91", "2", "91 + 2x"]),
    ("", ["86 glasses and 42 plates", "86", "42", "86 glasses and 43 plates"]),
    ("", ["A: Paris", "A: London", "A: 7", "Answer: A, B", "Answer: A", "x = 5, y = 6", "6"]),
    ("", ["Answer: 6th Street", "Answer: 7th Street", "6"]),
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


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.text("abcXYZ 01", min_size=1, max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2)
    ),
    max_leaves=6,
)
PLAIN_SHAPES = [shape for shape in SHAPES if "apples" not in shape and "x = {}" not in shape]


@settings(max_examples=examples(500), derandomize=True)
@given(LITERALS, st.sampled_from(PLAIN_SHAPES))
def test_a_literal_stays_itself_in_every_shape(value: object, shape: str) -> None:
    said = repr(value)
    if '"{}"' in shape:
        said = json.dumps(said)[1:-1]
    elif "{{" in shape and "boxed" not in shape and isinstance(value, dict | tuple | str):
        return  # JSON has no such values
    if "boxed" in shape and "{" in said:
        return  # LaTeX writes a brace with a backslash
    text = shape.format(said)
    assert read_literal(text).key == literal_key(repr(value)), text


EXPRESSIONS = [
    ("\\frac{3\\pi}{4}", "0.75\u03c0"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("x^2 - 2x + 1", "(x-1)^2"),
    ("\\frac{x+1}{2}", "0.5x + 0.5"),
    ("\\frac{1}{2x}", "1/(2x)"),
    ("(2, -3)", "\\left( 2, -3 \\right)"),
    ("[0, \\infty)", "[0,\u221e)"),
    ("\\{1, 2\\}", "\\{2,1\\}"),
    ("3 - 2i", "-2i + 3"),
    ("\\sqrt[3]{2}", "2^{1/3}"),
    ("\\sin x", "\\sin(x)"),
    ("e^{-x}", "1/e^x"),
    ("|x - 1|", "|1 - x|"),
]
SMALL_SHAPES = [
    shape
    for shape in SHAPES
    if "apples" not in shape and "of 99" not in shape and "{}." not in shape and "," not in shape.replace("{}", "")
]


@pytest.mark.parametrize("shape", SMALL_SHAPES)
@pytest.mark.parametrize(("one", "other"), EXPRESSIONS)
def test_equal_expressions_agree_in_every_shape(one: str, other: str, shape: str) -> None:
    said = [json.dumps(each)[1:-1] if '"{}"' in shape else each for each in (one, other)]
    if '{{"answer": {}}}' in shape:
        return  # no value of JSON
    keys = {expression_key(one), expression_key(other)}
    assert len(keys) == 1
    found = [agreement_key(shape.format(each)) for each in said]
    assert found[0] is not None
    assert found[0] == found[1], (shape, found)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2x", "x^2"),
        ("\\frac{x+1}{2}", "x + \\frac{1}{2}"),
        ("\\sqrt{2}", "1.41"),
        ("(1, 2)", "(2, 1)"),
        ("[0, 1)", "[0, 1]"),
        ("\\pi", "3.14"),
    ],
)
def test_other_expressions_do_not(one: str, other: str) -> None:
    assert expression_key(one) != expression_key(other)


@pytest.mark.parametrize(
    "text", ["", "a cat", "to be or not", "1 +", "((1)", "x^^2", "\\frac{1}{0}", "9^9^9^9", "(" * 200, "2024-06-05 at noon"]
)
def test_what_is_no_expression_has_no_key(text: str) -> None:
    assert expression_key(text) is None


OUTPUTS = [
    ("The function returns [1, 2].", "[1,2]"),
    ("So f([3]) == [3]", "[3]"),
    ("assert f([1], 2) == {'a': (1, 2)}  # as computed", "{'a':(1,2)}"),
    ("```python\nassert f('x') == 'y'\n```", "'y'"),
    ("[ANSWER]'abc'[/ANSWER]", "'abc'"),
    ("Answer: `{'a': 1}`", "{'a':1}"),
    ("Answer: **True**", "1"),
    ("The output is 'a, b'.", "'a, b'"),
    ('{"answer": ["a", true, null]}', "['a',1,None]"),
    ('{"answer": "\\"x\\""}', "'x'"),
    ('{"answer": ""}', "''"),
    ('{"answer": "[1, 2", "x": 1}', "'[1, 2'"),
    ("{\"answer\": [(1, 'a')]}", "[(1,'a')]"),
    ('{"answer": {1: {"b": 2}}}', "{1:{'b':2}}"),
    ('{"answer": "f(2) == 4"}', "4"),
    ('```json\n{"reasoning": "assert f(1) == 3", "answer": "4"}\n```', "4"),
    ('{"answer": "4"}\n\nWait. Answer: 5', "5"),
    ("assert f([1]) == ??", None),
    ("I cannot run code.", None),
    ("Answer:", None),
    ("Answer: [1, 2", None),
    ("Answer: [x for x in range(3)]", None),
    ("assert f(3) == [3]\nAnswer: [1, 2", "[3]"),
    ("Answer:\n```python\n{'a': [1,\n 2]}\n```\nsince 2 is even", "{'a':[1,2]}"),
    ("Answer: 5\n\nThe answer is based on 2 passes of the loop.", "5"),
    ('{"answer": "5"}\n\nThe answer is based on 2 passes of the loop.', "5"),
    ("assert f(1) == 5\n\nThe answer is based on 2 passes of the loop.", "5"),
    ("Answer: abc</s>", "'abc'"),
    ("Answer: 1.50", "1.5"),
    ("Answer: -0", "0"),
    ("Answer: {3, 1, 3}", "{1,3}s"),
    ("Answer: set()", "{}s"),
    ("Answer: b'x'", "b'x'"),
    ("Answer: [\u20181\u2019, \u20182\u2019]", "['1','2']"),
    ("First [1], then [1, 2].\nIn the end it is [1, 2, 3].", "[1,2,3]"),
    ("Answer: [1, 2] because 3 is missing", "[1,2]"),
]


@pytest.mark.parametrize(("reply", "key"), OUTPUTS)
def test_the_literal_of_a_reply_or_none(reply: str, key: str | None) -> None:
    assert read_literal(reply).key == key


@settings(max_examples=examples(300), derandomize=True)
@given(st.text(max_size=120) | st.text("[](){}'\",:.=fassert0123 \n\\`", max_size=120))
def test_no_text_raises(text: str) -> None:
    agreement_key(text)
    expression_key(text)
    found = read_literal(text)
    assert (found.key is None) == (found.how is None)


@pytest.mark.parametrize("piece", ["assert f(", "assert f()", "assert f() == ", ")", "assert "])
def test_the_form_of_a_long_question_takes_time_in_proportion_to_its_length(piece: str) -> None:
    started = time.monotonic()
    assert form_of(piece * (400_000 // len(piece))) == "any"
    assert time.monotonic() - started < 20  # of quadratic work it would be hours


def test_questions_are_not_kept_for_their_replies() -> None:
    """A thousand questions of megabytes would fill the memory of the server."""

    class Question(str):
        __slots__ = ("__weakref__",)

    question = Question("What is 1 + 1?")
    kept = weakref.ref(question)
    assert agreement_key("Answer: 2", question) == agreement_key("Answer: 2")
    del question
    gc.collect()
    assert kept() is None
