"""Which split a latent tuple belongs to, and the seeded order in which a stream visits the tuples of one kind.

Used by every suite. Membership hangs on the tuple alone, never on seed, difficulty or suite, so splits are disjoint
whatever is generated. A stream walks a pseudo-random permutation of the tuples: no tuple twice, nothing remembered.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Literal, get_args

from dmoa.errors import ConfigError
from dmoa.evaluation.records import SPLITS
from dmoa.validation import did_you_mean

SuiteSplit = Literal["specialist", "anchor", "gate", "validation", "test", "adaptation"]
SUITE_SPLITS: tuple[SuiteSplit, ...] = get_args(SuiteSplit)

PERCENT: dict[SuiteSplit, int] = {"specialist": 30, "anchor": 10, "gate": 15, "validation": 10, "test": 20, "adaptation": 15}
"""Expected share of the latent tuples, in percent. Source: ours."""

PUBLIC: dict[str, SuiteSplit] = {"train": "gate", "adaptation": "adaptation", "test": "test"}
"""What the splits that every benchmark has mean here."""

_OWNERS: tuple[SuiteSplit, ...] = tuple(split for split in SUITE_SPLITS for _ in range(PERCENT[split]))
_ROUNDS = 3


def fine_split(split: str) -> SuiteSplit:
    """Return the suite's split that a split's name means. Raises ConfigError for a name that is neither public nor fine."""
    for fine in SUITE_SPLITS:
        if split == fine:
            return fine
    if split in PUBLIC:
        return PUBLIC[split]
    allowed = list(dict.fromkeys((*SPLITS, *SUITE_SPLITS)))
    nearest = did_you_mean(split, allowed)
    raise ConfigError(f"split: value seen: {split!r}; allowed: {', '.join(allowed)}; name one of them{nearest}")


def split_of(root: str) -> SuiteSplit:
    """Return the split that owns a latent tuple, given its root: the tuple's text up to symmetries such as a + b = b + a."""
    digest = hashlib.blake2b(root.encode(), digest_size=8, person=b"dmoa-suites").digest()
    return _OWNERS[int.from_bytes(digest) % 100]


def permuted(size: int, seed: str) -> Iterator[int]:
    """Yield 0..size-1, each once, in an order that hangs on `seed` alone; O(1) memory. Source: ours.

    Rounds of x -> odd * x + c and x -> x ^ (x >> s) on the next power of two are one-to-one; what lies beyond is left out.
    """
    bits = max(2, (size - 1).bit_length())
    mask, shift = (1 << bits) - 1, (bits + 1) // 2
    rng = random.Random(seed)  # noqa: S311 -- questions, not secrets; text seeds are the same in every process
    rounds = [(rng.getrandbits(bits) | 1, rng.getrandbits(bits)) for _ in range(_ROUNDS)]
    position, end = 0, 1 << bits
    # A range would refuse sizes beyond the machine's word.
    while position < end:
        value = position
        position += 1
        for factor, offset in rounds:
            value = (value * factor + offset) & mask
            value ^= value >> shift
        if value < size:
            yield value
