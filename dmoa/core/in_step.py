"""What a step knows of its answers while it asks: which one leads, how probably it is right, whose reply is worth asking for.

Speaks the step loop's terms (decisions, replies, names) to the label model that a gate version carries (`core/label_model`,
`core/sequential`). Without one there is no judgement, and entropies decide as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmoa.core.aggregate import Selection, contributions, is_cut
from dmoa.core.features import FEEDBACK_FEATURES, Preset
from dmoa.core.label_model import LabelModel
from dmoa.core.scores import posterior_scores, raw_score
from dmoa.core.sequential import standing
from dmoa.core.witnesses import Witnesses, answer_classes
from dmoa.types import AgentReply, FloatArray, RouteDecision

DIGITS = 6
"""Decimals of the entropy that is read: traces keep as many, so that a replay finds the same probabilities, bit for bit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the label model makes of the replies of a step so far."""

    right: Mapping[str, float]
    """By agent that contributed, the probability that its answer is right, given all replies."""
    selection: Selection | None
    """The leading answer in the words of its most trusted agent; None where no answer can be read."""
    probability: float
    """That the leading answer is right; 0 without one."""
    worthwhile: tuple[str, ...]
    """The agents, of those that could be asked, whose reply is worth its price; the worthiest first."""

    @property
    def doubt(self) -> float:
        """Score of the leading answer, which theta is compared with."""
        return float(posterior_scores(self.probability))


def judge(
    decision: RouteDecision | None, replies: Sequence[AgentReply], available: Sequence[str] = (), *, asked: str
) -> Judgement | None:
    """Return what the decision's label model makes of the replies; None where it has none.

    `available` are the agents that could be asked, best ranked first; `asked` is the question, whose form answers have.
    """
    if decision is None or decision.label_model is None:
        return None
    model: LabelModel = decision.label_model
    agents, said = decision.agents, {reply.agent: reply for reply in contributions(replies)}
    witnesses = _witnesses(agents, said, asked)
    is_available_A = np.array([name in available for name in agents], dtype=np.bool_)
    found = standing(model, witnesses, price=decision.agent_price, available_A=is_available_A)
    worth = {name: float(value) for name, value in zip(agents, found.worth_A, strict=True)}
    # What is worth the same but for a thousandth is asked in the gate's order.
    worthwhile = sorted((name for name in available if worth[name] > 0), key=lambda name: -round(worth[name], 3))
    answer_A = witnesses.answer_RA[0]
    selection = None
    if found.leader is not None and answer_A[found.leader] >= 0:
        reply = said[agents[found.leader]]
        num_same = int((answer_A == answer_A[found.leader]).sum())
        selection = Selection(agent=reply.agent, text=reply.text, is_agreed=num_same >= 2)
    return Judgement(
        right={name: float(p) for name, p in zip(agents, found.right_A, strict=True) if name in said},
        selection=selection,
        probability=found.probability if selection else 0.0,
        worthwhile=tuple(worthwhile),
    )


def _witnesses(agents: Sequence[str], said: Mapping[str, AgentReply], asked: str) -> Witnesses:
    """Return the contributions of one step as witnesses [1, A]."""
    replies = [said.get(name) for name in agents]
    nats = [None if reply is None else reply.entropy.mean_nats for reply in replies]
    texts = [None if reply is None else reply.text for reply in replies]
    are_cut = [bool(reply and is_cut(reply)) for reply in replies]
    return Witnesses(
        answer_RA=np.array([read_classes(texts, are_cut, asked)], dtype=np.int64),
        doubt_RA=np.array([[np.nan if value is None else raw_score(round(value, DIGITS)) for value in nats]]),
        length_RA=np.array([[np.nan if reply is None else float(len(reply.text)) for reply in replies]]),
        outcome_RA=np.full((1, len(agents)), np.nan),
    )


def read_classes(texts: Sequence[str | None], are_cut: Sequence[bool], asked: str) -> list[int]:
    """Return the equality class of each text's answer (`core/witnesses`), None: no reply; one that was cut off has none."""
    return answer_classes(["" if text is not None and cut else text for text, cut in zip(texts, are_cut, strict=True)], asked)


def context_part(input_X: FloatArray, preset: Preset) -> FloatArray:
    """Return of gate inputs [.., X] the embeddings alone, which label models read contexts from."""
    return input_X if preset == "paper" else input_X[..., :-FEEDBACK_FEATURES]
