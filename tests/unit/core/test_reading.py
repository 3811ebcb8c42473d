"""What a reply answers: public shapes of replies that were once read wrongly, and that no shape makes up another number."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.core.answers import extract_answer, read_answer, read_number, same_answer
from dmoa.core.literals import read_literal
from dmoa.core.numbers import find_numbers, plain_text, spelled
from tests.examples import examples

NUMBERS = [
    # thoughts
    ("<think>\nI cannot be sure. The answer is 41", None),
    ("<think>\nThe answer is 41\n</think>\nThe answer is 42", "42"),
    ("so 41 comes out\n</think>\n\nThe answer is 42", "42"),
    ("<think>maybe 3</think>\n<think>no, 4", None),
    ("analysisWe compute. The answer is 40? no 42.assistantfinal42", "42"),
    ("analysisWe compute. The answer is 40", None),
    ("<|channel|>analysis<|message|>It is 40.<|end|><|start|>assistant<|channel|>final<|message|>It is 42.<|return|>", "42"),
    ("[THINK]40[/THINK]42", "42"),
    # a next question that nobody asked
    ("Tom has 5.\n#### 5\n\nAnn has 4 apples and buys 5. How many has she?\n4 + 5 = 9\n#### 9", "5"),
    ("Answer: 5\n\nQuestion: What is 4 + 5?\nAnswer: 9", "5"),
    ("#### 5\n\nProblem: What is 4 + 5?\n#### 9", "5"),
    ("Question 1: how many are red? Answer: 3\nQuestion 2: how many are left?\nAnswer: 8", "8"),
    ("Answer: 5\nWait, that is wrong.\nAnswer: 6", "6"),
    # asides
    ("The profit is $70,000 (150% of the value).", "70000"),
    ("She earns $18 a day (9 eggs at $2 each).", "18"),
    ("There are 12 of them left in the end (3 were sold and 5 were lost)\nand that is all", "12"),
    ("It costs 5 (not 6).", "5"),
    ("(18)", "18"),
    # signs
    ("The temperature is minus 7.", "-7"),
    ("It was negative 7 degrees", "-7"),
    ("Answer: \u2013 15", "-15"),
    ("Answer: - 15", "-15"),
    ("Answer:\n- 15", "15"),
    ("x = \u2013 15", "-15"),
    ("10 minus 7 makes 3", "3"),
    # separators
    ("The answer is 12 500", "12500"),
    ("The answer is 12\u202f500", "12500"),
    ("The answer is 1.234,50", "1234.5"),
    ("The answer is 1.234.567", "1234567"),
    ("The answer is 1'250", "1250"),
    ("The answer is 1\u2019250", "1250"),
    ("The answer is 1,25 euros", "1.25"),
    ("The answer is \u20ac1,5", "1.5"),
    ("The answer is 0,5", "0.5"),
    ("The answer is 1,2", None),
    ("The answer is 1 234,5 kg", "1234.5"),
    ("The answer is 1.2.3", None),
    ("The answer is 1_000", "1000"),
    # several numbers name none
    ("Answer: between 5 and 6", None),
    ("Answer: 5 or 6", None),
    ("Answer: 5 to 6", None),
    ("Answer: 5\u20136", None),
    # denials
    ("The answer is not 829.", None),
    ("Answer: none of 1, 2, 829", None),
    ("Answer: neither 5 nor 6", None),
    ("Answer: not 5 but 6", "6"),
    ("Answer: 5, not 6", "5"),
    # calculations
    ("Answer: 2^10", "1024"),
    ("Answer: 2^{10}", "1024"),
    ("Answer: 10^3", "1000"),
    ("Answer: \u221a4", "2"),
    ("Answer: \\sqrt{144}", "12"),
    ("Answer: 3 \u00d7 10\u00b2", "300"),
    ("so in the end\nthere are 2^10 of them", "1024"),
    ("so in the end\nthere are \\sqrt{2} of them", None),
    # scales
    ("$70k", "70000"),
    ("Answer: 70K dollars", "70000"),
    ("Answer: $5M", "5000000"),
    ("Answer: 3 dozen", "36"),
    ("Answer: 2.5 million", "2500000"),
    # ordinals
    ('{"answer": "6th"}', "6"),
    ("Answer: 2nd place", "2"),
    # JSON
    ('{"reasoning": "3 and then 5", "answer": "18"}', "18"),
    ('{"reasoning": "3 and then 5", "answer": 18}', "18"),
    ('```json\n{"reasoning": "3",\n "answer": 18}\n```', "18"),
    ('{"answer": "18", "reasoning": "because 3 * 6 = 18, not 17"}', "18"),
    ('{"reasoning": "with "quotes" and 7", "answer": "18"', "18"),
    ('{"reasoning": "x", "answer": (150 * 2) + 240}', "540"),
    ('{"answer": "$1,080.50"}', "1080.5"),
    ('{"answer": "It is 3 * 5 = 15. With the rest 15 + 4 = 19 in all."}', "19"),
    ('{"answer": "Cannot be determined"}', None),
    ('{"answer": null}', None),
    ('{"answer": "5"}\nThe answer is that she bakes 5 dozens for 30 days.', "5"),
    ('{"answer": "5"}\nWait.\nAnswer: 6', "6"),
    # what is said about an answer that was given gives none
    ("Answer: 18\n\nThis answer is based on 2 assumptions.", "18"),
    ("Answer: 18\nThe answer is rounded to 2 decimals.", "18"),
    ("\\boxed{18}\n\nThis answer is consistent with the 3 conditions.", "18"),
    ("#### 18\nThe answer is in days.", "18"),
    ("The answer is 18.\n\nExplanation: The answer is obtained by multiplying 2 by 9.", "18"),
    ("The answer is 18. This answer is reasonable since it is less than 20.", "18"),
    ('{"answer": "18"}\n\nNote that this answer is rounded to 2 decimals.', "18"),
    ("Answer: 18\n\nThe answer is correct.", "18"),
    ("Answer: 18\nLet me check: the answer should be positive, and less than 20.", "18"),
    ("Answer: 18\n(The answer is an integer, as required.)", "18"),
    ("Answer: 18\nConfidence in this answer: 90%", "18"),
    ("Answer: 18\nI am 95% sure that the answer is right.", "18"),
    # another answer does
    ("Answer: 18\nWait, the answer is 20.", "20"),
    ("Answer: 18\nThe answer is corrected to 20.", "20"),
    ("Answer: 19.6\nThe answer is rounded to 20.", "20"),
    ("Answer: 18\nThe answer is given by 4 * 5 = 20.", "20"),
    ("Answer: 18\nThe correct answer is positive 20.", "20"),
    ("Answer: 18\nThis answer is based on 2 assumptions. The answer is 20.", "20"),
    ("Answer: 18\nThis answer is wrong.", None),
    # a condition after the number
    ("The answer is 7 when x = 2.", "7"),
    ("Answer: 12, where n = 4.", "12"),
    ("Answer: 12 (n = 4)", "12"),
    ("Answer: 36 square units (side = 6)", "36"),
    ("Answer: 120 minutes (1 hour = 60 minutes)", "120"),
    ("Answer: 5 km, given 1 km = 1000 m", "5"),
    ("Answer: $120, at a rate r = 5%", "120"),
    ("Answer: 7 with x = 3 and y = 4", "7"),
    ("The answer is $\\frac{1}{2}$ when $x=3$.", "0.5"),
    ("The final answer is 0, meaning there are no values of x for which f(f(x)) = 3.", "0"),
    ("Answer: 18, which is 6 more than 12", "18"),
    ("Answer: 10 pens at $5 each = $50", "50"),
    ("Answer: 5 boxes of 12 for 3 rooms, so 60", "60"),
    ("Answer: (n = 4)", "4"),
    # totals
    ("The answer is 18 dollars in total for 3 days.", "18"),
    ('{"answer": "42 total points across 6 games"}', "42"),
    ("Answer: $120 total, $20 less than last year", "120"),
    ("Answer: 18 fruits in total: 6 apples and 12 oranges", "18"),
    ("Answer: 6 apples and 12 oranges, 18 in total", "18"),
    ("Answer: 5 boxes, for a total of 60", "60"),
    ("Answer: 18 dollars in total for 3 days, so 6 a day", "6"),
    # several quantities are no one number
    ("Answer: 86 glasses and 42 plates", None),
    ("Answer: 4 blue, 6 red", None),
    ("Answer: 7 hours 30 minutes", None),
    ('{"answer": {"glasses": 86, "plates": 42}}', None),
    ("Answer: 24 eggs, 2 dozen eggs", "24"),
    ("Answer: 5 of the 10 apples", "5"),
    # the end of a turn
    ("Answer: 18</s>", "18"),
    ("18<|im_end|>\n<|im_start|>user\nWhat is 4 + 5?", "18"),
    # exactness
    ("12345678901234567890123456789.5", "12345678901234567890123456789.5"),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_number_of_a_reply_or_none(text: str, number: str | None) -> None:
    reading = read_number(text)
    assert (None if reading.value is None else spelled(reading.value)) == number
    assert reading.reason


ANSWERS = [
    ("<think>\nMaybe the answer is A. Hmm", None),
    ('{"answer": "C"}', "c"),
    ('```json\n{"answer": "C"}\n```', "c"),
    ('{"answer": "Paris"}', "paris"),
    ('{"final_answer": ["x", "y"]}', "x y"),
    ("It is not (B)", None),
    ("It is not (B), it is (C)", "c"),
    ("The answer is not 829.", None),
    ("Answer: none of 1, 2, 829", None),
    ("Answer: between 5 and 6", None),
    ("Answer: None", "none"),
    ("Answer: Let's think step by step. B is right, so (B).", "b"),
    ("Answer: First Street", "first street"),
    ("Answer: Let's Dance", "let's dance"),
    ("Answer: Paris\n\nThe answer is based on paragraph 2.", "paris"),
    ("Answer: Paris. The answer was found in paragraph 2.", "paris"),
    ("Answer: Paris\nThe correct answer is London.", "london"),
    ("Answer: Paris\nNote: the correct answer is in paragraph 2.", "paris"),
    ("Answer: B\nThe answer is in dollars.", "b"),
    ("Answer: Paris<|eot_id|>", "paris"),
    ("Answer: incorrect\nWait, the answer is correct.", "correct"),
    ("The answer is correct.", "correct"),
    ("Answer: B\n\nThe answer is consistent with (A).", "b"),
    ("Answer: Freud\nWait, the answer is positive psychology.", "positive psychology"),
    ("Answer: London\nNo, the answer is in the desert.", "in the desert"),
    ("Answer: surnames\nNo, the answer is given names.", "given names"),
    ("Answer: 1895\nNo, the answer is in 1896.", "1896"),
    ("Answer: To Find a Man", "to find a man"),
    ("analysisIt is Rome?assistantfinalParis", "paris"),
    ("Answer: 2^10", "1024"),
    ("Answer: 10^3", "1000"),
    ("Answer: \u221a4", "2"),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_the_answer_of_a_reply_or_none(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_numbers_that_differ_in_the_last_of_thirty_digits_are_different() -> None:
    assert not same_answer("12345678901234567890123456789.5", "12345678901234567890123456790")
    assert same_answer("12345678901234567890123456789.50", "12345678901234567890123456789.5")


@pytest.mark.parametrize(
    ("text", "kind", "how"),
    [
        ("Answer: 5", "number", "stated"),
        ("\\boxed{5}", "number", "boxed"),
        ('{"answer": "B"}', "letter", "json"),
        ("Answer: Paris", "text", "stated"),
        ("```py\nx = 1\n```", "code", "code"),
        ("I choose (B) because", "letter", "choice"),
        ("Paris", "text", "short"),
        ("7", "number", "short"),
        ("She buys 3 and 4 more of them at the market today.\nThat makes 7.", "number", "last"),
    ],
)
def test_an_answer_says_what_it_is_and_where_it_stood(text: str, kind: str, how: str) -> None:
    found = read_answer(text)
    assert (found.kind, found.how) == (kind, how)


SHAPES = [
    "{}",
    "{}.",
    "**{}**",
    "Answer: {}",
    "Answer: {}.",
    "answer is {}",
    "The answer is: {}",
    "The final answer is {}.",
    "**Answer:** {}",
    "**Answer: {}**",
    "### Answer\n{}",
    "Answer:\n\n{}",
    "#### {}",
    "First 12, then 99.\n#### {}",
    "\\boxed{{{}}}",
    "$\\boxed{{{}}}$",
    "So it is \\(\\boxed{{{}}}\\).",
    '{{"answer": "{}"}}',
    '{{"reasoning": "12 and 99", "answer": "{}"}}',
    '{{"answer": {}}}',
    '```json\n{{"reasoning": "12",\n "answer": "{}"}}\n```',
    "<think>12 or 99?</think>\n{}",
    "it may be 12\n</think>\nAnswer: {}",
    "analysisIt is 12? 99?assistantfinal{}",
    "<think>12</think>\n\nThe answer is {}.",
    "Answer: {}\n\nQuestion: What is 12 + 99?\nAnswer: 111",
    "I thought of 12.\nAnswer: 12\nNo, wait.\nAnswer: {}",
    "12 and 99 are steps on the way, and there are many more.\nIn the end it is {}",
    "Answer: x = {}",
    "Answer: **{}** (12 of 99)",
    "The answer is {}, as 12 is too few.",
    "Answer: {} apples",
]


@settings(max_examples=examples(600), derandomize=True)
@given(
    st.integers(-(10**7), 10**7) | st.fractions(-1000, 1000, max_denominator=1).map(int),
    st.sampled_from(["{}", "{:,}", "{}.0"]),
    st.sampled_from(SHAPES),
)
def test_a_right_answer_stays_right_in_every_shape(value: int, spelling: str, shape: str) -> None:
    said = spelling.format(value)
    if shape == '{{"answer": {}}}' and "," in said:
        said = str(value)  # JSON's numbers have no separators
    text = shape.format(said)
    assert read_number(text).value == value, text
    found = extract_answer(text)
    assert found is not None, text
    assert same_answer(found, str(value)), (text, found)


UNKNOWN = ["", "unknown", "Cannot be determined", "not 12", "between 12 and 99", "12 or 99", "neither 12 nor 99", "1,2"]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "12" not in shape.replace("{}", "")])
@pytest.mark.parametrize("said", UNKNOWN)
def test_no_shape_makes_a_number_of_what_is_none(said: str, shape: str) -> None:
    if said == "1,2" and "apples" in shape:
        return  # with a unit it is a decimal comma
    assert read_number(shape.format(said)).value is None


@settings(max_examples=examples(300), derandomize=True)
@given(st.integers(0, 10**9), st.integers(0, 99))
def test_a_number_in_the_ways_of_other_countries_is_itself_or_ambiguous(whole: int, cents: int) -> None:
    value = whole + Fraction(cents, 100)
    english = f"{whole:,}.{cents:02d}"
    for spelling in (english, english.translate(str.maketrans(",.", ".,")), english.replace(",", "'"), english.replace(",", " ")):
        values = [number.value for number in find_numbers(plain_text(f"{spelling} in all"))]
        assert values in ([value], [None]), spelling


@pytest.mark.parametrize("unit", ["[", "(", "{", "[(A) ", "[[```", "\u221a(", "not ("])
def test_a_literal_is_looked_for_in_time_in_proportion_to_the_text(unit: str) -> None:
    """Every place may open one; an agent that writes brackets alone held up all queries for seconds."""

    def seconds(size: int) -> float:
        started = time.process_time()
        read_literal("Answer: " + unit * (size // len(unit)))
        return time.process_time() - started

    once, often = (min(seconds(size) for _ in range(3)) for size in (250, 2_000))
    assert often < 24 * once + 0.05


def test_a_reply_of_keys_alone_is_read_in_time() -> None:
    """Each of thousands of keys was read to its end, for a second of an agent that repeats itself."""
    text = '{"answer": ' * 1_800
    started = time.process_time()
    for _ in range(5):
        read_number(text)
    assert time.process_time() - started < 0.5
