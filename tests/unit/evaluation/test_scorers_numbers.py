"""Numbers: the forms that models write, 10,000 generated renderings, and calculations against Python."""

from __future__ import annotations

import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.core.answers import read_number
from dmoa.core.numbers import expression_value, spelled
from dmoa.errors import ConfigError
from dmoa.evaluation import registry as table
from dmoa.evaluation.benchmarks.competition_math import is_equivalent
from dmoa.evaluation.records import Label, Reply
from tests.examples import examples

STATED = [
    ("Answer: 18", "18"),
    ("Answer: $18.00", "18"),
    ("Answer: 18 apples", "18"),
    ("Answer: 5 km", "5"),
    ("Answer: 40 mph", "40"),
    ("Answer: 50%", "50"),
    ("Answer: 1,080", "1080"),
    ("Answer: $1.45 million", "1450000"),
    ("Answer: -5", "-5"),
    ("Answer: \u22125", "-5"),
    ("Answer: minus 5", "-5"),
    ("Answer: 1 1/2", "1.5"),
    ("Answer: 1.5e3", "1500"),
    ("Answer: [18]", "18"),
    ("Answer: **18**", "18"),
    ("**Answer:** 18 dollars.", "18"),
    ("Answer: about 18", "18"),
    ("Answer: approx. 18", "18"),
    ("Answer: Rs. 18", "18"),
    ("Answer: 30^\\circ", "30"),
    ("Answer: 0.\\overline{3}", "1/3"),
    ("Answer: \u0967\u096e", "18"),
    ("The answer is that there are 2 values of x for which f(x) = 3.", "2"),
    ('{"answer": "18"}\n\n\nQuestion:\n\nHow many are 4 and 5?\n\n{"answer": "9"}', "18"),
    ("Answer: 18 m^2", "18"),
    ("Answer: 18\nbecause 3 of 5 are left", "18"),
    ("Answer:\n\n18", "18"),
    ("### Final Answer\n18", "18"),
    ("#### 1,080", "1080"),
    ("#### Step 1\n3 are red\n#### Step 2\nso it is 9 apples", "9"),
    ("The final answer is: \\(\\boxed{18}\\)", "18"),
    ("\\boxed{3} is a part.\nAnswer: 4", "4"),
    ("```\n18\n```", "18"),
    # chains of equalities, working, and what follows the number
    ("Answer: x = 5", "5"),
    ("Answer: 3 + 5 = 8 apples", "8"),
    ("Answer: 8 = 3 + 5", "8"),
    ("Answer: 5 = five apples", "5"),
    ("The answer is 60, because 5 * 12 = 60.", "60"),
    ("Answer: 60 pencils (5 boxes of 12)", "60"),
    ("Answer: 18 eggs at $2 each", "18"),
    ("The answer is 5 boxes with 12 pencils each, so 60 pencils", "60"),
    # calculations, by math-verify
    ("Answer: 3 \\times 6 apples", "18"),
    ("$3\\times 6$", "18"),
    ("\\boxed{\\sqrt{4}}", "2"),
    ("\\boxed{\\frac{36}{2}}", "18"),
    ("Answer: 2^3", "8"),
    ("Answer: 10 - 3", "7"),
    # corrections
    ("Answer: 5\nno, wait\nAnswer: 6", "6"),
    ("Answer: 5\nAnswer: 5.0", "5"),
    # the last number, where nothing is stated
    ("She has 3 apples and buys 4 more.\nThat makes 7 apples.", "7"),
    ("To find the answer: first add 5 and 6. That gives 11 in the end.", "11"),
    ("I have 3 and 4, so 7", "7"),
]
NOT_STATED = [
    "",
    "  \n\t ",
    "I cannot help with that.",
    "I can\u2019t answer 3 questions at once.",
    "I'm sorry, as an AI language model I do not know; call 911 for help with that.",
    "As an AI, I have no answer to these 2 questions about things.",
    "Answer:",
    "3 + 4 makes 7, so\nAnswer:",
    "Answer: unknown",
    "Answer: N",
    "Answer: 7 or 8",
    "Answer: 5-7",
    "Answer: between 5 to 7",
    "Answer: 14:30",
    "Answer: 5/0",
    "Answer: x = 5, y = 6",
    "Answer: 5\nAnswer: 6",
    "no number at all",
]


@pytest.mark.parametrize(("text", "number"), STATED)
def test_number_of_a_reply(text: str, number: str) -> None:
    value = read_number(text).value
    assert value is not None
    assert spelled(value) == number


@pytest.mark.parametrize("text", NOT_STATED)
def test_without_one_number_nothing_is_made_up(text: str) -> None:
    reading = read_number(text)
    assert reading.value is None
    assert reading.reason


def _decimal(value: Fraction) -> str:
    text = f"{float(abs(value)):.4f}"
    return text.rstrip("0").rstrip(".")


def _spellings(value: Fraction) -> list[str]:
    """Spellings of a number that has at most four decimals, sign included."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    found = [f"{sign}{_decimal(size)}", f"{sign}{float(size):,.4f}", f"{sign}${float(size):,.4f}", f"{sign}{_decimal(size)}%"]
    found += [f"{sign}{size.numerator}/{size.denominator}", f"{sign}\\frac{{{size.numerator}}}{{{size.denominator}}}"]
    found += [f"{sign}{float(size) / 1000:.7f}e3", f"{sign}{float(size) / 100:.6f} \\times 10^{{2}}"]
    if size.denominator == 1:
        found += [
            f"{sign}{size}",
            f"{sign}{size.numerator:,}",
            f"{sign}{size}.",
            f"{sign}{size.numerator:,}.00",
            f"{sign}00{size}",
        ]
        found += [f"{sign}{size.numerator:,}".replace(",", "\u202f"), f"{sign}{size.numerator:,}".replace(",", "{,}")]
    elif size > 1:
        found += [f"{sign}{int(size)} {size - int(size)}"]
    if value < 0:
        found += [spelling.replace("-", "\u2212", 1) for spelling in found]
    return found


UNITS = ["", " apples", " km", " dollars", " square feet", " km/h", " hours."]
FRAMES = [
    "Answer: {}",
    "answer: {}",
    "Working: 2 + 3 = 5, then 7.\nAnswer: {}",
    "**Answer:** {}",
    "Answer: **{}**",
    "Answer:\n{}",
    "The answer is {}",
    "So the final answer is: {}",
    "First 12, then 99.\n#### {}",
    "Answer: 1 + 2 = {}",
    "Answer: x = {}",
    "The answer is \\boxed{{{}}}",
    "4 times 5 is 20.\nIn the end she has {}",
    "{}",
]


@st.composite
def renderings(draw: st.DrawFn) -> tuple[Fraction, str]:
    value = Fraction(draw(st.integers(-(10**6), 10**6)), draw(st.sampled_from([1, 1, 1, 2, 4, 5, 8, 10, 16, 100, 1000])))
    spelling = draw(st.sampled_from(_spellings(value)))
    frame = draw(st.sampled_from(FRAMES))
    unit = "" if spelling.endswith(".") else draw(st.sampled_from(UNITS))
    return value, frame.format(spelling + unit)


@settings(max_examples=examples(10_000), derandomize=True, database=None)
@given(renderings())
def test_every_rendering_of_a_number_is_read_as_it(rendering: tuple[Fraction, str]) -> None:
    value, text = rendering
    reading = read_number(text)
    assert reading.value == value, (text, reading)


def _calculations(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(inner, st.sampled_from([" + ", " - ", " * ", "/"]), inner).map(lambda parts: f"({''.join(parts)})")


EXPRESSIONS = [
    (r"\frac{36}{2}", 18),
    (r"\sqrt{4}", 2),
    (r"\sqrt{16}/2", 2),
    (r"3\times 6", 18),
    ("3 \u00d7 6", 18),
    (r"6 \div 4", Fraction(3, 2)),
    ("(2+3)*4", 20),
    ("2^{3}", 8),
    (r"\left(\frac{1}{2}\right)^{2}", Fraction(1, 4)),
    ("1,200 + 3", 1203),
    ("18 - 5", 13),
    ("0.1+0.2", Fraction(3, 10)),
    ("1+(2*(3+(4*(5+6))))", 95),
    ("2^10", 1024),
    (r"\frac{\frac{1}{2}}{3}", Fraction(1, 6)),
    ("(2 + 3) - 007", -2),
]


@pytest.mark.parametrize(("text", "value"), EXPRESSIONS)
def test_a_calculation_is_exact(text: str, value: Fraction | int) -> None:
    assert expression_value(text) == Fraction(value)


@settings(max_examples=examples(200), derandomize=True)
@given(st.recursive(st.integers(0, 999).map(str), _calculations, max_leaves=6))
def test_a_calculation_is_what_python_makes_of_it(text: str) -> None:
    number = re.sub(r"[0-9]+", r"Fraction(\g<0>)", text)
    try:
        expected = eval(number, {"Fraction": Fraction})
    except ZeroDivisionError:
        expected = None
    assert expression_value(f"{text} + 0") == expected


@pytest.mark.parametrize(
    "text",
    [
        "18",
        "5-7",
        "3(4)",
        "2 1/2 + 1",
        "7!",
        "1/0",
        r"\frac{0}{0}",
        r"\sqrt{2}",
        r"\sqrt{-4}",
        "((",
        "3 + = 4",
        "+" * 200,
        "(" * 50 + "1 + 1" + ")" * 50,
        "{" * 50 + "1 + 1" + "}" * 50,
        "9^{9^{9^{9}}}",
        "9^{99}^{99}",
        "9^999999999",
        "9999999999999999999999^{99}",
        r"\frac\frac",
        r"\input{x} + 1",
        "x + 1",
        "",
    ],
)
def test_what_is_no_small_exact_calculation_has_no_value(text: str) -> None:
    assert expression_value(text) is None


@pytest.mark.parametrize("text", ["25!!", "(25!)!", "9!!!", "(10^9)!", "(9999999999)!", "10^{9}!", r"\binom{10^9}{5*10^8}"])
def test_an_answer_that_takes_for_ever_to_work_out_is_wrong_at_once(text: str) -> None:
    """The clock of math-verify takes two seconds, and works in no thread but the main one."""
    started_s = time.process_time()
    assert not is_equivalent(text, "17")
    assert time.process_time() - started_s < 1.5
    assert is_equivalent(r"\frac{5!}{3!2!}", "10")
    assert is_equivalent("252", r"\binom{10}{5}")


def test_numbers_compare_exactly() -> None:
    score = table.build_scorer("gsm8k").score
    third = Label(row_id="gsm8k/test/1", benchmark="gsm8k", gold={"number": "1/3"})
    assert score(third, Reply(text="Answer: 2/6")).value == 1.0
    wrong = score(third, Reply(text="Answer: 0.33"))
    assert (wrong.value, wrong.is_scored, wrong.extracted) == (0.0, True, "0.33")
    none = score(third, Reply(text="Answer: a third"))
    assert (none.value, none.is_scored, none.extracted) == (0.0, False, None)


@pytest.mark.parametrize("gold", [{"number": "many"}, {"answer": "18"}])
def test_a_label_of_another_kind_is_refused(gold: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="svamp/test/1"):
        table.build_scorer("svamp").score(Label(row_id="svamp/test/1", benchmark="svamp", gold=gold), Reply(text="1"))
