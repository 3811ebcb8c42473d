r"""Finds what a reply answers: the one reader for stopping, selection, agreement, the scorers and the reports.

A reply states its answer in a LaTeX box, a line `#### X`, "Answer: X" and its like, or a JSON object with an answer; else a short
reply is its answer, and of longer prose the last number. The last statement counts; what is said about one that was given, as in
"This answer is rounded to 2 decimals", is none. Thoughts count for nothing, and a question that a model made up after its answer
is not read. Only the end of a long reply is read, so any text is read in bounded time. Source: ours.
"""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Generic, Literal, TypeVar

from dmoa.core.expressions import expression_key, is_symbolic
from dmoa.core.numbers import FoundNumber, dates_and_times, expression_value, find_numbers, iter_numbers, plain_text, spelled
from dmoa.core.reasoning import split_reasoning

T = TypeVar("T")
MAX_CHARS = 20_000
"""Characters at the end of a reply that are read."""
_MAX_STATEMENTS = 64
_MAX_SHORT_CHARS = 120
_MAX_SHORT_WORDS = 10
_MAX_LISTING_WORDS = 6
"""A longer line with several numbers is working, and its last number the result; a shorter one is a date or a list."""
_MAX_SPAN_CHARS = 300
_MAX_LINE_WORDS = 8
"""A reply of one line and no more words is read as a statement."""

Kind = Literal["number", "letter", "expression", "text", "code"]
How = Literal["stated", "boxed", "json", "code", "choice", "short", "last"]
"""Where it stands: stated in words or after ####, in a box, JSON or block, a chosen letter, a short reply, the last number."""

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_MARK = re.compile(
    r"(?:^[ \t]*#{1,6}[ \t]*(?:the[ \t]+)?(?:final[ \t]+|correct[ \t]+)?answer[ \t]*(?=\n)"
    r"|\b(?:answer|ans)\b\.?(?:[ \t]+(?:to|for)[ \t]+[^.:=\n]{1,80}?)?[ \t]*"
    r"(?::|=|->|\u2192|\u21d2|[-\u2013\u2014](?=[ \t])|\b(?:is|was|would[ \t]+be|should[ \t]+be|must[ \t]+be)\b[ \t]*:?))"
    r"[ \t]*(?:\n[ \t]*){0,2}",
    re.IGNORECASE | re.MULTILINE,
)
_NO_MARK = re.compile(
    r"\b(?:find|get|give|gives|know|see|reach|compute|calculate|determine|obtain|derive|check|verify|write|an?)"
    r"[ \t]+(?:(?:the|your|our|my|this|that|final|correct|right|complete)[ \t]+){0,3}\Z"
    r"|\b(?:confidence|certainty)(?:[ \t]+(?:level|score))?[ \t]+(?:in|of|for|about)[ \t]+(?:(?:the|my|this|final)[ \t]+){0,2}\Z",
    re.IGNORECASE,
)
# "The answer is rounded to 2 decimals" speaks about an answer that was given; "... is rounded to 12" gives one.
_IS_PROSE = re.compile(r"\b(?:is|was|be)\s*\Z", re.IGNORECASE)
_ENDS = r"(?=\s*(?:\W*\Z|[.,;!)]|(?:and|but|because|since|as|for|with|in|by|to|if|when|under|given|based|due|less|greater)\b))"
_REMARK = re.compile(
    r"\A[\W_]*(?:(?:indeed|also|therefore|thus|then|now|clearly|simply|already|always|still|just|only|quite|both)\s+)*(?:"
    r"(?:correct|right|reasonable|sensible|plausible|valid|consistent|accurate|exact|complete|final|unique|positive|negative"
    rf"|an?\s+(?:\w+\s+)?(?:integer|number|fraction|decimal|percentage|approximation|estimate|expression)){_ENDS}"
    r"|in\s+(?:the\s+)?(?:\w+\s+)?(?:paragraph|passage|text|context)\b"
    r"|(?P<measure>(?:less|more|greater|smaller|larger|higher|lower|fewer)\s+than\b|at\s+(?:least|most)\b"
    r"|in\s+(?!fact\b|(?:the\s+)?[0-9])|the\s+same\b(?!.*[0-9]))"
    r"|(?:based|rounded|obtained|derived|found|verified|confirmed|checked|supported|justified|computed|calculated|determined|left"
    r"|reached|given|stated|provided|expressed|written|represented|presented|shown|measured|simplified)"
    r"(?=\s*(?:\W*\Z|[.,;!)]|(?:(?:\w+ly|up|down|off)\s+)?(?:on|to|by|in|from|with|as|using|for|at|above|twice|again|and|because)\b))"
    r"(?!(?:\s+\w+)?\s+(?:to\s+be|by|to|as)\s+[\W_]*[0-9](?!\S*[\s-]*(?:decimal|significant|place|digit|d\.?p|s\.?f))"
    r"|[^.]{0,40}\sas\s+(?!an?\b|the\b|requested|required|asked|above|instructed|specified|needed|shown)))",
    re.IGNORECASE,
)
_OPPOSITE = re.compile(r"\W*(?:incorrect|wrong|left|invalid)\b", re.IGNORECASE)
_HASHES = re.compile(r"^[ \t]*####[ \t]*([^\n]*)$", re.MULTILINE)
_BRACES = re.compile(r"\\(?:boxed|fbox)[ ]?\{|\{|\}")
_NEXT_TO = re.compile(r"[\s.,;:$*]*")
_REFUSAL = re.compile(
    r"(?:(?:i am|i'm|we are|we're)(?: \w+)? sorry|sorry\W*(?:but|i|we|as|\Z)|i apologi[sz]e"
    r"|as an? (?:ai|assistant|(?:large )?language model)\b"
    r"|(?:unfortunately,? )?(?:i|we)(?: am| are|'m|'re)? (?:cannot|can not|can't|could not|couldn't|won't|will not|do not|don't"
    r"|not able to|unable to|not allowed to|not permitted to|must decline|decline)\b)",
    re.IGNORECASE,
)
# A model that goes on after its answer makes up a next question; numbered ones are steps of its own.
_NEXT_QUESTION = re.compile(
    r"\n[ \t]*(?:#{1,6}[ \t]*)?(?:\*\*)?(?:question|problem|q|exercise|human|user|instruction)(?:\*\*)?[ \t]*:", re.IGNORECASE
)
_TAGGED = re.compile(r"<((?:final[_ ]?)?answer)>(.{0,2000}?)</\1>", re.IGNORECASE | re.DOTALL)
_END_OF_TURN = re.compile(r"<\|(?:im_end|eot_id|eom_id|endoftext|end_of_text)\|>|<end_of_turn>")
_MADE_UP = re.compile(
    r"\?\s|(?:^|[.!]\s)[ \t]*(?:find|calculate|determine|compute|work out)\s+(?:the|how|what|which)\b", re.I | re.M
)
_LETS_THINK = re.compile(
    r"\A(?:let(?:'s|s|\u2019s| us| me)\s+(?:think|see|solve|work|break|start|find|calculate|compute|go|consider|look)\b"
    r"|first,?\s+(?:we|i|let|calculate|compute|determine|find)\b|to (?:solve|find|answer|determine) (?:the|this|out|how|what)\b)",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\b[DdMmSsJjRr][rst])(?<!\bMrs)(?<!\bNo)(?<!\bvs)(?<!\b[Aa]pprox)[.!?](?=\s)")
_NEGATED = re.compile(r"\A\W*(?:(?:is|are|was|it)\s+)*(?:not|none|neither|never|nothing|isn't|cannot)\b", re.IGNORECASE)
_NOT_BUT = re.compile(r"\A\W*(?:(?:it|this|that)\s+(?:is|was)\s+)?not\b[^\n]*?\bbut\s+(?:rather\s+)?", re.IGNORECASE)
_REASON = re.compile(r",\s*as\b|,?\s+(?:because|since|due to|given that|considering|for which|such that)\b", re.IGNORECASE)
_DENIED = re.compile(
    r"\b(?:not|n't|neither|nor|never|(?:rul(?:e|es|ed|ing)|cross(?:ed)?)\s+out|eliminat(?:e|es|ed|ing)|exclud(?:e|es|ed|ing)|reject(?:s|ed)?"
    r"|discard(?:s|ed)?)\s+(?:be\s+)?(?:option\s+|choice\s+|answer\s+)?\(?\Z",
    re.IGNORECASE,
)
_IS_WRONG = re.compile(
    r"[)\].:*\s]*(?:(?:is|are|was|seems|looks|must\s+be)\s+(?:clearly\s+|also\s+|definitely\s+)?"
    r"(?:not\b|wrong|incorrect|false|ruled\s+out|impossible|excluded)|isn't\b|cannot\s+be|can't\s+be)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Statement:
    """One place where a reply says what its answer is."""

    span: str
    """What it says: one line, what the box holds, or the value in JSON; empty where the answer is announced and not given."""
    start: int
    end: int
    how: How = "stated"


@dataclass(frozen=True, slots=True)
class Final:
    """What a reply states last."""

    span: str
    rival: str | None = None
    """What it states directly before, with nothing in between; a contradiction where it says something else."""
    before: str | None = None
    """What it states before, wherever: of several numbers in the last statement, the one that repeats it is the answer."""
    how: How = "stated"


@dataclass(frozen=True, slots=True)
class ReplyText:
    """A reply made ready to be read: its thoughts and what follows its answer taken off."""

    prose: str
    """Plain text without fenced blocks; a reply that is nothing but a block is that block."""
    final: Final | None
    """What it states last; None if it states nothing."""
    code: str | None = None
    """The last fenced block, normalised; None without one."""
    is_only_thought: bool = False
    """Whether the reply ends inside a thought."""


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """What a reply answers, or why nothing was read."""

    value: str | None
    """Normalised; None where there is no answer."""
    kind: Kind | None
    how: How | None
    reason: str
    """In words: where the answer stood, or why there is none."""


def open_reply(text: str) -> ReplyText:
    """Return a reply ready to be read. Never raises."""
    split = split_reasoning(text)
    if split.is_open and not split.text:
        return ReplyText("", None, is_only_thought=True)
    said = without_next_question(split.text[-MAX_CHARS:])
    found = json_answer(said)
    prose, code = split_code(said)
    prose = plain_text(prose if prose.strip() or not code else code)
    final = final_statement(prose)
    if found is not None:
        span = plain_text(found.span).strip()
        after = final_statement(plain_text(said[found.end :].replace("```", " ")), given=span)
        final = replace(after, before=span) if after is not None and after.span else Final(span, how="json")
    return ReplyText(prose, final, code)


def without_next_question(text: str) -> str:
    """Cut a reply where its turn ends, or where, after a statement, the model asks itself the next question."""
    text = _turn(_TAGGED.sub(r"\nAnswer: \2\n", text))
    stated = f"(?:{_MARK.pattern})\\S|{_HASHES.pattern}|{JSON_KEY.pattern}|{_ROLE.pattern}"
    first = re.search(stated, text, _MARK.flags)
    question = _NEXT_QUESTION.search(text, first.end()) if first else None
    return text[: question.start()] if question else text


def _turn(text: str) -> str:
    """Cut a reply at the token that ends a turn, where one stands at the end of a line; text that speaks about it goes on."""
    for ended in _END_OF_TURN.finditer(text):
        if text[ended.end() : ended.end() + 2].lstrip(" ")[:1] in ("", "\n", "<"):
            text = text[: ended.start()] if text[: ended.start()].strip() else text
            break
    while (bare := text.rstrip()).endswith(("</s>", "<eos>")):
        text = bare[: bare.rfind("<")]
    return text


def is_refusal(prose: str) -> bool:
    """Tell whether a text begins as a refusal does ("I'm sorry, ...", "I cannot ...", "As an AI ...")."""
    return _REFUSAL.match(prose.strip().replace("\u2019", "'")) is not None


JSON_KEY = re.compile(r"[\"'](?:final_?|correct_?)?answer[\"']\s*:\s*", re.IGNORECASE)
_JSON_STRING = re.compile(r"\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'(?=\s*[,}])", re.DOTALL)
_JSON_BARE = re.compile(r"[^\s}\]\"'][^}\n]*")
_JSON_GOES_ON = re.compile(r"\s*(?:\Z|[}\]]|,\s*(?:[\"'}]|\Z))")


def json_answer(text: str) -> Statement | None:
    """Return the answer of the last JSON object that has one, also of an object that does not parse as a whole. Never raises."""
    keys = list(JSON_KEY.finditer(text))
    opening = text.rfind("{", 0, keys[-1].start()) if keys else -1
    if opening < 0:
        return None
    value, end = _json_value(text, keys[-1].end())
    closing = text.find("}", end)
    return Statement(value, opening, len(text) if closing < 0 else closing + 1, "json")


def _json_value(text: str, start: int) -> tuple[str, int]:
    """Return a value of JSON as text and where it ends; objects and lists as they are written."""
    try:
        value, end = json.JSONDecoder(parse_float=str, parse_int=str, strict=False).raw_decode(text, start)
        is_whole = _JSON_GOES_ON.match(text, end) is not None  # a calculation such as 150 * 2 begins with a number
    except (ValueError, RecursionError):
        is_whole = False
    if not is_whole:
        match = _JSON_STRING.match(text, start) or _JSON_BARE.match(text, start)
        return (match[match.lastindex or 0].strip(), match.end()) if match else ("", start)
    return (_with_latex(value) if isinstance(value, str) else text[start:end].strip("[]")), end


def _with_latex(value: str) -> str:
    """Give LaTeX its backslash back where JSON read it as an escape: of frac, beta, text, times. Half a character becomes `?`."""
    value = value.encode("utf-8", "replace").decode().replace("\x0c", "\\f").replace("\x08", "\\b")
    return re.sub(r"\t(?=ext|imes|heta|an\b)", r"\\t", value)


def final_statement(prose: str, *, given: str = "") -> Final | None:
    """Return what a plain text states last; None if it states nothing. `given`: the answer that stands before the text."""
    found = statement_places(prose, given=given)
    places = [statement for statement in found if statement.span]
    if not places:
        return Final("") if found else None
    last, before = places[-1], places[-2] if len(places) > 1 else None
    is_next = before is not None and _NEXT_TO.fullmatch(prose, before.end, last.start)
    return Final(last.span, before.span if before and is_next else None, before.span if before else None, last.how)


def last_line(prose: str) -> str:
    """Return the last line that is not blank, stripped."""
    return prose.rstrip().rpartition("\n")[2].strip()


def statement_places(prose: str, *, given: str = "") -> list[Statement]:
    """Return all statements by position, without remarks on an answer before them; a box in a marked line stands for the line."""
    boxes = _boxes(prose)[-_MAX_STATEMENTS:]
    marks = list(_MARK.finditer(prose))[-_MAX_STATEMENTS:]
    found, remarks = list(boxes), list[Statement]()
    for number, mark in enumerate(marks):
        if _NO_MARK.search(prose[max(0, mark.start() - 40) : mark.start()]):
            continue
        line_end = prose.find("\n", mark.end())
        end = len(prose) if line_end < 0 else line_end
        if number + 1 < len(marks):
            end = max(mark.end(), min(end, marks[number + 1].start()))
        span = prose[mark.end() : end].strip()
        if end < len(prose) and prose[end] != "\n" and (ends := list(SENTENCE_END.finditer(span))):
            span = span[: ends[-1].end()]  # the rest of the line begins the next statement
        if "\n" not in mark[0]:  # on a line of its own it is the mark of a list
            span = re.sub(r"\A[-\u2013\u2014]\s+(?=[$\u20ac\u00a3]?[0-9.])", "-", span)
        if _LETS_THINK.match(span):
            continue
        if not any(mark.start() <= box.start < end for box in boxes):
            is_remark = _IS_PROSE.search(mark[0]) is not None and _REMARK.match(span) is not None
            (remarks if is_remark else found).append(Statement(span, mark.start(), end))
    found += _hashed(prose)
    first = min((place for place in found if place.span), key=lambda place: place.start, default=None)
    for remark in remarks:
        before = given or (first.span if first and first.start < remark.start else "")
        if not _is_about(remark.span, before):
            found.append(remark)
    return sorted(found, key=lambda statement: statement.start)


def _is_about(remark: str, before: str) -> bool:
    """Whether a remark speaks about the answer before it; `in 1896` and `less than 5` may be others where that is words."""
    match = _REMARK.match(remark)
    is_other = match is not None and match["measure"] is not None and not re.search(r"[0-9]|\A\W*\w\W*\Z", before)
    return bool(before) and not is_other and not _OPPOSITE.match(before)


def _hashed(prose: str) -> list[Statement]:
    """Return the lines `#### X`; headings are none, and neither is what follows a question that was made up after the first."""
    found: list[Statement] = []
    for match in _HASHES.finditer(prose):
        is_last = not prose[match.end() :].strip()
        if not is_last and re.search("[A-Za-z]", match.group(1)):
            continue
        if found and _MADE_UP.search(prose, found[-1].end, match.start()):
            break
        found.append(Statement(match.group(1).strip(), match.start(), match.end()))
    return found


def _boxes(prose: str) -> list[Statement]:
    """Return the closed outermost boxes."""
    found: list[Statement] = []
    open_braces: list[re.Match[str]] = []
    for match in _BRACES.finditer(prose):
        if match.group() != "}":
            open_braces.append(match)
        elif open_braces:
            opening = open_braces.pop()
            if opening.group() != "{":
                while found and found[-1].start > opening.start():
                    found.pop()  # an outer box holds the inner ones
                found.append(Statement(prose[opening.end() : match.start()].strip(), opening.start(), match.end(), "boxed"))
    return found


def split_code(text: str) -> tuple[str, str | None]:
    """Return the text without its fenced blocks, and the last block normalised, None if there is none. Never raises."""
    blocks = _FENCE.findall(text)
    if not blocks:
        return text, None
    lines = (line.rstrip() for line in textwrap.dedent(blocks[-1].expandtabs(4)).splitlines())
    code = "\n".join(line for line in lines if line)
    return _FENCE.sub("\n\n", text), code or None


_CHOICE_START = re.compile(
    r"(?i)(?:(?:it\s+is|it['\u2019]s|option|choice)\s+){0,2}"
    r"(?:\(\s?([A-H])\s?\)|([A-H])(?:\s?\)|[.:,!?](?=\s|\Z)|[ \t]*(?:\n|\Z)|(?=\s+(?:because|since)\b)))"
)
_LISTED = re.compile(r"^[ \t]*\(?([A-H])[).:]", re.IGNORECASE | re.MULTILINE)
_TWO_CHOICES = re.compile(r"[ (*_]*[A-H]\)?\s*(?:,|/|&|\band\b|\bor\b)\s*\(?[A-H](?![\w'])")
_ROLE = re.compile(r"^[ \t]*A:[ \t]+(?=\S)", re.MULTILINE)
_CHOICE_INSIDE = re.compile(r"\(([A-H])\)")
_CALENDAR = re.compile(
    r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec|january|february|march|april|june|july|august|september|october"
    r"|november|december|monday|tuesday|wednesday|thursday|friday|saturday|sunday)\b",
    re.IGNORECASE,
)
_EDGES = ".,;:!?\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb()[]{}<>*_~|\\#$"
_ASIDE = re.compile(r"\([^()]*\)")


def read_answer(text: str) -> ReadAnswer:
    r"""Return the final answer of a reply with its kind and place, or why it has none. Never raises.

    In this order: what it states last (a box, a line `#### X`, "the answer is X", JSON); the last code block; a choice such as
    "(B)" or "B. ..."; a short single line, whole; the last number. Equal answers have values for which `same_answer` holds.
    """
    reply = open_reply(text)
    if reply.is_only_thought:
        return ReadAnswer(None, None, None, THOUGHT_ONLY)
    if reply.final is not None and reply.final.span:
        value, kind = _span_answer(reply.final.span)
        if value:
            return ReadAnswer(value, kind, reply.final.how, "stated")
        if kind == "number":
            return ReadAnswer(None, None, None, "it says what the answer is not, or leaves open which number it is")
    if reply.code:
        return ReadAnswer(reply.code, "code", "code", "the last code block")
    # `Q: ... A: 7` as in examples; a list of the choices has a B as well.
    prose = reply.prose if re.search(r"^[ \t]*\(?B[).:]", reply.prose, re.MULTILINE) else _ROLE.split(reply.prose)[-1]
    letter = _choice(prose)
    if letter:
        return ReadAnswer(letter, "letter", "choice", "the choice it names")
    short = _short(prose)
    if short:
        return ReadAnswer(short, _kind_of(short), "short", "a short reply")
    if "\n" not in prose.strip() and _is_range(prose):
        return ReadAnswer(None, None, None, _NONE.reason)
    last = _last_number(prose)
    return ReadAnswer(last, "number", "last", "the last number") if last else ReadAnswer(None, None, None, "no answer found")


def _kind_of(answer: str) -> Kind:
    is_letter = re.fullmatch("[a-h]", answer) is not None
    return "letter" if is_letter else "expression" if is_symbolic(answer) else "number" if _whole_number(answer) else "text"


def extract_answer(text: str) -> str | None:
    """Return the final answer of a reply, normalised, or None if it has none: the value of `read_answer`. Never raises."""
    return read_answer(text).value


def same_answer(a: str, b: str) -> bool:
    """Return whether two answers are the same: equal numbers (1,200 = 1200.0, 1/2 = 0.5) or equal normalised texts."""
    return a == b or canonical_answer(a) == canonical_answer(b)


def canonical_answer(answer: str) -> str:
    """Return the spelling that answers share for which `same_answer` holds."""
    if "\n" in answer:
        return answer
    answer = plain_text(answer).strip()
    return (expression_key(answer) if is_symbolic(answer) else _whole_number(answer)) or _normal_text(answer)


def _span_answer(span: str) -> tuple[str | None, Kind]:
    """Return the answer that a statement holds."""
    span = SENTENCE_END.split(span.strip(), maxsplit=1)[0].strip()
    span = span[match.end() :] if (match := _NOT_BUT.match(span)) else span
    choice = _CHOICE_START.match(span.lstrip("*_ "))
    if choice and not _TWO_CHOICES.match(span):
        return (choice[1] or choice[2]).casefold(), "letter"
    if _NEGATED.match(span) and (find_numbers(span) or _CHOICE_INSIDE.search(span)):
        return None, "number"
    if is_symbolic(span):
        return span, "expression"
    number = _numeric_line(_main_part(span))
    if number:
        return number, "number"
    text = _normal_text(span)
    return (None, "number") if _is_range(span) else (text or None, _kind_of(text) if len(text) == 1 else "text")


def _main_part(span: str) -> str:
    """Return a statement without why (`0, as 12 is too few`), on what condition (`7 when x = 2`) and asides with `=`."""
    reason = _REASON.search(span)
    if reason and find_numbers(span[: reason.start()]) and not _GOES_ON.search(span, reason.end()):
        span = span[: reason.start()]
    if "=" in span and find_numbers(bare := _EQUATION_ASIDE.sub(" ", span)):
        span = bare
    first = _leading_number(span)
    condition = _CONDITION.match(span, first.end) if first and not (_CALENDAR.search(span) or _RANGE.search(span)) else None
    if condition is None or _RESULT.search(span, condition.end()):
        return span
    if condition["loose"] and (_GOES_ON.search(span, condition.end()) or _CALCULATED.match(span, condition.end())):
        return span
    return span[: condition.end("unit")]


def _leading_number(span: str) -> FoundNumber | None:
    """Return the number that a span begins with, if it does."""
    first = next(iter_numbers(span), None)
    leading = _LEADING.match(span)
    return first if first and first.start <= (leading.end() if leading else 0) <= first.end else None


def is_ordinal(answer: str) -> bool:
    """Tell whether an answer is an ordinal and nothing else, such as 6th, which counts as the number 6."""
    ordinal = _ORDINAL.fullmatch(answer)
    return ordinal is not None and not ordinal[2].strip()


def is_denied(text: str, place: int, end: int | None = None) -> bool:
    """Tell whether what begins at `place` is said not to be the answer, as the second number of `5, not 6`.

    With its `end` also whether what follows says so, as in `(A) is wrong`.
    """
    is_wrong = end is not None and _IS_WRONG.match(text, end) is not None
    return is_wrong or _DENIED.search(text[max(0, place - 40) : place]) is not None


def without_denial(span: str) -> str | None:
    """Return what a statement leaves: Y of `not X but Y`; None where it says no more than what the answer is not."""
    span = span[match.end() :] if (match := _NOT_BUT.match(span)) else span
    return None if _NEGATED.match(span) else span


def _choice(prose: str) -> str | None:
    inside = [match[1] for match in _CHOICE_INSIDE.finditer(prose) if not is_denied(prose, match.start(), match.end())]
    is_list = len({match[1].upper() for match in _LISTED.finditer(prose)}) > 1
    for line in (prose.strip(), last_line(prose)):
        start = _CHOICE_START.fullmatch(line) if is_list else _CHOICE_START.match(line)
        is_one = start and not _IS_WRONG.match(line, start.end()) and not _TWO_CHOICES.match(line)
        letter = (start[1] or start[2]).casefold() if start and is_one else ""
        if letter and not (letter == "a" and "B" in inside):  # what begins with (A) and goes on to (B) lists the choices
            return letter
    return inside[-1].casefold() if inside else None


def _short(prose: str) -> str | None:
    line = prose.strip()
    is_short = "\n" not in line and len(line) <= _MAX_SHORT_CHARS and len(line.split()) <= _MAX_SHORT_WORDS
    # "Answer:" and an empty or unclosed box announce an answer and give none.
    if not is_short or line.endswith(":") or "\\boxed" in line:
        return None
    if is_symbolic(line):
        return line
    if _is_range(line):
        return None
    if any(is_denied(line, match.start(), match.end()) for match in _CHOICE_INSIDE.finditer(line)):
        return None
    return _numeric_line(_main_part(line)) or _normal_text(line) or None


def _numeric_line(line: str) -> str | None:
    """Return the number that a line amounts to: its only one, or the result after `=`, or of longer working the last."""
    if _CALENDAR.search(line) or len(_ASSIGNED.findall(line)) > 1:
        return None
    result = line.rpartition("=")[2]
    value = expression_value(_UNIT_WORDS.sub("", result.strip(" .$")))
    if value is not None:
        return spelled(value)
    found = _outside_asides(result)
    if len(found) > 1 and _is_total(result):
        found = found[:1]
    is_short = len(line.split()) <= _MAX_LISTING_WORDS
    if len(found) > 1 and (_is_several(result) or (is_short and not _GOES_ON.search(result, found[-2].end, found[-1].start))):
        return None
    return spelled(found[-1].value) if found and found[-1].value is not None else None


def _outside_asides(text: str) -> list[FoundNumber]:
    """Return the numbers of a text; those in parentheses only where there are no others."""
    return find_numbers(_ASIDE.sub(lambda match: " " * len(match[0]), text)) or find_numbers(text)


def _last_number(prose: str) -> str | None:
    line = last_line(prose)
    dates = dates_and_times(line)
    if dates and not find_numbers(line):
        return dates[-1]
    return None if (value := _last_reading(prose).value) is None else spelled(value)


def _whole_number(text: str) -> str | None:
    first = next(iter_numbers(text), None)
    is_whole = first is not None and first.start == 0 and first.end == len(text.rstrip("%"))
    return spelled(first.value) if first and is_whole and first.value is not None else None


def _normal_text(text: str) -> str:
    """Return the text casefolded, with single spaces and without punctuation at the edges of its words."""
    words = (word.strip(_EDGES) for word in text.replace(",", " ").casefold().split())
    return " ".join(word for word in words if word)


_LEADING = re.compile(
    r"(?:[\"'([{<$*~\u2248\s]|about|approximately|approx\.?|around|roughly|exactly|only|just|a total of|US|USD|Rs\.?)*",
    re.IGNORECASE,
)
_TRAILING = re.compile(r"(?:[A-Za-z$\u20ac\u00a3\u00a5%.,;:!?\"')\]}>*\s\u00b0/]|(?<=[A-Za-z])\^[23](?![0-9]))*")
_UNIT_WORDS = re.compile(r"[ \t][ \tA-Za-z.]*\Z")
_GOES_ON = re.compile(r"\b(?:so|thus|therefore|hence|total|altogether|makes?|leaves?|which is|that is|equals?)\b", re.IGNORECASE)
_ALTERNATIVE = re.compile(r"\s?[A-Za-z%]{0,12}\s?(?:\bor\b|\bto\b|[-\u2013\u2014])\s?\Z", re.IGNORECASE)
_ORDINAL = re.compile(r"\W*([0-9]{1,6})(?:st|nd|rd|th)\b([A-Za-z\s]{0,40})\W*", re.IGNORECASE)
_LIST = re.compile(r"\W*[-$]?[0-9.]+%?(?:(?:,\s+|;\s*|,?\s+(?:and|&)\s+)[-$]?[0-9.]+%?){1,20}\W*")
_RESULT = re.compile(r"\b(?:so|thus|therefore|hence)\b", re.IGNORECASE)
# After a number and its unit; a loose one may also be a part of a calculation, as in `10 pens at $5 each = $50`.
_CONDITION = re.compile(
    r"(?P<unit>(?:(?!\b(?:so|thus|therefore|hence|or|makes?|leaves?|equals?|that|which)\b)[^0-9=(]){0,24}?)[ \t,;:$]*"
    r"(?:\b(?:attained|reached|achieved|obtained)\s+)?"
    r"(?:\b(?:when|where|if|given|assuming|meaning|using|provided)\b|\b(?P<loose>for|with|at|across|less|more)\b"
    r"|\bwhich\s+is\s+(?=\S+\s+(?:\w+\s+){0,2}(?:more|less|fewer|times|greater|higher|lower|larger|smaller|older|younger)\b))",
    re.IGNORECASE,
)
_CALCULATED = re.compile(r"[^=]*[0-9][^=]*=")
_EQUATION_ASIDE = re.compile(r"(?<![A-Za-z0-9])\((?:[^()=]|\([^()]*\))*=(?:[^()]|\([^()]*\))*\)")
_TOTAL = re.compile(
    r"[^0-9,;:=]{0,30}?\b(?:total|altogether|in\s+all)\b(?!\s+(?:of|is|was|are|comes|makes)\b|\s*[$=]?[0-9])", re.IGNORECASE
)
_NO_UNIT = (
    "and|of|out|or|to|per|each|more|less|fewer|total|altogether|in|so|thus|that|which|is|are|was|were|makes?|than|for|at|with|by|after"
    "|before|left|remain|from|times|every|when|where|if|because|since|as|minus|plus|divided|multiplied"
)
_UNIT = rf"(?:\s*[%\u00b0]|(?:[\s-]+(?!(?:{_NO_UNIT})\b)[A-Za-z'\u2019]+){{1,3}})"
_QUANTITY = rf"[$\u20ac\u00a3]?[0-9.,/]+{_UNIT}"
_SEVERAL = re.compile(rf"\W*{_QUANTITY}(?:\s*(?:,|;|&|\band\b|,\s*and\b|\s)\s*{_QUANTITY})+\W*")
_OBJECT = re.compile(r"\s*\{[^{}:=]{1,80}:")
_ASSIGNED = re.compile(r"(?:\A|[,;]|\band\b)[\s$]*[a-zA-Z]\s*=(?!=)")
_RANGE = re.compile(r"\bbetween\b[^\n]*\band\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """What a reply gives: a number, a letter, an expression, a name."""

    value: T | None
    """None where it gives none."""
    reason: str


Number = Reading[Fraction]


THOUGHT_ONLY = "the thought never ended"
_NONE: Number = Reading(None, "no number, or several, where the answer stands")
_AMBIGUOUS: Number = Reading(None, "ambiguous separators")
NOT_THIS = "it says what the answer is not"
_DENIAL: Number = Reading(None, NOT_THIS)
_EXPRESSION: Number = Reading(None, "an expression, not a number")


def read_number(text: str) -> Number:
    """Return the number that a reply gives. Never raises."""
    reply = open_reply(text)
    final, prose = reply.final, reply.prose
    if reply.is_only_thought:
        return Reading(None, THOUGHT_ONLY)
    if final is None:
        if is_refusal(prose):
            return Reading(None, "the reply refuses to answer")
        line = prose.strip()
        if "\n" not in line and len(line.split()) <= _MAX_LINE_WORDS:
            return _named(_span_number(line), "a short reply")
        return _last_reading(prose)
    if not final.span:
        return Reading(None, "an answer is announced and not given")
    said = _json_number(final.span) if final.how == "json" else _span_number(final.span)
    rival = _span_number(final.rival).value if final.rival else None
    before = _span_number(final.before).value if final.before else None
    if before is not None and rival is None and before in [number.value for number in find_numbers(final.span)]:
        return Reading(before, "stated twice")
    if said.value is not None and rival is not None and rival != said.value:
        return Reading(None, f"two final answers: {spelled(rival)} and {spelled(said.value)}")
    return _named(said, "stated")


def _json_number(value: str) -> Number:
    """Return the number of a value in JSON: of several sentences or steps, the last one ends in it."""
    is_worked = not _is_several(value) and len(SENTENCE_END.split(value.strip())) > 1
    return _last_reading(value) if is_worked else _span_number(value)


def read_number_span(span: str) -> Fraction | None:
    """Return the number that a statement or a choice amounts to, None where it amounts to none. Never raises."""
    return _span_number(re.sub(r"\bper ?cent\b", "%", span)).value


def _named(reading: Number, place: str) -> Number:
    return reading if reading.value is None else Reading(reading.value, place)


def _last_reading(prose: str) -> Number:
    """Return the last number of a text that states no answer; one in parentheses only where its line has no other."""
    for line in reversed(prose.splitlines()):
        for number in reversed(_outside_asides(line)):
            if is_denied(line, number.start):
                continue
            return Reading(number.value, "the last number") if number.value is not None else _AMBIGUOUS
    return Reading(None, "no number found")


def _is_range(span: str) -> bool:
    """Whether a text names two numbers and leaves open which: 5 or 6, 5-7, between 5 and 6."""
    found = find_numbers(span)
    if len(found) < 2 or "=" in span:
        return False
    if _LIST.fullmatch(span):
        return True
    return bool(_RANGE.search(span)) or any(_ALTERNATIVE.fullmatch(span, a.end, b.start) for a, b in pairwise(found))


def _is_total(part: str) -> bool:
    """Whether a part begins with a number that is said to be the total: 18 in total, 6 of them red."""
    first = _leading_number(part)
    return first is not None and _TOTAL.match(part, first.end) is not None and not _RESULT.search(part, first.end)


def _is_several(part: str) -> bool:
    """Whether a part gives several quantities and no one number: 4 red and 6 blue, 7 hours 30 minutes, an object of JSON."""
    bare = _ASIDE.sub(" ", part[:_MAX_SPAN_CHARS])
    is_listed = _OBJECT.match(bare) is not None or _SEVERAL.fullmatch(bare) is not None
    return is_listed and len({number.value for number in find_numbers(bare)}) > 1


def _span_number(span: str) -> Number:
    """Return the number that a statement amounts to."""
    span = SENTENCE_END.split(span[:_MAX_SPAN_CHARS], maxsplit=1)[0]
    left = without_denial(span)
    if left is None:
        return _DENIAL
    span = _main_part(left)
    parts = [part.strip() for part in span.split("=") if part.strip()]
    if not parts or len(_ASSIGNED.findall(span)) > 1:
        return _NONE
    if is_symbolic(parts[-1]):
        return _EXPRESSION
    reading = _part_number(parts[-1])
    # "8 = 3 + 5" ends in a calculation, "5 = five apples" in words
    return reading if reading.value is not None or len(parts) == 1 else _part_number(parts[-2])


def _part_number(part: str) -> Number:
    value = expression_value(_UNIT_WORDS.sub("", part.strip(" .$")))
    found = find_numbers(part)
    is_first = _leading_number(part) is not None
    if is_first and _TRAILING.fullmatch(part, found[0].end):
        return Reading(found[0].value, "") if found[0].value is not None else _AMBIGUOUS
    if value is not None:
        return Reading(value, "")
    if not found and (ordinal := _ORDINAL.fullmatch(part)):
        return Reading(Fraction(ordinal[1]), "")
    if not found or _is_range(part) or _is_several(part):
        return _NONE
    outside = _outside_asides(part)
    is_result = not is_first or (_GOES_ON.search(part, found[0].end) is not None and not _is_total(part))
    number = outside[-1] if is_result else found[0]
    if is_denied(part, number.start):
        return _DENIAL
    return Reading(number.value, "") if number.value is not None else _AMBIGUOUS
