"""What answers tell of a pool, without labels: which signal can route it, what to expect, and whom to look at first.

The part of a probe that reads what agents said, by the label model (`core/label_model`); `training/probe` reads how sure they
were. Accuracies are the model's own estimates: they hold as far as the signal does, and the finding says how far that is. Shape
letters: R rows, A agents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from dmoa.core.forms import agreement_key
from dmoa.core.in_step import read_classes
from dmoa.core.label_model import ENOUGH_BACKED, MIN_ROWS, LabelModel, Signal, fit_label_model
from dmoa.core.scores import known_mean
from dmoa.core.witnesses import (
    NO_ANSWER,
    NOT_ASKED,
    Array,
    BoolArray,
    IntArray,
    Witnesses,
    are_backed,
    disputes,
    witnesses_of,
)
from dmoa.training.cluster_router import ProbeSample
from dmoa.training.judging import ask_in_turn
from dmoa.training.probe_outcomes import Judged, Settled, judged_agents, settled_words
from dmoa.training.rollouts import FileRecord

_SAME = 0.95
_CLIQUE, _APART = 0.6, 0.25
_CONSTANT = 0.8
_FEWEST = MIN_ROWS
"""Queries, of those that an agent or a pair replied to, below which nothing is said of it."""
_SELDOM, _OFTEN = 0.15, 0.5
_HARDLY = 0.15
"""Share of queries with an answer of two agents below which the replies are taken for free text, or for guesses."""
_READABLE = 0.5
_Z = 1.96
_GAPS = (0.1, 0.25)


class Expected(FileRecord):
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


class DisputeFinding(FileRecord):
    """Two agents that are sure, agree with each other and nobody else, and are refuted by another that is sure as well."""

    a: str
    b: str
    against: str
    """The agent that refutes them most often."""
    queries: int
    """How many."""


class AnswerFinding(FileRecord):
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
    readable: float
    """Share of the replies in which an answer can be read."""
    agreed: int
    """Queries to which two or more agents give the same answer, right or wrong."""
    replies: dict[str, int]
    """By agent, how many queries it replied to."""
    is_one_voice: bool
    """All agents give the same answers to nearly all queries: whether these are right does not show."""
    outcomes: int
    """Queries with a known outcome that the estimates rest on."""
    competence: dict[str, float]
    """By agent, the estimated share of right answers; 0 for one that never replied."""
    expected: list[Expected]
    redundant: list[tuple[str, str]]
    """Pairs that give one answer to nearly all queries: one of the two is enough."""
    colluding: list[tuple[str, str]]
    """Pairs that agree with each other and with nobody else."""
    disputed: list[DisputeFinding]
    """Pairs that may collude on one kind of query: entropies and agreement do not tell which side is right there."""
    unread: list[str]
    """Agents in nearly all of whose replies no answer can be read, though in those of others it can."""
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
    settled: list[str] = []
    if finding.settled is not None:
        settled = settled_words(
            finding.settled,
            outcomes=finding.outcomes,
            signal=finding.signal,
            is_trusted=finding.is_trusted,
            best=finding.expected[0].agent or "",
        )
    return finding.model_copy(update={"summary": [*signal_words(finding), *settled, *_agent_words(finding)]})


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
    whole = witnesses = _witnesses(sample)
    same_AA, both_AA = _same_answers(witnesses)
    model = fit_label_model(witnesses, seed=seed)
    unread = _unread(sample.agents, whole)
    constant = [name for name in _constant(sample) if name not in unread]
    thirds = [index for index, name in enumerate(sample.agents) if name not in (*unread, *constant)]
    colluding = _colluding(same_AA, both_AA, sample.agents, thirds, model, witnesses)
    redundant = _redundant(same_AA, both_AA, sample.agents)
    seconds = sorted({sample.agents.index(second) for _, second in colluding})
    if seconds:  # one witness, not two
        witnesses = _unheeded(whole, seconds)
        model = fit_label_model(witnesses, seed=seed)
    right_RA = _as_others(model.right_probability(witnesses), whole.answer_RA, seconds)
    backed = float(_backing(witnesses, right_RA).mean())
    outcomes = int(np.isfinite(witnesses.outcome_RA).any(axis=1).sum())
    is_one_voice = _is_one_voice(same_AA, both_AA, whole.asked.sum(axis=0))
    signal, is_trusted = _signal(sample, 0.0 if is_one_voice else backed, outcomes, can_entropy=can_entropy)
    expected = _expected(sample, model, witnesses, right_RA)
    open_outcomes = 0 if is_trusted else max(0, _to_settle(expected) - outcomes)
    disputed = _disputed(sample.agents, model, witnesses)
    told = {*constant, *unread, *(name for pair in colluding for name in pair)}
    competence_A = np.where(whole.asked.any(axis=0), np.nanmean(right_RA, axis=0), 0.0)
    agreed = int(_are_agreed(whole).sum())
    seldom = _seldom_right(sample, model, witnesses, right_RA) if agreed >= _HARDLY * len(sample.texts) else []
    finding = AnswerFinding(
        signal=signal,
        is_trusted=is_trusted,
        summary=[],
        backed=backed,
        rows=len(sample.texts),
        readable=float((whole.answer_RA >= 0).sum() / max(1, whole.asked.sum())),
        agreed=agreed,
        replies={name: int(count) for name, count in zip(sample.agents, whole.asked.sum(axis=0), strict=True)},
        is_one_voice=is_one_voice,
        outcomes=outcomes,
        competence={name: float(share) for name, share in zip(sample.agents, competence_A, strict=True)},
        expected=expected,
        redundant=[pair for pair in redundant if pair not in colluding and not {*pair} & {*constant}],
        colluding=[pair for pair in colluding if not {*pair} & {*constant}],
        disputed=[found for found in disputed if not {found.a, found.b} & {*constant}],
        unread=unread,
        constant=constant,
        seldom_right=[name for name in seldom if name not in told],
        outcomes_to_settle=open_outcomes,
    )
    return finding, right_RA


def _witnesses(sample: ProbeSample) -> Witnesses:
    """Return what the replies say, their answers compared as training and serving compare them."""
    texts, asked = replies_of(sample), _asked(sample)
    cut_RA = np.zeros(sample.entropy_RA.shape, dtype=bool) if sample.cut_RA is None else sample.cut_RA
    entropies = [[float(nats) if math.isfinite(nats) else None for nats in row] for row in sample.entropy_RA]
    found = witnesses_of(texts, entropies=entropies, embedding_RD=np.asarray(sample.embedding_RD, dtype=np.float64))
    answer_RA = np.array([read_classes(row, cut_A, query) for row, cut_A, query in zip(texts, cut_RA, asked, strict=True)])
    outcome_RA = found.outcome_RA if sample.outcome_RA is None else np.where(found.asked, sample.outcome_RA, np.nan)
    return replace(found, answer_RA=answer_RA.astype(np.int64), outcome_RA=outcome_RA)


def _are_agreed(witnesses: Witnesses) -> BoolArray:
    """Return the rows on which two or more agents give the same answer [R]."""
    answer_RA = witnesses.answer_RA
    same_RAA = (answer_RA[:, :, None] == answer_RA[:, None, :]) & (answer_RA >= 0)[:, :, None]
    are_agreed_R: BoolArray = (same_RAA.sum(axis=2) >= 2).any(axis=1)
    return are_agreed_R


def _is_one_voice(same_AA: Array, both_AA: IntArray, replies_A: IntArray) -> bool:
    """Tell whether all agents that replied often enough give the same answers."""
    heard = [agent for agent, replies in enumerate(replies_A) if replies >= _FEWEST]
    pairs = list(combinations(heard, 2))
    return bool(pairs) and all(same_AA[pair] >= _SAME and both_AA[pair] >= _FEWEST for pair in pairs)


def _unread(agents: tuple[str, ...], witnesses: Witnesses) -> list[str]:
    """Return the agents in whose replies hardly an answer can be read, where in those of another it can."""
    replies_A = witnesses.asked.sum(axis=0)
    share_A = (witnesses.answer_RA == NO_ANSWER).sum(axis=0) / np.maximum(replies_A, 1)
    is_judged_A = replies_A >= _FEWEST
    if not (is_judged_A & (share_A < _CONSTANT)).any():
        return []
    return [name for name, is_bad in zip(agents, is_judged_A & (share_A >= _CONSTANT), strict=True) if is_bad]


def replies_of(sample: ProbeSample) -> list[list[str | None]]:
    """Return the texts [R][A], None where an agent gave no reply."""
    return [
        [text if is_heard else None for text, is_heard in zip(row, heard_A, strict=True)]
        for row, heard_A in zip(sample.texts, sample.replied, strict=True)
    ]


def _asked(sample: ProbeSample) -> tuple[str, ...]:
    return sample.asked or ("",) * len(sample.texts)


def _unheeded(witnesses: Witnesses, agents: Sequence[int]) -> Witnesses:
    """Return the witnesses as if nothing could be read in what some agents said."""
    answer_RA = witnesses.answer_RA.copy()
    answer_RA[:, agents] = np.minimum(answer_RA[:, agents], NO_ANSWER)
    return replace(witnesses, answer_RA=answer_RA)


def _as_others(right_RA: Array, answer_RA: IntArray, agents: Sequence[int]) -> Array:
    """Return the probabilities of being right, those of some agents taken from the others that say the same; 0 where none does.

    Where one of them did not reply it is taken to be right as often as elsewhere.
    """
    right_RA = right_RA.copy()
    others_A = ~np.isin(np.arange(right_RA.shape[1]), agents)
    for agent in agents:
        same_RA = (answer_RA == answer_RA[:, [agent]]) & (answer_RA >= 0) & others_A
        said_R = np.where(same_RA, right_RA, 0.0).max(axis=1)
        is_there_R = answer_RA[:, agent] != NOT_ASKED
        right_RA[:, agent] = np.where(is_there_R, said_R, said_R[is_there_R].mean())
    return right_RA


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
    turn_A, asked_A = turn.asked_RA.mean(axis=0), witnesses.asked.mean(axis=0)
    given_RA = np.where(witnesses.answer_RA >= 0, right_RA, 0.0)
    one_A = (np.arange(num_agents) == best).astype(np.float64)
    ways: list[tuple[Literal["one agent", "everybody", "in turn"], float, float, Array]] = [
        ("one agent", given_RA[:, best].mean(), 1.0, one_A),
        ("in turn", turn.right_R.mean(), turn.count_R.mean(), turn_A),
        ("everybody", given_RA.max(axis=1).mean(), (asked_A > 0).sum(), asked_A),
    ]
    return [
        Expected(
            way=way,
            agent=sample.agents[best] if way == "one agent" else None,
            accuracy=float(accuracy),
            calls=float(calls),
            tokens=_rounded(_spent(share_A, tokens_A), 1),
            price=_rounded(_spent(share_A, price_A)),
        )
        for way, accuracy, calls, share_A in ways
    ]


def _means(value_RA: Array | None, num_agents: int) -> Array:
    """Return the mean of every agent's replies [A]; NaN where nothing is known."""
    return np.full(num_agents, np.nan) if value_RA is None else known_mean(value_RA)


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


def _same_answers(witnesses: Witnesses) -> tuple[Array, IntArray]:
    """Return the share of rows on which two agents give the same answer, of those that both answer, and their number [A, A]."""
    given_RA = witnesses.answer_RA >= 0
    both_RAA = given_RA[:, :, None] & given_RA[:, None, :]
    same_RAA = both_RAA & (witnesses.answer_RA[:, :, None] == witnesses.answer_RA[:, None, :])
    both_AA: IntArray = both_RAA.sum(axis=0)
    share_AA: Array = same_RAA.sum(axis=0) / np.maximum(both_AA, 1)
    return share_AA, both_AA


def _redundant(same_AA: Array, both_AA: IntArray, agents: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = combinations(range(len(agents)), 2)
    return [(agents[a], agents[b]) for a, b in pairs if same_AA[a, b] >= _SAME and both_AA[a, b] >= _FEWEST]


def _colluding(
    same_AA: Array,
    both_AA: IntArray,
    agents: tuple[str, ...],
    thirds: Sequence[int],
    model: LabelModel,
    witnesses: Witnesses,
) -> list[tuple[str, str]]:
    """Return the pairs that agree on most rows while neither agrees with any third agent, nor where both are sure.

    `thirds`: who may bear out a pair; one answer to all queries bears out nobody. Of a pair without a third agent that answered
    enough of the same queries nothing is known.
    """
    found = []
    for a, b in combinations(range(len(agents)), 2):
        others = [c for c in thirds if c not in (a, b)]
        common = max((int(min(both_AA[a, c], both_AA[b, c])) for c in others), default=0)
        if min(common, both_AA[a, b]) < _FEWEST:
            continue
        most = max(float(max(same_AA[a, c], same_AA[b, c])) for c in others)
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
    said = [
        [None if text is None else agreement_key(text, query) or text.strip() for text in row]
        for row, query in zip(replies_of(sample), _asked(sample), strict=True)
    ]
    return [name for name, is_one in zip(sample.agents, say_one_thing(said, _CONSTANT), strict=True) if is_one]


def say_one_thing(said: Sequence[Sequence[str | None]], least: float) -> list[bool]:
    """Return which agents say one thing on `least` of the rows or more, where another that replied to the same ones does not.

    `said` [R][A]: None where an agent gave no reply.
    """
    columns = list(zip(*said, strict=True))
    return [commonest(mine) >= least and any(_differs(mine, theirs, least) for theirs in columns) for mine in columns]


def _differs(mine: Sequence[str | None], theirs: Sequence[str | None], least: float) -> bool:
    """Tell whether an agent says one thing on the rows that both replied to, and the other does not."""
    both = [(own, other) for own, other in zip(mine, theirs, strict=True) if None not in (own, other)]
    if len(both) < _FEWEST:
        return False
    own, other = zip(*both, strict=True)
    return commonest(own) >= least > commonest(other)


def commonest(said: Sequence[str | None]) -> float:
    """Return the share of an agent's replies that are its commonest one; 0 without any."""
    counts = Counter(one for one in said if one is not None)
    return counts.most_common(1)[0][1] / counts.total() if counts else 0.0


def _seldom_right(sample: ProbeSample, model: LabelModel, witnesses: Witnesses, right_RA: Array) -> list[str]:
    """Return the agents that are probably wrong in every context, where somebody is probably right in most.

    Of an agent that hardly replied nothing is said.
    """
    context_R = model.context(witnesses.embedding_RD, len(right_RA))
    share_CA = np.array([np.nanmean(right_RA[context_R == c], axis=0) for c in np.unique(context_R)])
    if float(share_CA.max(axis=1).mean()) < _OFTEN:
        return []
    replies_A = sample.replied.sum(axis=0)
    judged = zip(sample.agents, share_CA.max(axis=0), replies_A, strict=True)
    return [name for name, most, replies in judged if most < _SELDOM and replies >= _FEWEST]


def signal_words(found: AnswerFinding) -> list[str]:
    """Return in sentences what can route the pool, and what to expect."""
    share = f"two or more agents give the right answer to probably {found.backed:.0%} of {found.rows} queries"
    kind = "more outcomes" if found.outcomes else "outcomes"
    more = f"{found.outcomes_to_settle} {kind} (dmoa train --outcomes) would settle it" if found.outcomes_to_settle else ""
    if found.signal == "agreement":
        lines = [f"agreement can route this pool: {share}"]
    else:
        share = "" if found.is_one_voice else f"{share}, {ENOUGH_BACKED:.0%} are needed; "
        lines = [f"agreement is not to be trusted here: {share}{_why_not(found)}"]
        then = {
            "entropy": f"entropy can{'' if found.is_trusted else 'not'}, by who is sure of which query",
            "outcomes": f"{found.outcomes} outcomes are known, {'and decide' if found.is_trusted else 'too few to decide'}",
            "none": "no entropies are known either",
        }[found.signal]
        lines.append(f"{then}; {more}" if more else then)
    missing = {name: count for name, count in found.replies.items() if count < ENOUGH_BACKED * found.rows}
    if missing:
        counts = ", ".join(f"{name} {count}" for name, count in missing.items())
        lines.append(f"replies to the {found.rows} queries: {counts}; one that is missing counts as wrong")
    return [*lines, *_expected_words(found)]


def _why_not(found: AnswerFinding) -> str:
    """Return in words why agreement is not to be trusted."""
    if found.is_one_voice:
        return "all agents give the same answers to nearly all queries, right or wrong"
    heard = [name for name, count in found.replies.items() if count]
    if len(heard) == 1:
        return f"{heard[0]} alone replied"
    there, wanted = sum(found.replies.values()), found.rows * len(heard)
    if there < ENOUGH_BACKED * wanted:
        return f"{wanted - there} of {wanted} replies are missing: ask all agents the same queries"
    if found.readable < _READABLE:
        return f"in {1 - found.readable:.0%} of the replies no answer can be read: they are cut off, empty or free text"
    if found.agreed < _HARDLY * found.rows:
        return "hardly ever do two give the same answer, and free text is not compared by meaning"
    if len({*heard} - {*found.unread, *found.constant}) == 2:
        return "where two agents differ nothing tells who is right"
    return "those that agree may collude" if found.colluding else "weak agents may err alike"


def is_guess(found: AnswerFinding) -> bool:
    """Tell whether accuracies are a guess: no answer bears out another, or all are the same, and no entropy tells."""
    by_entropy = found.signal == "entropy" and found.is_trusted
    return not by_entropy and (found.is_one_voice or found.agreed < _HARDLY * found.rows)


def _expected_words(found: AnswerFinding) -> list[str]:
    """Return what to expect; nothing where it is a guess."""
    if is_guess(found):
        return []
    one, turn, everybody = found.expected
    gain, saved = round(turn.accuracy - one.accuracy, 2) + 0.0, everybody.calls / turn.calls
    tokens = f", {turn.tokens:.0f} tokens" if turn.tokens is not None else ""
    tokens += f", price {turn.price:.3g}" if turn.price is not None else ""
    begin = "expect" if found.is_trusted else "if it could be trusted,"
    return [
        f"{begin} {turn.accuracy:.0%} right at {turn.calls:.1f} calls{tokens} a query by asking in turn: {gain:+.0%} against "
        f"{one.agent} alone ({one.accuracy:.0%}), {everybody.accuracy:.0%} by asking everybody at {saved:.1f} times the calls"
    ]


def _agent_words(found: AnswerFinding) -> list[str]:
    look = "look at some rows"
    lines = [f"{a} and {b} agree with each other and nobody else: they may collude; {look}" for a, b in found.colluding]
    lines += [
        f"{one.a} and {one.b} agree with each other and nobody else on {one.queries} queries that {one.against} is as sure of: "
        f"one side is wrong, and the two may collude; {look}, or hand over outcomes of them (dmoa train --outcomes)"
        for one in found.disputed
    ]
    unread = "no answer can be read in nearly all its replies (cut off, empty or free text)"
    lines += [f"{name}: {unread}; mend that, or take it out" for name in found.unread]
    lines += [f"{name} gives one answer to nearly all queries: take it out" for name in found.constant]
    lines += [f"{name} is probably wrong on nearly all queries: take it out, or {look}" for name in found.seldom_right]
    for group in _groups(found.redundant):
        of = "the two" if len(group) == 2 else "them"
        lines.append(f"{', '.join(group[:-1])} and {group[-1]} give the same answers: one of {of} is enough")
    return lines


def _groups(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return groups of agents of which every two are a pair, so that every pair is in one."""
    known = {frozenset(pair) for pair in pairs}
    groups: list[list[str]] = []
    for pair in pairs:
        if any({*pair} <= {*group} for group in groups):
            continue
        group = [*pair]
        for name in dict.fromkeys(name for one in pairs for name in one):
            if name not in group and all(frozenset((name, member)) in known for member in group):
                group.append(name)
        groups.append(group)
    return groups
