"""Reads numbers in texts: separators of every locale, currencies, scales, fractions, powers and small calculations.

A number that can be read in two ways has no value; another number is never made up. Values are exact fractions. Source: ours.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

_MAX_NUMBER_CHARS = 64
_UNITS = "km|cm|mm|m|kg|mg|g|lbs?|oz|ml|l|min|hrs?|h|sec|s|mph|ft|in|k"
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SHORT_SCALES = {"k": 10**3, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}
_SEPARATORS = ".,'\u2019_ "
_CHARS = str.maketrans(
    {chr(zero + digit): str(digit) for zero in (0x660, 0x6F0, 0x966, 0x9E6) for digit in range(10)}
    | {**dict.fromkeys("\u00a0\u2009\u202f\u2007", " "), **dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff")}
    | {"\u066b": ".", "\u066c": ","}
)
"""Arabic, Persian, Devanagari and Bengali digits, spaces of other widths, and characters that are not seen."""
# A run of digits with separators between them; a space separates groups of three alone.
_RUN = r"(?:[0-9]+(?:[.,'\u2019_][0-9]+|\ [0-9]{3}(?![0-9]))*|\.[0-9]+)"
_VALUE = re.compile(
    r"(?<![\w.^])(?<!\\sqrt\{)"
    r"(?:(?P<other>[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[0-9]+/[0-9]+/[0-9]+|[0-9]+(?::[0-9]+)+)"
    r"|(?P<sign>(?<![\w)%])[-+])?(?P<currency>[$\u20ac\u00a3\u00a5])?(?P<sign2>-)?"
    r"(?:(?P<whole>[0-9]+)\ (?=[0-9]+/[0-9]))?"
    rf"(?P<number>{_RUN})(?P<exponent>[eE][-+]?[0-9]{{1,2}})?(?:/(?P<below>{_RUN}))?)"
    r"(?:\^(?:\{(?P<power>[0-9]{1,2})\}|(?P<power1>[0-9]{1,2})(?![0-9])))?(?!\^)"
    rf"(?:(?P<short>[kKM]|bn|mn|B)(?![A-Za-z0-9])|(?![0-9]|(?!(?:{_UNITS})\b)[A-Za-z]))"
    rf"(?P<scale>\ (?i:{'|'.join(_SCALES)})\b)?"
)
_MONEY_OR_UNIT = re.compile(r"\s?(?:[%\u20ac$\u00a3\u00a5\u00b0]|[A-Za-z])")
_THOUSANDS_OF_EUROS = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}\s?(?:\u20ac|(?:EUR|[Ee]uros?)\b)")
"""1.250 euros are a thousand and more to who writes the sign behind."""
_POWER_OF_TEN = re.compile(
    r"(?<=[0-9])\ {0,2}(?:\u00d7|\*|x|\u00b7|\\times|\\cdot)\ {0,2}10\^(?:\{\ ?(-?[0-9]{1,2})\ ?\}|(-?[0-9]{1,2}))(?![0-9])"
)
_SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_LATEX_SEPARATOR = re.compile(r"(?<=[0-9])(?:\\,|\\!|\{,\})(?=[0-9]{3}(?![0-9]))")
_TYPOGRAPHIC_MINUS = re.compile(r"\u2212|(?<![\w)\]%])[\u2012\u2013](?=[0-9.$])|(?<==)\ ?[-\u2012\u2013\u2014]\ (?=[0-9.$])")
_NEGATIVE_WORD = re.compile(r"(?<![\w-])(?:minus|negative)\s+(?=[$\u20ac\u00a3]?[0-9.])", re.IGNORECASE)
_OPERAND = re.compile(r"[0-9)}%](?:\s?[A-Za-z\u00b0]{1,12})?\s*\Z")
_REPEATING = re.compile(r"([0-9]{1,15})\.([0-9]{0,15})\\(?:overline|bar)\s?\{([0-9]{1,15})\}")
_LATEX_ROOT = re.compile(r"\\sqrt\s?\{([0-9]{1,15})\}")
_ROOT = re.compile(r"\u221a\s?(?:\(([^()]*)\)|([0-9.]+))")


@dataclass(frozen=True, slots=True)
class FoundNumber:
    """One number of a text."""

    value: Fraction | None
    """None where its separators can be read in two ways."""
    start: int
    """Position of its first character in the text."""
    end: int


def find_numbers(text: str) -> list[FoundNumber]:
    """Return every number of a plain text (see `plain_text`) in order; dates and times are none. Never raises."""
    return list(iter_numbers(text))


def iter_numbers(text: str) -> Iterator[FoundNumber]:
    """Yield what `find_numbers` returns, one by one."""
    for match in _VALUE.finditer(text):
        if match["other"] or len(match[0]) > _MAX_NUMBER_CHARS:
            continue
        end = match.end()
        parts = _listed(match) if text[match.start("number") - 1 : match.start("number")] in {"(", "[", "{"} else None
        if parts is not None:
            yield from parts
            continue
        try:
            value = _value(match, text)
        except _NoNumberError:
            continue
        except _AmbiguousError:
            value = None
        yield FoundNumber(value, match.start(), end)


def dates_and_times(text: str) -> list[str]:
    """Return what looks like a date or a time of day, such as 2021-06-05 or 14:30."""
    return [match["other"] for match in _VALUE.finditer(text) if match["other"]]


def _listed(match: re.Match[str]) -> list[FoundNumber] | None:
    """Return the numbers of `(3,4)`: between brackets a comma separates two numbers, if it separates no group of three."""
    run, start = match["number"], match.start("number")
    if "," not in run or any(len(group) == 3 for group in run.split(",")[1:]) or not run.replace(",", "").isdigit():
        return None
    found, place = [], start
    for part in run.split(","):
        found.append(FoundNumber(Fraction(part), place, place + len(part)))
        place += len(part) + 1
    return found


class _NoNumberError(Exception):
    """What looks like a number is something else, such as 1.2.3."""


class _AmbiguousError(Exception):
    """A number with two readings."""


def _value(match: re.Match[str], text: str) -> Fraction:
    is_decimal_comma = bool(match["currency"]) or bool(_MONEY_OR_UNIT.match(text, match.end("number")))
    if _THOUSANDS_OF_EUROS.match(text, match.start("number")):
        raise _AmbiguousError
    above = _run_value(match["number"], is_decimal_comma=is_decimal_comma)
    below = _run_value(match["below"], is_decimal_comma=False) if match["below"] else Fraction(1)
    if below == 0:
        raise _NoNumberError
    value = above * Fraction(f"1{match['exponent']}" if match["exponent"] else 1) / below + int(match["whole"] or 0)
    power = match["power"] or match["power1"]
    if power:
        value **= int(power)
    if match["short"]:
        # 5M alone may be metres, a size or a name; $5M is money.
        if match["short"] not in "kK" and not match["currency"]:
            raise _NoNumberError
        value *= _SHORT_SCALES[match["short"].lower()]
    if match["scale"]:
        value *= _SCALES[match["scale"].strip().lower()]
    return -value if match["sign"] == "-" or match["sign2"] else value


def _run_value(run: str, *, is_decimal_comma: bool) -> Fraction:
    """Return the value of digits with separators. Raises _AmbiguousError, _NoNumberError.

    `is_decimal_comma`: a unit or a currency beside it says that `1,5` is one number, not two.
    """
    kinds = list(dict.fromkeys(char for char in run if char in _SEPARATORS))
    if len(kinds) > 2:
        raise _NoNumberError
    if len(kinds) == 2:
        thousands, point = kinds
        head, _, tail = run.rpartition(point)
        if point not in ".," or point in head or not _is_grouped(head, thousands):
            raise _NoNumberError
        if not tail.isdigit():  # 1,234.567,8
            raise _AmbiguousError
        return Fraction(f"{head.replace(thousands, '')}.{tail}")
    if not kinds:
        return Fraction(run)
    (kind,) = kinds
    if kind == ".":
        if run.count(".") == 1:
            return Fraction(run)
        if not _is_grouped(run, kind):
            raise _NoNumberError
        return Fraction(run.replace(".", ""))
    if _is_grouped(run, kind):
        return Fraction(run.replace(kind, ""))
    if kind != "," or run.count(",") > 1:
        raise _NoNumberError
    decimals = len(run) - run.index(",") - 1
    if is_decimal_comma or run.startswith("0,") or decimals > 1:
        return Fraction(run.replace(",", "."))
    raise _AmbiguousError


def _is_grouped(run: str, separator: str) -> bool:
    """Whether separators stand before groups of three; of commas in India's way too, as in 1,00,000."""
    first, *groups = run.split(separator)
    if not 1 <= len(first) <= 3 or first.startswith("0") or not groups or not all(group.isdigit() for group in groups):
        return False
    is_indian = separator == "," and len(groups) > 1 and len(first) <= 2 and all(len(group) == 2 for group in groups[:-1])
    return len(groups[-1]) == 3 and (is_indian or all(len(group) == 3 for group in groups))


def plain_text(text: str) -> str:
    """Return the text with typographic and LaTeX spellings made plain, emphasis marks removed. Never raises."""
    text = _LATEX_SEPARATOR.sub(",", text.translate(_CHARS))
    text = _SUPERSCRIPTS.sub(lambda match: "^" + unicodedata.normalize("NFKC", match.group()).replace("\u2212", "-"), text)
    # "3½" must become "3 1/2": NFKC alone would join the digits.
    text = "".join(
        " " + c if unicodedata.category(c) == "No" and "\u2044" in unicodedata.normalize("NFKC", c) else c for c in text
    )
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    text = _POWER_OF_TEN.sub(
        lambda match: f"e{match[1] or match[2]}", _TYPOGRAPHIC_MINUS.sub("-", _REPEATING.sub(_as_fraction, text))
    )
    text = _LATEX_ROOT.sub(_as_root, _ROOT.sub(r"\\sqrt{\1\2}", text))
    text = re.sub(r"\*\*|__|`", "", re.sub(r"(?<=[0-9])(\s?)\*\*\1(?=[0-9])", "^", text))  # 2**3 is no emphasis
    text = re.sub(r"\s?\^\s?(?:\\circ(?![a-z])|\{\s?\\circ\s?\})", "\u00b0", text.replace("{,}", ",")).replace("\\!", "")
    text = text.replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"(?<=[0-9])\s?(?=\\[dt]?frac)", " ", text)  # a mixed number: 2\frac{1}{2} is 2 1/2
    text = re.sub(r"\\[dt]?frac\s?(?:\{([^{}]*)\}\s?\{([^{}]*)\}|([0-9])([0-9]))", _as_ratio, text)
    text = re.sub(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[()\[\],;]", " ", text)
    # `minus 7` is -7 where it is a sign; between two operands it is a calculation in words and stays.
    return _NEGATIVE_WORD.sub(lambda at: at[0] if _OPERAND.search(text[max(0, at.start() - 24) : at.start()]) else "-", text)


def _as_ratio(match: re.Match[str]) -> str:
    """Write a fraction on one line, its parts in parentheses where they would come apart."""
    above, below = (match[1] or match[3] or "").strip(), (match[2] or match[4] or "").strip()
    above = f"({above})" if re.search(r"(?<=.)[-+]", above) else above
    return f"{above}/{below}" if re.fullmatch(r"[-0-9.,$%\s]*|[A-Za-z]", below) else f"{above}/({below})"


def _as_fraction(match: re.Match[str]) -> str:
    """Write a repeating decimal as the fraction that it is."""
    fixed, below = match[1] + match[2], (10 ** len(match[3]) - 1) * 10 ** len(match[2])
    return f"{int(fixed + match[3]) - int(fixed)}/{below}"


def _as_root(match: re.Match[str]) -> str:
    root = math.isqrt(int(match[1]))
    return str(root) if root * root == int(match[1]) else match[0]


def spelled(value: Fraction) -> str:
    """Return a number in its one canonical spelling: 1200, -0.5, or 1/3 where no decimal is exact."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        places = max(places, power)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


_MAX_CHARS = 120
_MAX_DEPTH = 8
_MAX_BITS = 4096
_TOKENS = re.compile(
    r"(?:[0-9]{1,15}(?:\.[0-9]{1,15})?(?![0-9.])|\.[0-9]{1,15}|\\[dt]?frac|\\sqrt|\\times|\\cdot|\\div"
    r"|\^(?:\{-?[0-9]{1,2}\}|[0-9]{1,2}(?![0-9]))|[-+*/(){}\u00d7\u00f7\u00b7\s])+"
)
_OPERATOR = re.compile(r"\\[dt]?frac|\\sqrt|\\times|\\cdot|\\div|\^|[+*/\u00d7\u00f7\u00b7]|(?<=[\d)]) - (?=[\d(])")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_AS_PYTHON = [
    (re.compile(r"\\sqrt\s*(?=\{)"), "sqrt"),
    (re.compile(r"\\times|\\cdot|\u00d7|\u00b7"), "*"),
    (re.compile(r"\\div|\u00f7"), "/"),
    (re.compile(r"\^"), "**"),
    (re.compile(r"\{"), "("),
    (re.compile(r"\}"), ")"),
    (re.compile(r"(?<![0-9.])0+(?=[0-9])"), ""),
]
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def expression_value(text: str) -> Fraction | None:
    """Return the exact value of an expression, plain or LaTeX; None if it is none, too long or not rational. Never raises."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text.strip().strip("$").strip())
    text = text.replace("\\left", "").replace("\\right", "")
    if len(text) > _MAX_CHARS or text.count("^") > 1 or not _OPERATOR.search(text) or not _TOKENS.fullmatch(text):
        return None
    if max(accumulate((char in "({") - (char in ")}") for char in text)) > _MAX_DEPTH:
        return None
    for _ in range(_MAX_DEPTH):
        text = _FRACTION.sub(r"((\1)/(\2))", text)
    for pattern, python in _AS_PYTHON:
        text = pattern.sub(python, text)
    try:
        return _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None


def _evaluated(node: ast.expr) -> Fraction:
    """Return the value of a parsed expression. Raises ValueError for anything but arithmetic on rational numbers."""
    match node:
        case ast.Constant(value=int() | float()):
            return Fraction(ast.unparse(node)) if isinstance(node.value, int) else Fraction(repr(node.value))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluated(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluated(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_evaluated(left), _evaluated(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_evaluated(left), _evaluated(right))
        case ast.Call(func=ast.Name(id="sqrt"), args=[radicand], keywords=[]):
            return _root(_evaluated(radicand))
    raise ValueError("not arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or size * abs(exponent.numerator) > _MAX_BITS:
        raise ValueError("not a small power")
    return base**exponent.numerator


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise ValueError("not a real number")
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if root * root != value:
        raise ValueError("not rational")
    return root
