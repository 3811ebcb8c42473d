r"""Word problems: the number that a reply gives (GSM8K, MultiArith, SVAMP).

Read in this order: what the reply states last (`#### N`, "Answer: N", "the answer is N", a LaTeX box); else the last
number of the reply. Within a statement: the result after the last `=`; a number or calculation that is all of it; the
number it begins with; of longer working the last. Commas, currency, percent signs and units do not count, as
`core.answers` decides; "5 or 6" and "5-6" name no number. Numbers compare exactly as fractions, with no tolerance: 0.50
is 1/2, and 0.33 is not 1/3. A reply without a number is unscored: there is no default number. Source: ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from dmoa.core.answers import SENTENCE_END, find_numbers, spelled
from dmoa.errors import ConfigError
from dmoa.evaluation.records import Label, Reply, Score
from dmoa.evaluation.scorers.entry import VALUE, ScorerEntry, chance_of, gold_of, unscored
from dmoa.evaluation.scorers.expressions import expression_value
from dmoa.evaluation.scorers.statements import final_statement, is_refusal, readable

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
