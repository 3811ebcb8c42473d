"""Decides when a query ends: by its summarizer's verdict, by agreement, by certainty, or by a budget.

Called once after every step by the policies and the orchestrator. Pure; the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dmoa.core.aggregate import RAW, Anchors, Selection, answer_key, contributions, is_any_sure
from dmoa.core.in_step import Judgement
from dmoa.types import AgentReply, StopReason, Verdict


def rule_stop(
    *,
    mode: Literal["select", "llm"],
    verdict: Verdict,
    active_replies: Sequence[AgentReply],
    selection: Selection | None,
    previous_summary: str,
    theta: float | None = None,
    anchors: Anchors = RAW,
    judgement: Judgement | None = None,
    asked: str = "",
) -> StopReason | None:
    """Return why the query is done after this step, None to go on.

    `llm`: `summarizer` on the verdict final, nothing else. `select`: `agreement` when two or more contributions give
    the same answer; else, if theta is given, `sure` when the score of a contribution is at most theta; if there is no theta,
    `agreement` when a lone contribution repeats the last summary's answer. `active_replies` and `selection` are this step's,
    `previous_summary` the last step's (empty at the first); `theta` and `anchors` are those of the gate version that
    decided the step. With a `judgement` it is the score of the leading answer that theta is compared with, and a lone
    contribution that is not sure may end the query by repeating the summary too. `asked` is the question, whose form answers
    have. Source: paper (summarizer); the rules ours.
    """
    if mode == "llm":
        return "summarizer" if verdict == "final" else None
    if selection is None:
        return None
    if selection.is_agreed:
        return "agreement"
    counted = contributions(active_replies)
    if theta is not None:
        if judgement.doubt <= theta if judgement is not None else is_any_sure(counted, theta, anchors):
            return "sure"
        if judgement is None:
            return None
    return "agreement" if len(counted) == 1 and _repeats(selection.text, previous_summary, asked) else None


def _repeats(text: str, previous_summary: str, asked: str) -> bool:
    return bool(text.strip()) and answer_key(text, asked) == answer_key(previous_summary, asked)


def budget_stop(
    *,
    step: int,
    max_steps: int,
    tokens_used: int,
    budget_tokens: int | None,
    now: float,
    deadline: float | None,
    price_used: float = 0.0,
    budget_price: float | None = None,
    calls_used: int = 0,
    budget_calls: int | None = None,
    is_paced: bool = False,
) -> StopReason | None:
    """Return the budget that is spent, None if another step may start.

    `step` is the number of finished steps; `now` and `deadline` are Unix seconds. Where several are spent the order is
    deadline, tokens, price, calls, steps. `is_paced`: tokens and price are spent too where one more call, as the calls so far
    were in the mean, would be too much. Source: paper (20 steps); the others ours.
    """
    ahead = 1 + 1 / calls_used if is_paced and calls_used else 1.0
    if deadline is not None and now >= deadline:
        return "deadline"
    if budget_tokens is not None and (tokens_used >= budget_tokens or tokens_used * ahead > budget_tokens):
        return "budget_tokens"
    if budget_price is not None and (price_used >= budget_price or price_used * ahead > budget_price):
        return "budget_price"
    if budget_calls is not None and calls_used >= budget_calls:
        return "budget_calls"
    return "max_steps" if step >= max_steps else None
