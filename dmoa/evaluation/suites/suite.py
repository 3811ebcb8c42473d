"""A built-in suite: a seeded generator of rows that never ends, with a scorer. Every suite is one of these.

Rows leave `generate` one by one, at O(1) memory. Kinds of question take turns in seeded order, so every prefix of a
stream holds as many of each as of any other, give or take one. Everything hangs on (suite, split, seed, difficulty).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.upstream import hash_content
from dmoa.evaluation.records import Label, Reply, Row, Score, Task
from dmoa.evaluation.suites.kinds import Kind, Latent, Question, Templates, spell
from dmoa.evaluation.suites.scoring import reply_finally, score_final
from dmoa.evaluation.suites.streams import PERCENT, SuiteSplit, fine_split, permuted, split_of
from dmoa.types import Stage
from dmoa.validation import did_you_mean

_ID_CHARS = 16
_SAFE_SHARE = 0.85
"""Part of a split's expected tuples that may be asked for: the true number is a matter of hashes, and a little off."""
_CHANCE_SAMPLE = 6000


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
    def is_generated(self) -> bool:
        """Always: no row was written by a person."""
        return True

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
                f"limit: value seen: {limit}; allowed: 1 to {capacity} (rows of suite {self.name}, split {fine}, difficulty "
                f"{difficulty}); ask for fewer rows or another difficulty"
            )
        return islice(self._rows(fine, seed, difficulty, groups), limit)

    def score(self, label: Label, reply: Reply) -> Score:
        """Judge a reply by strict match of its final answer; a `records.Scorer`."""
        return score_final(label, reply)

    def gold_reply(self, label: Label) -> Reply:
        """Return a perfect reply."""
        return reply_finally(label)

    def _level(self, difficulty: int) -> Level:
        if not 1 <= difficulty <= len(self.levels):
            meanings = ", ".join(f"{number} ({meaning})" for number, meaning in self.difficulties.items())
            raise ConfigError(
                f"difficulty: value seen: {difficulty}; allowed for suite {self.name}: {meanings}; choose one of them"
            )
        return self.levels[difficulty - 1]

    def _kinds(self, difficulty: int, groups: Collection[str]) -> tuple[Kind, ...]:
        self._check_groups(difficulty, groups)
        return tuple(kind for kind in self._level(difficulty).kinds if not groups or kind.group in groups)

    def _check_groups(self, difficulty: int, groups: Collection[str]) -> None:
        allowed = self.groups(difficulty)
        unknown = sorted(set(groups) - set(allowed))
        if unknown:
            raise ConfigError(
                f"groups: value seen: {', '.join(unknown)}; allowed for suite {self.name} at difficulty {difficulty}: "
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


def word(templates: Templates, question: Question, split: SuiteSplit, rng: random.Random) -> Wording:
    """Return the question in one of the split's wordings, drawn uniformly."""
    name, wordings = templates.of(split)
    number = int(rng.random() * len(wordings))
    return Wording(text=wordings[number].format(**question.fields), template=f"{templates.name}/{name}/{number}")


def make_row(suite: str, split: SuiteSplit, text: str, group: str, gold: dict[str, Any], stages: tuple[Stage, ...] = ()) -> Row:
    """Return a row; its hash covers everything that is asked and everything that is right."""
    parts = [[stage.observation, stage.part] for stage in stages]
    row_hash = hash_content({"suite": suite, "text": text, "group": group, "stages": parts, "gold": gold})
    row_id = f"{suite}/{split}/{row_hash[:_ID_CHARS]}"
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
    counts: dict[str, int] = {}
    for answer in answers[:half]:
        counts[answer] = counts.get(answer, 0) + 1
    commonest = max(counts, key=lambda answer: counts[answer])
    options = questions[0].num_options
    return max(answers[half:].count(commonest) / (len(answers) - half), 1 / options if options else 0.0)
