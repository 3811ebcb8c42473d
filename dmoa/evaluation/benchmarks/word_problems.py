"""GSM8K, MultiArith and SVAMP: arithmetic word problems, scored by whether the reply's final number is the label's.

Label: `number`, a canonical decimal (`18`, `-0.5`) or fraction (`3/4`) without commas.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator

from dmoa.core.answers import read_number
from dmoa.core.numbers import spelled
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
from dmoa.evaluation.records import Label, Reply, Score

NUMBER_FORMAT = "End with a line `Answer: N`, N one number."
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
_FRACTION = re.compile(r"[+-]?\d+\s*/\s*0*[1-9]\d*", re.ASCII)


def canonical_number(text: str) -> str:
    """Return a number as shortest plain text: no commas, plus or trailing zeros, fractions reduced. Raises ValueError."""
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
        return _ask(self.question)

    def gold(self) -> dict[str, Any]:
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
        return _ask(self.question)

    def gold(self) -> dict[str, Any]:
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
        return _ask(f"{self.Body.strip()} {self.Question.strip()}")

    def gold(self) -> dict[str, Any]:
        return {"number": self.Answer}

    def family(self) -> str:
        """The body: several questions are asked about one."""
        return self.Body


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
