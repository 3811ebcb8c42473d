"""Final answers: the forms that models write, and what must hold for any text."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.core.answers import extract_answer, same_answer
from dmoa.core.numbers import find_numbers, plain_text, spelled
from tests.examples import examples

REPLIES = [
    # a bare number
    ("19", "19"),
    ("19.", "19"),
    ("-5", "-5"),
    ("\u22125", "-5"),
    ("+5", "5"),
    ("007", "7"),
    ("1,234,567", "1234567"),
    ("$1,200.50", "1200.5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("50%", "50"),
    (".5", "0.5"),
    ("3/4", "0.75"),
    ("1/3", "1/3"),
    ("-1/3", "-1/3"),
    ("2 1/2", "2.5"),
    ("3\u00bd", "3.5"),
    ("\u00bd", "0.5"),
    ("1e3", "1000"),
    ("1.5e-3", "0.0015"),
    ("0.30000000000000004", "0.30000000000000004"),
    ("5kg", "5"),
    ("7 apples", "7"),
    ("I think it is 5", "5"),
    ("1,00,000", "100000"),
    ("1.5 million", "1500000"),
    ("2\\frac{1}{2}", "2.5"),
    ("\\frac12", "0.5"),
    ("\\dfrac{3}{4}", "0.75"),
    ("$2 thousand", "2000"),
    ("5M", "5m"),
    ("2 \\times 10^3", "2000"),
    ("1.5\u00d710\u207b\u00b2", "0.015"),
    ("3 * 10^{4}", "30000"),
    ("5 m\u00b2", "5"),
    ("1\u202f200", "1200"),
    ("1\\,200", "1200"),
    ("\u20135", "-5"),
    ("x = - 5", "-5"),
    ("pages 3\u20135 of the book\nare 3", "3"),
    ("12 + 7 = 19", "19"),
    # marked
    ("Let me see.\nThe answer is 42.", "42"),
    ("The answer is 42. I hope that helps.", "42"),
    ("The answer is 3.14.", "3.14"),
    ("the final answer is: 1,000 dollars", "1000"),
    ("**Answer:** 3/4", "0.75"),
    ("**Answer**: $18", "18"),
    ("Answer:\n42", "42"),
    ("Answer \u2192 7\nas 3 and 4 make it", "7"),
    ("Answer: approx. 18 apples", "18"),
    ("Answer: Rs. 500", "500"),
    ("Answer: 0.1\\overline{6}", "1/6"),
    ("Answer: \u0663\u066b\u0665 \u200b", "3.5"),
    ("Answer: 30^{\\circ}", "30"),
    ("The answer is that there are 2 values of x for which f(x) = 3.", "2"),
    ("Answer: x = 5, y = 6", "x = 5 y = 6"),
    ("A: 7", "7"),
    ("A: Paris", "paris"),
    ("Q: What is 3 + 4?\nA: 7", "7"),
    ("A: The sum is 7\n\nQ: What is 4 + 5?\nA: The sum is 9", "7"),
    ("{'reasoning': \"it's 3 + 4\", 'answer': '7'}", "7"),
    ('{"answer": "7"}\n\nQuestion: What is 4 + 5?\n\n{"answer": "9"}', "7"),
    ("Answer: 5\nLater, corrected.\nAnswer: 6", "6"),
    ("2 and 3 make 5.\n#### 5", "5"),
    ("#### 12 is a heading\nand then 7 apples\nare left", "7"),
    ("so \\boxed{\\frac{1}{2}} of it, which is 50 percent", "0.5"),
    ("\\boxed{1{,}000}", "1000"),
    ("\\boxed{3} no, \\boxed{4}", "4"),
    ("\\boxed{\\text{(B)}}", "b"),
    ("\\(x = 5\\), so the answer is \\(\\boxed{5}\\).", "5"),
    ("The answer to the question is Paris. It is in France.", "paris"),
    ("The answer is St. Louis. It is big.", "st louis"),
    ("the answer is J. R. R. Tolkien. He wrote it.", "j r r tolkien"),
    ("The answer is 5 June", "5 june"),
    # choices
    ("B", "b"),
    ("(C)", "c"),
    ("B\n\nDogs bark", "b"),
    ("It must be:\n\nB) a dog", "b"),
    ("A. Paris\nB. a dog\n\nB", "b"),
    ("Answer: B because A is wrong", "b"),
    ("Answer: A, B", "a b"),
    ("\\boxed{\\textbf{(B) }a dog}", "b"),
    ("Answer: B\u200b", "b"),
    ("d)", "d"),
    ("B. Paris", "b"),
    ("Option D: 12", "d"),
    ("The answer is (C) 5 apples", "c"),
    ("Answer: B", "b"),
    ("The correct answer is option E.", "e"),
    ("(A) is 3, (B) is 4.\nI choose (B) because 2 + 2 = 4", "b"),
    # texts
    ("Paris", "paris"),
    ("  Paris.  ", "paris"),
    ("apple, banana,cherry", "apple banana cherry"),
    ("A dog", "a dog"),
    ("Vitamin B12", "vitamin b12"),
    ("3rd", "3rd"),
    ("2x", "2x"),
    # dates and times are texts
    ("2021-06-05", "2021-06-05"),
    ("June 5, 2021", "june 5 2021"),
    ("Saturday", "saturday"),
    ("14:30", "14:30"),
    ("The meeting\nis on 2021-06-05", "2021-06-05"),
    # the last number of a longer reply
    ("She has 3 apples and buys 4 more.\nThat makes 7 apples.", "7"),
    ("I have 3 apples and 4 pears so 7 in total", "7"),
    ("It costs $5\nand then -$2", "-2"),
    ("from 5-3\nwe get two", "3"),
    # code
    ("```python\ndef f():\n\n    return 1   \n```", "def f():\n    return 1"),
    ("Answer:\n```py\nx = 1\n```\nThat prints 5.", "x = 1"),
    ("```\nx = 1", "x = 1"),
    ("```py\nx = 2\n```\nThe answer is 2.", "2"),
]


@pytest.mark.parametrize(("text", "answer"), REPLIES)
def test_answer_of_a_reply(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", ["", " \n ", "...", "No idea\nwhat it could be", "\\boxed{}", "Answer:", "``````"])
def test_no_answer_is_none(text: str) -> None:
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1,200", "1200.0"),
        ("1/2", "0.5"),
        ("$5", "5"),
        ("50%", "50"),
        ("2 1/2", "5/2"),
        ("-0", "0"),
        ("Paris", "paris."),
        ("B", "b"),
        ("apple, banana", "apple banana"),
        ("1e2", "100"),
    ],
)
def test_same(a: str, b: str) -> None:
    assert same_answer(a, b)
    assert same_answer(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/3", "0.33"),
        ("5", "-5"),
        ("Paris", "London"),
        ("2x", "2"),
        ("5 june", "5 july"),
        ("2021-06-05", "2021-06-06"),
        ("a", "b"),
        ("1200", "12 00"),
        ("x = 1\n  y", "x = 1\ny"),
        ("1/0", "0"),
    ],
)
def test_not_same(a: str, b: str) -> None:
    assert not same_answer(a, b)


TEXTS = st.text(max_size=300) | st.lists(
    st.sampled_from(
        [
            "The answer is ",
            "Answer:",
            "\\boxed{",
            "}",
            "####",
            "\n",
            " ",
            "(B)",
            "B.",
            "```",
            "1/2",
            "-",
            "$",
            "1,200",
            "1e9",
            "=",
            ".",
        ]
    ),
    max_size=30,
).map("".join)


@settings(max_examples=examples(400), derandomize=True)
@given(TEXTS)
def test_any_text_gives_none_or_a_clean_answer(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or answer == answer.strip("\n")
    assert answer != ""
    if answer is not None:
        assert same_answer(answer, answer)
        assert same_answer(answer, text) == same_answer(text, answer)


@settings(derandomize=True)
@given(st.integers(-(10**9), 10**9), st.sampled_from([1, 2, 3, 4, 5, 7, 8, 10, 16, 100]))
def test_every_spelling_of_a_number_is_the_same_answer(numerator: int, denominator: int) -> None:
    value = Fraction(numerator, denominator)
    spellings = [f"{numerator}/{denominator}", f"{numerator:,}/{denominator}"]
    if denominator in (1, 2, 4, 5, 8, 10, 16, 100):
        spellings += [f"{float(value):.4f}", f"{float(value):,.4f}", f"{float(value):.4f}00"]
    answers = {
        extract_answer(f"{prefix}{spelling}{end}")
        for spelling in spellings
        for prefix, end in [("", ""), ("The answer is ", ".")]
    }
    assert len(answers) == 1
    answer = answers.pop()
    assert answer is not None
    assert Fraction(answer) == value
    assert all(same_answer(answer, spelling) for spelling in spellings)


@settings(derandomize=True)
@given(st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_different_numbers_are_different_answers(a: int, b: int) -> None:
    assert same_answer(str(a), f"{b}.0") == (a == b)


HOSTILE = [
    *(part * 50_000 for part in ("9", "1,", "1/", "1:", "1 ", "{", "(A", "*", " ", "\u00bd", "a.", "$-", "=1")),
    *(
        part * 10_000
        for part in ("\\boxed{", "\\frac{", "answer ", "answer is\n", "answer to x ", "```", "```\n", "####\n", "1e99")
    ),
    "answer to " + "x " * 50_000,
    " " * 100_000 + "x",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_quick(text: str) -> None:
    start = time.process_time()
    extract_answer(text)
    same_answer(text, text + "1")
    assert time.process_time() - start < 2.0


def test_overlong_number_is_no_number() -> None:
    assert extract_answer("The total\nis " + "9" * 5000) is None


def test_numbers_of_a_text_are_found_in_order_and_dates_are_none() -> None:
    text = plain_text("On 2021-06-05 at 14:30 she paid $1,200.50 for 3\u00bd kg, 1/3 of it by card; 5/0 is nothing")
    assert [spelled(found.value) for found in find_numbers(text)] == ["1200.5", "3.5", "1/3"]
    assert [text[found.start : found.end] for found in find_numbers(text)] == ["$1,200.50", "3 1/2", "1/3"]
