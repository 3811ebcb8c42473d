"""Scorers of recorded replies that share no code and no method with dmoa's: regular expressions, Python's parser, string forms.

Each says whether a reply is right. They are crude on purpose; where they and dmoa disagree a person decided, in `DECIDED`.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def number_is_right(text: str, gold: str) -> bool:
    """What follows the last key `answer`, worked out by Python's parser, or its last number; without a key the last of all."""
    return number(text, is_strict=False) == Fraction(gold)


def expression_is_right(text: str, gold: str) -> bool:
    """As a number, but of a field only what is one number as a whole, with a unit or after a sentence's last verb."""
    try:
        return number(text, is_strict=True) == Fraction(gold.partition("_")[0])
    except ValueError:
        return False


def number(text: str, *, is_strict: bool) -> Fraction | None:
    text = re.split(r"\n(?:#+ (?:Question|Your task)|Question:\n)", text)[0]  # a model that goes on makes up its next question
    said = field(text)
    has_key = said is not None
    said = text if said is None else said
    try:
        return (
            value_of(ast.parse(re.sub(r"[$,%]", "", said).replace("^", "**").strip(), mode="eval").body)
            if has_key
            else last_number(said)
        )
    except (ValueError, SyntaxError, ZeroDivisionError, MemoryError, RecursionError, TypeError, OverflowError):
        if is_strict and (re.search(r"[\\^*\u221a\u03c0\[(;]|\d[a-z]\b|, -?\d|sqrt|[<>\u2264]", said)):
            return None
        return last_number(said)


def field(text: str) -> str | None:
    """Return what follows the last key `answer`, up to the quote or brace that ends it."""
    place = text.rfind('"answer"')
    if place < 0:
        return None
    said = text[place + len('"answer"') :].lstrip(" :\n")
    return re.split(r'(?<!\\)"', said[1:], maxsplit=1)[0] if said.startswith('"') else said.partition("}")[0]


def value_of(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value_of(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        right = value_of(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 99:
            raise ValueError(node)
        return OPERATORS[type(node.op)](value_of(node.left), right)
    raise ValueError(node)


def last_number(text: str) -> Fraction | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text.replace("$", ""))
    for word in reversed(found):
        try:
            return Fraction(word.replace(",", ""))
        except (ValueError, ZeroDivisionError):
            continue
    return None


def literal_is_right(text: str, gold: str) -> bool:
    """By spelling alone: the field's text and the gold's, with one kind of quotes and without blanks between parts."""
    found = list(re.finditer(r'"answer"\s*:\s*(.*?)\s*(?:\n\s*\}|\}\s*(?:```|$)|\Z)', text, flags=re.DOTALL))
    said = found[-1][1].strip().rstrip(",").strip() if found else text.strip().rpartition("\n")[2]
    try:
        read = json.loads(said, strict=False)
        said = read if isinstance(read, str) else said
    except ValueError:
        said = said[1:-1] if len(said) > 1 and said[0] == said[-1] == '"' else said
    return spelling(re.sub(r"^(?:assert )?f\(.*\) == ", "", said)) == spelling(gold)


def spelling(text: str) -> str:
    """Return a text with one kind of quotes and without blanks outside of them; the quotes of a whole text are taken off."""
    whole = text.replace('"', "'").replace("\n", "\\n").replace("\t", "\\t")
    bare = whole.strip()
    if bare[:1] in {"[", "(", "{"}:
        return "".join(part if number % 2 else re.sub(r"\s+", "", part) for number, part in enumerate(bare.split("'")))
    return bare[1:-1] if len(bare) > 1 and bare[0] == bare[-1] == "'" else whole
