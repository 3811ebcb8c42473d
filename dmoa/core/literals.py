r"""Reads the Python value that a reply states, such as the output of a function, and compares values as Python does.

The value may stand in a field of JSON, in `assert f(..) == X`, after "Answer:", in a fence or in a sentence. It is never run:
`ast.literal_eval` reads it, within bounds. Text without quotes that is no literal is that string, since many models leave the
quotes to JSON; so is a bare list such as `1,2`, which is not known to be a list or a tuple. Source: ours, after CRUXEval's
`assert f(input) == output`.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from dmoa.core.answers import (
    JSON_KEY,
    MAX_CHARS,
    THOUGHT_ONLY,
    How,
    Statement,
    is_refusal,
    statement_places,
    without_next_question,
)
from dmoa.core.numbers import spelled
from dmoa.core.reasoning import split_reasoning

MAX_LITERAL_CHARS = 10_000
_MAX_DEPTH = 40
_MAX_LINE_CHARS = 2_000
_MAX_STRING_CHARS = 300
_MAX_WORDS = 30
"""A line of more characters or words is prose, and not a string without its quotes."""

_GOES_ON = re.compile(r"\s*(?:\Z|[}\]`]|,\s*(?:[\"'}]|\Z))")
_ASSERTED = re.compile(r"^[^\n]*?\bassert\b[^\n]*?(?<![=!<>])==(?!=)[ \t]*(?P<said>[^\n]+)$", re.MULTILINE)
_CALL = re.compile(r"\A(?:assert\s+)?\w+\(.*\)\s*==\s*", re.DOTALL)
_SCALAR = re.compile(r"(?<![\w.])(?:[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?!\w|\.\d)|True\b|False\b|None\b|set\(\))")
_DENIED = re.compile(r"\W*(?:it\s+is\s+|is\s+)?not\s+(?=[-\[({'\"0-9]|(?:True|False|None)\b)")
_PREFIX = re.compile(r"(?<!\w)[bBrRuU]{1,2}(?=['\"])")
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
_FENCE = re.compile(r"```[^\n`]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_OPENING = re.compile(r"```[\w+-]*")
_SCAFFOLD = re.compile(r"\[/?(?:PYTHON|ANSWER)\]", re.IGNORECASE)
_CLOSING = {"[": "]", "(": ")", "{": "}"}


@dataclass(frozen=True, slots=True)
class ReadLiteral:
    """The Python value that a reply states."""

    key: str | None
    """Its canonical spelling: equal for values that Python calls equal; None where there is none."""
    span: str
    """The text it was read from."""
    how: How | None
    reason: str


def read_literal(text: str) -> ReadLiteral:
    """Return the Python value that a reply states. Never raises."""
    split = split_reasoning(text)
    if split.is_open and not split.text:
        return ReadLiteral(None, "", None, THOUGHT_ONLY)
    said = without_next_question(_SCAFFOLD.sub("  ", split.text[-MAX_CHARS:]))
    broken = ""
    for span, how, reason in _places(said):
        if how == "stated" and _DENIED.match(span):
            return ReadLiteral(None, span, None, "it says what the answer is not")
        key = _key_of(span, is_whole=how == "json")
        if key is not None:
            return ReadLiteral(key, span, how, reason)
        broken = broken or (span if span.lstrip("`* ")[:1] in ("[", "{") else "")
    if broken:
        return ReadLiteral(None, broken, None, "what it states is not a Python literal")
    if is_refusal(said):
        return ReadLiteral(None, "", None, "the reply refuses to answer")
    return _unstated(said)


def literal_key(text: str) -> str | None:
    """Return the canonical spelling of a Python literal; None if the text is none, or too long or deep. Never raises."""
    text = text.strip()
    depths = accumulate((char in "[({") - (char in "])}") for char in text[:MAX_LITERAL_CHARS])
    if not text or len(text) > MAX_LITERAL_CHARS or sum(map(text.count, "[({")) > 2_000 or max(depths) > _MAX_DEPTH:
        return None
    if text == "set()":
        return "{}s"
    for attempt in (text, text.replace("\n", "\\n"), text.translate(_QUOTES)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                return _spelled(ast.literal_eval(attempt))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _spelled(value: object) -> str:
    """Return a spelling that is equal exactly for equal values: 1 == 1.0 == True, dicts and sets in any order."""
    match value:
        case bool() | int():
            return spelled(Fraction(int(value)))
        case float() if value - value == 0:
            return spelled(Fraction(value))
        case list():
            return f"[{','.join(map(_spelled, value))}]"
        case tuple():
            return f"({','.join(map(_spelled, value))})"
        case dict():
            return f"{{{','.join(sorted(f'{_spelled(key)}:{_spelled(item)}' for key, item in value.items()))}}}"
        case set() | frozenset():
            return f"{{{','.join(sorted(map(_spelled, value)))}}}s"
    return repr(value)


def _key_of(span: str, *, is_whole: bool) -> str | None:
    """Return the value of a span; `is_whole`: it is that and nothing else, so what is no literal is a string."""
    bare = span if is_whole else span.strip().strip("`*").strip()
    if not bare.strip():
        return repr(bare) if is_whole else None
    if (call := _CALL.match(bare)) is not None and bare[call.end() :].strip(" ?"):
        bare = bare[call.end() :]
    if not _is_listing(bare):
        for attempt in (bare, bare.rstrip(" .;,"), bare.strip("`").strip()):
            if (key := literal_key(attempt)) is not None:
                return key
    found = literal_at(bare, 0) if not is_whole or bare[:1] in "[({" else None
    if found is not None and (not is_whole or re.match(r"\s*(?:#|\(|\n|because|since|as\b|['\"]\Z)", bare[found[1] :])):
        return found[0]
    if not is_whole:
        inner = [key for key, _ in _literals(bare)] if bare[0] not in "[{" else []
        if inner:
            return inner[-1]
        bare = bare.rstrip(".")
    is_string = bare and bare[0] not in _CLOSING and len(bare) <= _MAX_STRING_CHARS and len(bare.split()) <= _MAX_WORDS
    return repr(bare) if is_whole or is_string else None


def _is_listing(text: str) -> bool:
    """Whether a text is `1, 2` without brackets: not known to be a list, a tuple or a string."""
    found = literal_at(text.strip(), 0)
    return found is not None and text.strip()[found[1] :].lstrip().startswith(",") and bool(text.strip()[found[1] :].strip(" ,."))


def literal_at(text: str, start: int) -> tuple[str, int] | None:
    """Return the key of the literal that begins at a place, and where it ends; None where none does."""
    if (prefix := _PREFIX.match(text, start)) is not None:
        end = _end_of(text, prefix.end())
    elif text[start : start + 1] in _CLOSING or text[start : start + 1] in {"'", '"', "\u2018", "\u201c"}:
        end = _end_of(text, start)
    else:
        match = _SCALAR.match(text, start)
        end = match.end() if match else None
    if end is None:
        return None
    key = literal_key(text[start:end])
    return None if key is None else (key, end)


def _end_of(text: str, start: int) -> int | None:
    """Return where the brackets or quotes that open at `start` close; None if they do not, or are too deep for a literal.

    Looking on from there would take a text that opens a bracket in every place the square of its length.
    """
    stack: list[str] = []
    quote, place = "", start
    while place < min(len(text), start + MAX_LITERAL_CHARS):
        char = text[place]
        if quote:
            if char == "\\":
                place += 1
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "\u2018\u201c":
            quote = "\u2019" if char == "\u2018" else "\u201d"
        elif char in _CLOSING:
            stack.append(_CLOSING[char])
            if len(stack) > _MAX_DEPTH:
                return None
        elif stack and char == stack[-1]:
            stack.pop()
        place += 1
        if not quote and not stack:
            return place
    return None


def _literals(line: str) -> Iterator[tuple[str, int]]:
    """Yield the literals of a line with where they begin."""
    place, line = 0, line[-_MAX_LINE_CHARS:]
    for _ in range(_MAX_LINE_CHARS):
        match = re.compile(r"(?<!\w)['\"\u2018\u201c\[({]|" + _SCALAR.pattern).search(line, place)
        if match is None:
            return
        found = literal_at(line, match.start())
        if found is not None:
            yield found[0], match.start()
        place = found[1] if found is not None else match.start() + 1


def _places(said: str) -> Iterator[tuple[str, How, str]]:
    """Yield the texts where an answer is stated, from the one that counts most on."""
    field, field_end = _field(said)
    places = [(match.start(), match["said"], "an assertion") for match in _ASSERTED.finditer(said) if "??" not in match["said"]]
    given = field or (places[0][1] if places else "")
    stated = [(place.start, _stated(said, place), "stated") for place in statement_places(said, given=given)]
    places += [place for place in stated if place[1]]
    after = [place for place in places if field is None or place[0] >= field_end]
    for _, span, reason in sorted(after, reverse=True)[:3]:
        if field is None or _key_of(span, is_whole=False) is not None:
            yield span, "stated", reason
    if field is not None:
        yield field, "json", "a field of JSON"


def _stated(said: str, place: Statement) -> str:
    """Return what a statement says, also where that is a block or a literal of several lines."""
    if _OPENING.fullmatch(place.span) and (block := _FENCE.match(said, said.find("```", place.start))):
        return block[1].strip()
    start = said.find(place.span, place.start)
    whole = literal_at(said, start) if place.span[:1] in _CLOSING else None
    return said[start : whole[1]] if whole and whole[1] > place.end else place.span


def _field(said: str) -> tuple[str | None, int]:
    """Return the text of the last field `answer`, as Python would write it where JSON has a value, and where its object ends."""
    keys = list(JSON_KEY.finditer(said))
    key = keys[-1] if keys else None
    if key is None or said.rfind("{", 0, key.start()) < 0:
        return None, 0
    value, end = _field_value(said, key.end())
    closing = said.find("}", end)
    return value, len(said) if closing < 0 else closing + 1


def _field_value(said: str, start: int) -> tuple[str, int]:
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(said, start)
        if _GOES_ON.match(said, end):
            return (value if isinstance(value, str) else repr(value)), end
    except (ValueError, RecursionError):
        pass
    found = literal_at(said, start)
    if found is not None and _GOES_ON.match(said, found[1]):
        text = said[start : found[1]]
        return (_unescaped(text[1:-1]) if text[0] in "'\"" else text), found[1]
    line_end = said.find("\n", start)
    line = said[start : len(said) if line_end < 0 else line_end]
    quoted = re.match(r"\"(.*)\"\s*,?\s*}?\s*(?:```)?\s*\Z", line)
    if quoted is not None:
        return _unescaped(quoted[1]), start + quoted.end(1)
    return _unescaped(re.sub(r"\s*}?\s*(?:```)?\s*\Z", "", line).removeprefix('"').rstrip(",")), start + len(line)


def _unescaped(text: str) -> str:
    """Undo JSON's escapes where a text has others, too, which JSON does not allow."""
    return re.sub(r"\\([\\\"n])", lambda match: "\n" if match[1] == "n" else match[1], text)


def _unstated(said: str) -> ReadLiteral:
    """Return what a reply answers that states nothing: all of it, its last block, or the last literal of its last line."""
    whole = said.strip()
    blocks = [block.strip() for block in _FENCE.findall(whole) if block.strip()]
    if blocks and (key := literal_key(blocks[-1])) is not None:
        return ReadLiteral(key, blocks[-1], "code", "the last code block")
    bare = _FENCE.sub("\n", whole).strip() if blocks and _FENCE.sub("", whole).strip() else (blocks[-1] if blocks else whole)
    key = literal_key(bare.strip("`* ")) if not _is_listing(bare) else None
    if key is None and bare and "\n" not in bare and not bare.endswith(":") and len(bare.split()) <= 1:
        key = _key_of(bare, is_whole=False)
    if key is not None:
        return ReadLiteral(key, bare, "short", "the whole reply")
    for line in reversed(bare.splitlines()):
        if "??" not in line and (found := list(_literals(line))):
            return ReadLiteral(found[-1][0], line.strip(), "last", "the last literal")
    return ReadLiteral(None, "", None, "no Python literal found")
