"""Folding the contributions of a step without a language model: the summarizer's `select` mode.

Sits between the agents' replies and `core/stopping`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmoa.core.answers import extract_answer, same_answer
from dmoa.types import AgentReply


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The contribution that becomes the new summary."""

    agent: str
    text: str
    """The reply, unchanged."""
    is_agreed: bool
    """Whether two or more agents gave the same answer."""


def contributions(replies: Sequence[AgentReply]) -> list[AgentReply]:
    """Return the replies that count: status ok, and a text that is not blank."""
    return [reply for reply in replies if reply.status == "ok" and reply.text.strip()]


def select_contribution(replies: Sequence[AgentReply]) -> Selection | None:
    """Return the contribution to go on with, None if there is none.

    One passes unchanged. Of several, the agreed answer wins: the largest group of at least two equal answers, of
    groups equally large the one with the surest member, in that member's words. Else the surest reply: lowest mean
    entropy, unknown entropy last, exact before truncated, then the order given. Source: ours.
    """
    counted = sorted(contributions(replies), key=_doubt)
    if not counted:
        return None
    groups: list[tuple[str, list[AgentReply]]] = []
    for reply in counted:
        # Prose without a recognisable answer agrees only word for word.
        answer = extract_answer(reply.text) or " ".join(reply.text.split())
        for known, members in groups:
            if same_answer(known, answer):
                members.append(reply)
                break
        else:
            groups.append((answer, [reply]))
    # max keeps the first of equals, and groups come in order of their surest members.
    largest = max((members for _, members in groups), key=len, default=[])
    is_agreed = len(largest) >= 2
    chosen = largest[0] if is_agreed else counted[0]
    return Selection(agent=chosen.agent, text=chosen.text, is_agreed=is_agreed)


def _doubt(reply: AgentReply) -> tuple[float, bool]:
    entropy = reply.entropy_nats
    return (math.inf if entropy is None or math.isnan(entropy) else entropy, reply.entropy_kind == "truncated")
