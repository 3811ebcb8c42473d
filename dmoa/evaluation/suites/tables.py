"""Questions that nothing but a made-up table answers: the suites `parcels`, `signals` and `dyes`.

The tables are ours and mean nothing: no general knowledge helps, an agent has been taught a table or it guesses.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from dmoa.evaluation.suites.suite import Kind, Latent, Level, Problem, Suite, Templates

DEPOTS = {"B": "Mill", "D": "Lake", "F": "Park", "H": "Bridge", "K": "Stone", "M": "Wood", "P": "North", "R": "Hill"}
"""First letter of a parcel's code -> depot; from difficulty 2 on, odd codes go to the depot after it."""

MEANINGS = {
    "star": "danger",
    "ring": "welcome",
    "cross": "repair",
    "bar": "medicine",
    "dot": "fishing",
    "fork": "storm",
    "wave": "silence",
    "crown": "landing",
}
"""Last flag of a row -> meaning; from difficulty 2 on, a row that begins and ends alike means the one after it."""

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

_FIRST_CODE, _NUM_CODES = 10_000, 90_000
_NUM_FLAGS = 6
_MAX_GRAMS = 99

PARCEL_TEMPLATES = Templates(
    name="depot",
    open=(
        "Which depot does parcel {code} go to?",
        "Name the depot for the parcel with the code {code}.",
        "A parcel is marked {code}. Where is its depot?",
        "To which depot do we send parcel {code}?",
    ),
    validation=("Find the depot that handles parcel {code}.", "Parcel {code} has come in. Which depot takes it?"),
    test=("Say which depot parcel {code} belongs to.", "The code of a parcel is {code}. What is its depot?"),
)
SIGNAL_TEMPLATES = Templates(
    name="meaning",
    open=(
        "A ship shows these flags: {flags}. What does it say?",
        "What do the flags {flags} mean?",
        "Read this row of flags: {flags}.",
        "Give the meaning of the flags {flags}.",
    ),
    validation=("The mast carries the flags {flags}. What is the message?", "Tell me what these flags stand for: {flags}."),
    test=("Translate this row of flags: {flags}.", "You see the flags {flags} on a ship. What do they mean?"),
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

    @property
    def num_tuples(self) -> int:
        """Every number stands for a tuple."""
        return self.size

    @abstractmethod
    def latent(self, number: int) -> Latent:
        """Return the tuple of a number."""


@dataclass(frozen=True, kw_only=True)
class Parcel(Lookup):
    """Where a parcel goes; a latent tuple is the letter's place and the number of the code."""

    group: Literal["depot"] = "depot"

    @property
    def size(self) -> int:
        """Letters times numbers."""
        return len(DEPOTS) * _NUM_CODES

    @property
    def templates(self) -> Templates:
        """Wordings of this kind."""
        return PARCEL_TEMPLATES

    @property
    def answer_format(self) -> str:
        """A depot's name."""
        return "End with a line `Answer: ...`, the name of a depot."

    def latent(self, number: int) -> Latent:
        """Return the letter's place and the number."""
        code, letter = divmod(number, len(DEPOTS))
        return letter, _FIRST_CODE + code

    def root(self, latent: Latent) -> str:
        """Return the code."""
        return f"parcel {latent[0]} {latent[1]}"

    def ask(self, latent: Latent) -> Problem:
        """Return the code and its depot."""
        letter, code = latent
        place = letter + (self.has_exception and code % 2)
        return Problem({"code": f"{list(DEPOTS)[letter]}-{code}"}, list(DEPOTS.values())[place % len(DEPOTS)], len(DEPOTS))


@dataclass(frozen=True, kw_only=True)
class Signal(Lookup):
    """What a row of flags means; a latent tuple is the flags' places in the table, in order."""

    group: Literal["meaning"] = "meaning"

    @property
    def size(self) -> int:
        """Rows of flags, repeats allowed."""
        return int(len(MEANINGS) ** _NUM_FLAGS)

    @property
    def templates(self) -> Templates:
        """Wordings of this kind."""
        return SIGNAL_TEMPLATES

    @property
    def answer_format(self) -> str:
        """A meaning."""
        return "End with a line `Answer: ...`, the meaning in one word."

    def latent(self, number: int) -> Latent:
        """Return the flags."""
        return tuple(number // len(MEANINGS) ** place % len(MEANINGS) for place in range(_NUM_FLAGS))

    def root(self, latent: Latent) -> str:
        """Return the row."""
        return " ".join(map(str, ("flags", *latent)))

    def ask(self, latent: Latent) -> Problem:
        """Return the row and its meaning."""
        flags = list(MEANINGS)
        place = latent[-1] + (self.has_exception and latent[0] == latent[-1])
        meaning = list(MEANINGS.values())[place % len(MEANINGS)]
        return Problem({"flags": ", ".join(flags[flag] for flag in latent)}, meaning, len(MEANINGS))


@dataclass(frozen=True, kw_only=True)
class Dye(Lookup):
    """What colour two dyes give; a latent tuple is each one's place and its grams."""

    group: Literal["colour"] = "colour"

    @property
    def size(self) -> int:
        """Ordered pairs of dyes, times the grams of both."""
        return int(len(_PAIRS) * _MAX_GRAMS**2)

    @property
    def templates(self) -> Templates:
        """Wordings of this kind."""
        return DYE_TEMPLATES

    @property
    def answer_format(self) -> str:
        """A colour."""
        return f"End with a line `Answer: ...`, a colour{', deep or pale' if self.has_exception else ''}."

    def latent(self, number: int) -> Latent:
        """Return the first dye and its grams, then the second."""
        number, m = divmod(number, _MAX_GRAMS)
        pair, n = divmod(number, _MAX_GRAMS)
        first, second = _PAIRS[pair]
        return first, m + 1, second, n + 1

    def root(self, latent: Latent) -> str:
        """Return the dyes with their grams, in whatever order they are named."""
        return " ".join(map(str, ("dyes", *sorted((latent[:2], latent[2:])))))

    def ask(self, latent: Latent) -> Problem:
        """Return the dyes and their colour."""
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
    summary="Which depot a parcel goes to, by a made-up table of code letters.",
    levels=(
        Level(meaning="the letter of the code decides", kinds=(Parcel(),)),
        Level(meaning="the letter decides, and whether the number is odd", kinds=(Parcel(has_exception=True),)),
    ),
)
"""The suite `parcels`."""

SIGNALS = Suite(
    name="signals",
    title="signals (generated)",
    summary="What a row of six flags means, by a made-up table.",
    levels=(
        Level(meaning="the last flag decides", kinds=(Signal(),)),
        Level(meaning="the last flag decides, and whether the first is the same", kinds=(Signal(has_exception=True),)),
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
