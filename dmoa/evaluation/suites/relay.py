"""The suite `relay`: cards are answered d steps after the gate has seen them, or at once. A unit test of a router's memory.

Four cards, each uniformly from one of three suites. At step t the gate reads the constant query and the newest card
c_t; the agents see c_(t-d) alone. Steps t <= d have nothing to answer and are not scored. The newest card says nothing
about the pending one, so the best memoryless router is right 1/3 of the time; one that remembers can always be right. At
once (d = 0) nothing is to be remembered: a control.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from dmoa.core.answers import same_answer
from dmoa.evaluation.records import Label, Reply, Row, Score
from dmoa.evaluation.suites.arith import ARITH
from dmoa.evaluation.suites.calendar import CALENDAR
from dmoa.evaluation.suites.suite import Level, Suite, SuiteSplit, find_answer, make_row
from dmoa.evaluation.suites.words import WORDS
from dmoa.types import Stage

NUM_CARDS = 4
DELAYS = (1, 2, 3, 0)
"""d by difficulty."""
QUERY = "You are shown one card after the other. Answer each card when it is your turn. End with a line `Answer: ...`."
WAIT = "Wait for the first card. End with a line `Answer: none`."


@dataclass(frozen=True, kw_only=True)
class RelaySuite(Suite):
    """Rows of four stages; the difficulty says the delay d.

    Label.gold: `answers` (per step, null where not scored), `delay`, `suites` (per step, the suite of the pending card, null
    where there is none), `tuples`, `roots` and `templates` (per card).
    """

    suites: tuple[Suite, ...]
    """Where cards come from, at difficulty 1."""

    def groups(self, difficulty: int = 1) -> tuple[str, ...]:
        """Return the one group of a delay."""
        self._level(difficulty)
        return (f"delay-{DELAYS[difficulty - 1]}",)

    def num_tuples(self, difficulty: int = 1) -> int:
        """Return the number of sequences of four cards."""
        self._level(difficulty)
        return int(sum(suite.num_tuples() for suite in self.suites) ** NUM_CARDS)

    def capacity(self, split: str, difficulty: int = 1, groups: Collection[str] = ()) -> int:
        """Return the most rows of a stream. Two rows of the same four cards never come up in practice (below 1e-9 in 100,000)."""
        self._check_groups(difficulty, groups)
        return int(sum(suite.capacity(split) for suite in self.suites) ** NUM_CARDS)

    def wordings(self, split: str, difficulty: int = 1) -> tuple[str, ...]:
        """Return the cards' templates."""
        self._level(difficulty)
        return tuple(text for suite in self.suites for text in suite.wordings(split))

    def chance(self, difficulty: int = 1) -> float:
        """Return the mean chance of the three suites: guessing the answer, not the specialist."""
        self._level(difficulty)
        return sum(suite.chance() for suite in self.suites) / len(self.suites)

    def score(self, label: Label, reply: Reply) -> Score:
        """Return the share of scored steps whose summary ends in that step's answer.

        A step that did not happen or holds no answer is wrong; a reply without an answer at any scored step is unscored.
        """
        answers: list[str | None] = label.gold["answers"]
        texts = (*reply.step_texts, *[""] * len(answers))
        pairs = [(gold, find_answer(text)) for gold, text in zip(answers, texts, strict=False) if gold is not None]
        if all(found is None for _, found in pairs):
            return Score(value=0.0, reason="no scored step holds an answer", is_scored=False)
        num_right = sum(found is not None and same_answer(found, gold) for gold, found in pairs)
        return Score(
            value=num_right / len(pairs),
            extracted=" | ".join("-" if found is None else found for _, found in pairs),
            reason=f"{num_right} of {len(pairs)} scored steps match",
        )

    def gold_reply(self, label: Label) -> Reply:
        """Return a perfect reply; steps that are not scored answer `none`."""
        texts = tuple(f"Answer: {answer or 'none'}" for answer in label.gold["answers"])
        return Reply(text=texts[-1], step_texts=texts)

    def _rows(self, split: SuiteSplit, seed: int, difficulty: int, groups: Collection[str] = ()) -> Iterator[Row]:
        rng = random.Random(f"{self.name}/{split}/{difficulty}/{seed}")  # noqa: S311 -- questions, not secrets
        decks = [_deck(suite, split, seed) for suite in self.suites]
        while True:
            yield self._deal([next(decks[int(rng.random() * len(decks))]) for _ in range(NUM_CARDS)], split, difficulty)

    def _deal(self, cards: Sequence[Row], split: SuiteSplit, difficulty: int) -> Row:
        delay = DELAYS[difficulty - 1]
        pending: list[Row | None] = [*[None] * delay, *cards[: NUM_CARDS - delay]]
        stages = tuple(
            Stage(observation=newest.task.text, part=card.task.text if card else WAIT, has_history=False)
            for newest, card in zip(cards, pending, strict=True)
        )
        gold = {
            "answers": [card.label.gold["answer"] if card else None for card in pending],
            "delay": delay,
            "suites": [card.task.benchmark if card else None for card in pending],
            "tuples": [card.label.gold["tuple"] for card in cards],
            "roots": [card.label.gold["root"] for card in cards],
            "templates": [card.label.gold["template"] for card in cards],
        }
        return make_row(self.name, split, QUERY, f"delay-{delay}", gold, stages)


def _deck(suite: Suite, split: SuiteSplit, seed: int) -> Iterator[Row]:
    """Deal cards of a suite for ever: all of a split's rows, then all of them in another order."""
    for deal in count():
        # Far apart, so that neighbouring seeds do not share decks.
        yield from suite.generate(split, suite.capacity(split), seed * 1_000_003 + deal)


RELAY = RelaySuite(
    name="relay",
    title="relay (generated)",
    summary="Four cards, answered d steps after the gate saw them; the best memoryless router is right 1/3 of the time.",
    levels=tuple(
        Level(meaning=f"cards are answered {f'{delay} steps late' if delay else 'at once'}", kinds=()) for delay in DELAYS
    ),
    suites=(ARITH, WORDS, CALENDAR),
)
"""The suite `relay`."""
