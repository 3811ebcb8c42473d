"""Questions that nothing but a made-up table answers: the suites `parcels`, `signals` and `dyes`.

The tables are ours and mean nothing: no general knowledge helps, an agent has been taught a table or it guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from dmoa.evaluation.suites.suite import Kind, Latent, Level, Problem, Suite, Templates

DEPOTS = {
    "Oslo": "Mill",
    "Paris": "Lake",
    "Cairo": "Park",
    "Lima": "Bridge",
    "Delhi": "Stone",
    "Tokyo": "Wood",
    "Sydney": "North",
    "Boston": "Hill",
}
"""Where a parcel is for -> depot; from difficulty 2 on, odd parcels go to the depot after it."""

MEANINGS = {
    "red": "danger",
    "blue": "welcome",
    "green": "repair",
    "white": "medicine",
    "black": "fishing",
    "yellow": "storm",
    "brown": "silence",
    "pink": "landing",
}
"""Pennant over a row of flags -> meaning; from difficulty 2 on, a row that begins and ends alike means the one after it."""

_PAIRS_OF = {
    "plum": "madder+woad woad+lichen",
    "rust": "madder+weld sumac+lichen",
    "wine": "madder+sumac sumac+walnut",
    "slate": "madder+lichen woad+walnut",
    "sand": "madder+walnut weld+lichen",
    "moss": "woad+weld weld+walnut",
    "teal": "woad+sumac lichen+walnut",
    "straw": "weld+sumac",
}
MIXTURES = {tuple(pair.split("+")): colour for colour, pairs in _PAIRS_OF.items() for pair in pairs.split()}
"""Two dyes, in whatever order -> colour; from difficulty 2 on, it is deep where the first of the pair weighs more, else pale."""

_DYES = ("madder", "woad", "weld", "sumac", "lichen", "walnut")
_PAIRS = tuple(permutations(range(len(_DYES)), 2))

_FIRST_PARCEL, _NUM_PARCELS = 10_000, 90_000
_FLAGS = ("star", "ring", "cross", "bar", "dot", "fork", "wave", "crown")
_NUM_FLAGS = 5
_MAX_GRAMS = 99

PARCEL_TEMPLATES = Templates(
    name="depot",
    open=(
        "Which depot does parcel {number} for {town} go to?",
        "Name the depot for parcel {number} with the goal {town}.",
        "Parcel {number} is for {town}. Where is its depot?",
        "To which depot do we send parcel {number} for {town}?",
    ),
    validation=(
        "Find the depot that handles parcel {number} for {town}.",
        "Parcel {number} to {town} is in. Which depot takes it?",
    ),
    test=("Say which depot parcel {number} for {town} belongs to.", "{town} is the goal of parcel {number}. What is its depot?"),
)
SIGNAL_TEMPLATES = Templates(
    name="meaning",
    open=(
        "A ship shows the flags {flags} under a {pennant} pennant. What does it say?",
        "What do the flags {flags} and a {pennant} pennant mean?",
        "Read these flags with a {pennant} pennant: {flags}.",
        "Give the meaning of a {pennant} pennant over the flags {flags}.",
    ),
    validation=(
        "The mast carries a {pennant} pennant and the flags {flags}. What is the message?",
        "Tell me what the flags {flags} stand for with a {pennant} pennant.",
    ),
    test=(
        "Translate this signal: a {pennant} pennant, then the flags {flags}.",
        "You see the flags {flags} on a ship, and a {pennant} pennant. What do they mean?",
    ),
)
DYE_TEMPLATES = Templates(
    name="colour",
    open=(
        "Which colour do {m} grams of {first} and {n} grams of {second} give?",
        "Mix {m} grams of {first} with {n} grams of {second}. What colour is the dye?",
        "We dye wool with {m} grams of {first} and {n} grams of {second}. Name its colour.",
        "What colour comes from {m} grams of {first} and {n} grams of {second}?",
    ),
    validation=(
        "A vat holds {m} grams of {first} and {n} grams of {second}. What colour will the wool be?",
        "Find the colour that {m} grams of {first} make with {n} grams of {second}.",
    ),
    test=(
        "Say what colour you get from {m} grams of {first} and {n} grams of {second}.",
        "Into a pot go {m} grams of {first} and {n} grams of {second}. Which colour is that?",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Lookup(Kind):
    """One question that a table answers; with `has_exception` the second rule of the table holds as well."""

    has_exception: bool = False


@dataclass(frozen=True, kw_only=True)
class Parcel(Lookup):
    """Where a parcel goes; a latent tuple is the town's place in the table and the parcel's number."""

    group: Literal["depot"] = "depot"
    templates = PARCEL_TEMPLATES
    answer_format = "End with a line `Answer: ...`, the name of a depot."

    @property
    def size(self) -> int:
        """Towns times numbers."""
        return len(DEPOTS) * _NUM_PARCELS

    def latent(self, number: int) -> Latent:
        parcel, town = divmod(number, len(DEPOTS))
        return town, _FIRST_PARCEL + parcel

    def root(self, latent: Latent) -> str:
        return f"parcel {latent[0]} {latent[1]}"

    def ask(self, latent: Latent) -> Problem:
        town, parcel = latent
        fields: dict[str, object] = {"town": list(DEPOTS)[town], "number": parcel}
        place = town + (self.has_exception and parcel % 2)
        return Problem(fields, list(DEPOTS.values())[place % len(DEPOTS)], len(DEPOTS))


@dataclass(frozen=True, kw_only=True)
class Signal(Lookup):
    """What a signal means; a latent tuple is the pennant's place in the table, then those of the flags, in order."""

    group: Literal["meaning"] = "meaning"
    templates = SIGNAL_TEMPLATES
    answer_format = "End with a line `Answer: ...`, the meaning in one word."

    @property
    def size(self) -> int:
        """Pennants times rows of flags, repeats allowed."""
        return int(len(MEANINGS) * len(_FLAGS) ** _NUM_FLAGS)

    def latent(self, number: int) -> Latent:
        row, pennant = divmod(number, len(MEANINGS))
        return pennant, *(row // len(_FLAGS) ** place % len(_FLAGS) for place in range(_NUM_FLAGS))

    def root(self, latent: Latent) -> str:
        return " ".join(map(str, ("signal", *latent)))

    def ask(self, latent: Latent) -> Problem:
        pennant, *flags = latent
        fields: dict[str, object] = {"pennant": list(MEANINGS)[pennant], "flags": ", ".join(_FLAGS[flag] for flag in flags)}
        place = pennant + (self.has_exception and flags[0] == flags[-1])
        return Problem(fields, list(MEANINGS.values())[place % len(MEANINGS)], len(MEANINGS))


@dataclass(frozen=True, kw_only=True)
class Dye(Lookup):
    """What colour two dyes give; a latent tuple is each one's place and its grams."""

    group: Literal["colour"] = "colour"
    templates = DYE_TEMPLATES

    @property
    def size(self) -> int:
        """Ordered pairs of dyes, times the grams of both."""
        return int(len(_PAIRS) * _MAX_GRAMS**2)

    @property
    def answer_format(self) -> str:
        return f"End with a line `Answer: ...`, a colour{', deep or pale' if self.has_exception else ''}."

    def latent(self, number: int) -> Latent:
        number, m = divmod(number, _MAX_GRAMS)
        pair, n = divmod(number, _MAX_GRAMS)
        first, second = _PAIRS[pair]
        return first, m + 1, second, n + 1

    def root(self, latent: Latent) -> str:
        """Return the dyes with their grams, in whatever order they are named."""
        return " ".join(map(str, ("dyes", *sorted((latent[:2], latent[2:])))))

    def ask(self, latent: Latent) -> Problem:
        first, m, second, n = latent
        fields: dict[str, object] = {"first": _DYES[first], "m": m, "second": _DYES[second], "n": n}
        (low, low_grams), (high, high_grams) = sorted(((first, m), (second, n)))
        colour = MIXTURES[_DYES[low], _DYES[high]]
        if not self.has_exception:
            return Problem(fields, colour, len(_PAIRS_OF))
        return Problem(fields, f"{'deep' if low_grams > high_grams else 'pale'} {colour}", 2 * len(_PAIRS_OF))


PARCELS = Suite(
    name="parcels",
    title="parcels (generated)",
    summary="Which depot a parcel goes to, by a made-up table of towns.",
    levels=(
        Level(meaning="the town decides", kinds=(Parcel(),)),
        Level(meaning="the town decides, and whether the number is odd", kinds=(Parcel(has_exception=True),)),
    ),
)
"""The suite `parcels`."""

SIGNALS = Suite(
    name="signals",
    title="signals (generated)",
    summary="What a pennant over a row of flags means, by a made-up table.",
    levels=(
        Level(meaning="the pennant decides", kinds=(Signal(),)),
        Level(meaning="the pennant decides, and whether the first flag is the last", kinds=(Signal(has_exception=True),)),
    ),
)
"""The suite `signals`."""

DYES = Suite(
    name="dyes",
    title="dyes (generated)",
    summary="What colour two dyes give, by a made-up table of 15 mixtures.",
    levels=(
        Level(meaning="the two dyes decide", kinds=(Dye(),)),
        Level(meaning="the two dyes decide, and which weighs more", kinds=(Dye(has_exception=True),)),
    ),
)
"""The suite `dyes`."""
