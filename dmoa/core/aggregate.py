"""Folds the contributions of a step without a language model: the summarizer's `select` mode.

Sits between the agents' replies and `core/stopping`; says how unsure a reply is, which the cascade and the stopping rules
ask too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmoa.core.forms import agreement_key
from dmoa.core.scores import score
from dmoa.types import AgentReply, RouteDecision

Anchors = Mapping[str, float]
"""Agent -> what its anchored score subtracts; empty for raw scores."""
RAW: Anchors = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The contribution that becomes the new summary."""

    agent: str
    text: str
    """The reply, unchanged."""
    is_agreed: bool
    """Whether two or more agents gave the same answer."""


def contributions(replies: Sequence[AgentReply]) -> list[AgentReply]:
    """Return the replies that count: status ok, a text that is not blank, and not left out by the pool's defence."""
    return [reply for reply in replies if reply.status == "ok" and reply.text.strip() and not reply.is_barred]


def anchors_of(decision: RouteDecision | None) -> Anchors:
    """Return the anchors of the gate version that decided; empty for raw scores and for policies without a gate."""
    if decision is None or decision.anchors is None:
        return RAW
    return dict(zip(decision.agents, decision.anchors, strict=True))


def is_cut(reply: AgentReply) -> bool:
    """Tell whether a reply was cut off before its end."""
    return reply.finish_reason == "length"


def doubt(reply: AgentReply, anchors: Anchors = RAW) -> float:
    """Return the score of a reply: the lower, the surer; infinite where its entropy is unknown.

    A reply that was cut off counts as less sure than every finished one. Source: ours.
    """
    entropy = reply.entropy.mean_nats
    if entropy is None or math.isnan(entropy):
        return math.inf
    return score(entropy, anchors.get(reply.agent), is_cut=is_cut(reply))


def is_any_sure(replies: Sequence[AgentReply], theta: float, anchors: Anchors) -> bool:
    """Tell whether the score of at least one contribution is at most theta; blank and lost replies do not count."""
    return any(doubt(reply, anchors) <= theta for reply in contributions(replies))


def answer_key(text: str, asked: str) -> str:
    """Return what replies share that give the same answer to a question; prose without one agrees word for word."""
    return agreement_key(text, asked) or f"words:{' '.join(text.split())}"


def select_contribution(replies: Sequence[AgentReply], anchors: Anchors = RAW, *, asked: str = "") -> Selection | None:
    """Return the contribution to go on with, None if there is none.

    One passes unchanged. Of several, the agreed answer wins: the largest group of at least two equal answers, of
    groups equally large the one with the surest member, in that member's words. Else the surest reply: lowest score
    under the step's `anchors`, exact before truncated entropy, then the order given. A reply that was cut off comes after
    every finished one, whatever is known of their entropies, and cut replies alone agree on nothing that a finished reply
    does not say. `asked` is the question, whose form answers have. Source: ours.
    """

    counted = _by_sureness(replies, anchors)
    if not counted:
        return None
    groups: dict[str, list[AgentReply]] = {}
    for reply in counted:
        groups.setdefault(answer_key(reply.text, asked), []).append(reply)
    # A group's first member is finished if any is. max keeps the first of equals, and groups come in order of their surest.
    sound = [members for members in groups.values() if is_cut(members[0]) == is_cut(counted[0])]
    largest = max(sound, key=len)
    is_agreed = len(largest) >= 2
    chosen = largest[0] if is_agreed else counted[0]
    return Selection(agent=chosen.agent, text=chosen.text, is_agreed=is_agreed)


def surest_contribution(replies: Sequence[AgentReply], anchors: Anchors = RAW) -> Selection | None:
    """Return the contribution of the lowest score, whatever the others say; None if there is none."""
    counted = _by_sureness(replies, anchors)
    return Selection(agent=counted[0].agent, text=counted[0].text, is_agreed=False) if counted else None


def _by_sureness(replies: Sequence[AgentReply], anchors: Anchors) -> list[AgentReply]:
    def key(reply: AgentReply) -> tuple[bool, float, bool]:
        return is_cut(reply), doubt(reply, anchors), reply.entropy.kind == "truncated"

    return sorted(contributions(replies), key=key)
