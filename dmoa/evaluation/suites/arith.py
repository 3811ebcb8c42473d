"""Sums and differences of whole numbers, told apart by whether a digit carries (or borrows); the suites `arith` and `shared`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Literal

from dmoa.evaluation.suites.suite import NUMBER_FORMAT, Kind, Latent, Level, Problem, Suite, Templates

Operations = Literal["+", "-", "++", "+-"]

_NAMES: dict[Operations, str] = {"+": "sum", "-": "difference", "++": "sum-of-three", "+-": "sum-less"}

TEMPLATES = Templates(
    name="arithmetic",
    open=("What is {terms}?", "Compute {terms}.", "Calculate {terms}.", "How much is {terms}?"),
    validation=("Work out {terms}.", "Tell me the result of {terms}."),
    test=("Find the value of {terms}.", "Evaluate {terms}."),
)


class _OfNumbers(Kind):
    """What all kinds of sums have."""

    templates = TEMPLATES
    answer_format = NUMBER_FORMAT


@dataclass(frozen=True, kw_only=True)
class Arithmetic(_OfNumbers):
    """One or two operations on whole numbers of equally many digits, all results 0 or more."""

    operations: Operations
    digits: int
    """Of every operand; none begins with 0."""
    has_carries: bool
    """Whether at least one digit of one of the operations carries or borrows, or none does."""

    @property
    def group(self) -> str:  # type: ignore[override]  # a constant elsewhere
        """Such as `sum-with-carries`."""
        return f"{_NAMES[self.operations]}-{'with' if self.has_carries else 'without'}-carries"

    @cached_property
    def size(self) -> int:
        """All operands where digits carry; exactly the tuples where none does, because those would be rare among all."""
        if self.has_carries:
            return int((9 * 10 ** (self.digits - 1)) ** (len(self.operations) + 1))
        low, top = _plain_columns(self.operations)
        return int(len(top) * len(low) ** (self.digits - 1))

    @cached_property
    def num_tuples(self) -> int:
        """Counted by closed forms."""
        low, top = _plain_columns(self.operations)
        num_plain = int(len(top) * len(low) ** (self.digits - 1))
        return _num_not_negative(self.operations, self.digits) - num_plain if self.has_carries else num_plain

    def latent(self, number: int) -> Latent | None:
        if not self.has_carries:
            return self._plain(number)
        lowest = 10 ** (self.digits - 1)
        operands = []
        for _ in range(len(self.operations) + 1):
            number, rest = divmod(number, 9 * lowest)
            operands.append(lowest + rest)
        return tuple(operands) if _carries(self.operations, operands) else None

    def _plain(self, number: int) -> Latent:
        low, top = _plain_columns(self.operations)
        number, rest = divmod(number, len(top))
        operands = list(top[rest])
        for _ in range(self.digits - 1):
            number, rest = divmod(number, len(low))
            operands = [10 * operand + digit for operand, digit in zip(operands, low[rest], strict=True)]
        return tuple(operands)

    def root(self, latent: Latent) -> str:
        """Return the operands without the order of those that are added."""
        num_added = self.operations.count("+") + 1
        return " ".join(map(str, (self.operations, *sorted(latent[:num_added]), *latent[num_added:])))

    def ask(self, latent: Latent) -> Problem:
        """Return the terms, computed from left to right."""
        total, terms = latent[0], str(latent[0])
        for sign, operand in zip(self.operations, latent[1:], strict=True):
            total += operand if sign == "+" else -operand
            terms += f" {sign} {operand}"
        return Problem({"terms": terms}, str(total))


@dataclass(frozen=True, kw_only=True)
class DigitSum(_OfNumbers):
    """A whole number of some digits and a digit to add, 1 to 9."""

    digits: int
    has_carries: bool

    @property
    def group(self) -> str:  # type: ignore[override]  # a constant elsewhere
        """As of other sums."""
        return f"sum-{'with' if self.has_carries else 'without'}-carries"

    @property
    def size(self) -> int:
        """Numbers times digits."""
        return int(9 * 10 ** (self.digits - 1) * 9)

    @property
    def num_tuples(self) -> int:
        """Of 90 pairs of a last digit and a digit to add, 45 carry."""
        return self.size // 2

    def latent(self, number: int) -> Latent | None:
        rest, digit = divmod(number, 9)
        operands = [int(10 ** (self.digits - 1)) + rest, digit + 1]
        return tuple(operands) if _carries("+", operands) == self.has_carries else None

    def root(self, latent: Latent) -> str:
        return f"+ {latent[1]} {latent[0]}"

    def ask(self, latent: Latent) -> Problem:
        return Problem({"terms": f"{latent[0]} + {latent[1]}"}, str(sum(latent)))


@cache
def _plain_columns(operations: Operations) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the digits of one column that neither carry nor borrow: of a lower column, and of the leading one (no 0)."""
    columns = [digits for digits in product(range(10), repeat=len(operations) + 1) if _is_plain(operations, digits)]
    return columns, [digits for digits in columns if 0 not in digits]


def _is_plain(operations: Operations, digits: tuple[int, ...]) -> bool:
    total = digits[0]
    for sign, digit in zip(operations, digits[1:], strict=True):
        total += digit if sign == "+" else -digit
        if not 0 <= total <= 9:
            return False
    return True


def _carries(operations: Operations, operands: list[int]) -> bool:
    """Return whether a column carries or borrows in any operation; False as well for a result below 0."""
    total, has_carried = operands[0], False
    for sign, operand in zip(operations, operands[1:], strict=True):
        before = total
        total += operand if sign == "+" else -operand
        if total < 0:
            return False
        # The digit sum of a result is off by 9 for every carry, and by -9 for every borrow.
        digit_sum = _digit_sum(before) + (_digit_sum(operand) if sign == "+" else -_digit_sum(operand))
        has_carried = has_carried or digit_sum != _digit_sum(total)
    return has_carried


def _digit_sum(number: int) -> int:
    return sum(map(int, str(number)))


def _num_not_negative(operations: Operations, digits: int) -> int:
    """Return the number of operand tuples whose result is 0 or more."""
    lowest = int(10 ** (digits - 1))
    num_operands = 9 * lowest
    if operations == "-":
        return num_operands * (num_operands + 1) // 2
    # a + b < c: with a = lowest + i, b = lowest + j it is i + j < m, m = c - 2 lowest, so m (m + 1) / 2 pairs; summed over m.
    most = 10 * lowest - 1 - 2 * lowest
    num_negative = most * (most + 1) * (most + 2) // 6 if operations == "+-" else 0
    return int(num_operands ** (len(operations) + 1) - num_negative)


def both(operations: Operations, digits: int) -> tuple[Arithmetic, Arithmetic]:
    """Return the kinds with and without carries."""
    return (
        Arithmetic(operations=operations, digits=digits, has_carries=True),
        Arithmetic(operations=operations, digits=digits, has_carries=False),
    )


ARITH = Suite(
    name="arith",
    title="arith (generated)",
    summary="Sums and differences of whole numbers, one or two operations; half of the rows carry or borrow, half do not.",
    levels=(
        Level(meaning="a + b, 5 digits and 1", kinds=tuple(DigitSum(digits=5, has_carries=has) for has in (True, False))),
        Level(meaning="a + b, 3 digits", kinds=both("+", 3)),
        Level(meaning="a + b and a - b, 4 digits", kinds=(*both("+", 4), *both("-", 4))),
        Level(meaning="a + b + c and a + b - c, 3 digits", kinds=(*both("++", 3), *both("+-", 3))),
        Level(meaning="one and two operations, 4 digits", kinds=tuple(k for o in _NAMES for k in both(o, 4))),
        Level(meaning="one and two operations, 6 digits", kinds=tuple(k for o in _NAMES for k in both(o, 6))),
    ),
)
"""The suite `arith`."""


SHARED = Suite(
    name="shared",
    title="shared (generated)",
    summary="Sums of whole numbers, one set of wordings for two skills: the operands alone tell carries from no carries.",
    levels=tuple(Level(meaning=f"a + b, {digits} digits", kinds=both("+", digits)) for digits in (3, 4, 5)),
)
"""The suite `shared`."""
