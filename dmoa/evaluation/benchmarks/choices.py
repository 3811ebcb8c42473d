"""MMLU and AQuA-RAT: multiple choice, asked without examples and scored by the letter that a reply writes.

Label: `letter`, and the texts of the choices. MMLU's original protocol is 5-shot and takes the likeliest next token among A-D.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from dmoa.core.answers import (
    SENTENCE_END,
    THOUGHT_ONLY,
    Reading,
    is_denied,
    is_refusal,
    last_line,
    open_reply,
    read_number_span,
    without_denial,
)
from dmoa.core.numbers import plain_text
from dmoa.evaluation.benchmarks.base import VALUE, HubSource, ScorerEntry, Slice, Text, UpstreamRow, benchmark, gold_of, unscored
from dmoa.evaluation.records import Label, Reply, Score

LETTERS = "ABCDE"
LETTER_FORMAT = "End with a line `Answer: X`, X one letter."


@benchmark(
    "mmlu",
    title="MMLU",
    slices={"train": Slice(file="dev"), "adaptation": Slice(file="validation"), "test": Slice(file="test")},
    scoring=lambda _: entry("a generated letter, zero-shot, in place of 5-shot next-token probabilities"),
    hub=HubSource(dataset="cais/mmlu", config="all", revision="c30699e8356da336a370243923dbaf21066bb9fe"),
)
class MmluRow(UpstreamRow):
    """A row of `cais/mmlu`."""

    question: Text
    subject: Text
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: Annotated[int, Field(ge=0, le=3)]
    """Index of the right choice."""

    def text(self) -> str:
        task = f"Answer the multiple-choice question about {self.subject.replace('_', ' ')}. {LETTER_FORMAT}"
        return f"{task}\n\nQuestion: {self.question.strip()}\n{render_choices(self.choices)}"

    def gold(self) -> dict[str, Any]:
        return {"letter": LETTERS[self.answer], "choices": list(self.choices)}

    def group(self) -> str:
        """The subject."""
        return self.subject


def render_choices(choices: list[str]) -> str:
    """One line a choice: `A) text`."""
    return "\n".join(f"{letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False))


def _check_options(options: list[str]) -> list[str]:
    if len(options) != len(LETTERS):
        raise ValueError(f"five options, not {len(options)}")
    for letter, option in zip(LETTERS, options, strict=True):
        if not option.startswith(f"{letter})"):
            raise ValueError(f"options that begin with A) to E) in order; the one for {letter} is {option!r:.60}")
    return options


@benchmark(
    "aqua_rat",
    title="AQuA",
    slices={"train": Slice(file="train"), "adaptation": Slice(file="validation"), "test": Slice(file="test")},
    scoring=lambda _: entry(""),
    hub=HubSource(dataset="deepmind/aqua_rat", config="raw", revision="33301c6a050c96af81f63cad5562cb5363e88971"),
)
class AquaRow(UpstreamRow):
    """A row of `deepmind/aqua_rat`, raw."""

    question: Text
    options: Annotated[list[str], AfterValidator(_check_options)]
    rationale: str
    correct: Literal["A", "B", "C", "D", "E"]

    def choices(self) -> list[str]:
        """The options without their letters."""
        return [re.sub(r"^[A-E]\)\s*", "", option) for option in self.options]

    def text(self) -> str:
        task = f"Answer the multiple-choice algebra question. {LETTER_FORMAT}"
        return f"{task}\n\nQuestion: {self.question.strip()}\n{render_choices(self.choices())}"

    def gold(self) -> dict[str, Any]:
        return {"letter": self.correct, "choices": self.choices()}


_EDGES = "\"'\u2018\u2019\u201c\u201d \t\r\n$*_{}[]<>\\"
_LEAD = re.compile(r"(?:the\s+)?(?:(?:correct|best|right|final)\s+)?(?:option|choice|letter|answer)\b(?:\s+is\b)?\s*:?\s*", re.I)
_PLAIN = re.compile(
    r"(?:(?:it|that|this)(?:\s+(?:is|must\s+be|has\s+to\s+be|should\s+be)|['\u2019]s)|(?:my|our)\s+(?:choice|pick)\s+is"
    r"|(?:i|we)(?:\s+(?:would|will)|['\u2019](?:d|ll))?\s+(?:choose|chose|pick|select|say|go\s+(?:with|for)|opt\s+for))\s+",
    re.I,
)
_RESULT = re.compile(r"\b(?:so|thus|therefore|hence|leaving|leaves)\b[,:]?\s*")
_CLAUSE = re.compile(r"[,;]\s*(?:(?:and|but)\s+)?")
_SEVERAL = re.compile(r"[0-9][^0-9]*[A-Za-z]{2}[^0-9^]*[0-9]")
"""Two quantities, such as 7 hours 30 minutes: a choice of them is not the value of either."""
_MAX_PLAIN_CHARS = 300
_MAX_PLAIN_WORDS = 8
_NO_LETTER = "no letter found"


Letter = Reading[str]
"""The letter that a reply chooses, in upper case; None where it does not choose."""


@dataclass(frozen=True, slots=True)
class _Patterns:
    """The patterns for one number of choices."""

    bare: re.Pattern[str]
    start: re.Pattern[str]
    conflict: re.Pattern[str]
    listed: re.Pattern[str]
    inside: re.Pattern[str]
    letter: re.Pattern[str]
    preferred: re.Pattern[str]
    verdicts: tuple[re.Pattern[str], ...]


@lru_cache(maxsize=16)
def _patterns(num_choices: int) -> _Patterns:
    last = chr(ord("A") + num_choices - 1)
    upper, both = f"[A-{last}]", f"[A-{last}a-{last.lower()}]"
    right = r"(?:is|seems|looks|must\s+be)\s+(?:the\s+)?(?:most\s+)?(?:correct|right|best)\b"
    return _Patterns(
        bare=re.compile(rf"\(?\s?({both})[\s).:,;!?]*"),
        start=re.compile(rf"(?:\(({both})\)|({both})[).:,;](?!\w)|({upper})(?=\s+(?:because|since|[-\u2013\u2014=(])))"),
        conflict=re.compile(
            rf"(?:[Bb]oth\s+|[Ee]ither\s+)?\(?({upper})\)?\s*(?:,|/|&|\+|\bor\b|\band\b)\s*(?:option\s+)?\(?({upper})\b"
        ),
        listed=re.compile(rf"^[ \t]*(?:\(({both})\)|({both})[.):])", re.MULTILINE),
        inside=re.compile(rf"(?<!\w)\(({upper})\)"),
        letter=re.compile(rf"(?:[Oo]ption\s+|[Cc]hoice\s+)?\(?({upper})\)?(?![\w'])"),
        preferred=re.compile(
            rf"\(?({upper})\)?\s+(?:{right}|(?:and|but)\s+not\b|(?:not|over)\s+\(?{upper}\b|rather\s+than\b|instead\s+of\b)"
        ),
        verdicts=(
            re.compile(rf"\b(?:option|choice|answer)\s+\(?({both})\)?(?![\w'])\s*{right}", re.IGNORECASE),
            re.compile(rf"(?<!\w)\(({both})\)\s*{right}"),
            re.compile(rf"(?<![\w(])({upper})\s+(?:{right}|is\s+the\s+(?:correct\s+)?answer\b)"),
            re.compile(
                rf"\b(?:correct|right|best)\s+(?:option|choice|letter)\s*(?::|is)\s*(?:option\s+)?\(?({upper})(?![\w'])", re.I
            ),
            re.compile(rf"\b(?:choose|chose|select|pick|go\s+with)\s+(?:option\s+|choice\s+)?\(?({upper})(?![\w'])"),
        ),
    )


def read_choice(text: str, choices: Sequence[str]) -> Letter:
    """Return the letter, A for the first choice, that a reply chooses. Never raises."""
    reply = open_reply(text)
    prose, final = reply.prose, reply.final
    if reply.is_only_thought:
        return Reading(None, THOUGHT_ONLY)
    if final is None:
        if is_refusal(prose):
            return Reading(None, "the reply refuses to answer")
        choice, line = _unmarked_choice(prose.strip(), choices), prose.strip()
        is_plain = choice.reason == _NO_LETTER and "\n" not in line and len(line.split()) <= _MAX_PLAIN_WORDS
        return _stated_choice(line, choices) if is_plain else choice
    if not final.span:
        return Reading(None, "an answer is announced and not given")
    choice = _stated_choice(final.span, choices)
    rival = _stated_choice(final.rival, choices).value if final.rival else None
    if choice.value and rival and rival != choice.value:
        return Reading(None, f"two final answers: {rival} and {choice.value}")
    return choice


def _unmarked_choice(prose: str, choices: Sequence[str]) -> Letter:
    patterns = _patterns(len(choices))
    is_list = len({(match[1] or match[2]).upper() for match in patterns.listed.finditer(prose)}) > 1
    if not is_list:
        for span in (prose, prose.partition("\n")[0]):
            choice = _span_choice(span, choices)
            if choice.value:
                return choice
    said = {match[1].upper() for pattern in patterns.verdicts for match in pattern.finditer(prose)}
    if said:
        return _only(said, "said to be right")
    line = last_line(prose)
    choice = _span_choice(line, choices)
    if choice.value and not (is_list and patterns.listed.match(line) and not patterns.bare.fullmatch(line)):
        return choice
    return _only(
        {match[1] for match in patterns.inside.finditer(prose) if not is_denied(prose, match.start(), match.end())},
        "the only letter in parentheses",
    )


def _only(letters: set[str], reason: str) -> Letter:
    if len(letters) == 1:
        return Reading(letters.pop(), reason)
    return Reading(None, f"several letters: {', '.join(sorted(letters))}" if letters else _NO_LETTER)


def _span_choice(span: str, choices: Sequence[str]) -> Letter:
    """Return the choice that a span amounts to: the letter it begins with, or the full text of exactly one choice."""
    patterns = _patterns(len(choices))
    text = span.strip(_EDGES)
    lead = _LEAD.match(text)
    if lead:
        text = text[lead.end() :].strip(_EDGES)
    if text.startswith("A: ") and text.count("A: ") == 1 and (said := _span_choice(text[3:], choices)).value:
        return said  # A: names who speaks, as in `Q: ... A: B`
    bare = patterns.bare.fullmatch(text)
    if bare:
        return Reading(bare[1].upper(), "letter")
    by_text = _choice_of_text(span, choices)
    if by_text:
        return Reading(by_text, "text of a choice")
    conflict = patterns.conflict.match(text)
    if conflict and conflict[1] != conflict[2]:
        return Reading(None, f"two letters: {conflict[1]} and {conflict[2]}")
    start = patterns.start.match(text)
    if start:
        letter = (start[1] or start[2] or start[3]).upper()
        if is_denied(text, start.start(), start.end()):
            return Reading(None, f"{letter} is said to be wrong")
        other = _choice_of_text(text[start.end() :], choices)
        if other and other != letter:
            return Reading(None, f"letter {letter} with the text of choice {other}")
        return Reading(letter, "letter")
    spaced, _, rest = text.partition(" ")
    if len(spaced) == 1 and _choice_of_text(rest, choices) == spaced.upper():
        return Reading(spaced.upper(), "letter and text")
    by_value = _choice_of_value(span, choices)
    return Reading(by_value, "value of a choice") if by_value else Reading(None, _NO_LETTER)


def _stated_choice(span: str, choices: Sequence[str]) -> Letter:
    """Return the choice of a statement, also of one in plain words: it is B; not A, but B; B and not A; A is wrong, so B."""
    choice = _span_choice(span, choices)
    if choice.reason != _NO_LETTER:
        return choice
    said = SENTENCE_END.split(span[:_MAX_PLAIN_CHARS], maxsplit=1)[0].strip(_EDGES)
    text = without_denial(said) or ""
    patterns = _patterns(len(choices))
    for _ in choices:
        first = patterns.letter.match(text)
        if first is None or not is_denied(text, first.start(), first.end()):
            break
        then = _RESULT.search(text, first.end()) or _CLAUSE.search(text, first.end())
        text = text[then.end() :] if then else ""
    plain = _PLAIN.match(text)
    text = text[plain.end() if plain else 0 :].strip(_EDGES)
    found = _span_choice(text, choices) if text and text != said else choice
    preferred = patterns.preferred.match(text)
    if preferred and found.reason == _NO_LETTER:
        return Reading(preferred[1], "letter")
    return found


def _choice_of_value(span: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the only choice that is a number and has the value of this one; 1/2 is 0.5, 50 percent is 50%."""
    values = [read_number_span(plain_text(choice)) if _is_value(plain_text(choice)) else None for choice in choices]
    wanted = read_number_span(span)
    same = [number for number, value in enumerate(values) if value is not None and value == wanted]
    return chr(ord("A") + same[0]) if len(same) == 1 and not _SEVERAL.search(plain_text(choices[same[0]])) else None


def _is_value(choice: str) -> bool:
    """Whether a choice is a number with at most a unit: what holds several words may say anything."""
    return len(choice) <= 40 and len(choice.split()) <= 4 and sum(word.isalpha() for word in choice.split()) <= 2


def _choice_of_text(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the only choice whose full text this is; case counts only where it tells choices apart."""
    for fold in (_tidy, lambda choice: _tidy(choice).casefold()):
        wanted = fold(text)
        same = [number for number, choice in enumerate(choices) if wanted and fold(choice) == wanted]
        if same:
            return chr(ord("A") + same[0]) if len(same) == 1 else None
    return None


def _tidy(text: str) -> str:
    return " ".join(plain_text(text[:2000]).strip(_EDGES + ".,;:!?").split())


def entry(deviation: str) -> ScorerEntry:
    """Return the scoring of a multiple-choice benchmark, whose gold has `letter` and `choices`."""
    return ScorerEntry(
        score=_score,
        gold_replies=lambda label: {VALUE: f"Answer: {_gold(label)[0]}"},
        primary="accuracy (letter)",
        chance=lambda labels: sum(1 / len(_gold(label)[1]) for label in labels) / max(1, len(labels)),
        answer_key=lambda label: _gold(label)[0],
        deviation=deviation,
    )


def _gold(label: Label) -> tuple[str, list[str]]:
    letter, choices = gold_of(label, "letter", "choices")
    return letter, choices


def _score(label: Label, reply: Reply) -> Score:
    letter, choices = _gold(label)
    choice = read_choice(reply.text, choices)
    if choice.value is None:
        return unscored(choice.reason)
    is_right = choice.value == letter
    return Score(value=float(is_right), extracted=choice.value, reason=f"{choice.reason}: {choice.value}, right is {letter}")
