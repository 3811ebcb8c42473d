"""Gives a reply the key of its answer: replies whose keys are equal agree. The equality is the one that scorers use.

A number is its exact value (6th is 6; several quantities, which score as no number, are words), a choice that the query lists its
letter, a Python literal its value, a mathematical expression its values at fixed points (`core/expressions`), and anything else
its words. Source: ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from dmoa.core.answers import canonical_answer, is_ordinal, read_answer, read_number
from dmoa.core.literals import read_literal
from dmoa.core.numbers import spelled

Form = Literal["any", "literal"]
"""What kind of answer a query asks for: a Python literal, whose quotes and capitals count, or any other."""

_ASSERTS = re.compile(r"\bassert\s+\w+\(")
_NAMED = re.compile(r"\bPython literal\b")
_OPEN_RESULT = re.compile(r"\)\s*==\s*(?:\?\?|\.\.\.)")
_CHOICE = re.compile(r"^[ \t]*\(?([A-H])[).:][ \t]+(\S[^\n]*)$", re.MULTILINE)
_INNER = re.compile(r"(?<=[^\W\d_])[.'\u2019](?=[^\W\d_])")
_MAX_KEPT = 16_384
"""Characters of a reply whose key is remembered: a thousand replies of megabytes would fill the memory."""
NO_ANSWER = -1
"""The class of a reply without an answer."""


def form_of(query: str) -> Form:
    """Return what kind of answer a query asks for."""
    # Two searches, each over the text once: as one pattern they would take quadratic time on text that a client wrote.
    asserts = _ASSERTS.search(query)
    is_literal = _NAMED.search(query) or (asserts and _OPEN_RESULT.search(query, asserts.end()))
    return "literal" if is_literal else "any"


def agreement_key(reply: str, query: str = "") -> str | None:
    """Return the key of a reply's answer, None where it has none. Never raises.

    Args:
        reply: the whole text of a reply; a thought in it counts for nothing.
        query: what was asked, which tells the form of the answer and its choices; without it a Python literal is words.
    """
    key = (_kept_key if len(reply) <= _MAX_KEPT else _key)(reply, form_of(query))
    if key is None or key.startswith(("literal:", "letter:")):
        return key
    choices = dict(_CHOICE.findall(query))  # of each letter the last: examples may stand before the question
    same = [letter for letter, text in choices.items() if _kept_key(f"Answer: {text[:_MAX_KEPT]}", "any") == key]
    return f"letter:{same[0].casefold()}" if len(same) == 1 < len(choices) else key


def _key(reply: str, form: Form) -> str | None:
    if form == "literal":
        literal = read_literal(reply).key
        return None if literal is None else f"literal:{literal}"
    found = read_answer(reply)
    if found.value is None:
        return None
    number = read_number(reply).value if found.kind == "number" or is_ordinal(found.value) else None
    if number is not None:
        return f"number:{spelled(number)}"
    said = canonical_answer(found.value)
    if found.kind == "text":  # as HotpotQA compares words
        said = " ".join(word for word in _INNER.sub("", said).split() if word not in ("a", "an", "the")) or said
    return f"{found.kind}:{said}"


_kept_key = lru_cache(maxsize=1024)(_key)
"""A step reads its replies again after each one that comes, between two awaits; the query itself is not kept."""


def answer_classes(replies: Sequence[str], query: str = "") -> list[int]:
    """Return which replies to one query agree: equal numbers from 0 on; `NO_ANSWER` without one, which agrees with nobody."""
    classes: dict[str, int] = {}
    found: list[int] = []
    for reply in replies:
        key = agreement_key(reply, query)
        found.append(NO_ANSWER if key is None else classes.setdefault(key, len(classes)))
    return found
