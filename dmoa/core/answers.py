"""Finds the final answer of a reply and normalises it, for stopping, aggregation and the benchmark scorers.

Percent signs, currency, thousands separators and units do not count (50% = 50, $1,200.00 = 1200); "million" and its like do
(1.5 million = 1500000), and so do powers of ten; numbers compare exactly (1/2 = 0.5, but 0.33 is not 1/3); dates and times are
texts, not numbers; a choice is its letter in lower case. A reply without a recognisable answer has none.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

_MAX_CHARS = 20_000
_MAX_NUMBER_CHARS = 64
_MAX_SHORT_CHARS = 120
_MAX_SHORT_WORDS = 10
_MAX_LISTING_WORDS = 6
"""A longer line with several numbers is working, and its last number the result; a shorter one is a date or a list."""

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)\s*\Z", re.MULTILINE)
_MARKER = re.compile(
    r"\banswer(?:[ \t]+(?:to|for)[ \t]+[^.:=\n]{1,80}?)?[ \t]*"
    r"(?::|=|\b(?:is|was|would[ \t]+be|should[ \t]+be|must[ \t]+be)\b[ \t]*:?)"
    r"[ \t]*\n?[ \t]*([^\n]*)",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\b[DdMmSsJj][rst])(?<!\bMrs)(?<!\bNo)(?<!\bvs)[.!?](?=\s)")
_CHOICE_START = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-Ha-h])\)|([A-H])(?:[).:,](?=\s|\Z)|\s*\Z)|([a-h])(?:\)|\s*\Z))", re.IGNORECASE
)
_CHOICE_INSIDE = re.compile(r"\(([A-H])\)")
_CALENDAR = re.compile(
    r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec|january|february|march|april|june|july|august|september|october"
    r"|november|december|monday|tuesday|wednesday|thursday|friday|saturday|sunday)\b",
    re.IGNORECASE,
)
_UNITS = "km|cm|mm|m|kg|mg|g|lbs?|oz|ml|l|min|hrs?|h|sec|s|mph|ft|in"
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_VALUE = re.compile(
    r"(?<![\w.^])"
    r"(?:(?P<other>[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[0-9]+/[0-9]+/[0-9]+|[0-9]+(?::[0-9]+)+)"
    rf"|(?P<sign>(?<![\w)%])[-+])?[$€£¥]?(?P<sign2>-)?"
    r"(?:(?P<whole>[0-9]+) (?=[0-9]+/[0-9]))?"
    rf"(?P<number>{_PLAIN})(?P<exponent>[eE][-+]?[0-9]{{1,2}})?(?:/(?P<below>{_PLAIN}))?)"
    rf"(?![0-9]|(?!(?:{_UNITS})\b)[A-Za-z])"
    rf"(?P<scale>\ (?i:{'|'.join(_SCALES)})\b)?"
)
_POWER_OF_TEN = re.compile(
    r"(?<=[0-9])\ {0,2}(?:\u00d7|\*|x|\u00b7|\\times|\\cdot)\ {0,2}10\^(?:\{\ ?(-?[0-9]{1,2})\ ?\}|(-?[0-9]{1,2}))(?![0-9])"
)
_SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_THIN_SEPARATOR = re.compile(r"(?<=[0-9])(?:[\u00a0\u2009\u202f]|\\,|\\!|\{,\})(?=[0-9]{3}(?![0-9]))")
_TYPOGRAPHIC_MINUS = re.compile(r"\u2212|(?<![\w)\]%])[\u2012\u2013](?=[0-9.$])|(?<==)\ ?-\ (?=[0-9.$])")
_EDGES = ".,;:!?\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb()[]{}<>*_~|\\#$"


@dataclass(frozen=True, slots=True)
class FoundNumber:
    """One number of a text."""

    value: Fraction
    start: int
    """Position of its first character in the text."""
    end: int


def find_numbers(text: str) -> list[FoundNumber]:
    """Return every number of a plain text (see `plain_text`) in order; dates and times are none. Never raises."""
    found = ((_value(match), match) for match in _VALUE.finditer(text))
    return [FoundNumber(value, match.start(), match.end()) for value, match in found if value is not None]


def extract_answer(text: str) -> str | None:
    r"""Return the final answer of a reply, normalised, or None if it has none. Never raises.

    In this order: the last \boxed{...}; a last line `#### X`; the last "the answer is X" or "Answer: X"; the last code
    block; a choice such as "(B)" or "B. ..."; a short single line, whole; the last number. Source: ours.
    """
    prose, code = split_code(text[-_MAX_CHARS:])
    prose = plain_text(prose)
    for span in (_boxed(prose), _after_hashes(prose), _marked(prose)):
        answer = _span_answer(span) if span else None
        if answer:
            return answer
    if code:
        return code
    return _choice(prose) or _short(prose) or _last_number(prose)


def same_answer(a: str, b: str) -> bool:
    """Return whether two answers are the same: equal numbers (1,200 = 1200.0, 1/2 = 0.5) or equal normalised texts."""
    return a == b or _canonical(a) == _canonical(b)


def _canonical(answer: str) -> str:
    if "\n" in answer:
        return answer
    answer = plain_text(answer).strip()
    return _whole_number(answer) or _normal_text(answer)


def split_code(text: str) -> tuple[str, str | None]:
    """Return the text without its fenced blocks, and the last block normalised, None if there is none. Never raises."""
    blocks = _FENCE.findall(text)
    if not blocks:
        return text, None
    lines = (line.rstrip() for line in textwrap.dedent(blocks[-1].expandtabs(4)).splitlines())
    code = "\n".join(line for line in lines if line)
    return _FENCE.sub("\n\n", text), code or None


def plain_text(text: str) -> str:
    """Return the text with typographic and LaTeX spellings made plain, emphasis marks removed. Never raises."""
    text = _THIN_SEPARATOR.sub(",", text)
    text = _SUPERSCRIPTS.sub(lambda match: "^" + unicodedata.normalize("NFKC", match.group()).replace("\u2212", "-"), text)
    # "3½" must become "3 1/2": NFKC alone would join the digits.
    text = "".join(
        " " + c if unicodedata.category(c) == "No" and "\u2044" in unicodedata.normalize("NFKC", c) else c for c in text
    )
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    text = _POWER_OF_TEN.sub(_as_exponent, _TYPOGRAPHIC_MINUS.sub("-", text))
    text = re.sub(r"\*\*|__|`", "", text)
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("\\!", "")
    text = re.sub(r"(?<=[0-9])\s?(?=\\[dt]?frac)", " ", text)  # a mixed number: 2\frac{1}{2} is 2 1/2
    text = re.sub(r"\\[dt]?frac\s?(?:\{([^{}]*)\}\s?\{([^{}]*)\}|([0-9])([0-9]))", r"\1\3/\2\4", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\\[()\[\],;]", " ", text)


def _as_exponent(match: re.Match[str]) -> str:
    return f"e{match.group(1) or match.group(2)}"


def _boxed(prose: str) -> str | None:
    """Return what the last closed \\boxed{...} holds."""
    start = prose.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + 6, len(prose)):
        depth += (prose[position] == "{") - (prose[position] == "}")
        if depth == 0:
            return prose[start + 7 : position]
    return None


def _after_hashes(prose: str) -> str | None:
    match = _HASHES.search(prose)
    return match.group(1) if match else None


def _marked(prose: str) -> str | None:
    found = None
    for found in _MARKER.finditer(prose):  # noqa: B007  # the last one counts
        pass
    return SENTENCE_END.split(found.group(1), maxsplit=1)[0] if found else None


def _span_answer(span: str) -> str | None:
    """Return the answer that a marked span holds."""
    span = span.strip()
    choice = _CHOICE_START.match(span.lstrip("*_ "))
    if choice:
        return next(letter for letter in choice.groups() if letter).casefold()
    return _numeric_line(span) or _normal_text(span) or None


def _choice(prose: str) -> str | None:
    start = _CHOICE_START.match(prose.strip())
    inside = _CHOICE_INSIDE.findall(prose)
    if start:
        letter = next(letter for letter in start.groups() if letter)
        # A reply that begins with (A) and goes on to (B) lists the choices before it decides.
        if not (letter in "Aa" and "B" in inside):
            return letter.casefold()
    return inside[-1].casefold() if inside else None


def _short(prose: str) -> str | None:
    line = prose.strip()
    is_short = "\n" not in line and len(line) <= _MAX_SHORT_CHARS and len(line.split()) <= _MAX_SHORT_WORDS
    # "Answer:" and an empty or unclosed box announce an answer and give none.
    if not is_short or line.endswith(":") or "\\boxed" in line:
        return None
    return _numeric_line(line) or _normal_text(line) or None


def _numeric_line(line: str) -> str | None:
    """Return the number that a line amounts to: its only one, or the result after `=`, or of longer working the last."""
    if _CALENDAR.search(line):
        return None
    result = line.rpartition("=")[2]
    values = list(_VALUE.finditer(result))
    if len(values) > 1 and len(line.split()) <= _MAX_LISTING_WORDS:
        return None
    return _number(values[-1]) if values else None


def _last_number(prose: str) -> str | None:
    last = None
    for match in _VALUE.finditer(prose):
        last = match
    if last is None:
        return None
    return last.group("other") or _number(last)


def _whole_number(text: str) -> str | None:
    match = _VALUE.match(text)
    return _number(match) if match and match.end() == len(text.rstrip("%")) else None


def _number(match: re.Match[str]) -> str | None:
    """Return a matched number in its one canonical spelling: 1200, -0.5 or 1/3; None for what is not a number."""
    value = _value(match)
    return None if value is None else spelled(value)


def _value(match: re.Match[str]) -> Fraction | None:
    if match.group("other") or len(match.group()) > _MAX_NUMBER_CHARS:
        return None
    below = Fraction((match.group("below") or "1").replace(",", ""))
    if below == 0:
        return None
    value = Fraction(match.group("number").replace(",", "") + (match.group("exponent") or "")) / below
    value += int(match.group("whole") or 0)
    if match.group("sign") == "-" or match.group("sign2"):
        value = -value
    return value * _SCALES[match.group("scale").strip().lower()] if match.group("scale") else value


def spelled(value: Fraction) -> str:
    """Return a number in its one canonical spelling: 1200, -0.5, or 1/3 where no decimal is exact."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = value.denominator.bit_length()  # a denominator 2^a 5^b needs max(a, b) decimals, never more than its bits
    scaled = value * 10**digits
    return format(Decimal(scaled.numerator).scaleb(-digits).normalize(), "f")


def _normal_text(text: str) -> str:
    """Return the text casefolded, with single spaces and without punctuation at the edges of its words."""
    words = (word.strip(_EDGES) for word in text.replace(",", " ").casefold().split())
    return " ".join(word for word in words if word)
