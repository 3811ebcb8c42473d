"""Prices: of tokens, of replies, of whole queries, and the budgets of price and calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from dmoa.config import Config
from dmoa.errors import EmptyAnswerError
from dmoa.evaluation.answering import answered, unanswered
from dmoa.evaluation.records import BenchmarkInfo, Task
from dmoa.evaluation.results import build_evaluation
from dmoa.testing import (
    Fail,
    FakeAgents,
    Say,
    Schedule,
    answer_of,
    asks,
    decision,
    orchestrator_of,
    query,
    run_info,
    scored,
    scripted_pool,
)
from dmoa.trace import answer_of_reply, reply_dmoa
from dmoa.types import AgentCall, AgentReply, Price, SummarizerRecord, TextDelta, TokenUsage, priced, total_price
from tests.unit.policies.schedules import run

TEN_FOUR = TokenUsage(prompt_tokens=10, completion_tokens=4)
PRICE = Price(prompt_per_1m=100_000.0, completion_per_1m=500_000.0)  # a call of 10 + 4 tokens costs 1 + 2


def reply(**changes: object) -> AgentReply:
    return replace(AgentReply(agent="a", status="ok", text="19", usage=TEN_FOUR), **changes)  # type: ignore[arg-type]


def test_the_price_of_tokens_and_who_knows_it() -> None:
    assert PRICE.of(TEN_FOUR) == 3.0
    assert Price(prompt_per_1m=3.0, completion_per_1m=15.0).of(TokenUsage(prompt_tokens=10**6, completion_tokens=200_000)) == 6.0
    assert priced(reply(), PRICE).price == 3.0
    assert priced(reply(price=0.25), PRICE).price == 0.25  # recorded with its own
    assert priced(reply(), None).price is None


def test_a_total_is_known_where_every_call_that_took_tokens_has_a_price() -> None:
    nothing = SummarizerRecord(mode="select", verdict="rule")
    assert total_price([reply(price=3.0), reply(price=0.5), nothing]) == 3.5
    assert total_price([reply(price=3.0), reply()]) is None
    assert total_price([reply(price=3.0), reply(usage=TokenUsage(), status="overloaded")]) == 3.0
    assert total_price([nothing]) is None


async def test_replies_and_the_summarizer_have_prices_and_they_come_back_from_the_wire() -> None:
    agents = FakeAgents({"a": Say(text="1"), "b": Say(text="2"), "summarizer": Say(text="FINAL\n3", tokens=6)})
    answer = await answer_of(orchestrator_of(agents, "ab", llm=True, price=PRICE), query(), Schedule(asks("a", "b")))
    assert [call.price for call in answer.steps[0].replies] == [3.0, 3.0]
    assert answer.steps[0].summarizer.price == 1.0 + 6 * 0.5
    found = reply_dmoa(answer)
    assert (found.price, found.steps[0].agents[0].price, found.steps[0].summarizer.price) == (10.0, 3.0, 4.0)
    assert answer_of_reply(found, text="3", finish_reason="stop", wall_ms=1.0).price == 10.0
    plain = await answer_of(orchestrator_of(FakeAgents({"a": Say(text="1")}), "a"), query(max_steps=1), Schedule(asks("a")))
    assert reply_dmoa(plain).price is None


@pytest.mark.parametrize(("budget", "steps"), [(5.9, 2), (6.0, 2), (6.1, 3), (2.0, 1)])
async def test_the_price_ends_a_query(budget: float, steps: int) -> None:
    agents = FakeAgents({"a": tuple(Say(text=str(number)) for number in range(4))})
    answer = await answer_of(orchestrator_of(agents, "a", price=PRICE), query(budget_price=budget), Schedule(asks("a")))
    assert (answer.stop_reason, len(answer.steps)) == ("budget_price", steps)


async def test_a_reply_grows_no_longer_than_the_price_that_is_left_pays_for() -> None:
    agents = FakeAgents({"a": tuple(Say(text=str(number)) for number in range(4))})
    await answer_of(orchestrator_of(agents, "a", price=PRICE), query(budget_price=7.0), Schedule(asks("a")))
    assert [call.sampling.max_tokens for call in agents.calls] == [14, 8, 2]  # 7, 4 and 1 at 0.5 a token


@pytest.mark.parametrize(
    ("budget", "calls", "llm"),
    [(1, ["a"], False), (3, ["a", "b", "c"], False), (4, ["a", "b", "c", "a"], False), (3, ["a", "b"], True)],
)
async def test_calls_are_a_budget_that_steps_keep_to(budget: int, calls: list[str], llm: bool) -> None:
    says = {name: (Say(text=name + "1"), Say(text=name + "2")) for name in "abc"}
    agents = FakeAgents({**says, "summarizer": Say(text="CONTINUE\nmore")})
    answer = await answer_of(orchestrator_of(agents, "abc", llm=llm), query(budget_calls=budget), Schedule(asks("a", "b", "c")))
    assert [call.agent for call in agents.calls if call.agent != "summarizer"] == calls
    assert answer.stop_reason == "budget_calls"


@pytest.mark.parametrize(("limits", "asked"), [({}, "abc"), ({"budget_calls": 2}, "ab"), ({"budget_price": 4.0}, "ab")])
async def test_the_cascade_keeps_to_price_and_calls(limits: dict[str, float], asked: str) -> None:
    unsure = decision({"a": 0.5, "b": 0.3, "c": 0.2}, 1, theta=-9.0, limit=3)
    agents = FakeAgents({name: Say(text=name, nats=1.0) for name in "abc"})
    plan = asks("a", reserves="bc", decision=unsure)
    await answer_of(orchestrator_of(agents, "abc", price=PRICE), query(max_steps=1, **limits), Schedule(plan))
    assert "".join(call.agent for call in agents.calls) == asked


@pytest.mark.parametrize(("budget", "asked"), [(2, "a"), (3, "ab")])
async def test_the_cascade_keeps_the_summarizers_call_back(budget: int, asked: str) -> None:
    unsure = decision({"a": 0.5, "b": 0.3, "c": 0.2}, 1, theta=-9.0, limit=3)
    agents = FakeAgents({**{name: Say(text=name, nats=1.0) for name in "abc"}, "summarizer": Say(text="CONTINUE\nmore")})
    plan = asks("a", reserves="bc", decision=unsure)
    await answer_of(orchestrator_of(agents, "abc", llm=True), query(max_steps=1, budget_calls=budget), Schedule(plan))
    assert [call.agent for call in agents.calls] == [*asked, "summarizer"]


@pytest.mark.parametrize(("budget", "asked"), [(27, "a"), (28, "ab")])
async def test_the_cascade_keeps_to_a_paced_budget(budget: int, asked: str) -> None:
    """A call takes 14 tokens: another would be too much for 27."""
    unsure = decision({"a": 0.5, "b": 0.3, "c": 0.2}, 1, theta=-9.0, limit=3)
    agents, limits = FakeAgents({name: Say(text=name, nats=1.0) for name in "abc"}), {"budget_tokens": budget}
    plan = asks("a", reserves="bc", decision=unsure)
    await answer_of(orchestrator_of(agents, "abc"), query(max_steps=1, within_steps=True, **limits), Schedule(plan))
    assert "".join(call.agent for call in agents.calls) == asked


class LostLast(FakeAgents):
    """Whoever is lost is lost after the others have replied."""

    async def call(self, call: AgentCall) -> AgentReply:
        reply = await super().call(call)
        for _ in range(20 if reply.status == "failed" else 0):
            await asyncio.sleep(0)
        return reply


@pytest.mark.parametrize(
    ("limits", "lost", "asked"),
    [
        ({}, "a", "abc"),
        ({"budget_calls": 3}, "a", "abc"),
        ({"budget_calls": 2}, "a", "ab"),
        ({"budget_calls": 3}, "ab", "abc"),
        ({"budget_calls": 2}, "ab", "abc"),  # nobody else can contribute
        ({"budget_calls": 2}, "abc", "abcd"),
        ({"budget_tokens": 14}, "a", "ab"),
        ({"budget_tokens": 15}, "a", "abc"),
        ({"budget_price": 3.0}, "a", "ab"),
        ({"budget_price": 3.1}, "a", "abc"),
        ({"budget_tokens": 28, "within_steps": True}, "b", "abc"),
        ({"budget_tokens": 27, "within_steps": True}, "b", "a"),
    ],
)
async def test_a_stand_in_beside_a_contribution_keeps_to_the_budgets(limits: dict[str, float], lost: str, asked: str) -> None:
    """Every reply takes 10 + 4 tokens and costs 3; what is lost takes nothing, and is a call."""
    agents = LostLast({name: Fail() if name in lost else Say(text=name) for name in "abcd"})
    plan = asks("a", "b", reserves="cd")
    await answer_of(orchestrator_of(agents, "abcd", price=PRICE), query(max_steps=1, **limits), Schedule(plan))
    assert "".join(call.agent for call in agents.calls) == asked


async def test_a_stand_in_grows_no_longer_than_the_tokens_that_are_left() -> None:
    agents = LostLast({"a": Fail(), "b": Say(text="b"), "c": Say(text="c")})
    await answer_of(orchestrator_of(agents, "abc"), query(max_steps=1, budget_tokens=40), Schedule(asks("a", "b", reserves="c")))
    assert [call.sampling.max_tokens for call in agents.calls] == [40, 40, 26]


class Dear(FakeAgents):
    """An endpoint that says itself what a call cost."""

    async def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        async for item in super().stream(call):
            yield replace(item, price=0.25) if isinstance(item, AgentReply) else item

    async def call(self, call: AgentCall) -> AgentReply:
        return replace(await super().call(call), price=0.25)


@pytest.mark.parametrize("price", [None, PRICE])
async def test_what_the_summarizers_endpoint_says_that_it_cost_counts(price: Price | None) -> None:
    agents = Dear({"a": Say(text="1"), "summarizer": Say(text="FINAL\n1")})
    answer = await answer_of(orchestrator_of(agents, "a", llm=True, price=price), query(), Schedule(asks("a")))
    assert answer.price == 0.5


@pytest.mark.parametrize("policy", ["moa:layers=2", "self_moa:k=3", "chain"])
async def test_the_calls_of_all_steps_are_counted_where_nothing_was_said(policy: str) -> None:
    calls = []
    with pytest.raises(EmptyAnswerError) as caught:
        await run(policy, lambda call: calls.append(call) or " ", query(max_steps=50), pool="ab")
    assert len(caught.value.replies) == len(calls) > 1


async def test_an_evaluation_adds_prices_and_calls_up() -> None:
    task = Task(row_id="arith/test/1", benchmark="arith", text="?")
    agents = FakeAgents({"a": Say(text="1"), "b": Say(text="2")})
    answer = await answer_of(orchestrator_of(agents, "ab", price=PRICE), query(max_steps=1), Schedule(asks("a", "b")))
    line = answered(task, "dmoa", answer)
    assert (line.price, line.calls) == (6.0, 2)
    other = line.model_copy(update={"row_id": "arith/test/2"})
    info = run_info([BenchmarkInfo(name="arith", rows=2)], policies=("dmoa",))
    scores = [scored("arith", 1, "dmoa", 1.0), scored("arith", 2, "dmoa", 0.0)]
    scores = [score.model_copy(update={"row_id": f"arith/test/{number}"}) for number, score in enumerate(scores, 1)]
    row = build_evaluation(info, [line, other], scores).rows[0]
    assert (row.price, row.price_per_correct, row.calls) == (12.0, 12.0, 4)
    unknown = other.model_copy(update={"price": None})
    assert build_evaluation(info, [line, unknown], scores).rows[0].price is None


def test_a_query_whose_contributions_were_blank_has_a_price_too() -> None:
    blank = reply(text=" ", price=3.0)
    line = unanswered(
        Task(row_id="arith/test/1", benchmark="arith", text="?"), "dmoa", EmptyAnswerError("x", (blank, blank)), 1.0
    )
    assert (line.price, line.calls, line.usage.total) == (6.0, 2, 28)


def test_a_budget_of_price_needs_prices() -> None:
    pool = scripted_pool().model_dump(mode="json")
    pool["limits"]["budget_price"] = 0.5
    with pytest.raises(ValueError, match=r"limits.budget_price is 0.5, and llms.\w+ has no price; .*set llms.\w+.price"):
        Config.model_validate(pool)
    for llm in pool["llms"].values():
        llm["price"] = {"prompt_per_1m": 1.0, "completion_per_1m": 2.0}
    assert Config.model_validate(pool).limits.budget_price == 0.5
    next(iter(pool["llms"].values()))["price"] = {"prompt_per_1m": -1.0, "completion_per_1m": 2.0}
    with pytest.raises(ValueError, match="prompt_per_1m"):
        Config.model_validate(pool)
