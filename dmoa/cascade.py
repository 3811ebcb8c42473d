"""The cascade: a step whose contributions are all unsure asks the next-ranked agent too.

Asked by `asking` after the active agents replied, and again after every agent that it added. Sure steps stay small, unsure
ones grow up to K.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmoa.core.aggregate import Anchors, anchors_of, contributions, doubt
from dmoa.types import AgentReply, RouteDecision


def wants_more(decision: RouteDecision | None, replies: Sequence[AgentReply]) -> bool:
    """Tell whether the step should ask one agent more, given the replies that count so far.

    True where the gate version fitted theta, fewer than `decision.limit` agents replied, and no contribution is as sure
    as theta. Agents that were lost take no place of the limit. Source: ours (cf. arXiv 2403.07652).
    """
    if decision is None or decision.theta is None:
        return False
    if sum(reply.status == "ok" for reply in replies) >= decision.limit:
        return False
    return not is_any_sure(replies, decision.theta, anchors_of(decision))


def is_any_sure(replies: Sequence[AgentReply], theta: float, anchors: Anchors) -> bool:
    """Tell whether the score of at least one contribution is at most theta; blank and lost replies are no contribution."""
    return any(doubt(reply, anchors) <= theta for reply in contributions(replies))
