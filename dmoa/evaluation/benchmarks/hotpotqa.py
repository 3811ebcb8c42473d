"""HotpotQA in the distractor setting: a question over paragraphs, two of which matter; scored by exact match and F1.

Label: `answer`. Supporting facts are part of the row hash, never of the prompt.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any, ClassVar

from pydantic import model_validator

from dmoa.core.answers import is_refusal, last_line, open_reply
from dmoa.core.numbers import plain_text
from dmoa.evaluation.benchmarks.base import (
    VALUE,
    HubSource,
    ScorerEntry,
    Text,
    UpstreamFields,
    UpstreamRow,
    benchmark,
    chance_of,
    divided,
    gold_of,
    unscored,
)
from dmoa.evaluation.records import Label, Reply, Score


class SupportingFacts(UpstreamFields):
    """Which sentences the answer rests on."""

    title: list[str]
    sent_id: list[int]


class Context(UpstreamFields):
    """The paragraphs, in upstream's order."""

    title: list[str]
    sentences: list[list[str]]

    @model_validator(mode="after")
    def _same_length(self) -> Context:
        if not self.title or len(self.title) != len(self.sentences):
            raise ValueError(f"as many paragraphs as titles, at least one; there are {len(self.sentences)} and {len(self.title)}")
        return self


@benchmark(
    "hotpotqa",
    title="HotpotQA (distractor)",
    slices=divided("validation"),
    scoring=lambda _: entry("answer only, no supporting facts"),
    hub=HubSource(
        dataset="hotpotqa/hotpot_qa", config="distractor", revision="1908d6afbbead072334abe2965f91bd2709910ab", max_rows=20_000
    ),
)
class HotpotRow(UpstreamRow):
    """A row of `hotpotqa/hotpot_qa`, distractor."""

    identifiers: ClassVar[dict[str, Any]] = {"id": True}
    id: str
    question: Text
    answer: Text
    type: str
    level: str
    supporting_facts: SupportingFacts
    context: Context

    def text(self) -> str:
        task = "Answer the question from the paragraphs. End with a line `Answer: ...`, a few words or yes or no."
        paragraphs = [
            f"Title: {title.strip()}\n{' '.join(sentence.strip() for sentence in sentences)}"
            for title, sentences in zip(self.context.title, self.context.sentences, strict=True)
        ]
        return "\n\n".join([task, *paragraphs, f"Question: {self.question.strip()}"])

    def gold(self) -> dict[str, Any]:
        return {"answer": self.answer}

    def group(self) -> str:
        """Bridge or comparison."""
        return self.type


F1 = "f1"
_CLOSED = ("yes", "no", "noanswer")
_MAX_CHARS = 500
_MIN_TITLE_CHARS = 4
"""Shorter words of a title may begin with a small letter."""
_AS_AN_AI = re.compile(r"\W*as an? (?:ai|assistant|(?:large )?language model)\b", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return an answer as the official script compares it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(said: str, gold: str) -> float:
    """Return 1.0 where the two answers are equal after normalisation, else 0.0."""
    return float(normalised(said) == normalised(gold))


def f1(said: str, gold: str) -> float:
    """Return the F1, 0..1, of the normalised tokens of two answers."""
    said, gold = normalised(said), normalised(gold)
    if said != gold and (said in _CLOSED or gold in _CLOSED):
        return 0.0
    said_tokens, gold_tokens = said.split(), gold.split()
    num_shared = sum((Counter(said_tokens) & Counter(gold_tokens)).values())
    if num_shared == 0:
        return 0.0
    precision, recall = num_shared / len(said_tokens), num_shared / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)


def read_answer(text: str) -> str | None:
    """Return the answer of a reply, as it is spelled there; None for an empty reply or a refusal. Never raises."""
    reply = open_reply(text)
    prose, final = reply.prose, reply.final
    said = final.span if final is not None else last_line(prose)
    if not normalised(said) or (_refuses(said) if final is not None else is_refusal(said) or is_refusal(prose)):
        return None
    return said[:_MAX_CHARS]


def _refuses(said: str) -> bool:
    """Whether a stated answer refuses one; a title such as `I Can't Dance` or `Sorry, I Love You` does not."""
    words = [word for word in re.findall(r"[\w'\u2019]+", said) if len(word) >= _MIN_TITLE_CHARS]
    is_title = bool(words) and all(word[0].isupper() for word in words) and not _AS_AN_AI.match(said)
    return is_refusal(said) and not is_title


def entry(deviation: str) -> ScorerEntry:
    """Return the scoring of HotpotQA, whose gold has `answer`."""

    def gold_replies(label: Label) -> dict[str, str]:
        (gold,) = gold_of(label, "answer")
        return {VALUE: f"Answer: {gold}", F1: f"Answer: {gold}"}

    return ScorerEntry(
        score=_score,
        gold_replies=gold_replies,
        primary="exact match",
        metrics=(F1,),
        chance=lambda labels: chance_of([_key(label) for label in labels]),
        answer_key=_key,
        deviation=deviation,
    )


def _key(label: Label) -> str:
    return normalised(plain_text(gold_of(label, "answer")[0]))


def _score(label: Label, reply: Reply) -> Score:
    (gold,) = gold_of(label, "answer")
    if not normalised(plain_text(gold)):
        return unscored(
            f"the right answer {gold!r} is empty as the official script compares it: no reply can be right",
            (F1,),
            is_left_out=True,
        )
    said = read_answer(reply.text)
    if said is None:
        return unscored("no answer found", (F1,))
    plain_gold = plain_text(gold)  # as the reply was: equal texts stay equal
    return Score(
        value=exact_match(said, plain_gold), extracted=said, reason=f"right is {gold!r}", metrics={F1: f1(said, plain_gold)}
    )
