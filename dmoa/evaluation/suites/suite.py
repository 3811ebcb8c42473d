"""What every generated suite is made of: kinds of problems, wordings, levels, splits, seeded streams, and scoring.

Split membership depends only on the latent tuple, never on seed, difficulty or suite, so splits are disjoint whatever is
generated. A stream walks a pseudo-random permutation of the tuples; no tuple comes twice, and nothing is remembered.
"""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Literal, get_args

from dmoa.core.answers import extract_answer, same_answer, without_next_question
from dmoa.core.reasoning import split_reasoning
from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.base import hash_content
from dmoa.evaluation.records import SPLITS, Label, Reply, Row, Score, Task
from dmoa.types import Stage
from dmoa.validation import did_you_mean

SuiteSplit = Literal["specialist", "anchor", "gate", "validation", "test", "adaptation"]
SUITE_SPLITS: tuple[SuiteSplit, ...] = get_args(SuiteSplit)

PERCENT: dict[SuiteSplit, int] = {"specialist": 30, "anchor": 10, "gate": 15, "validation": 10, "test": 20, "adaptation": 15}
"""Expected share of the latent tuples, in percent. Source: ours."""

PUBLIC: dict[str, SuiteSplit] = {"train": "gate", "adaptation": "adaptation", "test": "test"}
"""What the splits that every benchmark has mean here."""

_OWNERS: tuple[SuiteSplit, ...] = tuple(split for split in SUITE_SPLITS for _ in range(PERCENT[split]))
_ROUNDS = 3

Latent = tuple[int, ...]
"""What a question is about, apart from its wording: operands, indices of words, day numbers."""

NUMBER_FORMAT = "End with a line `Answer: ...`, a number."

_ANSWER_LINE = re.compile(r"^[ \t>*_#-]*+answer[*_ \t]*:[ \t]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_MAX_CHARS = 20_000

_ID_CHARS = 16
_SAFE_SHARE = 0.85
"""Part of a split's expected tuples that may be asked for: the true number is a matter of hashes, and a little off."""
_CHANCE_SAMPLE = 6000


def fine_split(split: str) -> SuiteSplit:
    """Return the suite's split that a split's name means. Raises ConfigError for a name that is neither public nor fine."""
    for fine in SUITE_SPLITS:
        if split == fine:
            return fine
    if split in PUBLIC:
        return PUBLIC[split]
    allowed = list(dict.fromkeys((*SPLITS, *SUITE_SPLITS)))
    nearest = did_you_mean(split, allowed)
    raise ConfigError(f"split is {split!r}; expected one of {', '.join(allowed)}{nearest}")


def split_of(root: str) -> SuiteSplit:
    """Return the split that owns a latent tuple, given its root: the tuple's text up to symmetries such as a + b = b + a."""
    digest = hashlib.blake2b(root.encode(), digest_size=8, person=b"dmoa-suites").digest()
    return _OWNERS[int.from_bytes(digest) % 100]


def permuted(size: int, seed: str) -> Iterator[int]:
    """Yield 0..size-1, each once, in an order that depends only on `seed`; O(1) memory. Source: ours.

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


def spell(latent: Latent) -> str:
    """Return a latent tuple as text, as labels keep it."""
    return " ".join(map(str, latent))


@dataclass(frozen=True, slots=True)
class Problem:
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


class Part(ABC):
    """What a question is made of. Implementations are frozen records of a few numbers; equal records pose equal questions."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Numbers that `latent` takes: 0..size-1."""

    @property
    def num_tuples(self) -> int:
        """Latent tuples: the numbers for which `latent` is not None, counted exactly without visiting them."""
        return self.size

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


class Kind(Part):
    """A kind of question."""

    group: str
    """What tables break results down by; also the handle by which a caller chooses kinds."""

    @abstractmethod
    def root(self, latent: Latent) -> str:
        """Return what decides on the tuple's split: equal for tuples that are one and the same problem."""

    @abstractmethod
    def ask(self, latent: Latent) -> Problem:
        """Return the question with its computed answer."""


def find_answer(text: str) -> str | None:
    """Return the final answer of a reply, normalised; None where there is none. Never raises."""
    text = without_next_question(split_reasoning(text).text[-_MAX_CHARS:])
    lines = _ANSWER_LINE.findall(text)
    return (extract_answer(f"Answer: {lines[-1]}") if lines else None) or extract_answer(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One difficulty of a suite."""

    meaning: str
    """In words."""
    kinds: tuple[Kind, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """A question in words."""

    text: str
    template: str
    """Names the wording that was used."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A generator of labelled questions with computed answers.

    Label.gold: `answer`, `tuple` (the latent tuple, as text), `root` (what decided on the split), `template`.
    """

    name: str
    title: str
    """For tables; says that the rows are generated."""
    summary: str
    levels: tuple[Level, ...]
    """By difficulty, from 1."""

    @property
    def difficulties(self) -> dict[int, str]:
        """The allowed difficulties and what each means."""
        return {difficulty: level.meaning for difficulty, level in enumerate(self.levels, 1)}

    def groups(self, difficulty: int = 1) -> tuple[str, ...]:
        """Return the groups of rows of a difficulty, the values of `Task.group`."""
        return tuple(kind.group for kind in self._level(difficulty).kinds)

    def num_tuples(self, difficulty: int = 1) -> int:
        """Return the exact number of latent tuples of a difficulty, all splits together."""
        return sum(kind.num_tuples for kind in self._level(difficulty).kinds)

    def capacity(self, split: str, difficulty: int = 1, groups: Collection[str] = ()) -> int:
        """Return the most rows that one stream may be asked for, all with different latent tuples."""
        kinds = self._kinds(difficulty, groups)
        share = _SAFE_SHARE * PERCENT[fine_split(split)] / 100
        return len(kinds) * int(share * min(kind.num_tuples for kind in kinds))

    def wordings(self, split: str, difficulty: int = 1) -> tuple[str, ...]:
        """Return the templates that a split uses at a difficulty."""
        fine = fine_split(split)
        return tuple(dict.fromkeys(text for kind in self._level(difficulty).kinds for text in kind.templates.of(fine)[1]))

    def chance(self, difficulty: int = 1) -> float:
        """Return what guessing gets: the mean over kinds of the better of two guesses, made without reading the operands.

        One guess is uniform over the answers that the question lists (1/7 for weekdays, 1/n for one of n words), the other
        is the kind's commonest answer, found on one half of a fixed sample of 6,000 tuples and counted on the other half.
        """
        return _chance(self, difficulty)

    def describe(self, difficulty: int = 1) -> str:
        """Return one line for people: what the rows are, how many tuples there are, and the chance level."""
        meaning = self._level(difficulty).meaning
        return (
            f"{self.title}, difficulty {difficulty}: {meaning}; {self.num_tuples(difficulty):,} latent tuples; "
            f"chance {100 * self.chance(difficulty):.1f} %"
        )

    def generate(self, split: str, limit: int, seed: int, difficulty: int = 1, groups: Collection[str] = ()) -> Iterator[Row]:
        """Return `limit` rows of a split, lazily; no latent tuple comes twice, and a longer stream begins with a shorter one.

        `split` is one of `SuiteSplit`, or `train` (the same as `gate`); `groups` keeps only those groups of rows (default: all).

        Raises:
            ConfigError: at once, for an unknown split, difficulty or group, a limit below 1 or above `capacity`.
        """
        fine = fine_split(split)
        capacity = self.capacity(fine, difficulty, groups)
        if not 1 <= limit <= capacity:
            raise ConfigError(
                f"limit is {limit}; expected 1 to {capacity} (rows of suite {self.name}, split {fine}, difficulty "
                f"{difficulty}); ask for fewer rows or another difficulty"
            )
        return islice(self._rows(fine, seed, difficulty, groups), limit)

    def score(self, label: Label, reply: Reply) -> Score:
        """Judge a reply by strict match of its final answer; a `records.Scorer`."""
        found = find_answer(reply.text)
        if found is None:
            return Score(value=0.0, reason="the reply holds no answer", is_scored=False)
        is_right = same_answer(found, label.gold["answer"])
        reason = "the answers match" if is_right else f"the answer is {label.gold['answer']}"
        return Score(value=float(is_right), extracted=found, reason=reason)

    def gold_reply(self, label: Label) -> Reply:
        """Return a perfect reply."""
        return Reply(text=f"Answer: {label.gold['answer']}")

    def _level(self, difficulty: int) -> Level:
        if not 1 <= difficulty <= len(self.levels):
            meanings = ", ".join(f"{number} ({meaning})" for number, meaning in self.difficulties.items())
            raise ConfigError(f"difficulty is {difficulty}; suite {self.name} has {meanings}; choose one of them")
        return self.levels[difficulty - 1]

    def _kinds(self, difficulty: int, groups: Collection[str]) -> tuple[Kind, ...]:
        self._check_groups(difficulty, groups)
        return tuple(kind for kind in self._level(difficulty).kinds if not groups or kind.group in groups)

    def _check_groups(self, difficulty: int, groups: Collection[str]) -> None:
        allowed = self.groups(difficulty)
        unknown = sorted(set(groups) - set(allowed))
        if unknown:
            raise ConfigError(
                f"groups: {', '.join(unknown)} not known; suite {self.name} has at difficulty {difficulty}: "
                f"{', '.join(allowed)}; name some of them{did_you_mean(unknown, allowed)}"
            )

    def _rows(self, split: SuiteSplit, seed: int, difficulty: int, groups: Collection[str] = ()) -> Iterator[Row]:
        """Yield rows until one of the kinds has no tuples left."""
        kinds = self._kinds(difficulty, groups)
        name = f"{self.name}/{split}/{difficulty}/{seed}"
        rng = random.Random(name)  # noqa: S311 -- questions, not secrets
        streams = [(kind, _members(kind, split, f"{name}/{kind.group}")) for kind in kinds]
        while True:
            rng.shuffle(streams)
            for kind, latents in streams:
                latent = next(latents, None)
                if latent is None:
                    return
                yield self._write(kind, latent, split, rng)

    def _write(self, kind: Kind, latent: Latent, split: SuiteSplit, rng: random.Random) -> Row:
        question = kind.ask(latent)
        wording = word(kind.templates, question, split, rng)
        gold = {"answer": question.answer, "tuple": spell(latent), "root": kind.root(latent), "template": wording.template}
        return make_row(self.name, split, f"{wording.text} {kind.answer_format}", kind.group, gold)


def word(templates: Templates, question: Problem, split: SuiteSplit, rng: random.Random) -> Wording:
    """Return the question in one of the split's wordings, drawn uniformly."""
    name, wordings = templates.of(split)
    number = int(rng.random() * len(wordings))
    return Wording(text=wordings[number].format(**question.fields), template=f"{templates.name}/{name}/{number}")


def make_row(suite: str, split: SuiteSplit, text: str, group: str, gold: dict[str, Any], stages: tuple[Stage, ...] = ()) -> Row:
    """Return a row; its hash covers everything that is asked and everything that is right, its id what is asked alone."""
    asked = {"suite": suite, "text": text, "group": group, "stages": [[stage.observation, stage.part] for stage in stages]}
    row_hash = hash_content({**asked, "gold": gold})
    row_id = f"{suite}/{split}/{hash_content(asked)[:_ID_CHARS]}"
    task = Task(row_id=row_id, benchmark=suite, text=text, group=group, stages=stages)
    return Row(task=task, label=Label(row_id=row_id, benchmark=suite, gold=gold), row_hash=row_hash)


def _members(kind: Kind, split: SuiteSplit, seed: str) -> Iterator[Latent]:
    for number in permuted(kind.size, seed):
        latent = kind.latent(number)
        if latent is not None and split_of(kind.root(latent)) == split:
            yield latent


@cache
def _chance(suite: Suite, difficulty: int) -> float:
    kinds = suite.levels[difficulty - 1].kinds
    return sum(_kind_chance(kind) for kind in kinds) / len(kinds)


def _kind_chance(kind: Kind) -> float:
    latents = (latent for latent in map(kind.latent, permuted(kind.size, "chance")) if latent is not None)
    questions = [kind.ask(latent) for latent in islice(latents, _CHANCE_SAMPLE)]
    half = len(questions) // 2
    answers = [question.answer for question in questions]
    ((commonest, _),) = Counter(answers[:half]).most_common(1)
    options = questions[0].num_options
    return max(answers[half:].count(commonest) / (len(answers) - half), 1 / options if options else 0.0)
