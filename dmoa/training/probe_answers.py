"""What answers tell of a pool, without labels: which signal can route it, what to expect, and whom to look at first.

The part of a probe that reads what agents said, by the label model (`core/label_model`); `training/probe` reads how sure they
were. Accuracies are the model's own estimates: they hold as far as the signal does, and the finding says how far that is. Shape
letters: R rows, A agents.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from dmoa.core.answers import extract_answer
from dmoa.core.label_model import ENOUGH_BACKED, MIN_ROWS, LabelModel, Signal, fit_label_model
from dmoa.core.witnesses import NO_ANSWER, Array, Witnesses, are_backed, disputes, witnesses_of
from dmoa.training.cluster_router import ProbeSample
from dmoa.training.judging import ask_in_turn
from dmoa.training.probe_outcomes import Judged, Settled, judged_agents, settled_words

_SAME = 0.95
_CLIQUE, _APART = 0.6, 0.25
_CONSTANT = 0.8
_SELDOM, _OFTEN = 0.15, 0.5
_Z = 1.96
_GAPS = (0.1, 0.25)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Expected(_Record):
    """What a way of asking comes to."""

    way: Literal["one agent", "everybody", "in turn"]
    """in turn: the best agent first, others while a reply is worth its price."""
    agent: str | None = None
    """Of `one agent`: which."""
    accuracy: float
    """As the label model estimates it."""
    calls: float
    """Agents asked a query."""
    tokens: float | None
    """Prompt and completion tokens a query; null where they are not known."""
    price: float | None
    """What a query costs by `llms.NAME.price`; null where an agent that is asked has none."""


class DisputeFinding(_Record):
    """Two agents that are sure, agree with each other and nobody else, and are refuted by another that is sure as well."""

    a: str
    b: str
    against: str
    """The agent that refutes them most often."""
    queries: int
    """How many."""


class AnswerFinding(_Record):
    """What a probe found in the answers."""

    signal: Signal
    """What can route the pool: agreement, entropy, outcomes (with some it could), none (neither is there)."""
    is_trusted: bool
    """Whether the signal is strong enough for the accuracies to be believed."""
    summary: list[str]
    """The findings in sentences."""
    backed: float
    """Estimated share of queries to which two or more agents give the right answer."""
    rows: int
    outcomes: int
    """Queries with a known outcome that the estimates rest on."""
    competence: dict[str, float]
    """By agent, the estimated share of right answers."""
    expected: list[Expected]
    redundant: list[tuple[str, str]]
    """Pairs that give one answer to nearly all queries: one of the two is enough."""
    colluding: list[tuple[str, str]]
    """Pairs that agree with each other and with nobody else."""
    disputed: list[DisputeFinding]
    """Pairs that may collude on one kind of query: entropies and agreement do not tell which side is right there."""
    constant: list[str]
    """Agents that give one answer to nearly all queries, where others do not."""
    seldom_right: list[str]
    """Agents that are probably wrong nearly everywhere, in a pool whose best agent is not."""
    outcomes_to_settle: int
    """How many more outcomes would settle what is unclear; 0 where nothing is."""
    settled: Settled | None = None
    """What the outcomes that were handed over changed; null without any."""


def probe_answers(sample: ProbeSample, *, can_entropy: bool, seed: int = 0) -> AnswerFinding | None:
    """Return the finding; None for fewer rows than a label model needs. `can_entropy`: whether entropies were found to route."""
    if len(sample.texts) < MIN_ROWS or len(sample.agents) < 2:
        return None
    finding, _ = _found(sample, can_entropy=can_entropy, seed=seed)
    if finding.outcomes:
        assert sample.outcome_RA is not None
        before, right_RA = _found(replace(sample, outcome_RA=None), can_entropy=can_entropy, seed=seed)
        finding = _settle(finding, before, judged_agents(sample.agents, right_RA, sample.outcome_RA))
    return finding.model_copy(update={"summary": [*signal_words(finding), *_outcome_words(finding), *_agent_words(finding)]})


def _settle(finding: AnswerFinding, before: AnswerFinding, judged: list[Judged]) -> AnswerFinding:
    """Return the finding with what outcomes changed; agreement that they contradict is trusted no more, they are."""
    settled = Settled(
        signal_before=before.signal, was_trusted=before.is_trusted, best_before=before.expected[0].agent or "", agents=judged
    )
    update: dict[str, Any] = {"settled": settled}
    if settled.contradicted and finding.signal != "outcomes":
        missing = max(0, _to_settle(finding.expected) - finding.outcomes)
        update |= {"signal": "outcomes", "is_trusted": finding.outcomes >= _least(_GAPS[1]), "outcomes_to_settle": missing}
    return finding.model_copy(update=update)


def _found(sample: ProbeSample, *, can_entropy: bool, seed: int) -> tuple[AnswerFinding, Array]:
    """Return the finding, without its sentences, and the probability of each agent being right [R, A]."""
    witnesses = _witnesses(sample)
    pairs = _same_answers(witnesses)
    model = fit_label_model(witnesses, seed=seed)
    colluding, redundant = _colluding(pairs, sample.agents, model, witnesses), _redundant(pairs, sample.agents)
    for _, second in colluding:  # one witness, not two
        witnesses.answer_RA[:, sample.agents.index(second)] = NO_ANSWER
    model = fit_label_model(witnesses, seed=seed) if colluding else model
    right_RA = model.right_probability(witnesses)
    backed = float(_backing(witnesses, right_RA).mean())
    outcomes = int(np.isfinite(witnesses.outcome_RA).any(axis=1).sum())
    signal, is_trusted = _signal(sample, backed, outcomes, can_entropy=can_entropy)
    expected = _expected(sample, model, witnesses, right_RA)
    open_outcomes = 0 if is_trusted else max(0, _to_settle(expected) - outcomes)
    constant, seldom = _constant(sample), _seldom_right(sample, model, witnesses, right_RA)
    disputed = _disputed(sample.agents, model, witnesses)
    finding = AnswerFinding(
        signal=signal,
        is_trusted=is_trusted,
        summary=[],
        backed=backed,
        rows=len(sample.texts),
        outcomes=outcomes,
        competence={name: float(share) for name, share in zip(sample.agents, np.nanmean(right_RA, axis=0), strict=True)},
        expected=expected,
        redundant=[pair for pair in redundant if pair not in colluding],
        colluding=colluding,
        disputed=[found for found in disputed if not {found.a, found.b} & {*constant}],
        constant=constant,
        seldom_right=[name for name in seldom if name not in (*constant, *(name for pair in colluding for name in pair))],
        outcomes_to_settle=open_outcomes,
    )
    return finding, right_RA


def _witnesses(sample: ProbeSample) -> Witnesses:
    heard_RA = np.ones(sample.entropy_RA.shape, dtype=bool) if sample.heard_RA is None else sample.heard_RA
    texts = [
        [text if heard else None for text, heard in zip(row, heard_A, strict=True)]
        for row, heard_A in zip(sample.texts, heard_RA, strict=True)
    ]
    entropies = [[float(nats) if math.isfinite(nats) else None for nats in row] for row in sample.entropy_RA]
    found = witnesses_of(texts, entropies=entropies, embedding_RD=np.asarray(sample.embedding_RD, dtype=np.float64))
    if sample.outcome_RA is None:
        return found
    return Witnesses(
        answer_RA=found.answer_RA,
        doubt_RA=found.doubt_RA,
        length_RA=found.length_RA,
        outcome_RA=np.where(found.asked, sample.outcome_RA, np.nan),
        embedding_RD=found.embedding_RD,
    )


def _backing(witnesses: Witnesses, right_RA: Array) -> Array:
    """Return the probability that a right answer is given by two or more agents [R]."""
    answer_RA = witnesses.answer_RA
    best_R = np.where(answer_RA >= 0, right_RA, -1.0).argmax(axis=1)
    said_R = answer_RA[np.arange(len(answer_RA)), best_R]
    is_shared_R = (said_R >= 0) & ((answer_RA == said_R[:, None]).sum(axis=1) >= 2)
    backing_R: Array = np.where(is_shared_R, right_RA[np.arange(len(answer_RA)), best_R], 0.0)
    return backing_R


def _signal(sample: ProbeSample, backed: float, outcomes: int, *, can_entropy: bool) -> tuple[Signal, bool]:
    """Return what to route by, and whether it can be trusted."""
    if backed >= ENOUGH_BACKED:
        return "agreement", True
    if can_entropy:
        return "entropy", True
    if outcomes:
        return "outcomes", outcomes >= _least(_GAPS[1])
    if np.isfinite(sample.entropy_RA).any():
        return "entropy", False
    return "none", False


def _expected(sample: ProbeSample, model: LabelModel, witnesses: Witnesses, right_RA: Array) -> list[Expected]:
    num_rows, num_agents = right_RA.shape
    tokens_A, price_A = _means(sample.tokens_RA, num_agents), _means(sample.price_RA, num_agents)
    best = int(np.nanmean(right_RA, axis=0).argmax())
    context_R = model.context(witnesses.embedding_RD, num_rows)
    ranking_RA = np.argsort(-model.ability_CA[context_R], axis=1, kind="stable")
    turn = ask_in_turn(
        model, witnesses, right_RA, ranking_RA, np.ones(num_rows, dtype=np.int64), limit=num_agents, price=sample.agent_price
    )
    turn_A = turn.asked_RA.mean(axis=0)
    given_RA = np.where(witnesses.answer_RA >= 0, right_RA, 0.0)
    return [
        Expected(
            way="one agent",
            agent=sample.agents[best],
            accuracy=float(given_RA[:, best].mean()),
            calls=1.0,
            tokens=_rounded(tokens_A[best], 1),
            price=_rounded(price_A[best]),
        ),
        Expected(
            way="in turn",
            accuracy=float(turn.right_R.mean()),
            calls=float(turn.count_R.mean()),
            tokens=_rounded(_spent(turn_A, tokens_A), 1),
            price=_rounded(_spent(turn_A, price_A)),
        ),
        Expected(
            way="everybody",
            accuracy=float(given_RA.max(axis=1).mean()),
            calls=float(witnesses.asked.sum(axis=1).mean()),
            tokens=_rounded(tokens_A.sum(), 1),
            price=_rounded(price_A.sum()),
        ),
    ]


def _means(value_RA: Array | None, num_agents: int) -> Array:
    """Return the mean of every agent's replies [A]; NaN where nothing is known."""
    known_RA = np.full((1, num_agents), np.nan) if value_RA is None else value_RA
    counts_A = np.isfinite(known_RA).sum(axis=0)
    mean_A: Array = np.where(counts_A > 0, np.nansum(known_RA, axis=0) / np.maximum(counts_A, 1), np.nan)
    return mean_A


def _spent(share_A: Array, value_A: Array) -> float:
    """Return what a query takes that asks each agent with such a share; NaN where one that is asked is not known."""
    return float(np.where(share_A > 0, share_A * value_A, 0.0).sum())


def _rounded(value: float, digits: int = 9) -> float | None:
    return round(float(value), digits) if math.isfinite(value) else None


def _least(gap: float) -> int:
    """Return how many outcomes tell a share of right answers to within `gap`, nineteen times out of twenty."""
    return math.ceil(0.25 * (_Z / gap) ** 2)


def _to_settle(expected: list[Expected]) -> int:
    """Return how many outcomes of final answers tell whether asking more than one agent is worth it."""
    one, everybody = expected[0].accuracy, expected[-1].accuracy
    return _least(min(max(abs(everybody - one), _GAPS[0]), _GAPS[1]))


def _same_answers(witnesses: Witnesses) -> Array:
    """Return the share of rows on which two agents give the same answer, of those that both answer [A, A]; 0 of none."""
    given_RA = witnesses.answer_RA >= 0
    both_RAA = given_RA[:, :, None] & given_RA[:, None, :]
    same_RAA = both_RAA & (witnesses.answer_RA[:, :, None] == witnesses.answer_RA[:, None, :])
    share_AA: Array = same_RAA.sum(axis=0) / np.maximum(both_RAA.sum(axis=0), 1)
    return share_AA


def _redundant(same_AA: Array, agents: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(agents[a], agents[b]) for a, b in combinations(range(len(agents)), 2) if same_AA[a, b] >= _SAME]


def _colluding(same_AA: Array, agents: tuple[str, ...], model: LabelModel, witnesses: Witnesses) -> list[tuple[str, str]]:
    """Return the pairs that agree on most rows while neither agrees with any third agent, nor where both are sure."""
    found = []
    for a, b in combinations(range(len(agents)), 2):
        others = [c for c in range(len(agents)) if c not in (a, b)]
        most = max((float(max(same_AA[a, c], same_AA[b, c])) for c in others), default=1.0)
        is_apart = same_AA[a, b] >= _CLIQUE and most <= _APART * same_AA[a, b]
        if is_apart and not are_backed(witnesses.answer_RA, witnesses.doubt_RA - model.doubt_mean_A, a, b):
            found.append((agents[a], agents[b]))
    return found


def _disputed(agents: tuple[str, ...], model: LabelModel, witnesses: Witnesses) -> list[DisputeFinding]:
    return [
        DisputeFinding(a=agents[found.a], b=agents[found.b], against=agents[found.against], queries=len(found.rows))
        for found in disputes(witnesses.answer_RA, witnesses.doubt_RA - model.doubt_mean_A)
    ]


def _constant(sample: ProbeSample) -> list[str]:
    shares = []
    for index in range(len(sample.agents)):
        answers = [extract_answer(row[index]) or row[index].strip() for row in sample.texts]
        shares.append(Counter(answers).most_common(1)[0][1] / len(answers))
    return [name for name, share in zip(sample.agents, shares, strict=True) if share >= _CONSTANT and min(shares) < _CONSTANT]


def _seldom_right(sample: ProbeSample, model: LabelModel, witnesses: Witnesses, right_RA: Array) -> list[str]:
    """Return the agents that are probably wrong in every context, where somebody is probably right in most."""
    context_R = model.context(witnesses.embedding_RD, len(right_RA))
    share_CA = np.array([np.nanmean(right_RA[context_R == c], axis=0) for c in np.unique(context_R)])
    if float(share_CA.max(axis=1).mean()) < _OFTEN:
        return []
    return [name for name, most in zip(sample.agents, share_CA.max(axis=0), strict=True) if most < _SELDOM]


def signal_words(found: AnswerFinding) -> list[str]:
    """Return in sentences what can route the pool, and what to expect."""
    share = f"two or more agents give the right answer to probably {found.backed:.0%} of {found.rows} queries"
    more = f"{found.outcomes_to_settle} outcomes (dmoa train --outcomes) would settle it" if found.outcomes_to_settle else ""
    if found.signal == "agreement":
        lines = [f"agreement can route this pool: {share}"]
    else:
        lines = [f"agreement is not to be trusted here: {share}, {ENOUGH_BACKED:.0%} are needed; weak agents may err alike"]
        then = {
            "entropy": f"entropy can{'' if found.is_trusted else 'not'}, by who is sure of which query",
            "outcomes": f"{found.outcomes} outcomes are known, and decide",
            "none": "no entropies are known either",
        }[found.signal]
        lines.append(f"{then}; {more}" if more else then)
    one, turn, everybody = found.expected
    gain, saved = round(turn.accuracy - one.accuracy, 2) + 0.0, everybody.calls / turn.calls
    tokens = f", {turn.tokens:.0f} tokens" if turn.tokens is not None else ""
    tokens += f", price {turn.price:.3g}" if turn.price is not None else ""
    begin = "expect" if found.is_trusted else "if it could be trusted,"
    lines.append(
        f"{begin} {turn.accuracy:.0%} right at {turn.calls:.1f} calls{tokens} a query by asking in turn: {gain:+.0%} against "
        f"{one.agent} alone ({one.accuracy:.0%}), {everybody.accuracy:.0%} by asking everybody at {saved:.1f} times the calls"
    )
    return lines


def _outcome_words(found: AnswerFinding) -> list[str]:
    if found.settled is None:
        return []
    best = found.expected[0].agent or ""
    return settled_words(found.settled, outcomes=found.outcomes, signal=found.signal, is_trusted=found.is_trusted, best=best)


def _agent_words(found: AnswerFinding) -> list[str]:
    look = "look at some rows"
    lines = [f"{a} and {b} agree with each other and nobody else: they may collude; {look}" for a, b in found.colluding]
    lines += [
        f"{one.a} and {one.b} agree with each other and nobody else on {one.queries} queries that {one.against} is as sure of: "
        f"one side is wrong, and the two may collude; {look}, or hand over outcomes of them (dmoa train --outcomes)"
        for one in found.disputed
    ]
    lines += [f"{name} gives one answer to nearly all queries: take it out" for name in found.constant]
    lines += [f"{name} is probably wrong on nearly all queries: take it out, or {look}" for name in found.seldom_right]
    lines += [f"{a} and {b} give the same answers: one of the two is enough" for a, b in found.redundant]
    return lines
