r"""Tells whether two mathematical expressions, plain or in LaTeX, are the same: 32\pi/3 and \frac{32}{3}\pi, 91-2x and -2x+91.

An expression is computed at three fixed values of its variables; equal values mean equal expressions. Intervals, points, sets and
matrices are compared part by part. What it cannot compute has no key, and is compared as text. Source: ours (identity testing by
evaluation, Schwartz 1980).
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

_MAX_CHARS = 300
_MAX_DEPTH = 30
_POINTS = 3
_DIGITS = 9
"""Significant digits that are compared: doubles lose the others to rounding."""
_MAX_VALUE = 1e30

_PLAIN: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\left|\\right|\\displaystyle|\\(?:q?quad|[,;:! ])(?![a-z])|\$|\\[()\[\]]|\u00b0|\^\{?\\circ\}?", " "),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\(?:text|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r"\1"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\u221a\s*\(([^()]*)\)|\u221a\s*(\w+)", r"\\sqrt{\1\2}"),
        (r"\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\u00d7|\u00b7|\u22c5|\\times|\\cdot", "*"),
        (r"\u00f7|\\div", "/"),
        (r"\*\*", "^"),
        (r"\u2212|\u2013", "-"),
        (r"\u03c0|\\pi(?![a-z])|\bpi\b", " \u03c0 "),
        (r"\u221e|\\infty", " \u221e "),
        (r"\u222a|\\cup", " \u222a "),
        (r"\\leq?(?![a-z])|<=|\u2264", " \u2264 "),
        (r"\\geq?(?![a-z])|>=|\u2265", " \u2265 "),
        (r"\\(sin|cos|tan|log|ln|exp|sec|csc|cot)(?![a-z])", r" \1 "),
        (r"\\([{}])", r" \1"),
        (r"\\%|%", ""),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"(?<=\d)[eE]([-+]?\d{1,2})(?![0-9a-zA-Z])", r"*10^{\1}"),
    )
]
_TURNED = str.maketrans("<>\u2264\u2265", "><\u2265\u2264")
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    **{name: getattr(cmath, name) for name in ("sin", "cos", "tan", "log", "exp")},
    "ln": cmath.log,
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "cot": lambda x: 1 / cmath.tan(x),
}
_CONSTANTS = {"\u03c0": complex(math.pi), "\u221e": complex(math.inf), "i": 1j, "e": complex(math.e)}
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<word>\\frac|\\sqrt|{'|'.join(_FUNCTIONS)})|(?P<name>[a-zA-Z\u03c0\u221e](?![a-zA-Z]{{2}}))"
    r"|(?P<mark>[-+*/^(){}\[\]|!_]))"
)
_SIDE = re.compile(r"\A\s*[a-zA-Z]\w?(?:\([a-zA-Z]\))?\s*(?:=|\\in\b|\u2208)\s*(?=\S)")
# Marks around an expression; the point of .5 is none.
_EDGES = re.compile(r"\A(?:[ ,;:*`\"']|\.(?!\d))+|[ .,;:*`\"']+\Z")
# Letters that stand for a unit beside a number (12 m^2, 5 km/h) are no variables there.
_SYMBOLIC = re.compile(
    r"\\(?:pi|infty|cup|sin|cos|tan|log|ln|sqrt)(?![a-z])|[\u03c0\u221e\u222a\u221a]|\b(?:pi|sqrt|sin|cos|tan|log|ln)\b|\^\{[^{}]*/"
    r"|(?<![a-zA-Z])[a-fi-jn-rt-zA-Z]\s?(?:[-+*/]\s?[0-9a-zA-Z(\\]|\^)|[-+*]\s?[0-9]*[a-z](?![a-zA-Z])|/\s?[a-fi-jn-rt-z](?![a-zA-Z])|[0-9][inxyz](?![a-zA-Z])"
    r"|[0-9a-zA-Z)}]\s*[<>\u2264\u2265]\s*[-0-9a-zA-Z(\\.]"
    r"|\A\W*[(\[{][^\n]*[0-9a-z}\u221e],[^\n]*[)\]}]\W*\Z"
)


def is_symbolic(text: str) -> bool:
    """Tell whether a text is a mathematical expression and not one rational number: 2x + 1, 5 pi, (3, 4), [0, 1)."""
    return len(text) <= _MAX_CHARS and _SYMBOLIC.search(_plain(text)) is not None and expression_key(text) is not None


class _NoExpressionError(Exception):
    """A text is no expression that can be computed."""


def expression_key(text: str) -> str | None:
    """Return a key that equal expressions share; None where the text is none. Never raises."""
    if len(text) > _MAX_CHARS:
        return None
    plain = _plain(text)
    if (
        not plain
        or not re.search(r"[0-9a-zA-Z\u03c0\u221e]", plain)
        or re.search(r"[^\W\d_]{4,}", re.sub(r"\\[a-z]+", "", plain))
    ):
        return None
    try:
        return _key(plain)
    except (_NoExpressionError, ArithmeticError, ValueError):
        return None


def _plain(text: str) -> str:
    text = _EDGES.sub("", text)
    for pattern, new in _PLAIN:
        text = pattern.sub(new, text)
    return _SIDE.sub("", _EDGES.sub("", text))


def _key(plain: str) -> str:
    if "\u222a" in plain:
        return "\u222a".join(sorted(_key(part.strip()) for part in plain.split("\u222a")))
    sides = re.split(r"\s*([<>\u2264\u2265])\s*", plain)
    if len(sides) > 1 and sides[1] in ">\u2265":  # 5 > x is x < 5
        sides = [side.translate(_TURNED) for side in reversed(sides)]
    if len(sides) > 1:
        return "".join(side if place % 2 else _value_key(side) for place, side in enumerate(sides))
    parts = _parts(plain)
    if parts is not None:
        opening, inner, closing = parts
        keys = [_value_key(part) for part in inner]
        return opening + ",".join(sorted(keys) if opening == "{" else keys) + closing
    return _value_key(plain)


def _parts(plain: str) -> tuple[str, list[str], str] | None:
    """Return the brackets and the parts of `(3, 4)`, `[2, 5)`, `{1, 2}` or `1, 2`; None for a single value."""
    opening, closing, inner = "", "", plain
    if plain[0] in "([{" and plain[-1] in ")]}" and _is_enclosed(plain[1:-1]):
        opening, closing, inner = plain[0], plain[-1], plain[1:-1]
    depth, parts = 0, [""]
    for char in inner:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    if len(parts) == 1 and (not opening or opening == "("):
        return None
    return opening, parts, closing


def _is_enclosed(inner: str) -> bool:
    depths = [0, *accumulate((char in "([{") - (char in ")]}") for char in inner)]
    return min(depths) >= 0 == depths[-1]


def _value_key(text: str) -> str:
    values = [_Parser(text, point).whole() for point in range(_POINTS)]
    return "~" + ";".join(map(_rounded, values))


def _rounded(value: complex) -> str:
    if math.isinf(value.real):
        return "inf" if value.real > 0 else "-inf"
    if not cmath.isfinite(value) or abs(value) > _MAX_VALUE:
        raise _NoExpressionError
    scale = max(abs(value), 1e-12)
    real = 0.0 if abs(value.real) < 1e-9 * scale else value.real
    imag = 0.0 if abs(value.imag) < 1e-9 * scale else value.imag
    if scale <= 1e-12:
        real = imag = 0.0
    return f"{real:.{_DIGITS}g}" + (f"{imag:+.{_DIGITS}g}i" if imag else "")


@dataclass
class _Parser:
    """Computes an expression at one point by recursive descent; a missing sign between two factors is a product."""

    text: str
    point: int
    place: int = 0
    depth: int = 0

    def whole(self) -> complex:
        """Return the value of the whole text. Raises _NoExpressionError."""
        value = self._sum()
        if self.text[self.place :].strip():
            raise _NoExpressionError
        return value

    def _next(self) -> re.Match[str] | None:
        return _TOKEN.match(self.text, self.place)

    def _take(self, marks: str) -> str:
        token = self._next()
        if token is None or token["mark"] is None or token["mark"] not in marks:
            return ""
        self.place = token.end()
        return token["mark"]

    def _sum(self) -> complex:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _NoExpressionError
        value = self._product()
        while sign := self._take("+-"):
            term = self._product()
            value = value + term if sign == "+" else value - term
        self.depth -= 1
        return value

    def _product(self) -> complex:
        if sign := self._take("+-"):
            value = self._product()
            return -value if sign == "-" else value
        value = self._power()
        while True:
            if sign := self._take("*/"):
                factor = self._power(signed=True)
                value = value * factor if sign == "*" else value / factor
            elif (token := self._next()) is not None and (token["mark"] or "(") in "({|" and not self._is_closing_bar(token):
                # 2\frac{1}{2} is a mixed number, and 2x a product.
                is_mixed = token["word"] == "\\frac" and re.search(r"\d\s*\Z", self.text[: self.place]) is not None
                factor = self._power()
                value = value + factor if is_mixed else value * factor
            else:
                return value

    def _is_closing_bar(self, token: re.Match[str]) -> bool:
        return token["mark"] == "|" and self.text.count("|", 0, self.place) % 2 == 1

    def _power(self, *, signed: bool = False) -> complex:
        if signed and (sign := self._take("+-")):
            value = self._power(signed=True)
            return -value if sign == "-" else value
        value = self._atom()
        if self._take("!"):
            if value.imag or value.real != int(value.real) or not 0 <= value.real <= 25:
                raise _NoExpressionError
            value = complex(math.factorial(int(value.real)))
        if self._take("^"):
            exponent = self._power(signed=True)
            if abs(exponent) > 300 or abs(value) > _MAX_VALUE:
                raise _NoExpressionError
            value = value**exponent
        return value

    def _atom(self) -> complex:
        token = self._next()
        if token is None:
            raise _NoExpressionError
        self.place = token.end()
        if token["number"]:
            return complex(float(token["number"]))
        if token["name"]:
            return self._named(token["name"])
        if token["word"]:
            return self._applied(token["word"])
        closing = {"(": ")", "{": "}", "[": "]", "|": "|"}.get(token["mark"])
        if closing is None:
            raise _NoExpressionError
        value = self._sum()
        if not self._take(closing):
            raise _NoExpressionError
        return complex(abs(value)) if closing == "|" else value

    def _named(self, name: str) -> complex:
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        value = 0.3 + math.modf(ord(name) * (0.618 + 0.131 * self.point))[0]
        return complex(-1 - value if self.point == 0 and "|" in self.text else value)  # |x| is not x

    def _applied(self, word: str) -> complex:
        if word == "\\frac":
            above, below = self._atom(), self._atom()
            return above / below
        if word == "\\sqrt":
            degree = complex(2.0)
            if self._take("["):
                degree = self._sum()
                if not self._take("]"):
                    raise _NoExpressionError
            value = self._atom()
            if degree.real == 3 and not value.imag and value.real < 0:
                return complex(-((-value.real) ** (1 / 3)))
            return value ** (1 / degree)
        power = self._power(signed=True) if self._take("^") else 1
        if power == -1:  # an inverse
            raise _NoExpressionError
        return _FUNCTIONS[word](self._power()) ** power
