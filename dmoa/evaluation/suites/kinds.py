"""What a suite is made of: kinds of question, each with a space of latent tuples, a solver and templates.

A kind numbers its tuples, so that a stream can visit them in any order; it computes the answer of each and says which
words fill the templates. `suite` turns tuples into rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from dmoa.evaluation.suites.streams import SuiteSplit

Latent = tuple[int, ...]
"""What a question is about, apart from its wording: operands, indices of words, day numbers."""


def spell(latent: Latent) -> str:
    """Return a latent tuple as text, as labels keep it."""
    return " ".join(map(str, latent))


@dataclass(frozen=True, slots=True)
class Question:
    """One latent tuple, solved and ready for any template."""

    fields: dict[str, object]
    """What the templates' fields stand for."""
    answer: str
    """The computed answer, spelled as the answer format asks."""
    num_options: int = 0
    """Answers that the question lists or that its format leaves (7 weekdays); 0: no such list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Templates:
    """The wordings of one kind of question, divided so that held-out ones appear in validation or in test alone."""

    name: str
    """Starts the names of the wordings."""
    open: tuple[str, ...]
    """For specialist, anchor, gate and adaptation."""
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def of(self, split: SuiteSplit) -> tuple[str, tuple[str, ...]]:
        """Return the name and the wordings of the set that a split uses."""
        if split == "validation":
            return "validation", self.validation
        if split == "test":
            return "test", self.test
        return "open", self.open

    @property
    def wordings(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.open, *self.validation, *self.test)


class Kind(ABC):
    """A kind of question. Implementations are frozen records of a few numbers; equal records pose equal questions."""

    group: str
    """What tables break results down by; also the handle by which a caller chooses kinds."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Numbers that `latent` takes: 0..size-1."""

    @property
    @abstractmethod
    def num_tuples(self) -> int:
        """Latent tuples: the numbers for which `latent` is not None, counted exactly without visiting them."""

    @property
    @abstractmethod
    def templates(self) -> Templates:
        """The wordings."""

    @property
    @abstractmethod
    def answer_format(self) -> str:
        """The sentence that ends every question and says how to answer."""

    @abstractmethod
    def latent(self, number: int) -> Latent | None:
        """Return the tuple of a number, a different one for every number; None where the number stands for none."""

    @abstractmethod
    def root(self, latent: Latent) -> str:
        """Return what decides on the tuple's split: equal for tuples that are one and the same problem."""

    @abstractmethod
    def ask(self, latent: Latent) -> Question:
        """Return the question with its computed answer."""


NUMBER_FORMAT = "End with a line `Answer: ...`, a number."
