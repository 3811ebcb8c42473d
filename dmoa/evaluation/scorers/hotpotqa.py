"""HotpotQA: exact match and token F1 of the answer, with the official normalisation.

The answer is the last "Answer: ..." line or its like; else the last line that is not blank. Both sides are normalised
as the official script does: lower case, punctuation removed, the articles a, an and the removed, white space joined. F1
is 0 where one side is yes, no or noanswer and the two differ. Supporting facts are not asked for. Source: Yang et al.
2018, `hotpot_evaluate_v1.py`.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from dmoa.core.answers import plain_text
from dmoa.evaluation.records import Label, Reply, Score
from dmoa.evaluation.scorers.entry import VALUE, ScorerEntry, chance_of, gold_of, unscored
from dmoa.evaluation.scorers.statements import final_statement, is_refusal, last_line, readable

F1 = "f1"
_CLOSED = ("yes", "no", "noanswer")
_MAX_CHARS = 500
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
    prose = readable(text)
    final = final_statement(prose)
    said = final.span if final is not None else last_line(prose)
    if not normalised(said) or is_refusal(said) or (final is None and is_refusal(prose)):
        return None
    return said[:_MAX_CHARS]


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
    said = read_answer(reply.text)
    if said is None:
        return unscored("no answer found", (F1,))
    plain_gold = plain_text(gold)  # as the reply was: equal texts stay equal
    return Score(
        value=exact_match(said, plain_gold), extracted=said, reason=f"right is {gold!r}", metrics={F1: f1(said, plain_gold)}
    )
