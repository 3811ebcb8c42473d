r"""The value of a short arithmetic expression in LaTeX or plain signs, by math-verify.

The second opinion behind the number grammar of `core.answers`: it is asked where a final answer is a calculation, such
as \sqrt{4}, 3 \times 6 or 2^{3}. math-verify has no limits of its own in threads (its timeouts are signals), so only a
small grammar of short expressions reaches it, in which nothing takes long. Source: ours.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from itertools import accumulate

_MAX_CHARS = 120
_MAX_DEPTH = 4
"""Brackets inside one another: math-verify takes longer with every one, seconds for fifty."""
_TOKENS = re.compile(
    r"(?:[0-9]{1,15}(?:\.[0-9]{1,15})?(?![0-9.])|\.[0-9]{1,15}|\\[dt]?frac|\\sqrt|\\times|\\cdot|\\div|\\left|\\right"
    r"|\^(?:\{-?[0-9]{1,2}\}|[0-9](?![0-9]))|[-+*/(){}\u00d7\u00f7\u00b7=\s])+"
)
_OPERATOR = re.compile(r"\\[dt]?frac|\\sqrt|\\times|\\cdot|\\div|\^|[+*/\u00d7\u00f7\u00b7]|(?<=[\d)]) - (?=[\d(])")
_JUXTAPOSED = re.compile(r"[0-9)}]\s*[({]|\)\s*[0-9]|[0-9]\s+[0-9.]")
_FRACTION_OR_ROOT = re.compile(r"\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\\sqrt\s*\{[^{}]*\}|\^\{-?[0-9]+\}")
_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")


def expression_value(text: str) -> Fraction | None:
    """Return the exact value of an arithmetic expression.

    None for what is none, is too long, or is no rational number. Never raises.
    """
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text.strip().strip("$").strip())
    text = text.replace("\\left", "").replace("\\right", "")
    if len(text) > _MAX_CHARS or text.count("^") > 1 or not _OPERATOR.search(text) or not _TOKENS.fullmatch(text):
        return None
    if max(accumulate((char in "({") - (char in ")}") for char in text)) > _MAX_DEPTH:
        return None
    # math-verify reads 3(4) and 3 4 as mixed numbers
    if _JUXTAPOSED.search(_FRACTION_OR_ROOT.sub(" + ", text)):
        return None
    return _parsed(_DECIMAL.sub(_as_fraction, text).replace("\u00d7", "\\times ").replace("\u00b7", "\\cdot "))


def _as_fraction(match: re.Match[str]) -> str:
    return f"\\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}"  # math-verify would make it a float


def _parsed(latex: str) -> Fraction | None:
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    found = parse(f"${latex}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    if not found or not hasattr(found[0], "doit"):
        return None
    value = found[0].doit()
    if not getattr(value, "is_Rational", False):
        return None
    return Fraction(int(value.p), int(value.q))
