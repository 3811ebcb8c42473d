"""GSM8K, MultiArith and SVAMP: arithmetic word problems, scored by whether the reply's final number is the label's.

Label: `number`, a canonical decimal (`18`, `-0.5`) or fraction (`3/4`) without commas.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator

from dmoa.core.answers import SENTENCE_END, find_numbers, spelled
from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.base import (
    VALUE,
    HubSource,
    ScorerEntry,
    Text,
    UpstreamRow,
    benchmark,
    chance_of,
    gold_of,
    unscored,
)
from dmoa.evaluation.benchmarks.final_answer import final_statement, is_refusal, readable
from dmoa.evaluation.records import Label, Reply, Score

NUMBER_FORMAT = "End with a line `Answer: N`, N one number."
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
_FRACTION = re.compile(r"[+-]?\d+\s*/\s*0*[1-9]\d*", re.ASCII)


def canonical_number(text: str) -> str:
    """The number as shortest plain text: no commas, no plus, no trailing zeros, fractions reduced.

    Raises:
        ValueError: the text is not one decimal number or fraction.
    """
    plain = text.strip().replace(",", "")
    if len(plain) <= 100 and _FRACTION.fullmatch(plain):
        return str(Fraction(re.sub(r"\s", "", plain)))
    if len(plain) > 100 or not _DECIMAL.fullmatch(plain):
        raise ValueError("a number such as 18, 1,080, 0.5 or 3/4")
    fixed = format(Decimal(plain), "f")
    fixed = fixed.rstrip("0").rstrip(".") if "." in fixed else fixed
    return "0" if fixed in ("-0", "") else fixed


def _as_text(value: object) -> object:
    # Some copies keep the answer as a JSON number.
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


NumberText = Annotated[str, BeforeValidator(_as_text), AfterValidator(canonical_number)]


def _final_number(answer: str) -> str:
    _, mark, tail = answer.rpartition("####")
    if not mark:
        raise ValueError("a worked solution that ends in `#### N`")
    canonical_number(tail)
    return answer


def _ask(problem: str) -> str:
    return f"Solve the arithmetic problem. {NUMBER_FORMAT}\n\nProblem: {problem.strip()}"


@benchmark(
    "gsm8k",
    title="GSM8K",
    scoring=lambda _: entry(),
    hub=HubSource(dataset="openai/gsm8k", config="main", revision="740312add88f781978c0658806c59bc2815b9866"),
)
class Gsm8kRow(UpstreamRow):
    """A row of `openai/gsm8k`, main."""

    question: Text
    answer: Annotated[str, AfterValidator(_final_number)]
    """The worked solution, then `#### N`."""

    def text(self) -> str:
        """The problem."""
        return _ask(self.question)

    def gold(self) -> dict[str, Any]:
        """The number after `####`."""
        return {"number": canonical_number(self.answer.rpartition("####")[2])}


@benchmark(
    "multiarith",
    title="MultiArith",
    scoring=lambda _: entry(),
    hub=HubSource(dataset="ChilleD/MultiArith", revision="144d44c3fb87c0b9097ac9593c789e716a282e3e"),
)
class MultiArithRow(UpstreamRow):
    """A row of `ChilleD/MultiArith`."""

    question: Text
    final_ans: NumberText

    def text(self) -> str:
        """The problem."""
        return _ask(self.question)

    def gold(self) -> dict[str, Any]:
        """The final answer."""
        return {"number": self.final_ans}

    def family(self) -> str:
        """The question: upstream repeats some."""
        return self.question


@benchmark(
    "svamp",
    title="SVAMP",
    scoring=lambda _: entry(),
    hub=HubSource(dataset="ChilleD/SVAMP", revision="5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef"),
)
class SvampRow(UpstreamRow):
    """A row of `ChilleD/SVAMP`; `question_concat` is `Body` and `Question` again, and is not read."""

    identifiers: ClassVar[dict[str, Any]] = {"ID": True}
    ID: str
    Body: Text
    Question: Text
    Equation: str
    Answer: NumberText
    Type: str

    def text(self) -> str:
        """The body, then the question."""
        return _ask(f"{self.Body.strip()} {self.Question.strip()}")

    def gold(self) -> dict[str, Any]:
        """The answer."""
        return {"number": self.Answer}

    def family(self) -> str:
        """The body: several questions are asked about one."""
        return self.Body


_MAX_CHARS = 120
_MAX_DEPTH = 4
"""Brackets inside one another: math-verify takes longer with every one, seconds for fifty."""
_TOKENS = re.compile(
    r"(?:[0-9]{1,15}(?:\.[0-9]{1,15})?(?![0-9.])|\.[0-9]{1,15}|\\[dt]?frac|\\sqrt|\\times|\\cdot|\\div|\\left|\\right"
    r"|\^(?:\{-?[0-9]{1,2}\}|[0-9](?![0-9]))|[-+*/(){}\u00d7\u00f7\u00b7=\s])+"
)
_OPERATOR = re.compile(r"\\[dt]?frac|\\sqrt|\\times|\\cdot|\\div|\^|[+*/\u00d7\u00f7\u00b7]|(?<=[\d)]) - (?=[\d(])")
_JUXTAPOSED = re.compile(r"[0-9)}]\s*[({]|\)\s*[0-9]|[0-9]\s+[0-9.]")
_FRACTION_OR_ROOT = re.compile(r"\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\\sqrt\s*\{[^{}]*\}|\^\{-?[0-9]+\}")
_DECIMAL_IN_EXPRESSION = re.compile(r"([0-9]*)\.([0-9]+)")


def expression_value(text: str) -> Fraction | None:
    """Return the exact value of an arithmetic expression.

    None if the text is not an expression, is too long, or is not rational. Never raises.
    """
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text.strip().strip("$").strip())
    text = text.replace("\\left", "").replace("\\right", "")
    if len(text) > _MAX_CHARS or text.count("^") > 1 or not _OPERATOR.search(text) or not _TOKENS.fullmatch(text):
        return None
    if max(accumulate((char in "({") - (char in ")}") for char in text)) > _MAX_DEPTH:
        return None
    # math-verify reads 3(4) and 3 4 as mixed numbers
    if _JUXTAPOSED.search(_FRACTION_OR_ROOT.sub(" + ", text)):
        return None
    return _parsed(_DECIMAL_IN_EXPRESSION.sub(_as_fraction, text).replace("\u00d7", "\\times ").replace("\u00b7", "\\cdot "))


def _as_fraction(match: re.Match[str]) -> str:
    return f"\\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}"  # math-verify would make it a float


def _parsed(latex: str) -> Fraction | None:
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    found = parse(f"${latex}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    if not found or not hasattr(found[0], "doit"):
        return None
    value = found[0].doit()
    if not getattr(value, "is_Rational", False):
        return None
    return Fraction(int(value.p), int(value.q))


_MAX_SPAN_CHARS = 300
_MAX_LINE_WORDS = 8
"""A reply of one line and no more words is read as a statement."""
_NEGATIVE_WORD = re.compile(r"(?:^|(?<=[=:(]))\s*(?:minus|negative)\s+(?=[$0-9.])", re.IGNORECASE)
_LEADING = re.compile(
    r"(?:[\"'([{<$*~\u2248\s]|about|approximately|approx\.?|around|roughly|exactly|only|just|a total of|US|USD|Rs\.?)*",
    re.IGNORECASE,
)
_TRAILING = re.compile(r"(?:[A-Za-z$\u20ac\u00a3\u00a5%.,;:!?\"')\]}>*\s\u00b0/]|(?<=[A-Za-z])\^[23](?![0-9]))*")
_UNIT_WORDS = re.compile(r"[ \t][ \tA-Za-z.]*\Z")
_GOES_ON = re.compile(r"\b(?:so|thus|therefore|hence|total|altogether|makes?|leaves?|which is|that is|equals?)\b", re.IGNORECASE)
_ALTERNATIVE = re.compile(r"\s?[A-Za-z%]{0,12}\s?(?:\bor\b|\bto\b|[-\u2013\u2014])\s?\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reading:
    """The number that a reply gives."""

    value: Fraction | None
    """None where it gives none."""
    reason: str


def read_number(text: str) -> Reading:
    """Return the number that a reply gives. Never raises."""
    prose = readable(text)
    final = final_statement(prose)
    if final is None:
        if is_refusal(prose):
            return Reading(None, "the reply refuses to answer")
        line = prose.strip()
        if "\n" not in line and len(line.split()) <= _MAX_LINE_WORDS:
            return _stated(_span_number(line), "a short reply")
        found = find_numbers(_NEGATIVE_WORD.sub("-", prose))
        return Reading(found[-1].value, "the last number") if found else Reading(None, "no number found")
    if not final.span:
        return Reading(None, "an answer is announced and not given")
    value = _span_number(final.span)
    rival = _span_number(final.rival) if final.rival else None
    if value is not None and rival is not None and rival != value:
        return Reading(None, f"two final answers: {spelled(rival)} and {spelled(value)}")
    return _stated(value, "stated")


def _stated(value: Fraction | None, reason: str) -> Reading:
    return Reading(None, "no number, or several, where the answer stands") if value is None else Reading(value, reason)


def _span_number(span: str) -> Fraction | None:
    """Return the number that a statement amounts to."""
    span = _NEGATIVE_WORD.sub("-", SENTENCE_END.split(span[:_MAX_SPAN_CHARS], maxsplit=1)[0])
    parts = [part.strip() for part in span.split("=") if part.strip()]
    if not parts:
        return None
    value = _part_number(parts[-1])
    # "8 = 3 + 5" ends in a calculation, "5 = five apples" in words
    return value if value is not None or len(parts) == 1 else _part_number(parts[-2])


def _part_number(part: str) -> Fraction | None:
    found = find_numbers(part)
    leading = _LEADING.match(part)
    begin = leading.end() if leading else 0
    is_first = bool(found) and found[0].start <= begin <= found[0].end
    if is_first and _TRAILING.fullmatch(part, found[0].end):
        return found[0].value
    value = expression_value(_UNIT_WORDS.sub("", part.strip(" .$")))
    if value is not None:
        return value
    if not found or any(_ALTERNATIVE.fullmatch(part, a.end, b.start) for a, b in pairwise(found)):
        return None
    return found[0].value if is_first and not _GOES_ON.search(part, found[0].end) else found[-1].value


def entry(deviation: str = "") -> ScorerEntry:
    """Return the scoring of a word-problem benchmark, whose gold has `number`."""
    return ScorerEntry(
        score=_score,
        gold_replies=lambda label: {VALUE: f"Answer: {gold_of(label, 'number')[0]}"},
        primary="accuracy (number)",
        chance=lambda labels: chance_of([_gold(label) for label in labels]),
        answer_key=_gold,
        deviation=deviation,
    )


def _gold(label: Label) -> Fraction:
    (text,) = gold_of(label, "number")
    try:
        return Fraction(str(text).replace(",", ""))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"label {label.row_id}: gold number is {text!r}; a decimal or a fraction is needed") from error


def _score(label: Label, reply: Reply) -> Score:
    gold = _gold(label)
    reading = read_number(reply.text)
    if reading.value is None:
        return unscored(reading.reason)
    said = spelled(reading.value)
    return Score(value=float(reading.value == gold), extracted=said, reason=f"{reading.reason}: {said}, right is {spelled(gold)}")
