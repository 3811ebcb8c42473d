"""Scores of the built-in suites: strict match of the final answer, and per step for `relay`.

The final answer is what the last line `Answer: ...` holds, else what `core.answers` finds in the reply. Equal numbers
and equal normalised texts match (case, white space, commas and marks at the edges of words do not count); nothing else.
"""

from __future__ import annotations

import re

from dmoa.core.answers import extract_answer, same_answer
from dmoa.evaluation.records import Label, Reply, Score

_ANSWER_LINE = re.compile(r"^[ \t>*_#-]*+answer[*_ \t]*:[ \t]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_MAX_CHARS = 20_000


def find_answer(text: str) -> str | None:
    """Return the final answer of a reply, normalised; None where there is none. Never raises."""
    lines = _ANSWER_LINE.findall(text[-_MAX_CHARS:])
    return (extract_answer(f"Answer: {lines[-1]}") if lines else None) or extract_answer(text)


def score_final(label: Label, reply: Reply) -> Score:
    """Score the final answer against `gold["answer"]`."""
    found = find_answer(reply.text)
    if found is None:
        return Score(value=0.0, reason="the reply holds no answer", is_scored=False)
    is_right = same_answer(found, label.gold["answer"])
    reason = "the answers match" if is_right else f"the answer is {label.gold['answer']}"
    return Score(value=float(is_right), extracted=found, reason=reason)


def score_steps(label: Label, reply: Reply) -> Score:
    """Score `relay`: the share of scored steps whose summary ends in that step's answer.

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


def reply_finally(label: Label) -> Reply:
    """Return a perfect reply to a question with one final answer."""
    return Reply(text=f"Answer: {label.gold['answer']}")


def reply_in_steps(label: Label) -> Reply:
    """Return a perfect reply to a `relay` row; steps that are not scored answer `none`."""
    texts = tuple(f"Answer: {answer or 'none'}" for answer in label.gold["answers"])
    return Reply(text=texts[-1], step_texts=texts)
