"""GSM8K, MultiArith and SVAMP: arithmetic word problems with one number as the answer.

Label: `number`, a canonical decimal (`18`, `-0.5`) or fraction (`3/4`) without commas.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator

from dmoa.evaluation.benchmarks.upstream import Text, UpstreamRow

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
