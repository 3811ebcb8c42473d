"""The suite `shared`: two skills behind the same wording.

Sums with carries and sums without look alike to an encoder of sentences; only the digits tell whose turn it is. The
tuples are those of `arith`, in the same splits.
"""

from __future__ import annotations

from dmoa.evaluation.suites.arith import both
from dmoa.evaluation.suites.suite import Level, Suite

SHARED = Suite(
    name="shared",
    title="shared (generated)",
    summary="Sums of whole numbers, one set of wordings for two skills: the operands alone tell carries from no carries.",
    levels=tuple(Level(meaning=f"a + b, {digits} digits", kinds=both("+", digits)) for digits in (3, 4, 5)),
)
"""The suite `shared`."""
