"""Which contribution goes on: agreement first, then certainty."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from dmoa.core.aggregate import Selection, anchors_of, select_contribution
from dmoa.types import AgentReply, AgentStatus, EntropyKind, EntropySum, RouteDecision


def reply(
    agent: str, text: str, entropy: float | None = 1.0, status: AgentStatus = "ok", kind: EntropyKind = "exact"
) -> AgentReply:
    """Return a reply of four tokens with the given mean entropy, or of no tokens."""
    sums = {} if entropy is None else {"sum_nats": 4 * entropy, "tokens": 4}
    return AgentReply(agent=agent, status=status, text=text, entropy=EntropySum(kind=kind, **sums))


def test_nothing_to_select() -> None:
    assert select_contribution([]) is None
    assert select_contribution([reply("a", "7", status="failed"), reply("b", "  \n")]) is None


def test_the_only_contribution_passes_unchanged() -> None:
    text = "  Well,\nthe answer is 7.  "
    selection = select_contribution([reply("a", "8", 0.0, status="late"), reply("b", text, 3.0)])
    assert selection == Selection(agent="b", text=text, is_agreed=False)


def test_agreement_beats_certainty_in_the_words_of_its_surest_member() -> None:
    replies = [reply("sure", "8", 0.1), reply("a", "It is 1,200.", 0.9), reply("b", "The answer is 1200.0", 0.5)]
    for order in itertools.permutations(replies):
        assert select_contribution(order) == Selection(agent="b", text="The answer is 1200.0", is_agreed=True)


def test_the_larger_group_wins() -> None:
    replies = [reply("a", "1", 0.1), reply("b", "1", 0.1), *(reply(name, "2", 0.9) for name in "cde")]
    assert select_contribution(replies) == Selection(agent="c", text="2", is_agreed=True)


def test_equal_groups_are_decided_by_their_surest_member() -> None:
    replies = [reply("a", "1", 0.4), reply("b", "2", 0.2), reply("c", "1", 0.3), reply("d", "2", 0.9)]
    assert select_contribution(replies) == Selection(agent="b", text="2", is_agreed=True)


def test_without_agreement_the_surest_reply_wins() -> None:
    assert select_contribution([reply("a", "1", 0.4), reply("b", "2", 0.2), reply("c", "3", 0.3)]) == Selection(
        agent="b", text="2", is_agreed=False
    )


@pytest.mark.parametrize(
    ("replies", "winner"),
    [
        ([reply("a", "1", None), reply("b", "2", 9.0)], "b"),
        ([reply("a", "1", 0.5, kind="truncated"), reply("b", "2", 0.5)], "b"),
        ([reply("a", "1", 0.4, kind="truncated"), reply("b", "2", 0.5)], "a"),
        ([reply("a", "1", 0.5), reply("b", "2", 0.5)], "a"),
        ([reply("a", "1", float("nan")), reply("b", "2", 9.0)], "b"),
    ],
)
def test_ties_and_missing_entropies(replies: list[AgentReply], winner: str) -> None:
    selection = select_contribution(replies)
    assert selection is not None
    assert selection.agent == winner


def test_a_reply_that_was_cut_off_is_less_sure_than_every_finished_one() -> None:
    cut = replace(reply("a", "1", 0.0), finish_reason="length")
    for other in (reply("b", "2", 9.0), reply("b", "2", 9.0, kind="truncated")):
        selection = select_contribution([cut, other])
        assert selection is not None
        assert selection.agent == "b"
    agreed = select_contribution([cut, reply("b", "The answer is 1.", 9.0)])
    assert agreed == Selection(agent="b", text="The answer is 1.", is_agreed=True)


@pytest.mark.parametrize("unsure", [None, float("nan"), 9.0])
def test_a_cut_reply_never_beats_a_finished_one_whatever_is_known_of_their_entropies(unsure: float | None) -> None:
    cut = [replace(reply(name, "So, let us", 0.0), finish_reason="length") for name in "ab"]
    finished = reply("c", "The answer is 7.", unsure)
    for replies in ([cut[0], finished], [*cut, finished], [finished, *cut]):
        # Two that were cut at the same words have agreed on nothing.
        assert select_contribution(replies) == Selection(agent="c", text="The answer is 7.", is_agreed=False)
    anchors = {"c": -30.0}  # as of an agent that says the same to everything
    assert select_contribution([*cut, finished], anchors) == Selection(agent="c", text="The answer is 7.", is_agreed=False)
    assert select_contribution(cut) == Selection(agent="a", text="So, let us", is_agreed=True)
    agreed = select_contribution(
        [*cut, replace(cut[0], agent="d", finish_reason="stop", entropy=EntropySum(sum_nats=40.0, tokens=4)), finished]
    )
    assert agreed == Selection(agent="d", text="So, let us", is_agreed=True)


def test_anchors_decide_who_is_surest() -> None:
    replies = [reply("a", "1", 0.4), reply("b", "2", 0.5)]
    decided = RouteDecision(
        gate_version="v",
        agents=("b", "a"),
        probability_A=np.asarray([0.5, 0.5], np.float32),
        ranking=(0, 1),
        k=2,
        mass=1.0,
        hidden_H=np.zeros(1, np.float32),
        anchors=(0.3, 0.0),
    )
    for decision, winner in ((None, "a"), (decided, "b"), (replace(decided, anchors=None), "a")):
        selection = select_contribution(replies, anchors_of(decision))
        assert selection is not None
        assert selection.agent == winner


def test_prose_without_an_answer_agrees_only_word_for_word() -> None:
    prose, other = "First line of thought\nsecond line of thought", "First line of thought\nanother line of thought"
    same = select_contribution([reply("a", prose, 0.5), reply("b", prose.replace("\n", "  \n"), 0.4)])
    assert same is not None
    assert (same.agent, same.is_agreed) == ("b", True)
    differing = select_contribution([reply("a", prose, 0.5), reply("b", other, 0.4)])
    assert differing == Selection(agent="b", text=other, is_agreed=False)


def test_the_question_says_whether_capitals_count() -> None:
    asked = "def f(s): ...\nassert f('aB') == ??"
    replies = [reply("a", "Answer: 'aB'", 0.5), reply("b", "Answer: 'ab'", 0.3), reply("c", "assert f('aB') == 'aB'", 0.9)]
    assert select_contribution(replies, asked=asked) == Selection(agent="a", text=replies[0].text, is_agreed=True)
    found = [select_contribution(replies[:2], asked=question) for question in (asked, "What is f('aB')?")]
    assert [chosen.is_agreed for chosen in found if chosen] == [False, True]
