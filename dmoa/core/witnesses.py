"""What the replies of many queries say, as arrays: who agrees with whom, how unsure and how long each is, and known outcomes.

What `core/label_model` is fitted on, made from texts by the one reader of answers (`core/answers`). No label of a
benchmark gets in; outcomes are what the user handed over. Shape letters: R queries, A agents of the pool, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dmoa.core import forms
from dmoa.core.scores import raw_score
from dmoa.errors import ConfigError

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

NO_ANSWER = forms.NO_ANSWER
"""In `answer_RA`: the reply came, and nothing that could agree with another was read from it."""
NOT_ASKED = -2
"""In `answer_RA`: there is no reply."""
_SURE_NATS = 1.0
"""How far below its anchor the score of a reply lies that its agent is sure of: e times less entropy than usual."""
_DISPUTED = 4
"""Queries that a dispute takes: fewer are chance."""
_MOST_LIKE = 4
"""Queries most like one that tell what is usual for its kind, ..."""
_LIKE_SHARE = 8
"""... and the most of all queries that they may be, as a divisor: of a few queries the nearest may be of any kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Witnesses:
    """Replies of A agents to R queries; a dense rollout has no NOT_ASKED."""

    answer_RA: IntArray
    """Equality class of the answer within its row, 0 to A - 1, or NO_ANSWER or NOT_ASKED."""
    doubt_RA: Array
    """Logarithm of the mean entropy (`core/scores.raw_score`); NaN where unknown."""
    length_RA: Array
    """Length of the reply in characters or tokens, the same unit within a column; NaN where unknown."""
    outcome_RA: Array
    """How good the reply was found to be, 0 to 1; NaN where nobody said."""
    embedding_RD: Array | None = None
    """Of the query; None: all queries are of one context."""

    def __post_init__(self) -> None:
        """Raises ConfigError for shapes that differ and for outcomes outside 0 to 1."""
        shape = self.answer_RA.shape
        for name in ("doubt_RA", "length_RA", "outcome_RA"):
            if getattr(self, name).shape != shape:
                raise ConfigError(f"witnesses.{name} has shape {getattr(self, name).shape}; expected {shape}, that of answer_RA")
        if self.embedding_RD is not None and len(self.embedding_RD) != len(self.answer_RA):
            raise ConfigError(f"witnesses.embedding_RD has {len(self.embedding_RD)} rows; expected {len(self.answer_RA)}")
        known = self.outcome_RA[~np.isnan(self.outcome_RA)]
        if known.size and (known.min() < 0 or known.max() > 1):
            raise ConfigError(f"witnesses.outcome_RA holds {known.min():g} to {known.max():g}; expected numbers from 0 to 1")
        if shape[1] and self.answer_RA.size and not NOT_ASKED <= self.answer_RA.min() <= self.answer_RA.max() < shape[1]:
            raise ConfigError(f"witnesses.answer_RA holds values outside {NOT_ASKED} to {shape[1] - 1}")

    @property
    def asked(self) -> npt.NDArray[np.bool_]:
        """Which agents replied [R, A]."""
        asked_RA: npt.NDArray[np.bool_] = self.answer_RA != NOT_ASKED
        return asked_RA

    def rows(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> Witnesses:
        """Return some of the rows."""
        embedding_RD = None if self.embedding_RD is None else self.embedding_RD[rows]
        return Witnesses(
            answer_RA=self.answer_RA[rows],
            doubt_RA=self.doubt_RA[rows],
            length_RA=self.length_RA[rows],
            outcome_RA=self.outcome_RA[rows],
            embedding_RD=embedding_RD,
        )

    def only(self, asked_RA: npt.NDArray[np.bool_]) -> Witnesses:
        """Return the same rows as if the other agents had not been asked."""
        return replace(
            self,
            answer_RA=np.where(asked_RA, self.answer_RA, NOT_ASKED),
            doubt_RA=np.where(asked_RA, self.doubt_RA, np.nan),
            length_RA=np.where(asked_RA, self.length_RA, np.nan),
            outcome_RA=np.where(asked_RA, self.outcome_RA, np.nan),
        )


def answer_classes(texts: Sequence[str | None], query: str = "") -> list[int]:
    """Return the equality class of each reply to one query, numbered as they come; None is a reply that is not there.

    The equality is that of the scorers (`core/forms`). A reply without an answer that can be read agrees with none: prose is not
    compared by meaning.
    """
    classes = iter(forms.answer_classes([text for text in texts if text is not None], query))
    return [NOT_ASKED if text is None else next(classes) for text in texts]


def witnesses_of(
    texts: Sequence[Sequence[str | None]],
    *,
    queries: Sequence[str] | None = None,
    entropies: Sequence[Sequence[float | None]] | None = None,
    embedding_RD: Array | None = None,
    outcomes: Sequence[Sequence[float | None]] | None = None,
) -> Witnesses:
    """Return the witnesses of R queries from A texts each, None where an agent was not asked.

    `queries` tell the form of the answers (`core/forms`). `entropies` are mean nats per token, `outcomes` 0 to 1, both of
    the same shape and None where unknown; entropies that cannot be count as unknown. Raises ConfigError for rows that differ.
    """
    if len({len(row) for row in texts}) != 1:
        raise ConfigError(f"witnesses: rows of {sorted({len(row) for row in texts})} replies; expected as many as agents in each")
    answer_RA = np.array([answer_classes(*row) for row in zip(texts, queries or [""] * len(texts), strict=True)], dtype=np.int64)
    length_RA = np.array([[np.nan if text is None else float(len(text)) for text in row] for row in texts])
    unknown_RA = np.full(answer_RA.shape, np.nan)
    doubt_RA, outcome_RA = unknown_RA, unknown_RA
    if entropies is not None:
        known = [[value if value is not None and 0 <= value < np.inf else np.nan for value in row] for row in entropies]
        doubt_RA = np.array([[raw_score(value) for value in row] for row in known])
    if outcomes is not None:
        outcome_RA = np.array([[np.nan if value is None else value for value in row] for row in outcomes], dtype=np.float64)
    return Witnesses(
        answer_RA=answer_RA, doubt_RA=doubt_RA, length_RA=length_RA, outcome_RA=outcome_RA, embedding_RD=embedding_RD
    )


class Dispute(NamedTuple):
    """Two agents that are sure, agree with each other and nobody else, and are refuted by another that is sure as well."""

    a: int
    b: int
    rows: IntArray
    """Where."""
    against: int
    """The agent that refutes them most often."""


def disputes(answer_RA: IntArray, anchored_RA: Array) -> list[Dispute]:
    """Return the pairs that stand against a third agent wherever they are sure, with nobody beside them.

    Nothing in such replies tells two that know from two that err in concert: not how sure they are, and not their agreement,
    which nobody else bears out. `anchored_RA`: scores beside the agents' anchors, NaN where unknown. Source: ours.
    """
    is_sure_RA = (anchored_RA < -_SURE_NATS) & (answer_RA >= 0)
    found = []
    for a, b in combinations(range(answer_RA.shape[1]), 2):
        together_R, alone_R = _together(answer_RA, is_sure_RA[:, a] & is_sure_RA[:, b], a, b)
        refuted_RA = alone_R[:, None] & is_sure_RA & (answer_RA != answer_RA[:, [a]])
        rows = np.flatnonzero(refuted_RA.any(axis=1))
        if len(rows) >= max(_DISPUTED, together_R.sum() / 2):
            found.append(Dispute(a, b, rows, int(refuted_RA.sum(axis=0).argmax())))
    return found


def are_backed(answer_RA: IntArray, anchored_RA: Array, a: int, b: int) -> bool:
    """Tell whether others bear out what two agents agree on while they are sure, in the mean; False where they seldom are."""
    together_R, alone_R = _together(answer_RA, anchored_RA[:, [a, b]].mean(axis=1) < -_SURE_NATS, a, b)
    return bool(together_R.sum() >= max(_DISPUTED, 2 * alone_R.sum()))


def _together(answer_RA: IntArray, is_sure_R: BoolArray, a: int, b: int) -> tuple[BoolArray, BoolArray]:
    """Return where two agents agree of the rows where they are sure [R], and where nobody else says the same."""
    together_R = is_sure_R & (answer_RA[:, a] == answer_RA[:, b]) & (answer_RA[:, a] >= 0)
    return together_R, together_R & ((answer_RA == answer_RA[:, [a]]).sum(axis=1) == 2)


def by_context(value_RA: Array, context_R: IntArray, count: int) -> Array:
    """Return means by context [C, A], with the mean over all contexts as two values more; 0 where nothing is known."""
    known_RA = np.isfinite(value_RA)
    value_RA = np.where(known_RA, value_RA, 0.0)
    mean_A = value_RA.sum(axis=0) / np.maximum(known_RA.sum(axis=0), 1)
    member_CR = (context_R == np.arange(count)[:, None]).astype(np.float64)
    mean_CA: Array = (member_CR @ value_RA + 2 * mean_A) / (member_CR @ known_RA + 2)
    return mean_CA


def usual_doubts(witnesses: Witnesses) -> Array:
    """Return how unsure each agent is on queries like each one [R, A]: the mean over it and those nearest to it by embedding.

    One reply tells little of its kind: an expert's surest and least sure replies may lie four nats apart. NaN where neither the
    query nor those like it tell anything. Source: ours, nearest neighbours.
    """
    count = min(_MOST_LIKE, len(witnesses.doubt_RA) // _LIKE_SHARE)
    if witnesses.embedding_RD is None or not count:
        return witnesses.doubt_RA
    is_known_RA = np.isfinite(witnesses.doubt_RA)
    doubt_RA = np.where(is_known_RA, witnesses.doubt_RA, 0.0)
    square_R = (witnesses.embedding_RD**2).sum(axis=1)
    found = []
    for row, embedding_D in enumerate(witnesses.embedding_RD):
        distance_R = square_R - 2 * (witnesses.embedding_RD @ embedding_D)
        distance_R[row] = -np.inf
        like = np.argsort(distance_R, kind="stable")[: count + 1]
        known_A = is_known_RA[like].sum(axis=0)
        found.append(np.where(known_A, doubt_RA[like].sum(axis=0) / np.maximum(known_A, 1), np.nan))
    return np.array(found)


def lengths(log_RA: Array, context_R: IntArray, count: int) -> tuple[Array, Array, float]:
    """Return mean per context, standard deviation within contexts, and the correlation between agents of log lengths."""
    known_RA = np.isfinite(log_RA)
    mean_CA = by_context(log_RA, context_R, count)
    centred_RA = np.where(known_RA, log_RA - mean_CA[context_R], 0)
    sd_A = np.sqrt((centred_RA**2).sum(axis=0) / np.maximum(known_RA.sum(axis=0), 1))
    sd_A = np.maximum(sd_A, 0.05)
    scaled_RA = np.clip(centred_RA / sd_A, -3, 3)
    both = float((known_RA.sum(axis=1) ** 2 - known_RA.sum(axis=1)).sum())
    cross = float((scaled_RA.sum(axis=1) ** 2 - (scaled_RA**2).sum(axis=1)).sum())
    return mean_CA, sd_A, min(max(cross / max(both, 1.0), 0.0), 0.9)
