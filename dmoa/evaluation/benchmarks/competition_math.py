r"""MATH: competition problems; scored by whether the final answer is equivalent to the one in the solution's last box.

Numbers and expressions are compared exactly by `dmoa.core`; what that cannot decide is put to math-verify.

Label: `answer`, in LaTeX.
"""

from __future__ import annotations

import re
import threading
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AfterValidator

from dmoa.core.answers import (
    NOT_THIS,
    THOUGHT_ONLY,
    Reading,
    is_refusal,
    open_reply,
    read_number,
    read_number_span,
    statement_places,
    without_denial,
)
from dmoa.core.expressions import expression_key, is_symbolic
from dmoa.core.numbers import expression_value, find_numbers, plain_text, spelled
from dmoa.evaluation.benchmarks.base import VALUE, ScorerEntry, Text, UpstreamRow, benchmark, chance_of, gold_of, unscored
from dmoa.evaluation.records import Label, Reply, Score

_MAX_SPAN_CHARS = 300
_MAX_SHORT_WORDS = 8
_VERIFY_S = 2
_PROSE = re.compile(r"[A-Za-z]{3,}\s+[A-Za-z]{2,}")
_OPERATORS = re.compile(r"[\\^*/+<>,;|\u2264\u2265]|(?<=\d)\s*[-!]")
# What makes an equation more than "name = value": a list, a relation, a word between values.
_SEVERAL = re.compile(r"[,;<>\u2260\u2264\u2265]|\\(?:leq?|geq?|neq?|lt|gt|in)(?![a-z])|\b(?:or|and)\b", re.IGNORECASE)
_NAME = re.compile(r"[a-zA-Z\u03b1-\u03c9](?:_\{?\w+\}?|'+)?(?:\([^()]*\))?|[a-zA-Z\\\s]{2,}")
_FUNCTION = re.compile(r"\\?\b(?:sin|cos|tan|sec|csc|cot|log|ln|exp|angle)(?![a-z])")
_IN_BASE = re.compile(r"[0-9a-fA-F]\s*_\s*\{?\s*(?:\d+|\\text\s*\{[^{}]*\})\s*\}?\W*\Z")
# A unit behind a value, in LaTeX's words or in the plain text that they become; a lone m has a space before it and a power.
_UNIT = re.compile(
    r"(?:(?<=[0-9}])|(?<=pi)|(?<=\u03c0))(?:\\[ ,;:!]|[\s~])*(?:(?:\\(?:text|mathrm|mbox)\s*\{[a-zA-Z.\s]+\}"
    r"|mm|cm|dm|km|in|ft|yd|mi|inch(?:es)?|feet|yards?|miles?|units?)(?:\s*\^\s*\{?\s*[23]\s*\}?)?"
    r"|(?<=[\s~])m\s*\^\s*\{?\s*[23]\s*\}?)\W*\Z"
)
_MIXED = re.compile(r"(-?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")
# A list, a variable or a word: no number, whatever a part of it is.
_BETWEEN = re.compile(r"\W*(?:it is )?(?:somewhere )?between\b[^\n]*\band\b", re.IGNORECASE)
_NO_NUMBER = re.compile(r"[,;]|(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])|\\(?:cos|sin|tan)\b|\bmod\b")
# What takes a computer algebra system forever: towers of powers, huge exponents, factorials and binomials.
_HUGE = re.compile(
    r"\^\s*\{?\s*-?[0-9]{4,}|\^[^^+*/,-]*\^|[0-9]{3,}[\s)}]*!|\^[^!+*/,-]*[)}]\s*!|![\s)}]*!|binom\s*\{[^}]*(?:\^|!|[0-9]{5})"
)


def _boxed(solution: str) -> str:
    boxes = [place.span for place in statement_places(solution) if place.how == "boxed"]
    if not boxes or not boxes[-1]:
        raise ValueError(r"a solution with its answer in \boxed{}")
    return boxes[-1]


@benchmark("math", title="MATH", scoring=lambda _: entry())
class MathRow(UpstreamRow):
    """A row of MATH (Hendrycks et al. 2021), such as `EleutherAI/hendrycks_math` keeps."""

    problem: Text
    level: str
    type: str
    solution: Annotated[str, AfterValidator(lambda solution: _boxed(solution) and solution)]

    def text(self) -> str:
        return f"Solve the problem. End with the final answer in \\boxed{{}}.\n\nProblem: {self.problem.strip()}"

    def gold(self) -> dict[str, Any]:
        return {"answer": _boxed(self.solution)}

    def group(self) -> str:
        """The subject."""
        return self.type


Expression = Reading[str]
"""The expression that a reply gives, as it is written, LaTeX made plain."""


def read_expression(text: str) -> Expression:
    """Return what a reply gives as its answer: what it states last, a short reply, or the last number. Never raises."""
    reply = open_reply(text)
    if reply.is_only_thought:
        return Reading(None, THOUGHT_ONLY)
    final = reply.final
    if final is not None:
        if not final.span.strip(" $."):
            return Reading(None, "an answer is announced and not given")
        if final.rival is not None and _key(final.rival) != _key(final.span):
            return Reading(None, f"two final answers: {final.rival[:80]} and {final.span[:80]}")
        return _named(final.span, final.how)
    if is_refusal(reply.prose):
        return Reading(None, "the reply refuses to answer")
    line = reply.prose.strip()
    if line and "\n" not in line and len(line.split()) <= _MAX_SHORT_WORDS:
        return _named(line, "a short reply")
    number = read_number(text)
    return Reading(None if number.value is None else spelled(number.value), number.reason)


def _named(span: str, place: str) -> Expression:
    left = without_denial(span)
    if left is None:
        return Reading(None, NOT_THIS)
    if _BETWEEN.match(left):
        return Reading(None, "two numbers name none")
    # In a sentence it calls out, in a formula it is a factorial.
    return Reading((left.rstrip(" !") if place in ("stated", "a short reply") else left)[:_MAX_SPAN_CHARS], place)


def entry() -> ScorerEntry:
    """Return the scoring of MATH, whose gold has `answer`."""
    return ScorerEntry(
        score=_score,
        gold_replies=lambda label: {VALUE: f"\\boxed{{{gold_of(label, 'answer')[0]}}}"},
        primary="accuracy (equivalent expression)",
        chance=lambda labels: chance_of([_gold_key(label) for label in labels]),
        answer_key=_gold_key,
        deviation="",
    )


def _gold_key(label: Label) -> str:
    return _key(plain_text(gold_of(label, "answer")[0]))


def _key(span: str) -> str:
    """Return what equal answers share as far as it can be told without algebra."""
    span = _UNIT.sub("", span.strip(" _"))
    number = _number(span)
    return (
        spelled(number) if number is not None else expression_key(span) or re.sub(r"[\s{}$\\]+", "", span).casefold().rstrip(".")
    )


def _number(span: str) -> Fraction | None:
    """Return the number that a span is, with a unit or in a sentence; None where it is more than that."""
    bare = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", span.strip(" $").rstrip(" .$"))
    bare = bare.rstrip("\u00b0 ")
    bare = re.sub(r"\A(\d+),(\d{1,2})(?=\s?[a-zA-Z\u20ac])", r"\1.\2", bare)  # 1,25 euros
    if (value := expression_value(bare)) is not None:
        return value
    if (mixed := _MIXED.fullmatch(bare)) and int(mixed[4]):
        return (int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))) * (-1 if mixed[1] else 1)
    is_sentence = _PROSE.search(bare) is not None and "\\" not in bare and "^" not in bare
    if is_symbolic(bare) or (not is_sentence and (len(find_numbers(bare)) != 1 or _OPERATORS.search(bare))):
        return None
    return read_number_span(bare)


def _score(label: Label, reply: Reply) -> Score:
    (gold,) = gold_of(label, "answer")
    said = read_expression(reply.text)
    if said.value is None:
        return unscored(said.reason)
    value = float(is_equivalent(said.value, gold))
    return Score(value=value, extracted=said.value, reason=f"{said.reason}: {said.value}, right is {gold}")


def is_equivalent(said: str, gold: str) -> bool:
    """Tell whether a reply's span is the right answer in LaTeX. Never raises."""
    right = plain_text(gold)
    said = _listed(said) if "," in right else said
    result = _result(said)
    if _key(right) in {_key(said), _key(result or said)}:
        return True
    if _IN_BASE.search(said):
        return False  # math-verify drops the base
    if base := _IN_BASE.search(gold):  # the question may say it
        return _key(said) == _key(gold[: base.start() + 1])
    if result is None and "=" not in gold:
        return False
    if _number(right) is not None and (_number(said) is not None or _PROSE.search(said) or _NO_NUMBER.search(said)):
        return False
    return _verified(said[:_MAX_SPAN_CHARS].encode("ascii", "ignore").decode(), gold)


def _listed(said: str) -> str:
    """Write `x = 1 or x = 2` as the list 1, 2, if it names one unknown."""
    said = re.sub(r",?\s+(?:and|or)\s+", ", ", said.strip(" $"))
    return re.sub(r"(\A|, *)[a-zA-Z]\s*=\s*", r"\1", said) if len(set(re.findall(r"([a-zA-Z])\s*=", said))) == 1 else said


def _result(said: str) -> str | None:
    """Return what an equation gives for its left side; the text itself where it is none; None where it gives no one value.

    "x = 3 or x = 5" gives two, and "2x + 1 = 0" is an equation in one unknown that is still to be solved.
    """
    first, equals, _ = said.partition("=")
    if not equals or _PROSE.search(re.sub(r"\\[a-zA-Z]+", " ", said)):
        return said
    if _SEVERAL.search(re.sub(r"\([^()]*\)", "", said.rpartition("=")[0])):
        return None
    left = plain_text(first).strip(" $")
    unknowns = set(re.findall(r"[a-zA-Z]", _FUNCTION.sub("", left)))
    is_open = len(unknowns) == 1 and not _NAME.fullmatch(left) and not _FUNCTION.search(left)
    return None if is_open else said.rpartition("=")[2]


@lru_cache(maxsize=4096)
def _verified(said: str, gold: str) -> bool:
    """Ask math-verify, whose clock works in the main thread alone; elsewhere `_HUGE` bounds the time."""
    if not re.search(r"[0-9a-zA-Z]", said) or _HUGE.search(said) or _HUGE.search(gold):
        return False
    from math_verify import parse, verify

    limit = _VERIFY_S if threading.current_thread() is threading.main_thread() else None
    pair = [parse(f"${text.strip('$ ')}$", parsing_timeout=limit) for text in (gold, said)]
    # A text of which it read a part only is not what it read.
    read = [len(_bare(str(found[-1]))) if len(found) > 1 else 0 for found in pair]
    is_whole = read[0] >= len(_bare(gold)) and read[1] >= len(_bare(said))
    return is_whole and bool(verify(*pair, timeout_seconds=limit))


def _bare(text: str) -> str:
    return re.sub(r"[\s$.]|\\[,;:! ]", "", text)
