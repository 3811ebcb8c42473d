"""The probability that a reply is right, learnt without labels: from agreement, entropy, length and outcomes.

Fitted by expectation maximisation over queries that several agents answered. Per context (a cluster of queries) and agent a
competence; one slope each for entropy and for length, which tell hard queries from easy ones; one table of who errs alike, so
that correlated agents are not counted as independent witnesses. In contexts where agents seldom agree on what is probably right,
entropies alone say who is. Outcomes, where there are any, enter as evidence about the truth of their rows. Source: ours, after
Dawid and Skene (1979). Never reads labels of benchmarks.

Shape letters: R queries, A agents, C contexts, D embedding, K nodes of difficulty, Z candidates for the truth.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from dmoa.core.posterior import (
    ALIKE,
    ONE_WITNESS,
    USUAL_COPY,
    Truth,
    copies,
    held_open,
    nodes,
    outcome_evidence,
    repeated,
    right_of,
    truth_posterior,
    voices,
    wrong_outcomes,
)
from dmoa.core.scores import clusters, fit_anchors, squared_distances
from dmoa.core.witnesses import Array, IntArray, Witnesses, by_context, disputes, lengths, usual_doubts
from dmoa.errors import ConfigError

MIN_ROWS = 8
_ROUNDS = 25
MAX_CONTEXTS = 8
_ROWS_PER_CONTEXT = 8
_SPREAD = 1.5
"""Standard deviation of difficulty. Held-back likelihood hardly tells 1 from 2; above 1 the calibration is better."""
_ABILITY = (0.0, 1.5)
"""Mean and standard deviation of competence (log odds of being right) beforehand."""
_CONTEXT_SD = 0.5
"""How far the competence of an agent differs between contexts beforehand."""
_UNBACKED = -3.0
"""Competence that agents of one voice begin with, where nobody else bears them out: by agreement they would be believed first."""
_COMPETENT = 0.5
"""Share of the queries on which others agree, from which on they bear out anybody: weak agents err alike."""
_FAR_MORE = 7.0
"""By how many nats the replies must be more probable (a thousand to one) for agents to count as copies: few are."""
_DOUBT = (1.0, 0.5)
_DOUBT_ROWS = 4.0
"""For how many replies what is expected of doubts beforehand counts where they alone decide, ..."""
_DOUBT_CONTEXT_SD = 0.6
"""... how far competence may differ between contexts there, ..."""
_DOUBT_TAIL = 3.0
"""Degrees of freedom of the doubts of one kind (Student's t): a few that are far off move them little, ..."""
_DOUBT_PASSES = 5
"""... found in so many passes of weighing anew, ..."""
_MAX_DOUBT_SLOPE = 2.0
"""... and the most that a nat of doubt may tell: the doubts of one agent depend on more than being right."""
_LENGTH = (0.3, 0.5)
_NOISE = 0.05
_CLIP = 6.0
_MIN_JUDGED = 4
_FOLDS = 4
_RELIANCES = (1.0, 0.3, 0.1, 0.0)
_FULL = 0.9
"""Probability beforehand that queries without outcome count in full: held-back outcomes must speak against it."""
ENOUGH_BACKED = 0.85
"""Share of queries to which two or more agents must probably give the right answer for agreement to be trusted. Of 40 to 80
recorded queries: .94 to 1 on GSM8K, .68 to .82 on CRUXEval-O and .32 to .52 on MATH, where weak agents err alike."""
_DISTRUST = 0.25
"""Reliance below which outcomes are what it goes by; without evidence either way it is 0.35."""


Signal = Literal["agreement", "entropy", "outcomes", "none"]


_ARRAYS = (
    "centre_CD",
    "ability_CA",
    "doubt_mean_A",
    "doubt_CA",
    "doubt_slope_CA",
    "length_mean_CA",
    "length_sd_A",
    "copy_AA",
    "reliance_C",
)
_NUMBERS = ("length_share", "length_slope", "context_sd", "spread", "noise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Which signal the model goes by in one context, and why."""

    signal: Signal
    reason: str
    """One sentence in words."""
    rows: int
    """Queries of the context that it was fitted on."""


class Features(NamedTuple):
    """What replies say by themselves, before competences are known."""

    context_R: IntArray
    doubt_RA: Array
    factor_R: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelModel:
    """What is known of each agent's competence, by context."""

    centre_CD: Array
    ability_CA: Array
    """Log odds of a right answer at average doubt, length and difficulty."""
    doubt_mean_A: Array
    """Anchor of each agent: its mean score over balanced contexts."""
    doubt_CA: Array
    """Mean score in each context, beside the anchor: what is expected of a reply before it comes."""
    doubt_slope_CA: Array
    """Log odds of a right answer that each nat of the score above the anchor takes off."""
    length_mean_CA: Array
    length_sd_A: Array
    length_share: float
    """Correlation of the lengths of two agents' replies to the same query."""
    length_slope: float
    copy_AA: Array
    """Probability that two agents that are both wrong say the same; `ONE_WITNESS`: where they agree they count as one."""
    context_sd: float
    """Standard deviation of an agent's competence between contexts, in log odds; estimated."""
    spread: float
    """Standard deviation of the difficulty of a query, in log odds; all agents share it."""
    noise: float
    """Share of outcomes that are taken to be wrong."""
    reliance_C: Array
    """What a query without outcome counted beside one with, in each context; 1 without outcomes."""
    lead_C: Array = field(default_factory=lambda: np.zeros(0))
    """By how much the ranking of agents is that of their competences, in place of the gate's; none: nowhere (`core/told`)."""
    trust: tuple[Trust, ...] = ()
    """By context."""

    def __post_init__(self) -> None:
        """Fill in that competences lead nowhere, where nothing is said."""
        if len(self.lead_C) != len(self.ability_CA):
            object.__setattr__(self, "lead_C", np.zeros(len(self.ability_CA)))

    def arrays(self) -> dict[str, Array]:
        """Return the arrays, for a tensor file; `from_arrays` takes them back with `numbers`."""
        more = ("lead_C",) if self.lead_C.any() else ()
        return {name: np.asarray(getattr(self, name), dtype=np.float64) for name in (*_ARRAYS, *more)}

    def numbers(self) -> dict[str, Any]:
        """Return what is no array, as plain values for JSON."""
        return {name: getattr(self, name) for name in _NUMBERS} | {"trust": [asdict(trust) for trust in self.trust]}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], numbers: Mapping[str, Any]) -> LabelModel:
        """Return the model that `arrays` and `numbers` describe. Raises ConfigError if one is missing, or of another shape."""
        missing = [name for name in _ARRAYS if name not in arrays] + [
            name for name in (*_NUMBERS, "trust") if name not in numbers
        ]
        if missing:
            raise ConfigError(f"label model: {', '.join(missing)} missing; expected what `arrays` and `numbers` return")
        there = [name for name in (*_ARRAYS, "lead_C") if name in arrays]
        held: dict[str, Any] = {name: np.asarray(arrays[name], dtype=np.float64) for name in there}
        sizes: dict[str, int] = {}
        for name, array in held.items():
            letters = name.rpartition("_")[2]
            wanted = [sizes.setdefault(letter, size) for letter, size in zip(letters, array.shape, strict=False)]
            if list(array.shape) != wanted or array.ndim != len(letters):
                raise ConfigError(f"label model: {name} has the shape {list(array.shape)}; expected [{', '.join(letters)}]")
        held |= {name: float(numbers[name]) for name in _NUMBERS}
        held["trust"] = tuple(Trust(**one) for one in numbers["trust"])
        return cls(**held)

    def digest(self) -> str:
        """Return a hash of everything in it."""
        found = hashlib.sha256(json.dumps(self.numbers(), sort_keys=True).encode())
        for name, array in self.arrays().items():
            found.update(f"\n{name} {list(array.shape)}\n".encode())
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:16]

    @property
    def num_agents(self) -> int:
        """Agents of the pool."""
        return int(self.ability_CA.shape[1])

    def competence(self) -> Array:
        """Return the log odds of a right answer before the reply comes [C, A], at average length and difficulty."""
        return self.ability_CA - self.doubt_slope_CA * self.doubt_CA

    @property
    def order(self) -> IntArray:
        """The agents, the most competent first."""
        return np.argsort(-self.competence().mean(axis=0), kind="stable")

    def in_context(self, context: int) -> LabelModel:
        """Return the model of one context alone, for queries that are known to be of it."""
        rows = slice(context, context + 1)
        parts = {name: getattr(self, name)[rows] for name in (*_ARRAYS, "lead_C") if name.endswith(("_CA", "_C"))}
        return replace(self, centre_CD=np.zeros((1, 0)), trust=self.trust[rows], **parts)

    def context(self, embedding_RD: Array | None, num_rows: int) -> IntArray:
        """Return the context of each query: the nearest centre."""
        if embedding_RD is None or len(self.centre_CD) == 1:
            return np.zeros(num_rows, dtype=np.int64)
        nearest_R: IntArray = np.argmin(squared_distances(np.asarray(embedding_RD, dtype=np.float64), self.centre_CD), axis=1)
        return nearest_R

    def features(self, witnesses: Witnesses) -> Features:
        """Return what does not change while competences and slopes are fitted."""
        context_R = self.context(witnesses.embedding_RD, len(witnesses.answer_RA))
        return Features(context_R, self.doubts(witnesses, context_R), self.length_factor(witnesses, context_R))

    def logits(self, witnesses: Witnesses, known: Features | None = None, *, with_difficulty: bool = True) -> Array:
        """Return the log odds of each agent being right before answers are compared [R, A, K]; `known`: its features."""
        context_R, doubt_RA, factor_R = known or self.features(witnesses)
        logit_RA = self.ability_CA[context_R] - self.doubt_slope_CA[context_R] * doubt_RA
        logit_RA = logit_RA - self.length_slope * factor_R[:, None]
        for a, b in np.argwhere(np.triu(self.copy_AA, 1) >= ONE_WITNESS):
            same_R = (witnesses.answer_RA[:, a] == witnesses.answer_RA[:, b]) & (witnesses.answer_RA[:, a] >= 0)
            logit_RA[np.ix_(same_R, [a, b])] = logit_RA[np.ix_(same_R, [a, b])].mean(axis=1, keepdims=True)
        node_K, _ = nodes(self.spread if with_difficulty else 0.0)
        logit_RAK: Array = np.clip(logit_RA[:, :, None] - node_K, -_CLIP, _CLIP)
        return logit_RAK

    def doubts(self, witnesses: Witnesses, context_R: IntArray) -> Array:
        """Return the anchored scores [R, A]; what is usual in the context where there is none."""
        doubt_RA: Array = witnesses.doubt_RA - self.doubt_mean_A
        return np.where(np.isnan(doubt_RA), self.doubt_CA[context_R], doubt_RA)

    def length_factor(self, witnesses: Witnesses, context_R: IntArray) -> Array:
        """Return how long each query's replies are beside what their agents usually write [R], shrunk where few are known."""
        with np.errstate(invalid="ignore"):
            scaled_RA = (np.log1p(witnesses.length_RA) - self.length_mean_CA[context_R]) / self.length_sd_A
        known_RA = np.isfinite(scaled_RA) & witnesses.asked
        share = max(self.length_share, 1e-3)
        total_R: Array = np.where(known_RA, np.clip(scaled_RA, -3, 3), 0.0).sum(axis=1)
        factor_R: Array = total_R / (known_RA.sum(axis=1) + (1 - share) / share)
        return factor_R

    def truth(self, witnesses: Witnesses, right_RAK: Array | None = None) -> Truth:
        """Return what the replies of each query say about its truth; `right_RAK`: what `logits` says, where that is known."""
        _, weight_K = nodes(self.spread)
        right_RAK = 1 / (1 + np.exp(-self.logits(witnesses))) if right_RAK is None else right_RAK
        log_prior_RZ = outcome_evidence(witnesses, self.noise)
        return truth_posterior(witnesses.answer_RA, right_RAK, self.copy_AA, weight_K, log_prior_RZ, self.order)

    def right_probability(self, witnesses: Witnesses) -> Array:
        """Return the probability of each agent being right, given its row's replies [R, A]; beforehand if not asked."""
        right_RAK = 1 / (1 + np.exp(-self.logits(witnesses)))
        truth = self.truth(witnesses, right_RAK)
        given_RA = right_of(truth.weight_RZK, witnesses.answer_RA).sum(axis=2)
        prior_RA = np.einsum("rak,rk->ra", right_RAK, truth.weight_RZK.sum(axis=1))
        return np.where(witnesses.asked, given_RA, prior_RA)

    def foretold(self, witnesses: Witnesses) -> Array:
        """Return the probability of each agent being right by its own doubt, length and context, before answers are compared."""
        _, weight_K = nodes(self.spread)
        foretold_RA: Array = 1 / (1 + np.exp(-self.logits(witnesses))) @ weight_K
        return foretold_RA


def fit_label_model(witnesses: Witnesses, *, seed: int) -> LabelModel:
    """Return the label model of the witnesses."""
    num_rows, num_agents = witnesses.answer_RA.shape
    if num_rows < MIN_ROWS or num_agents < 1:
        raise ConfigError(f"label model: {num_rows} rows of {num_agents} agents; expected at least {MIN_ROWS} rows and one agent")
    num_contexts = 1 if witnesses.embedding_RD is None else min(MAX_CONTEXTS, num_rows // _ROWS_PER_CONTEXT)
    start = _start(witnesses, num_contexts, _SPREAD, seed)
    context_R = start.context(witnesses.embedding_RD, num_rows)
    judged_R = np.isfinite(witnesses.outcome_RA).any(axis=1)
    start = _without_copies(start, witnesses)
    start, side_RZ = _disputed(start, witnesses)
    if judged_R.sum() < _MIN_JUDGED:
        model = _fitted(start, witnesses, np.ones(num_rows), side_RZ, _ROUNDS)
    else:
        reliance_C = _reliance(start, witnesses, context_R, side_RZ, seed)
        model = _told(start, witnesses, reliance_C[context_R], side_RZ, _ROUNDS)
        model = replace(model, reliance_C=reliance_C)
    model = replace(model, trust=trusted(model, witnesses))
    alone_C = np.array([trust.signal == "entropy" for trust in model.trust])
    if not alone_C.any():
        return model
    weight_R = np.where(judged_R, 1.0, model.reliance_C[context_R])
    led = _led_by_doubt(start, model, witnesses, weight_R, side_RZ)
    ability_CA = np.where(alone_C[:, None], led.ability_CA, model.ability_CA)
    return replace(
        model, ability_CA=ability_CA, doubt_slope_CA=np.where(alone_C[:, None], led.doubt_slope_CA, model.doubt_slope_CA)
    )


def _without_copies(start: LabelModel, witnesses: Witnesses) -> LabelModel:
    """Return the model in which agents of one voice are one witness, believed last, where replies are far more probable so."""

    def evidence(model: LabelModel) -> float:
        num_rows = len(witnesses.answer_RA)
        no_RZ = np.zeros((num_rows, model.num_agents + 1))
        fitted = _fitted(model, witnesses, np.ones(num_rows), no_RZ, _ROUNDS)
        return float(fitted.truth(witnesses).log_likelihood_R.sum()) + repeated(witnesses.answer_RA, model.copy_AA)

    groups = [one.members for one in voices(witnesses.answer_RA) if one.across < one.among >= _COMPETENT]
    known = evidence(start) if groups else 0.0
    while groups:
        others = []
        for group in groups:
            ability_CA, copy_AA = start.ability_CA.copy(), start.copy_AA.copy()
            ability_CA[:, group], copy_AA[np.ix_(group, group)] = _UNBACKED, ONE_WITNESS
            others.append(replace(start, ability_CA=ability_CA, copy_AA=copy_AA))
        found = [evidence(other) for other in others]
        best = int(np.argmax(found))
        if found[best] < known + _FAR_MORE:
            break
        start, known = others[best], found[best]
        del groups[best]
    return start


def _disputed(start: LabelModel, witnesses: Witnesses) -> tuple[LabelModel, Array]:
    """Return the model in which pairs of a dispute are one witness each, and who may be right in rows of one [R, Z].

    Learnt from its own belief the side that is believed first would soon be right for certain. So each is taken to be right on
    half of the rows there, as far as competence is learnt, and with outcomes as often as these say; where several disputes meet
    in a row, all its sides share it. All other rows are 0.
    """
    copy_AA, side_RZ = start.copy_AA.copy(), np.zeros((len(witnesses.answer_RA), start.num_agents + 1))
    count_RZ = np.zeros(side_RZ.shape)
    for found in disputes(witnesses.answer_RA, witnesses.doubt_RA - start.doubt_mean_A):
        copy_AA[found.a, found.b] = copy_AA[found.b, found.a] = ONE_WITNESS
        told_R2 = witnesses.outcome_RA[found.rows][:, [found.a, found.against]]
        other_R = witnesses.outcome_RA[found.rows, found.b]
        told_R2[:, 0] = np.where(np.isnan(told_R2[:, 0]), other_R, told_R2[:, 0])
        told_R2 = np.where(np.isnan(told_R2), 1.0 - told_R2[:, ::-1], told_R2)  # of two sides one at most is right
        judged_R = np.isfinite(told_R2[:, 0])
        share_2 = (1.0 + told_R2[judged_R].sum(axis=0)) / (2.0 + judged_R.sum())
        share_2 /= max(1.0, share_2.sum())
        rows = found.rows[~judged_R]
        sides_R2 = witnesses.answer_RA[rows][:, [found.a, found.against]]
        side_RZ[rows[:, None], sides_R2] += share_2
        count_RZ[rows[:, None], sides_R2] += 1.0
    side_RZ /= np.maximum(count_RZ, 1.0)  # a side of several disputes has the mean of their shares
    is_open_R, is_shared_R = count_RZ.any(axis=1), (count_RZ.sum(axis=1) > 2)
    side_RZ[is_shared_R] /= np.maximum(side_RZ[is_shared_R].sum(axis=1, keepdims=True), 1.0)
    side_RZ[is_open_R, -1] = 1.0 - side_RZ[is_open_R, :-1].sum(axis=1)
    return replace(start, copy_AA=copy_AA), side_RZ


def _reliance(start: LabelModel, witnesses: Witnesses, context_R: IntArray, side_RZ: Array, seed: int) -> Array:
    """Return how much a query without outcome counts beside one with, by context [C]: what foretells held-back outcomes best.

    Where weak agents err alike, agreement teaches the wrong competences, and 20 outcomes beside 60 unlabelled queries could not
    set that right; where they do not, to leave queries out is a loss (`_FULL`). Each context goes by its own outcomes and, for a
    quarter, by those of all others.
    """
    judged = np.flatnonzero(np.isfinite(witnesses.outcome_RA).any(axis=1))
    fold_J = np.random.default_rng(seed).permutation(len(judged)) % _FOLDS
    score_WC = np.zeros((len(_RELIANCES), len(start.ability_CA)))
    for fold in range(_FOLDS):
        hidden = judged[fold_J == fold]
        outcome_RA = witnesses.outcome_RA.copy()
        outcome_RA[hidden] = np.nan
        seen = replace(witnesses, outcome_RA=outcome_RA)
        for place, reliance in enumerate(_RELIANCES):
            fitted = _told(start, seen, np.full(len(outcome_RA), reliance), side_RZ, _ROUNDS // 2)
            right_RA = np.clip(fitted.right_probability(seen.rows(hidden)), _NOISE, 1 - _NOISE)
            right_RA = fitted.noise + (1 - 2 * fitted.noise) * right_RA
            told_RA = witnesses.outcome_RA[hidden]
            log_RA = told_RA * np.log(right_RA) + (1 - told_RA) * np.log1p(-right_RA)
            # The outcomes of one query are not independent.
            log_R = np.nansum(log_RA, axis=1) / np.sqrt(np.isfinite(log_RA).sum(axis=1))
            np.add.at(score_WC[place], context_R[hidden], log_R)
    score_WC = 0.75 * score_WC + 0.25 * score_WC.sum(axis=1, keepdims=True)
    score_WC[1:] += np.log((1 - _FULL) / (len(_RELIANCES) - 1) / _FULL)
    share_WC = np.exp(score_WC - score_WC.max(axis=0))
    reliance_C: Array = np.array(_RELIANCES) @ (share_WC / share_WC.sum(axis=0))
    return reliance_C


def trusted(model: LabelModel, witnesses: Witnesses) -> tuple[Trust, ...]:
    """Return which signal decides in each context: agreement where most answers that are believed have two backers."""
    truth = model.truth(witnesses)
    num_agents = witnesses.answer_RA.shape[1]
    mass_RZ = truth.weight_RZK.sum(axis=2)
    backers_RZ = (witnesses.answer_RA[:, None, :] == np.arange(num_agents)[:, None]).sum(axis=2)
    backed_R = np.where(backers_RZ >= 2, mass_RZ[:, :-1], 0.0).sum(axis=1)
    context_R = model.context(witnesses.embedding_RD, len(mass_RZ))
    found = []
    for context in range(len(model.ability_CA)):
        rows = context_R == context
        outcomes = int(np.isfinite(witnesses.outcome_RA[rows]).any(axis=1).sum())
        share = float(backed_R[rows].mean()) if rows.any() else 0.0
        if outcomes and model.reliance_C[context] < _DISTRUST:
            signal: Signal = "outcomes"
            reason = "what agents agree on foretells the outcomes that were held back worse than outcomes alone do"
        elif share >= ENOUGH_BACKED:
            signal = "agreement"
            reason = f"on {share:.0%} of the queries two or more agents give the answer that is probably right"
        elif np.isfinite(witnesses.doubt_RA[rows]).any():
            signal = "entropy"
            reason = f"agents agree on what is probably right for {share:.0%} of the queries, {ENOUGH_BACKED:.0%} are needed"
        elif outcomes:
            signal, reason = "outcomes", f"agents seldom agree ({share:.0%}), no entropies are known, {outcomes} outcomes are"
        else:
            signal, reason = "none", f"agents seldom agree ({share:.0%}), and neither entropies nor outcomes are known"
        found.append(Trust(signal=signal, reason=reason, rows=int(rows.sum())))
    return tuple(found)


def _fitted(model: LabelModel, witnesses: Witnesses, weight_R: Array, side_RZ: Array, rounds: int) -> LabelModel:
    """Return the model after so many rounds of expectation and maximisation from where it is."""
    features = model.features(witnesses)
    for _ in range(rounds):
        p_RAK = 1 / (1 + np.exp(-model.logits(witnesses, features)))
        model = _maximised(model, witnesses, features, weight_R, held_open(model.truth(witnesses, p_RAK), side_RZ), p_RAK)
    return model


def _told(start: LabelModel, witnesses: Witnesses, reliance_R: Array, side_RZ: Array, rounds: int) -> LabelModel:
    """Return the model fitted with outcomes from its start on, other queries counting as `reliance_R` says.

    Queries with outcomes speak first: a model that a crowd has misled would take them for wrong ones.
    """
    judged_R = np.isfinite(witnesses.outcome_RA).any(axis=1)
    first_R: Array = np.where(judged_R, 1.0, 0.0)
    then_R: Array = np.where(judged_R, 1.0, reliance_R)
    first = _fitted(start, witnesses, first_R, side_RZ, _ROUNDS // 4)
    return _fitted(first, witnesses, then_R, side_RZ, rounds)


def _led_by_doubt(start: LabelModel, agreed: LabelModel, witnesses: Witnesses, weight_R: Array, side_RZ: Array) -> LabelModel:
    """Return the model for contexts where agreement tells nothing: doubts themselves tell right replies from wrong ones.

    What doubts are worth cannot be learnt from agreement there, and what is learnt of it elsewhere misleads: an agent that
    guesses the answer of a foreign query now and then is right without being sure. So each agent's doubts are those of two
    kinds of replies, normal with one variance (a mixture, whose log odds are linear: discriminant analysis).
    """
    count, num_agents = start.ability_CA.shape
    flat_CA = np.zeros((count, num_agents))
    prior = replace(start, doubt_slope_CA=flat_CA, length_slope=agreed.length_slope, noise=agreed.noise)
    slope_A, middle_A = np.full(num_agents, _DOUBT[0]), np.zeros(num_agents)

    def told() -> LabelModel:
        return replace(prior, ability_CA=prior.ability_CA + slope_A * middle_A, doubt_slope_CA=flat_CA + slope_A)

    alike, features = replace(witnesses, doubt_RA=usual_doubts(witnesses)), start.features(witnesses)
    for _ in range(_ROUNDS):
        truth = held_open(told().truth(alike), side_RZ)
        right_RA = right_of(truth.weight_RZK, witnesses.answer_RA).sum(axis=2)
        slope_A, middle_A = _two_kinds(witnesses.doubt_RA - start.doubt_mean_A, right_RA, weight_R[:, None] * witnesses.asked)
        found = _maximised(prior, witnesses, features, weight_R, truth, 1 / (1 + np.exp(-prior.logits(witnesses, features))))
        sd = min(found.context_sd, _DOUBT_CONTEXT_SD)
        prior = replace(prior, ability_CA=found.ability_CA, copy_AA=found.copy_AA, context_sd=sd)
    return told()


def _two_kinds(doubt_RA: Array, right_RA: Array, weight_RA: Array) -> tuple[Array, Array]:
    """Return the log odds that a nat of doubt takes off, and the doubt that tells nothing [A], given who is probably right.

    Doubts of right and of wrong replies have one variance and heavy tails: means and variance are found by iterated weights.
    """
    known_RA = np.isfinite(doubt_RA)
    doubt_RA, weight_RA = np.where(known_RA, doubt_RA, 0.0), np.where(known_RA, weight_RA, 0.0)
    share_HRA = np.stack([right_RA * weight_RA, (1 - right_RA) * weight_RA])  # H: right, wrong
    near_HRA = share_HRA
    for _ in range(_DOUBT_PASSES):
        count_HA = np.maximum(near_HRA.sum(axis=1), 1e-9)
        mean_HA = (near_HRA * doubt_RA).sum(axis=1) / count_HA
        square_HRA = (doubt_RA - mean_HA[:, None]) ** 2
        variance_A = ((near_HRA * square_HRA).sum(axis=(0, 1)) + _DOUBT_ROWS) / (weight_RA.sum(axis=0) + _DOUBT_ROWS)
        near_HRA = share_HRA * (_DOUBT_TAIL + 1) / (_DOUBT_TAIL + square_HRA / variance_A)
    total_A = count_HA.sum(axis=0)
    both_A = count_HA[0] * count_HA[1] / total_A
    gap_A = (both_A * (mean_HA[1] - mean_HA[0]) + _DOUBT_ROWS * _DOUBT[0] * variance_A) / (both_A + _DOUBT_ROWS)
    middle_A = (count_HA * mean_HA).sum(axis=0) / total_A + gap_A * (count_HA[0] - count_HA[1]) / total_A / 2
    slope_A = np.clip(gap_A / variance_A, 0, _MAX_DOUBT_SLOPE)
    # Few replies can tell an agent's own; half of it is what is usual in the pool.
    return (slope_A + np.median(slope_A)) / 2, middle_A


def _start(witnesses: Witnesses, num_contexts: int, spread: float, seed: int) -> LabelModel:
    num_rows, num_agents = witnesses.answer_RA.shape
    embedding_RD = (
        np.zeros((num_rows, 1)) if witnesses.embedding_RD is None else np.asarray(witnesses.embedding_RD, dtype=np.float64)
    )
    distinct_UD, row_R = np.unique(embedding_RD, axis=0, return_inverse=True)
    context_R = clusters(distinct_UD, min(num_contexts, len(distinct_UD)), np.random.default_rng(seed))[row_R.reshape(-1)]
    count = int(context_R.max()) + 1
    centre_CD = np.array([embedding_RD[context_R == c].mean(axis=0) for c in range(count)])
    doubt_A = np.zeros(num_agents)
    heard_A = np.isfinite(witnesses.doubt_RA).any(axis=0)
    if heard_A.any():
        doubt_A[heard_A] = fit_anchors(witnesses.doubt_RA[:, heard_A], embedding_RD, num_clusters=8, seed=seed, num_clusterings=4)
    log_RA = np.where(witnesses.asked, np.log1p(witnesses.length_RA), np.nan)
    mean_CA, sd_A, share = lengths(log_RA, context_R, count)
    ability_CA = np.full((count, num_agents), _ABILITY[0])
    copy_AA = np.full((num_agents, num_agents), USUAL_COPY)
    for voice in voices(witnesses.answer_RA):
        if voice.across < voice.among / 2:
            ability_CA[:, voice.members] = _UNBACKED
            copy_AA[np.ix_(voice.members, voice.members)] = ALIKE
    return LabelModel(
        centre_CD=centre_CD,
        ability_CA=ability_CA,
        doubt_mean_A=doubt_A,
        doubt_CA=by_context(witnesses.doubt_RA - doubt_A, context_R, count),
        doubt_slope_CA=np.full((count, num_agents), _DOUBT[0]),
        length_mean_CA=mean_CA,
        length_sd_A=sd_A,
        length_share=share,
        length_slope=_LENGTH[0] if share > 0 else 0.0,
        copy_AA=copy_AA,
        context_sd=_CONTEXT_SD,
        spread=spread,
        noise=_NOISE,
        reliance_C=np.ones(count),
    )


def _maximised(
    model: LabelModel, witnesses: Witnesses, features: Features, weight_R: Array, truth: Truth, p_RAK: Array
) -> LabelModel:
    """Return the model after one step of maximisation: a Newton step of competences and slopes, then the shared errors.

    `p_RAK`: the probability of each agent being right before answers are compared.
    """
    asked_RA, (context_R, doubt_RA, factor_R) = witnesses.asked, features
    found_RAK = right_of(truth.weight_RZK, witnesses.answer_RA)
    right_RAK, right_RA = found_RAK * weight_R[:, None, None], found_RAK.sum(axis=2)
    all_RAK = truth.weight_RZK.sum(axis=1)[:, None, :] * (asked_RA * weight_R[:, None])[:, :, None]
    slope_RA = (right_RAK - all_RAK * p_RAK).sum(axis=2)
    curve_RA = (all_RAK * p_RAK * (1 - p_RAK)).sum(axis=2)
    member_CR = (context_R == np.arange(len(model.ability_CA))[:, None]).astype(np.float64)
    mean_A, variance = _mean_ability(model)
    step_CA = (member_CR @ slope_RA - (model.ability_CA - mean_A) / variance) / (member_CR @ curve_RA + 1 / variance)
    ability_CA = np.clip(model.ability_CA + np.clip(step_CA, -1, 1), -_CLIP, _CLIP)
    doubt_slope_A = model.doubt_slope_CA[0]  # one for all contexts, while it is learnt from agreement
    shared = doubt_slope_A.mean()
    grad_A = -(slope_RA * doubt_RA).sum(axis=0) - (doubt_slope_A - (4 * shared + _DOUBT[0]) / 5) / _DOUBT[1] ** 2
    step_A = grad_A / ((curve_RA * doubt_RA**2).sum(axis=0) + 1 / _DOUBT[1] ** 2)
    grad = -(slope_RA * factor_R[:, None]).sum() - (model.length_slope - _LENGTH[0]) / _LENGTH[1] ** 2
    step = grad / ((curve_RA * factor_R[:, None] ** 2).sum() + 1 / _LENGTH[1] ** 2)
    return replace(
        model,
        ability_CA=ability_CA,
        doubt_slope_CA=np.tile(np.clip(doubt_slope_A + np.clip(step_A, -0.3, 0.3), 0, 4), (len(ability_CA), 1)),
        length_slope=float(np.clip(model.length_slope + np.clip(step, -0.3, 0.3), 0, 4)) if model.length_share > 0 else 0.0,
        copy_AA=np.where(model.copy_AA >= ONE_WITNESS, ONE_WITNESS, copies(witnesses.answer_RA, right_RA, weight_R)),
        noise=wrong_outcomes(witnesses, right_RA, expected=_NOISE),
        context_sd=_context_sd(ability_CA, member_CR @ curve_RA, model.context_sd),
    )


def _mean_ability(model: LabelModel) -> tuple[Array, float]:
    """Return what competence in a context is drawn to, [A], and its variance: the agent's mean over contexts, itself shrunk."""
    mean, sd = _ABILITY
    count, num_agents = model.ability_CA.shape
    if count == 1:
        return np.full(num_agents, mean), sd**2
    weight = count / model.context_sd**2
    return (weight * model.ability_CA.mean(axis=0) + mean / sd**2) / (weight + 1 / sd**2), model.context_sd**2


def _context_sd(ability_CA: Array, curve_CA: Array, old: float) -> float:
    """Return how far competence differs between contexts: what is seen, and what is uncertain of it (empirical Bayes)."""
    count, num_agents = ability_CA.shape
    if count == 1:
        return old
    seen = ((ability_CA - ability_CA.mean(axis=0)) ** 2).sum() * count / (count - 1) + (1 / (curve_CA + 1 / old**2)).sum()
    return float(np.sqrt((seen + _CONTEXT_SD**2 * num_agents) / (ability_CA.size + num_agents)))
