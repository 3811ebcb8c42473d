"""Debate, refinement and group chat: who speaks when, and whose words each has before it."""

from __future__ import annotations

import pytest

from dmoa.errors import EmptyAnswerError
from dmoa.policies.debate import MISTAKES
from dmoa.testing import query
from dmoa.types import AgentCall
from tests.unit.policies.schedules import Says, check_cost, run, schedule_of


async def test_debaters_read_their_own_answer_first_and_then_the_others() -> None:
    answer, calls = await run("debate:rounds=1:agents=a+b+c")
    seconds = ["a.1 <- a.0 b.0 c.0", "b.1 <- b.0 a.0 c.0", "c.1 <- c.0 a.0 b.0"]
    assert schedule_of(calls) == ["a.0", "b.0", "c.0", *seconds]
    assert answer.stop_reason == "schedule"


async def test_the_last_rounds_vote_is_the_answer() -> None:
    answer, _ = await run("debate:rounds=1", lambda call: f"Answer: {call.agent if call.step == 0 else 19 + (call.agent == 'a')}")
    assert answer.text == "Answer: 19"


def critic(*kinds: str) -> Says:
    """What the identifier says at each of its turns."""
    return lambda call: kinds[call.step // 2] if "worst mistake" in call.messages[-1].content else None


async def test_the_kind_of_mistake_says_who_refines_and_how() -> None:
    answer, calls = await run("refine", critic("MISREAD", "COMPUTATION"))
    # a answers, b looks; MISREAD is c's, CONCEPT d's, COMPUTATION a's again.
    assert schedule_of(calls) == ["a.0", "b.1 <- a.0", "c.2 <- a.0", "b.3 <- c.2", "a.4 <- c.2"]
    assert MISTAKES["MISREAD"] in calls[2].messages[-1].content
    assert MISTAKES["COMPUTATION"] in calls[4].messages[-1].content
    assert answer.text.startswith("[a.4]")


@pytest.mark.parametrize(("words", "num_calls"), [("NONE", 2), ("I cannot say.", 2)])
async def test_an_answer_without_a_mistake_stands(words: str, num_calls: int) -> None:
    answer, calls = await run("refine", critic(words))
    assert len(calls) == num_calls
    assert answer.text.startswith("[a.0]")  # not the identifier's words
    assert answer.stop_reason == "schedule"


def manager(*names: str) -> Says:
    """What the manager says at each of its turns."""
    return lambda call: names[call.step // 2] if "You lead a chat" in call.messages[-1].content else None


async def test_a_manager_names_who_speaks_and_all_read_the_whole_chat() -> None:
    answer, calls = await run("group_chat:turns=3:manager=d", manager("c", "a", "c"))
    expected = ["d.0", "c.1", "d.2 <- c.1", "a.3 <- c.1", "d.4 <- c.1 a.3", "c.5 <- c.1 a.3"]
    assert schedule_of(calls) == expected
    assert answer.text.startswith("[c.5]")


async def test_a_chat_ends_where_the_manager_says_done() -> None:
    answer, calls = await run("group_chat", manager("b", "DONE"))
    assert [call.agent for call in calls] == ["a", "b", "a"]
    assert answer.text.startswith("[b.1]")


async def test_a_budget_that_the_manager_alone_spends_is_told_with_what_it_took() -> None:
    with pytest.raises(EmptyAnswerError, match="'group_chat' was ended by budget_calls after 1 calls, before an agent") as told:
        await run("group_chat", manager("b"), query(max_steps=9, budget_calls=1))
    (reply,) = told.value.replies
    assert (reply.agent, reply.text) == ("a", "b")


async def test_a_manager_that_names_nobody_has_the_next_one_speak() -> None:
    _, calls = await run("group_chat:turns=2", manager("who knows", "nobody"))
    assert [call.agent for call in calls] == ["a", "a", "a", "b"]


def full(call: AgentCall) -> str | None:
    """Mistakes in every round; a manager that never is done."""
    return critic("CONCEPT", "CONCEPT", "CONCEPT")(call) or manager("b", "c", "d", "a", "b")(call)


@pytest.mark.parametrize("policy", ["debate", "debate:rounds=1", "refine", "refine:rounds=3", "group_chat", "group_chat:turns=5"])
async def test_calls_and_tokens_are_those_of_the_formula(policy: str) -> None:
    await check_cost(policy, full)
