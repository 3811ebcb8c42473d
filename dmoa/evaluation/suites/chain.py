"""The suite `chain`: two parts of different suites, the second about the result of the first.

Agents see the pending part and the summary, nothing else, so the context says what is next and memory should not help:
a control for `relay`. A row lies in the split of its first part's tuple, as that tuple does in its own suite.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass, replace
from datetime import date

from dmoa.evaluation.records import Row
from dmoa.evaluation.suites.arith import TEMPLATES as ARITHMETIC_TEMPLATES
from dmoa.evaluation.suites.calendar import DATE_FORMAT, NUM_DAYS, Calendar, WithinMonth, day_of
from dmoa.evaluation.suites.suite import (
    NUMBER_FORMAT,
    Kind,
    Latent,
    Level,
    Part,
    Problem,
    Suite,
    SuiteSplit,
    Templates,
    make_row,
    spell,
    word,
)
from dmoa.evaluation.suites.words import Words
from dmoa.types import Stage

_INTRODUCTION = "Two questions; the second is about the result of the first."


class Follower(Part):
    """A second part: a question about a whole number that was worked out before."""

    @abstractmethod
    def ask(self, result: int, latent: Latent) -> Problem:
        """Return the question with its answer, given the first part's result."""


@dataclass(frozen=True, kw_only=True)
class Add(Follower):
    """A number to add to the result."""

    digits: int

    templates = Templates(
        name="then-add",
        open=(
            "Take the result so far and add {n}. What is the sum?",
            "Add {n} to the result so far.",
            "How much is the result so far plus {n}?",
            "Compute the sum of {n} and the result so far.",
        ),
        validation=("Increase the result so far by {n}.", "What do you get when you add {n} to the result so far?"),
        test=("Find the sum of the result so far and {n}.", "With the result so far, work out: result + {n}."),
    )
    answer_format = NUMBER_FORMAT

    @property
    def size(self) -> int:
        """All numbers of so many digits."""
        return int(9 * 10 ** (self.digits - 1))

    def latent(self, number: int) -> Latent:
        """Return the number to add."""
        return (int(10 ** (self.digits - 1)) + number,)

    def ask(self, result: int, latent: Latent) -> Problem:
        return Problem({"n": latent[0]}, str(result + latent[0]))


@dataclass(frozen=True, kw_only=True)
class Pick(Follower):
    """A list of words; the result says which one."""

    length: int

    templates = Templates(
        name="then-pick",
        open=(
            "Take the result so far as a number n. Which word is number n in this list: {words}?",
            "Let n be the result so far. What is word number n of these words: {words}?",
            "Counting from 1, name the word whose number is the result so far: {words}.",
            "Use the result so far as a position in this list and give the word there: {words}.",
        ),
        validation=(
            "Which word stands at the place that the result so far names: {words}?",
            "Call the result so far n. Name word n of: {words}.",
        ),
        test=(
            "Find the word whose position is the result so far: {words}.",
            "With n the result so far, which of these words is at position n: {words}?",
        ),
    )
    answer_format = "End with a line `Answer: ...`, one word."

    @property
    def _list(self) -> Words:
        return Words(group="sort", length=self.length)

    @property
    def size(self) -> int:
        return self._list.size

    @property
    def num_tuples(self) -> int:
        return self._list.num_tuples

    def latent(self, number: int) -> Latent | None:
        return self._list.latent(number)

    def ask(self, result: int, latent: Latent) -> Problem:
        return Words(group="pick", length=self.length).ask((*latent[:-1], result - 1))


@dataclass(frozen=True, kw_only=True)
class Later(Follower):
    """A date; the result says how many days to go on."""

    templates = Templates(
        name="then-later",
        open=(
            "Take the result so far as a number of days. What date is that many days after {first}?",
            "Let n be the result so far. Which date is n days after {first}?",
            "Today is {first}. Which date is it after as many days as the result so far says?",
            "Add the result so far, in days, to the date {first}.",
        ),
        validation=(
            "Go as many days forward from {first} as the result so far says.",
            "Call the result so far n. Which date comes n days after {first}?",
        ),
        test=(
            "Name the date that follows {first} by as many days as the result so far.",
            "With n the result so far, which date is n days later than {first}?",
        ),
    )
    answer_format = DATE_FORMAT

    @property
    def size(self) -> int:
        """Days to start from."""
        return NUM_DAYS

    def latent(self, number: int) -> Latent:
        """Return the first day's ordinal."""
        return (day_of(number),)

    def ask(self, result: int, latent: Latent) -> Problem:
        first = date.fromordinal(latent[0])
        return Problem({"first": first.isoformat()}, date.fromordinal(latent[0] + result).isoformat())


@dataclass(frozen=True, kw_only=True)
class CloseDifference(Kind):
    """a - b with a result of 1..`max_result`: a tuple of `arith` whose result may name a word or a number of days."""

    digits: int
    max_result: int

    group = "difference"
    templates = ARITHMETIC_TEMPLATES
    answer_format = NUMBER_FORMAT

    @property
    def _num_lowest(self) -> int:
        return int(9 * 10 ** (self.digits - 1)) - self.max_result

    @property
    def size(self) -> int:
        """Subtrahends times results."""
        return self._num_lowest * self.max_result

    def latent(self, number: int) -> Latent:
        """Return a and b."""
        result, rest = divmod(number, self._num_lowest)
        subtrahend = int(10 ** (self.digits - 1)) + rest
        return subtrahend + result + 1, subtrahend

    def root(self, latent: Latent) -> str:
        """Return what `arith` calls this difference."""
        return f"- {latent[0]} {latent[1]}"

    def ask(self, latent: Latent) -> Problem:
        return Problem({"terms": f"{latent[0]} - {latent[1]}"}, str(latent[0] - latent[1]))


@dataclass(frozen=True, kw_only=True)
class Pair(Kind):
    """A first part and a follower. A latent tuple is the first part's number, then the follower's tuple."""

    group: str
    first: Kind
    follower: Follower

    @property
    def size(self) -> int:
        return self.first.size * self.follower.size

    @property
    def num_tuples(self) -> int:
        return self.first.num_tuples * self.follower.num_tuples

    @property
    def templates(self) -> Templates:
        return self.follower.templates

    @property
    def answer_format(self) -> str:
        return self.follower.answer_format

    def latent(self, number: int) -> Latent | None:
        rest, first = divmod(number, self.first.size)
        follower = self.follower.latent(rest)
        return None if follower is None or self.first.latent(first) is None else (first, *follower)

    def first_latent(self, latent: Latent) -> Latent:
        """Return the first part's tuple."""
        first = self.first.latent(latent[0])
        assert first is not None, latent
        return first

    def root(self, latent: Latent) -> str:
        return self.first.root(self.first_latent(latent))

    def ask(self, latent: Latent) -> Problem:
        return self.follower.ask(int(self.first.ask(self.first_latent(latent)).answer), latent[1:])


class ChainSuite(Suite):
    """Rows of two stages. Label.gold: `answer` (the final one), `first` (the first part's answer), and the rest of a suite."""

    def _write(self, kind: Kind, latent: Latent, split: SuiteSplit, rng: random.Random) -> Row:
        assert isinstance(kind, Pair)
        first, second = kind.first.ask(kind.first_latent(latent)), kind.ask(latent)
        first_wording = word(kind.first.templates, first, split, rng)
        second_wording = word(kind.templates, second, split, rng)
        stages = (
            Stage(part=f"{first_wording.text} {kind.first.answer_format}"),
            Stage(part=f"{second_wording.text} {kind.answer_format}"),
        )
        gold = {
            "answer": second.answer,
            "first": first.answer,
            "tuple": spell(latent),
            "root": kind.root(latent),
            "template": f"{first_wording.template} {second_wording.template}",
        }
        text = f"{_INTRODUCTION} First: {first_wording.text} Second: {second_wording.text} {kind.answer_format}"
        return make_row(self.name, split, text, kind.group, gold, stages)


def _pairs(length: int, digits: int, between: Calendar) -> tuple[Pair, ...]:
    """Return the six ordered pairs of suites; lists of `length` words, numbers of `digits` digits."""
    letters = Words(group="letters", length=3)
    return (
        Pair(group="arith-words", first=CloseDifference(digits=digits, max_result=length), follower=Pick(length=length)),
        Pair(group="arith-calendar", first=CloseDifference(digits=digits, max_result=28), follower=Later()),
        Pair(group="words-arith", first=letters, follower=Add(digits=digits)),
        Pair(group="words-calendar", first=letters, follower=Later()),
        Pair(group="calendar-arith", first=between, follower=Add(digits=digits)),
        Pair(group="calendar-words", first=replace(between, max_days=length), follower=Pick(length=length)),
    )


CHAIN = ChainSuite(
    name="chain",
    title="chain (generated)",
    summary="Two parts of different suites, the second about the result of the first; agents see the pending part alone.",
    levels=(
        Level(
            meaning="lists of 5 words, numbers of 3 digits, days of one month", kinds=_pairs(5, 3, WithinMonth(group="between"))
        ),
        Level(
            meaning="lists of 9 words, numbers of 4 digits, up to 60 days",
            kinds=_pairs(9, 4, Calendar(group="between", max_days=60)),
        ),
    ),
)
"""The suite `chain`."""
