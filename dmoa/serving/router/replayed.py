"""Finished queries as the guards read them: what is held back to judge by, what each reply was worth, what a query came to.

One ruler for all gates that are compared: the label model of the current version, or without one its scores; never what an
offered gate says of itself. Texts are tokens here (`dmoa/feedback`), which agree where the answers did; what clients said of
answers is not read, so nobody can post a gate out of service. Shape letters: R queries, A agents, X gate input.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmoa.config import Config
from dmoa.core.aggregate import is_cut
from dmoa.core.gate import Gate
from dmoa.core.in_step import context_part, read_classes
from dmoa.core.scores import Array, IntArray, score
from dmoa.core.witnesses import NOT_ASKED, Witnesses
from dmoa.feedback import Contexts, Feedback, is_held_back, query_part, tenant_of
from dmoa.types import AgentReply, FloatArray, RouteDecision, StepRecord

MAX_HELD = 512
"""Queries that are held back at a time, evenly over keys and contexts."""
_ANONYMOUS = tenant_of("")


class HeldBack:
    """The newest of the queries that gates are judged by: of the key with the most, in its largest context, the oldest goes."""

    def __init__(self, config: Config, max_held: int = MAX_HELD) -> None:
        self._config = config
        self._max_held = max_held
        self._contexts: defaultdict[str, Contexts] = defaultdict(Contexts)
        self._groups: dict[tuple[str, int], deque[Feedback]] = {}
        self._known: set[str] = set()

    def put(self, record: Feedback) -> None:
        """Take a record, if it is one that is held back, of a key that has a say."""
        router, answer = self._config.router, record.answer
        route = answer.steps[0].route if answer.steps else None
        has_say = record.tenant != _ANONYMOUS or router.feedback_anonymous
        if route is None or not has_say or answer.trace_id in self._known:
            return
        if not is_held_back(answer.trace_id, router.guards.held_back) or not np.isfinite(route.input_X).all():
            return
        group = record.tenant, self._contexts[record.tenant].of(query_part(route.input_X, self._config.gate.preset))
        self._groups.setdefault(group, deque()).append(record)
        self._known.add(answer.trace_id)
        if len(self._known) > self._max_held:
            held = Counter(one.tenant for group in self._groups.values() for one in group)
            largest = max(self._groups, key=lambda name: (held[name[0]], len(self._groups[name])))
            self._known.discard(self._groups[largest].popleft().answer.trace_id)

    def records(self) -> list[Feedback]:
        """Return what is kept, oldest first."""
        return sorted((record for group in self._groups.values() for record in group), key=lambda one: one.created_unix_s)

    def __len__(self) -> int:
        return len(self._known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The first steps of finished queries, oldest first."""

    inputs: list[FloatArray]
    """Gate inputs [X]."""
    right_RA: Array
    """Probability that each agent's reply is right; of agents that were not asked, what is expected of them there."""
    sureness_RA: Array
    """Minus the score of each reply; NaN where there is none."""
    agreement_RA: Array
    """Share of the other replies that gave the same answer; NaN where there is no other."""
    context_R: IntArray


def read_slice(records: Sequence[Feedback], gate: Gate) -> Slice:
    """Return the first steps of records, valued by the current gate. Records of other pools must be left out before."""
    agents, steps = gate.spec.agents, [record.answer.steps[0] for record in records]
    witnesses = _witnesses(steps, gate)
    contexts = Contexts()
    inputs = [step.route.input_X for step in steps if step.route is not None]
    context_R = np.array([contexts.of(query_part(input_X, gate.spec.preset)) for input_X in inputs], dtype=np.int64)
    sureness_RA = _sureness(steps, gate)
    answer_RA = witnesses.answer_RA
    same_RA = (answer_RA[:, :, None] == answer_RA[:, None, :]).sum(axis=2) - 1.0
    others_R = (answer_RA >= 0).sum(axis=1, keepdims=True) - 1.0
    is_judged_RA = (answer_RA >= 0) & (others_R > 0)
    agreement_RA = np.divide(same_RA, others_R, out=np.full(answer_RA.shape, np.nan), where=is_judged_RA)
    if gate.label_model is not None:
        right_RA = gate.label_model.right_probability(witnesses)
    else:
        right_RA = _expected(1.0 / (1.0 + np.exp(-sureness_RA)), context_R, len(agents))
    return Slice(inputs=inputs, right_RA=right_RA, sureness_RA=sureness_RA, agreement_RA=agreement_RA, context_R=context_R)


def _said(step: StepRecord, agents: Sequence[str]) -> list[AgentReply | None]:
    by_name = {reply.agent: reply for reply in step.replies if reply.status == "ok"}
    return [by_name.get(name) for name in agents]


def _witnesses(steps: Sequence[StepRecord], gate: Gate) -> Witnesses:
    """Return the replies of steps as witnesses [R, A]; lengths of tokens say nothing."""
    agents, shape = gate.spec.agents, (len(steps), len(gate.spec.agents))
    answer_RA, doubt_RA = np.full(shape, NOT_ASKED, dtype=np.int64), np.full(shape, np.nan)
    for row, step in enumerate(steps):
        replies = _said(step, agents)
        texts = [None if reply is None else reply.text for reply in replies]
        answer_RA[row] = read_classes(texts, [bool(reply and is_cut(reply)) for reply in replies], "")
        nats = [None if reply is None else reply.entropy.mean_nats for reply in replies]
        doubt_RA[row] = [np.nan if value is None or not 0 <= value < math.inf else math.log(value + 1e-3) for value in nats]
    contexts = [context_part(step.route.input_X, gate.spec.preset) for step in steps if step.route is not None]
    embedding_RD = np.stack(contexts).astype(np.float64) if contexts else None
    unknown_RA = np.full(shape, np.nan)
    return Witnesses(
        answer_RA=answer_RA, doubt_RA=doubt_RA, length_RA=unknown_RA, outcome_RA=unknown_RA, embedding_RD=embedding_RD
    )


def _sureness(steps: Sequence[StepRecord], gate: Gate) -> Array:
    anchors = gate.spec.anchors or (0.0,) * len(gate.spec.agents)
    sureness_RA = np.full((len(steps), len(anchors)), np.nan)
    for row, step in enumerate(steps):
        for agent, reply in enumerate(_said(step, gate.spec.agents)):
            nats = None if reply is None else reply.entropy.mean_nats
            if reply is not None and nats is not None and 0 <= nats < math.inf:
                sureness_RA[row, agent] = -score(nats, anchors[agent], is_cut=is_cut(reply))
    return sureness_RA


def _expected(value_RA: Array, context_R: IntArray, num_agents: int) -> Array:
    """Return values with gaps filled: by the agent's mean in the context, else its mean, else that of all, else a half."""
    filled = value_RA.copy()
    overall = float(np.nanmean(value_RA)) if np.isfinite(value_RA).any() else 0.5
    for agent in range(num_agents):
        known = np.isfinite(value_RA[:, agent])
        mean = float(value_RA[known, agent].mean()) if known.any() else overall
        for context in np.unique(context_R[~known]):
            here = known & (context_R == context)
            filled[~known & (context_R == context), agent] = float(value_RA[here, agent].mean()) if here.any() else mean
    return filled


def probabilities(decisions: Sequence[RouteDecision], num_agents: int) -> npt.NDArray[np.float32]:
    """Return the routing probabilities [R, A]."""
    return np.stack([one.probability_A for one in decisions]) if decisions else np.zeros((0, num_agents), np.float32)


def loads(decisions: Sequence[RouteDecision], num_agents: int) -> Array:
    """Return how the active agents of each decision share it, by their probabilities [R, A]; a row sums to 1."""
    load_RA = np.zeros((len(decisions), num_agents))
    for row, decision in enumerate(decisions):
        active = list(decision.ranking[: decision.k])
        share = decision.probability_A[active].astype(np.float64)
        load_RA[row, active] = share / share.sum()
    return load_RA


@dataclass(frozen=True, slots=True)
class Reading:
    """What one finished query came to; higher is worse. NaN: not known."""

    quality: float
    """1 minus the probability that its answer is right, or without a label model minus its sureness, from 0 to 1."""
    failures: float
    """1 where an agent that counted was lost, or nobody contributed."""
    tokens: float
    latency: float
    """Logarithms to base 4: twice as many make 1/2."""
    lost: float = 0.0
    """1 where it began and was never heard of: it hung, its client went away, or nothing of it may be kept."""


def read_queries(records: Sequence[Feedback], gate: Gate) -> list[Reading]:
    """Return what finished queries came to, by the ruler of `gate`; the last step counts."""
    steps = [record.answer.steps[-1] for record in records]
    if gate.label_model is not None:
        witnesses = _witnesses(steps, gate)
        right_RA = np.where(witnesses.asked, gate.label_model.right_probability(witnesses), np.nan)
    else:
        right_RA = 1.0 / (1.0 + np.exp(-_sureness(steps, gate)))
    return [_reading(record, right_A, gate.spec.agents) for record, right_A in zip(records, right_RA, strict=True)]


def _reading(record: Feedback, right_A: Array, agents: Sequence[str]) -> Reading:
    answer, step = record.answer, record.answer.steps[-1]
    said = {reply.agent for reply in step.replies if reply.status == "ok" and reply.text == answer.text}
    given = [float(right_A[a]) for a, name in enumerate(agents) if name in said and math.isfinite(right_A[a])]
    active = [float(right_A[a]) for a, name in enumerate(agents) if name in step.active and math.isfinite(right_A[a])]
    known = given or active
    return Reading(
        quality=1.0 - max(known) if known else math.nan,
        failures=float(answer.degraded or not any(reply.status == "ok" for reply in step.replies)),
        tokens=math.log(max(answer.usage.total, 1), 4),
        latency=math.log(max(answer.wall_ms, 1.0), 4),
    )


def is_of_pool(record: Feedback, fingerprint: str) -> bool:
    """Tell whether a pool's gate decided a query."""
    steps = record.answer.steps
    return record.fingerprint == fingerprint and bool(steps) and all(step.route is not None for step in steps)
