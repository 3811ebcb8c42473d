"""Outcomes of queries unlike those that a label model was fitted on: a table beside the gate's weights, joined when it decides.

In a new kind of query competence has to be learnt anew, and few outcomes are there to learn it from. Each new context (leader
clustering of embeddings) keeps what was replied to its judged queries. Competence there is a level of all agents together, a
part of what they differ in elsewhere, and what each has of its own, all drawn to what is usual beforehand, so that few outcomes
move little. Found by expectation maximisation over the judged queries alone: an outcome of one answer speaks of all others.
The more outcomes, the more the ranking of agents is that of their competences instead of the gate's, whose weights know nothing
of such queries. Contexts that the model was fitted on stay as they are. Source: ours.

Shape letters: R judged queries, A agents, C contexts, D embedding, P parameters of competence, K nodes of difficulty.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from dmoa.core.label_model import LabelModel, Trust
from dmoa.core.posterior import right_of
from dmoa.core.scores import squared_distances
from dmoa.core.witnesses import Array, Witnesses

MAX_JUDGED = 256
"""Newest judged queries that a new context keeps, ..."""
MAX_NEW = 8
"""... and most new contexts."""
_FARTHEST = 1.1
"""A query is of a context if it is no farther from its centre than so many times the farthest that the model was fitted on."""
_TOGETHER_SD, _OWN_SD = 1.5, 0.7
"""How far the competence of all agents, and that of one beside them, differs in a new context beforehand, in log odds."""
_CARRIED = (0.5, 0.5)
"""Mean and standard deviation of the part of what agents differ in elsewhere that carries over, beforehand."""
_HALF = 10.0
"""Judged queries after which half of the ranking is by competence."""
_ROUNDS = 12


@dataclass(slots=True)
class _Context:
    """A new kind of query: its centre, and its newest judged queries."""

    centre_D: Array
    seen: int = 0
    judged: deque[Witnesses] = field(default_factory=lambda: deque(maxlen=MAX_JUDGED))


class OutcomeTable:
    """What outcomes have told of new contexts, for one label model."""

    def __init__(self, model: LabelModel, embedding_RD: Array) -> None:
        """`embedding_RD`: of the queries that the model was fitted on, or others like them."""
        self._model = model
        near_R = squared_distances(np.asarray(embedding_RD, dtype=np.float64), model.centre_CD).min(axis=1)
        self._radius = _FARTHEST * float(np.sqrt(near_R.max(initial=0.0)))
        self._new: list[_Context] = []

    @property
    def judged(self) -> int:
        """Judged queries that are kept."""
        return sum(len(one.judged) for one in self._new)

    def is_new(self, witnesses: Witnesses) -> bool:
        """Tell whether a query [1, A] with its embedding is of a new context."""
        assert witnesses.embedding_RD is not None
        row_RD = np.asarray(witnesses.embedding_RD, dtype=np.float64)
        return float(np.sqrt(squared_distances(row_RD, self._model.centre_CD).min())) > self._radius

    def hear(self, witnesses: Witnesses) -> bool:
        """Take in one query [1, A] with its embedding, judged or not; tell whether it is of a new context."""
        if not self.is_new(witnesses):
            return False
        assert witnesses.embedding_RD is not None
        row_D = np.asarray(witnesses.embedding_RD[0], dtype=np.float64)
        # The mean of a few queries lies off the centre: by as much of the distance as is taken off here, on average.
        away = [float(np.linalg.norm(row_D - one.centre_D)) * (one.seen / (one.seen + 1)) ** 0.5 for one in self._new]
        if not away or (min(away) > self._radius and len(self._new) < MAX_NEW):
            self._new.append(_Context(np.zeros_like(row_D)))
            away.append(0.0)
        context = self._new[int(np.argmin(away))]
        context.seen += 1
        context.centre_D += (row_D - context.centre_D) / context.seen
        if np.isfinite(witnesses.outcome_RA).any():
            context.judged.append(witnesses)
        return True

    def model(self) -> LabelModel:
        """Return the label model with the new contexts that have outcomes behind those that it knows."""
        told = [one for one in self._new if one.judged]
        if not told:
            return self._model
        base = self._model
        usual = {name: getattr(base, name).mean(axis=0) for name in ("doubt_CA", "doubt_slope_CA", "length_mean_CA")}
        more = {name: np.tile(mean_A, (len(told), 1)) for name, mean_A in usual.items()}
        more["ability_CA"] = np.stack([self._ability(one) for one in told])
        more["centre_CD"] = np.stack([one.centre_D for one in told])
        more["reliance_C"] = np.ones(len(told))
        more["lead_C"] = np.array([len(one.judged) / (len(one.judged) + _HALF) for one in told])
        joined = {name: np.concatenate([getattr(base, name), added]) for name, added in more.items()}
        words = [f"{len(one.judged)} outcomes of queries unlike those that the gate was trained on" for one in told]
        trust = tuple(
            Trust(signal="outcomes", reason=reason, rows=len(one.judged)) for reason, one in zip(words, told, strict=True)
        )
        return replace(base, trust=(*base.trust, *trust) if base.trust else (), **joined)

    def _ability(self, context: _Context) -> Array:
        """Return the competences [A] that the judged queries of a context tell."""
        witnesses = _stacked(context.judged)
        names = ("ability_CA", "doubt_CA", "doubt_slope_CA", "length_mean_CA")
        usual = {name: getattr(self._model, name).mean(axis=0)[None] for name in names}
        usual |= {"reliance_C": np.ones(1), "lead_C": np.zeros(1)}
        start = replace(self._model, centre_CD=np.zeros((1, 0)), trust=(), **usual)
        mean, apart_A = float(start.ability_CA.mean()), start.ability_CA[0] - start.ability_CA.mean()
        # Each agent's competence is linear in (together, carried, its own): a Newton step of all of them at once.
        design_AP = np.hstack([np.ones((len(apart_A), 1)), apart_A[:, None], np.eye(len(apart_A))])
        prior_P = np.array([mean, _CARRIED[0], *np.zeros(len(apart_A))])
        precision_P = np.array([_TOGETHER_SD, _CARRIED[1], *np.full(len(apart_A), _OWN_SD)]) ** -2.0
        value_P, model = prior_P.copy(), start
        for _ in range(_ROUNDS):
            model = replace(start, ability_CA=(design_AP @ value_P)[None])
            p_RAK = 1 / (1 + np.exp(-model.logits(witnesses)))
            truth = model.truth(witnesses, p_RAK)
            right_RAK = right_of(truth.weight_RZK, witnesses.answer_RA)
            all_RAK = truth.weight_RZK.sum(axis=1)[:, None, :] * witnesses.asked[:, :, None]
            slope_A = (right_RAK - all_RAK * p_RAK).sum(axis=(0, 2))
            curve_A = (all_RAK * p_RAK * (1 - p_RAK)).sum(axis=(0, 2))
            slope_P = design_AP.T @ slope_A - precision_P * (value_P - prior_P)
            curve_PP = design_AP.T @ (curve_A[:, None] * design_AP) + np.diag(precision_P)
            value_P = value_P + np.clip(np.linalg.solve(curve_PP, slope_P), -1, 1)
        model = replace(start, ability_CA=(design_AP @ value_P)[None])
        ability_A: Array = model.ability_CA[0]
        return ability_A


def _stacked(rows: deque[Witnesses]) -> Witnesses:
    names = ("answer_RA", "doubt_RA", "length_RA", "outcome_RA")
    return Witnesses(**{name: np.concatenate([getattr(row, name) for row in rows]) for name in names})
