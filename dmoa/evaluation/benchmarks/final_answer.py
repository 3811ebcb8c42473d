"""Finds where a reply states its final answer, for the scorers of texts.

A statement is a LaTeX box, a line `#### X`, or "Answer: X" and its like ("the answer is X"). Only the end of a long
reply is read, so that any text is read in bounded time. Source: ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dmoa.core.answers import plain_text, split_code

MAX_CHARS = 20_000
"""Characters at the end of a reply that are read."""
_MAX_STATEMENTS = 64

_MARK = re.compile(
    r"(?:^[ \t]*#{1,6}[ \t]*(?:the[ \t]+)?(?:final[ \t]+|correct[ \t]+)?answer[ \t]*(?=\n)"
    r"|\b(?:answer|ans)\b\.?(?:[ \t]+(?:to|for)[ \t]+[^.:=\n]{1,80}?)?[ \t]*"
    r"(?::|=|[-\u2013\u2014](?=[ \t])|\b(?:is|was|would[ \t]+be|should[ \t]+be|must[ \t]+be)\b[ \t]*:?))"
    r"[ \t]*(?:\n[ \t]*){0,2}",
    re.IGNORECASE | re.MULTILINE,
)
_NO_MARK = re.compile(
    r"\b(?:find|get|give|gives|know|see|reach|compute|calculate|determine|obtain|derive|check|verify|write|an?)"
    r"[ \t]+(?:(?:the|your|our|my|this|that|final|correct|right|complete)[ \t]+){0,3}\Z",
    re.IGNORECASE,
)
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


@dataclass(frozen=True, slots=True)
class Statement:
    """One place where a reply says what its answer is."""

    span: str
    """What it says: one line, or what the box holds; empty where the answer is announced and not given."""
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Final:
    """What a reply states last."""

    span: str
    rival: str | None = None
    """What it states directly before, with nothing in between; a contradiction where it says something else."""


def readable(text: str) -> str:
    """Return the end of a reply, made plain, without its fenced blocks; one that is nothing but a block is that block."""
    prose, code = split_code(text[-MAX_CHARS:])
    return plain_text(prose if prose.strip() or not code else code)


def is_refusal(prose: str) -> bool:
    """Tell whether a reply begins as a refusal does ("I'm sorry, ...", "I cannot ...", "As an AI ...")."""
    return _REFUSAL.match(prose.strip().replace("\u2019", "'")) is not None


def final_statement(prose: str) -> Final | None:
    """Return what a reply states last; None if it states nothing."""
    found = _statements(prose)
    given = [statement for statement in found if statement.span]
    if not given:
        return Final("") if found else None
    last = given[-1]
    if len(given) > 1 and _NEXT_TO.fullmatch(prose, given[-2].end, last.start):
        return Final(last.span, given[-2].span)
    return Final(last.span)


def last_line(prose: str) -> str:
    """Return the last line that is not blank, stripped."""
    return prose.rstrip().rpartition("\n")[2].strip()


def _statements(prose: str) -> list[Statement]:
    """Return all statements by position; a box inside a marked line stands for the line."""
    boxes = _boxes(prose)[-_MAX_STATEMENTS:]
    marks = list(_MARK.finditer(prose))[-_MAX_STATEMENTS:]
    found = list(boxes)
    for number, mark in enumerate(marks):
        if _NO_MARK.search(prose[max(0, mark.start() - 40) : mark.start()]):
            continue
        line_end = prose.find("\n", mark.end())
        end = len(prose) if line_end < 0 else line_end
        if number + 1 < len(marks):
            end = max(mark.end(), min(end, marks[number + 1].start()))
        if not any(mark.start() <= box.start < end for box in boxes):
            found.append(Statement(prose[mark.end() : end].strip(), mark.start(), end))
    for match in _HASHES.finditer(prose):
        is_last = not prose[match.end() :].strip()
        if is_last or not re.search("[A-Za-z]", match.group(1)):
            found.append(Statement(match.group(1).strip(), match.start(), match.end()))
    return sorted(found, key=lambda statement: statement.start)


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
                found.append(Statement(prose[opening.end() : match.start()].strip(), opening.start(), match.end()))
    return found
