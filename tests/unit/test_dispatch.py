"""Reaching the agents of a step: stand-ins, the one retry loop, resumed streams, and what a call carries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dmoa.dispatch import Dispatcher, StepReplies
from dmoa.errors import BrokenStreamError, CallNotTakenError
from dmoa.recovery import FEWEST_RECENT, PATIENCE_S, LateReplies
from dmoa.routing import LocalRouter
from dmoa.testing import (
    Fail,
    FakeAgents,
    Fate,
    Hang,
    Lose,
    Refuse,
    Say,
    asks,
    card,
    decision,
    fixed_gate,
    jumping,
    query,
    router_of,
    state_of,
)
from dmoa.types import (
    Activation,
    AgentCall,
    AgentReply,
    Fold,
    Message,
    Query,
    QueryState,
    Sampling,
    StepPlan,
    StepRecord,
    SummarizerRecord,
    TextDelta,
)

NAMES = "abcdef"


def dispatcher_of(
    agents: FakeAgents, *, places: Mapping[str, str] | None = None, router: LocalRouter | None = None, is_select: bool = True
) -> Dispatcher:
    """A dispatcher over fake agents; every agent has a place of its own unless `places` says otherwise."""
    cards = {name: card(name, (places or {}).get(name, f"place-{name}")) for name in NAMES}
    return Dispatcher(agents=agents, cards=cards, router=router, is_select=is_select)


async def replies_of(
    dispatcher: Dispatcher, state: QueryState, plan: StepPlan, emit: Callable[[TextDelta], None] | None = None
) -> tuple[AgentReply, ...]:
    """The replies of a step that explores nothing."""
    asked = await dispatcher.ask(state, plan, emit)
    assert asked.explored == ()
    return asked.replies


def outcomes(replies: tuple[AgentReply, ...]) -> list[tuple[str, str]]:
    return [(reply.agent, reply.status) for reply in replies]


@pytest.mark.parametrize(("fate", "status"), [(Fail(), "failed"), (Refuse(), "overloaded"), (Lose(), "failed")])
async def test_the_next_ranked_agent_takes_the_place_of_a_lost_one(fate: Fate, status: str) -> None:
    agents = FakeAgents({"a": Say(text="1"), "b": fate, "c": fate, "d": Say(text="2"), "e": Say(text="3")})
    replies = await replies_of(dispatcher_of(agents), state_of(query()), asks("a", "b", reserves="cde"))
    assert outcomes(replies) == [("a", "ok"), ("b", status), ("c", status), ("d", "ok")]
    assert agents.calls_of("e") == []


async def test_every_lost_agent_gets_a_stand_in_of_its_own() -> None:
    agents = FakeAgents({"a": Fail(), "b": Fail(), "c": Say(text="1"), "d": Say(text="2"), "e": Say(text="3")})
    replies = await replies_of(dispatcher_of(agents), state_of(query()), asks("a", "b", reserves="cde"))
    assert sorted(outcomes(replies)) == [("a", "failed"), ("b", "failed"), ("c", "ok"), ("d", "ok")]


async def test_stand_ins_in_a_dead_place_are_passed_over() -> None:
    agents = FakeAgents({"a": Lose(), "b": Say(text="1"), "c": Say(text="2")})
    places = {"a": "gpu-0", "b": "gpu-0", "c": "gpu-1"}
    replies = await replies_of(dispatcher_of(agents, places=places), state_of(query()), asks("a", reserves="bc"))
    assert outcomes(replies) == [("a", "failed"), ("c", "ok")]
    assert agents.calls_of("b") == []


async def test_an_agent_that_fails_leaves_its_place_alive() -> None:
    agents = FakeAgents({"a": Fail(), "b": Say(text="1")})
    replies = await replies_of(
        dispatcher_of(agents, places={"a": "gpu-0", "b": "gpu-0"}), state_of(query()), asks("a", reserves="b")
    )
    assert outcomes(replies) == [("a", "failed"), ("b", "ok")]
    assert replies[0].error == "out of memory"


@pytest.mark.parametrize(
    ("quorum", "plan", "expected"),
    [
        (2, asks("a", "b", "c", reserves="de"), [("a", "ok"), ("c", "ok"), ("b", "late")]),
        (1, asks("a", "b", reserves="de"), [("a", "ok"), ("b", "late")]),
        (2, asks("f", "a", "b", "c", reserves="de"), [("f", "ok"), ("a", "ok"), ("c", "ok"), ("b", "late")]),  # f says nothing
        (2, asks("e", "b", "c", reserves="d"), [("e", "failed"), ("d", "ok"), ("c", "ok"), ("b", "late")]),
        (3, asks("e", "a", "c", reserves="d"), [("e", "failed"), ("d", "ok"), ("a", "ok"), ("c", "ok")]),  # all are waited for
        (2, asks("a"), [("a", "ok")]),
    ],
)
async def test_a_quorum_ends_a_step_of_more_agents(quorum: int, plan: StepPlan, expected: list[tuple[str, str]]) -> None:
    fates = {"a": Say(text="1"), "b": Hang(), "c": Say(text="2"), "d": Say(text="3"), "e": Fail(), "f": Say(text="")}
    agents, router = FakeAgents(fates), router_of(fixed_gate(dict.fromkeys(NAMES, 1 / 6)))
    replies = await replies_of(dispatcher_of(agents, router=router), state_of(query(quorum=quorum)), plan)
    assert outcomes(replies) == expected
    assert agents.cancelled == [name for name, status in expected if status == "late"]
    late = [reply.error for reply in replies if reply.status == "late"]
    assert late == [f"the step had its {quorum} contributions before"] * len(agents.cancelled)
    assert router.masked == frozenset()


@pytest.mark.parametrize("fold", ["pass", "vote", "keep"])
async def test_the_limit_on_waiting_leaves_a_schedules_own_steps_alone(fold: Fold) -> None:
    slow = asyncio.Event()
    agents = FakeAgents({"a": Say(text="1"), "b": Say(text="2", after=slow)})
    asking = asyncio.create_task(replies_of(dispatcher_of(agents), state_of(query(quorum=1)), asks("a", "b", fold=fold)))
    await agents.until_waiting("b")
    slow.set()
    assert outcomes(await asking) == [("a", "ok"), ("b", "ok")]


async def test_a_place_that_is_waited_for_when_the_quorum_is_there_is_lost_once() -> None:
    agents = FakeAgents({"a": (Lose(), Hang()), "b": (Lose(), Say(text="2")), "c": (Lose(), Hang())})
    replies = await replies_of(dispatcher_of(agents), state_of(query(quorum=1)), asks("a", "b", "c"))
    assert outcomes(replies) == [("a", "failed"), ("b", "ok"), ("c", "failed")]


class Timed(FakeAgents):
    """Every agent takes its time, on a clock that jumps."""

    def __init__(self, fates: Mapping[str, Fate | Sequence[Fate]], seconds: Mapping[str, float]) -> None:
        super().__init__(fates)
        self.seconds = dict(seconds)
        self.asked: list[tuple[str, float]] = []

    async def call(self, call: AgentCall) -> AgentReply:
        loop = asyncio.get_running_loop()
        self.asked.append((call.agent, round(loop.time(), 6)))
        await asyncio.sleep(self.seconds[call.agent])
        return await super().call(call)


SECONDS = {"a": 0.1, "b": 1.0, "c": 0.1, "d": 0.2}
START = [("a", 0.0), ("b", 0.0)]
BOTH = asks("a", "b", reserves="cd")


@pytest.mark.parametrize(
    ("plan", "limits", "failing", "b_s", "asked", "expected", "ends_s"),
    [
        # b takes 1 s; at 0.3 s c is asked beside it, and replies at 0.4 s.
        (BOTH, {}, "", 1.0, [("c", 0.3)], [("a", "ok"), ("b", "late"), ("c", "ok")], 0.4),
        (BOTH, {}, "", 0.35, [("c", 0.3)], [("a", "ok"), ("c", "late"), ("b", "ok")], 0.35),
        (BOTH, {}, "", 0.25, [], [("a", "ok"), ("b", "ok")], 0.25),
        (BOTH, {}, "c", 1.0, [("c", 0.3)], [("a", "ok"), ("c", "failed"), ("b", "ok")], 1.0),
        (BOTH, {}, "b", 0.35, [("c", 0.3)], [("a", "ok"), ("b", "failed"), ("c", "ok")], 0.4),
        (BOTH, {}, "bc", 0.35, [("c", 0.3), ("d", 0.4)], [("a", "ok"), ("b", "failed"), ("c", "failed"), ("d", "ok")], 0.6),
        (BOTH, {"quorum": 1}, "", 1.0, [], [("a", "ok"), ("b", "late")], 0.1),
        (BOTH, {"hedge_after_ms": None}, "", 1.0, [], [("a", "ok"), ("b", "ok")], 1.0),
        (BOTH, {"budget_calls": 2}, "", 1.0, [], [("a", "ok"), ("b", "ok")], 1.0),
        (asks("a", "b"), {}, "", 1.0, [], [("a", "ok"), ("b", "ok")], 1.0),
        (replace(BOTH, fold="vote"), {}, "", 1.0, [], [("a", "ok"), ("b", "ok")], 1.0),
    ],
    ids=range(11),
)
def test_the_next_ranked_agent_is_asked_beside_a_slow_one(
    plan: StepPlan,
    limits: dict[str, Any],
    failing: str,
    b_s: float,
    asked: list[tuple[str, float]],
    expected: list[tuple[str, str]],
    ends_s: float,
) -> None:
    fates = {name: Fail() if name in failing else Say(text=name) for name in "abcd"}
    agents = Timed(fates, SECONDS | {"b": b_s})
    state = state_of(query(**{"hedge_after_ms": 300.0} | limits))
    replies, seconds = jumping(replies_of(dispatcher_of(agents), state, plan))
    assert agents.asked == START + asked
    assert outcomes(replies) == expected
    assert seconds == pytest.approx(ends_s, abs=0.01)


def test_a_blank_reply_beside_a_slow_one_does_not_end_it() -> None:
    agents = Timed({"b": Say(text="2"), "c": Say(text=" ")}, SECONDS)
    replies, seconds = jumping(replies_of(dispatcher_of(agents), state_of(query(hedge_after_ms=300.0)), asks("b", reserves="c")))
    assert [(reply.agent, reply.status, reply.text) for reply in replies] == [("c", "ok", " "), ("b", "ok", "2")]
    assert seconds == pytest.approx(1.0, abs=0.01)


async def test_hedging_at_the_95th_percentile_waits_until_it_is_known() -> None:
    agents = FakeAgents({"b": (*[Say(text="1")] * FEWEST_RECENT, Hang()), "c": Say(text="2")})
    dispatcher, state = dispatcher_of(agents), state_of(query(hedge_after_ms="p95"))
    for _ in range(FEWEST_RECENT):
        assert outcomes(await replies_of(dispatcher, state, asks("b", reserves="c"))) == [("b", "ok")]
    (lost, reply) = await replies_of(dispatcher, state, asks("b", reserves="c"))
    assert (lost.agent, lost.status, lost.error) == ("b", "late", "c, asked beside it, replied first")
    assert (reply.agent, reply.status) == ("c", "ok")


def test_failures_say_nothing_of_how_long_a_reply_takes() -> None:
    """They come at once, and a call that takes as long as ever would have another agent asked beside it."""
    agents = Timed({"b": (*[Fail()] * FEWEST_RECENT, Say(text="1")), "c": Say(text="2")}, SECONDS)

    async def work() -> tuple[AgentReply, ...]:
        dispatcher, state = dispatcher_of(agents), state_of(query(hedge_after_ms="p95"))
        for _ in range(FEWEST_RECENT):
            agents.seconds["b"] = 0.01
            await replies_of(dispatcher, state, asks("b"))
        agents.seconds["b"] = 1.0
        return await replies_of(dispatcher, state, asks("b", reserves="c"))

    replies, _ = jumping(work())
    assert outcomes(replies) == [("b", "ok")]


def test_the_95th_percentile_neither_sinks_nor_climbs_with_calls_that_were_overtaken() -> None:
    latencies = LateReplies()
    for latency_s in range(FEWEST_RECENT - 1, 0, -1):
        latencies.answered("a", float(latency_s))
    assert latencies.p95_s("a") is None
    latencies.answered("a", 20.0)
    assert (latencies.p95_s("a"), latencies.p95_s("b")) == (19.0, None)  # the 19th of 20
    for _ in range(300):
        latencies.overtaken("a", 19.0)
    assert latencies.p95_s("a") == 19.0


async def test_nobody_stands_in_after_the_deadline() -> None:
    agents = FakeAgents({"a": Hang(), "b": Say(text="1")})
    state = state_of(query(), deadline_unix_s=time.time() + 0.05)
    replies = await replies_of(dispatcher_of(agents), state, asks("a", reserves="b"))
    assert outcomes(replies) == [("a", "late")]
    assert replies[0].error == "the deadline passed before the reply"
    assert agents.cancelled == ["a"]
    assert agents.calls_of("b") == []


def deadline(seconds: float) -> QueryState:
    return state_of(query(), deadline_unix_s=time.time() + seconds)


def test_late_replies_in_a_row_mask_an_agent_each_time_for_longer() -> None:
    late = LateReplies()
    for _ in range(3):
        late.answered("a", 0.5)
    rows = [100.0 * number for number in range(10)]
    assert [late.late("a", at, at + 1.4) for at in rows[:5]] == [0.0] * 5  # less than three times what it usually takes
    assert [late.late("a", at, at + 1.6) for at in rows] == [0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert [late.late("b", at, at + 9.0) for at in rows[:5]] == [0.0] * 5  # of b nobody knows how long it takes
    assert [late.late("b", at, at + 10.0) for at in rows[:3]] == [0.0, 0.0, 1.0]
    late.answered("a", 0.5)
    assert late.late("a", 2000.0, 2004.0) == 0.0


def test_calls_that_were_late_together_mask_an_agent_once() -> None:
    late = LateReplies()
    assert [late.late("a", 0.1 * number, 20.0 + 0.1 * number) for number in range(20)] == [0.0, 0.0, 1.0] + [0.0] * 17
    assert late.late("a", 21.5, 41.5) == 2.0  # one that began after that


def test_an_agent_that_answers_pings_and_nothing_else_is_masked_for_a_while() -> None:
    router, masked = router_of(fixed_gate(dict.fromkeys("ab", 0.5))), []

    async def ask() -> None:
        never = Say(text="", after=asyncio.Event())
        dispatcher = dispatcher_of(FakeAgents({"a": (Say(text="1"), never)}), router=router)
        for _ in range(4):
            await dispatcher.ask(deadline(3.0), asks("a"), None)
            masked.append(set(router.masked))
        await asyncio.sleep(1.1)
        masked.append(set(router.masked))

    _, seconds = jumping(ask())
    assert masked == [set(), set(), set(), {"a"}, set()]
    assert seconds == pytest.approx(3 * 3.0 + 1.1, abs=0.2)


async def test_a_dead_place_is_reported_and_nothing_else_is() -> None:
    agents = FakeAgents({"a": Lose(error="node lost"), "b": Fail(), "c": Refuse(), "d": Say(text="1")})
    router = router_of(fixed_gate(dict.fromkeys("abcd", 0.25)))
    await dispatcher_of(agents, router=router).ask(state_of(query()), asks("a", "b", "c", "d"), None)
    assert router.masked == {"a"}


async def test_why_an_agent_was_lost_is_told_without_what_looks_like_a_key() -> None:
    """What Ray or an engine of somebody else's says of a loss goes into traces, which others read."""
    agents = FakeAgents({"a": Lose(error="no https://me:pw@host/v1"), "b": Say(text="1")})
    lost, _ = await replies_of(dispatcher_of(agents), state_of(query()), asks("a", "b"))
    assert (lost.status, lost.error) == ("failed", "no https://[redacted]@host/v1")


def test_a_dead_place_with_nobody_else_is_waited_for() -> None:
    async def work() -> tuple[tuple[AgentReply, ...], list[str]]:
        agents = FakeAgents({"a": (Lose(error="node lost"), Lose(), Lose(), Say(text="1"))})
        replies = await replies_of(dispatcher_of(agents), state_of(query()), asks("a"))
        return replies, [call.call_id for call in agents.calls]

    ((reply,), call_ids), waited_s = jumping(work())
    assert (reply.status, reply.text, reply.attempts) == ("ok", "1", 4)
    assert reply.error == "an earlier attempt was lost: node lost"
    assert call_ids == ["t1/0/a"] * 4  # the same call, so that it is answered the same
    # The first repetition follows at once, then the pauses double.
    assert waited_s == pytest.approx(0.05 + 0.1)


def test_all_agents_of_the_one_dead_place_are_waited_for() -> None:
    async def work() -> tuple[AgentReply, ...]:
        agents = FakeAgents({"a": (Lose(), Say(text="1")), "b": (Lose(), Lose(), Say(text="2")), "c": Say(text="3")})
        places = dict.fromkeys("abc", "llm")
        return await replies_of(dispatcher_of(agents, places=places), state_of(query()), asks("a", "b", reserves="c"))

    replies, _ = jumping(work())
    assert [(reply.agent, reply.status, reply.attempts) for reply in replies] == [("a", "ok", 2), ("b", "ok", 3)]


def test_the_first_place_that_is_back_ends_the_waits_for_the_others() -> None:
    """Each agent would be waited for else, though one is enough to go on."""

    async def work() -> tuple[AgentReply, ...]:
        agents = FakeAgents({"a": (Lose(error="node lost"), Hang()), "b": (Lose(), Lose(), Say(text="2"))})
        return await replies_of(dispatcher_of(agents), state_of(query()), asks("a", "b"))

    replies, waited_s = jumping(work())
    assert [(reply.agent, reply.status, reply.error) for reply in replies[:1]] == [("a", "failed", "node lost")]
    assert (replies[1].agent, replies[1].status, replies[1].attempts) == ("b", "ok", 3)
    assert waited_s == pytest.approx(0.05)


@pytest.mark.parametrize("masked", ["b", "ab"])
def test_a_step_whose_agents_died_is_outdated_once_one_that_was_masked_is_back(masked: str) -> None:
    """It was not asked, because it was dead when the step was decided; a replica is back after seconds."""

    async def work() -> StepReplies:
        agents = FakeAgents({"c": (Lose(), Hang()), "b": Say(text="2"), "a": Hang()})
        decided = decision({"a": 0.2, "b": 0.2, "c": 0.6}, 1, masked=tuple(masked))
        asked = await dispatcher_of(agents).ask(state_of(query()), asks("c", decision=decided), None)
        assert [call.agent for call in agents.calls] == ["c"], "the step is decided anew, so that its record is a gate's"
        return asked

    asked, _ = jumping(work())
    assert asked.is_outdated
    assert outcomes(asked.replies) == [("c", "failed")]


def test_what_was_said_beside_a_dead_place_is_not_thrown_away_for_a_masked_agent() -> None:
    """a has answered; b died, and c, in the same place, is still at work there. m is back, and nobody needs it."""

    async def work() -> StepReplies:
        late = asyncio.Event()
        asyncio.get_running_loop().call_later(1.0, late.set)
        agents = FakeAgents({"a": Say(text="1"), "b": Lose(), "c": Say(text="2", after=late), "d": Say(text="9")})
        decided = decision({"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}, 3, masked=("d",))
        dispatcher = dispatcher_of(agents, places={"b": "gpu", "c": "gpu"})
        return await dispatcher.ask(state_of(query()), asks("a", "b", "c", decision=decided), None)

    asked, _ = jumping(work())
    assert not asked.is_outdated
    assert outcomes(asked.replies) == [("a", "ok"), ("b", "failed"), ("c", "ok")]


def test_a_call_that_is_under_way_in_a_dead_place_is_not_given_up_for_a_masked_agent() -> None:
    """Another replica of the place is at work on it."""

    async def work() -> StepReplies:
        late = asyncio.Event()
        asyncio.get_running_loop().call_later(1.0, late.set)
        agents = FakeAgents({"b": Lose(), "c": Say(text="2", after=late), "d": Say(text="9")})
        decided = decision({"b": 0.5, "c": 0.4, "d": 0.1}, 2, masked=("d",))
        dispatcher = dispatcher_of(agents, places={"b": "gpu", "c": "gpu"})
        return await dispatcher.ask(state_of(query()), asks("b", "c", decision=decided), None)

    asked, _ = jumping(work())
    assert (asked.is_outdated, outcomes(asked.replies)) == (False, [("b", "failed"), ("c", "ok")])


@pytest.mark.parametrize("changes", [{"budget_calls": 9}, {}])
def test_a_step_of_a_budget_of_calls_or_without_a_gate_is_not_decided_anew(changes: dict[str, int]) -> None:
    async def work() -> StepReplies:
        agents = FakeAgents({"c": (Lose(), Lose(), Say(text="3")), "b": Say(text="2")})
        decided = decision({"b": 0.2, "c": 0.8}, 1, masked=("b",)) if changes else None
        return await dispatcher_of(agents).ask(state_of(query(**changes)), asks("c", decision=decided), None)

    asked, _ = jumping(work())
    assert (asked.is_outdated, outcomes(asked.replies)) == (False, [("c", "ok")])


def test_the_newest_of_a_chain_of_dead_places_is_waited_for() -> None:
    async def work() -> tuple[AgentReply, ...]:
        agents = FakeAgents({"a": Lose(), "b": (Lose(), Say(text="2"))})
        return await replies_of(dispatcher_of(agents), state_of(query()), asks("a", reserves="b"))

    replies, _ = jumping(work())
    assert outcomes(replies) == [("a", "failed"), ("b", "ok")]


def test_nobody_waits_for_a_dead_place_beside_a_contribution() -> None:
    async def work() -> tuple[AgentReply, ...]:
        agents = FakeAgents({"a": Lose(), "b": Say(text="1")})
        return await replies_of(dispatcher_of(agents), state_of(query()), asks("a", "b"))

    replies, waited_s = jumping(work())
    assert outcomes(replies) == [("a", "failed"), ("b", "ok")]
    assert waited_s == 0


def test_patience_ends_after_a_minute() -> None:
    async def work() -> tuple[AgentReply, ...]:
        agents = FakeAgents({"a": Lose(error="node lost")})
        return await replies_of(dispatcher_of(agents), state_of(query()), asks("a"))

    (reply,), waited_s = jumping(work())
    assert (reply.status, reply.error) == ("failed", "node lost")
    # Pauses of 0.05, 0.1, 0.2, 0.4 s and then 0.5 s each: 123 of them end before the minute does.
    assert reply.attempts == 1 + 123
    assert waited_s == pytest.approx(PATIENCE_S)


def test_a_place_that_took_no_call_for_as_long_is_not_waited_for_again() -> None:
    async def work() -> tuple[AgentReply, ...]:
        agents = FakeAgents({"a": Lose(error="no replica took it", kind=CallNotTakenError), "b": Lose(), "c": Say(text="3")})
        return await replies_of(
            dispatcher_of(agents, places={"a": "llm", "c": "llm"}), state_of(query()), asks("a", reserves="bc")
        )

    replies, waited_s = jumping(work())
    assert outcomes(replies) == [("a", "failed"), ("b", "failed")]
    assert replies[0].attempts == 1
    assert waited_s == pytest.approx(PATIENCE_S)  # for b


def test_patience_is_for_the_place_and_not_for_the_reply() -> None:
    async def work() -> tuple[AgentReply, ...]:
        written = asyncio.Event()
        asyncio.get_running_loop().call_later(3 * PATIENCE_S, written.set)
        agents = FakeAgents({"a": (Lose(error="node lost"), Say(text="late but whole", after=written))})
        return await replies_of(dispatcher_of(agents), state_of(query()), asks("a"))

    (reply,), waited_s = jumping(work())
    assert (reply.status, reply.text, reply.attempts) == ("ok", "late but whole", 2)
    assert waited_s == pytest.approx(3 * PATIENCE_S)


def test_a_place_that_never_comes_up_ends_patience() -> None:
    async def work() -> tuple[AgentReply, ...]:
        agents = FakeAgents({"a": (Lose(error="node lost"), Hang())})
        return await replies_of(dispatcher_of(agents), state_of(query()), asks("a"))

    (reply,), waited_s = jumping(work())
    assert (reply.status, reply.error, reply.attempts) == ("failed", "node lost", 1)
    assert waited_s == pytest.approx(PATIENCE_S)


async def test_patience_ends_at_the_deadline() -> None:
    agents = FakeAgents({"a": Lose(error="node lost")})
    state = state_of(query(), deadline_unix_s=time.time() + 0.2)
    (reply,) = await replies_of(dispatcher_of(agents), state, asks("a"))
    assert (reply.status, reply.error) == ("late", "node lost")
    assert 2 <= reply.attempts <= 4  # after 0, 0.05 and 0.15 s


@pytest.mark.parametrize(
    ("then", "status", "error"), [(Refuse(), "overloaded", "agent 'a': its queue is full"), (Fail(), "failed", "out of memory")]
)
async def test_waiting_ends_with_any_reply(then: Fate, status: str, error: str) -> None:
    agents = FakeAgents({"a": (Lose(), then)})
    (reply,) = await replies_of(dispatcher_of(agents), state_of(query()), asks("a"))
    assert (reply.status, reply.error, reply.attempts) == (status, error, 2)


async def ask_streaming(agents: FakeAgents, reserves: str = "") -> tuple[tuple[AgentReply, ...], list[str]]:
    """Ask `a` with its text handed on; return the replies and the pieces."""
    pieces: list[TextDelta] = []
    plan = asks("a", reserves=reserves, fold="pass", ends_with="single")
    replies = await replies_of(dispatcher_of(agents), state_of(query()), plan, pieces.append)
    return replies, [piece.text for piece in pieces]


async def test_a_lost_stream_goes_on_without_repeating_text() -> None:
    again = Say(text="It is 19.", pieces=("It", " is ", "19", "."))
    agents = FakeAgents({"a": (Lose(pieces=("It ", "is")), Lose(pieces=("It is 1",)), again), "b": Say(text="2")})
    replies, pieces = await ask_streaming(agents, reserves="b")
    assert pieces == ["It ", "is", " 1", "9", "."]
    assert [(reply.agent, reply.text, reply.attempts) for reply in replies] == [("a", "It is 19.", 3)]
    assert agents.calls_of("b") == []  # another agent's words must not follow


@pytest.mark.parametrize(
    "again",
    [Say(text="It was 19.", pieces=("It ", "was", " 19.")), Say(text="It", pieces=("It",))],
    ids=["another text", "a shorter one"],
)
async def test_a_lost_stream_that_would_go_on_with_other_words_ends_in_an_error(again: Say) -> None:
    pieces: list[TextDelta] = []
    agents = FakeAgents({"a": (Lose(pieces=("It ", "is")), again)})
    plan = asks("a", fold="pass", ends_with="single")
    with pytest.raises(BrokenStreamError, match="said something else when asked again"):
        await replies_of(dispatcher_of(agents), state_of(query()), plan, pieces.append)
    assert [piece.text for piece in pieces] == ["It ", "is"]


async def test_a_stream_that_ends_without_a_reply_is_lost() -> None:
    class Silent(FakeAgents):
        async def stream(self, call):  # type: ignore[no-untyped-def]  # as FakeAgents.stream
            items = [item async for item in super().stream(call)]
            for item in items if len(self.calls) > 1 else items[:-1]:
                yield item

    replies, pieces = await ask_streaming(Silent({"a": Say(text="19", pieces=("1", "9"))}))
    assert pieces == ["1", "9"]
    assert replies[0].attempts == 2
    assert "the stream ended without a reply" in (replies[0].error or "")


async def test_a_stand_in_streams_where_no_text_was_handed_on() -> None:
    agents = FakeAgents({"a": Fail(), "b": Say(text="2", pieces=("2",))})
    replies, pieces = await ask_streaming(agents, reserves="b")
    assert outcomes(replies) == [("a", "failed"), ("b", "ok")]
    assert pieces == ["2"]


async def test_an_agent_that_fails_before_its_first_word_is_replaced_in_a_stream() -> None:
    agents, pieces = (
        FakeAgents({"a": Fail(pieces=("\n", " ")), "b": Say(text="\n19", pieces=("\n", "1", "9"))}),
        list[TextDelta](),
    )
    replies = await replies_of(dispatcher_of(agents), state_of(query()), asks("a", reserves="b", fold="pass"), pieces.append)
    assert outcomes(replies) == [("a", "failed"), ("b", "ok")]
    assert [piece.text for piece in pieces] == ["\n1", "9"]


async def test_a_failure_after_text_was_handed_on_is_final() -> None:
    agents = FakeAgents({"a": Fail(pieces=("It ",)), "b": Say(text="2")})
    replies, pieces = await ask_streaming(agents, reserves="b")
    assert outcomes(replies) == [("a", "failed")]
    assert pieces == ["It "]


@pytest.mark.parametrize(("used", "max_tokens"), [(0, 50), (70, 30), (99, 1), (100, 1), (200, 1)])
async def test_the_budget_limits_a_reply(used: int, max_tokens: int) -> None:
    agents = FakeAgents({"a": Say(text="1")})
    await dispatcher_of(agents).ask(state_of(query(budget_tokens=100), tokens_used=used), asks("a"), None)
    assert agents.calls[0].sampling == Sampling(max_tokens=max_tokens)


WISH = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 5, "stop": ("END",), "seed": 3}
OWN, WISHED = Sampling(max_tokens=50), Sampling(temperature=0.7, top_p=0.9, max_tokens=5, stop=("END",), seed=3)


@pytest.mark.parametrize(
    ("is_select", "plan", "expected"),
    [
        (True, asks("a"), WISHED),
        (True, asks("a", ends_with="single"), WISHED),
        (False, asks("a"), OWN),
        (False, asks("a", fold="pass"), OWN),
        (False, asks("a", fold="pass", ends_with="single"), WISHED),
    ],
)
async def test_the_clients_sampling_applies_to_every_call_when_selecting_else_to_the_last(
    is_select: bool, plan: StepPlan, expected: Sampling
) -> None:
    agents = FakeAgents({"a": Say(text="1")})
    await dispatcher_of(agents, is_select=is_select).ask(state_of(query(sampling=dict(WISH))), plan, None)
    assert agents.calls[0].sampling == expected


async def test_fields_that_the_client_leaves_out_stay_the_agents_own() -> None:
    agents = FakeAgents({"a": Say(text="1")})
    await dispatcher_of(agents).ask(state_of(query(sampling={"seed": 3})), asks("a"), None)
    assert agents.calls[0].sampling == Sampling(max_tokens=50, seed=3)
    assert agents.calls[0].sampling.given == ("seed",)


async def test_what_a_call_carries() -> None:
    asked = Query(
        trace_id="t9", text="And 7 + 5?", system="Be kind.", turns=(Message(role="user", content="12 + 7?"),), sampling={}
    )
    step = StepRecord(step=0, replies=(), active=(), summary="S", summarizer=SummarizerRecord(mode="select", verdict="rule"))
    plan = StepPlan(
        activations=(
            Activation(agent="a", instruction="Check it."),
            Activation(agent="b", history=("other work",)),
            Activation(agent="c", history=()),
        )
    )
    agents = FakeAgents(dict.fromkeys("abc", Say(text="1")))
    await dispatcher_of(agents).ask(state_of(asked, steps=(step,), deadline_unix_s=time.time() + 60), plan, None)
    a, b, c = (agents.calls_of(name)[0] for name in "abc")
    assert (a.call_id, a.step, a.agent) == ("t9/1/a", 1, "a")
    assert a.deadline_unix_s == b.deadline_unix_s
    assert a.deadline_unix_s is not None
    system, turn, user = a.messages
    assert (system.role, turn, user.role) == ("system", asked.turns[0], "user")
    assert "Be kind." in system.content
    assert user.content.startswith("And 7 + 5?\n\nWork so far, step 1:\nS\n\n")
    assert user.content.endswith("You are a. Check it.")
    assert "other work" in b.messages[-1].content
    assert "step 1:\nS" not in b.messages[-1].content
    assert "Work so far" not in c.messages[-1].content


async def test_all_calls_of_a_conversation_say_that_they_belong_together() -> None:
    async def conversations(asked: Query) -> set[str]:
        agents = FakeAgents(dict.fromkeys("abc", Say(text="1")))
        await dispatcher_of(agents).ask(state_of(asked), asks("a", "b"), None)
        return {call.conversation for call in agents.calls}

    opening = Query(trace_id="t1", text="12 + 7?", system="Be kind.")
    later = Query(
        trace_id="t2",
        text="And 7 + 5?",
        system="Be kind.",
        turns=(Message(role="user", content="12 + 7?"), Message(role="assistant", content="19")),
    )
    (first,) = await conversations(opening)
    assert first
    assert await conversations(later) == {first}
    for other in (replace(opening, text="12 + 8?"), replace(opening, system="Be brief."), replace(later, turns=())):
        assert await conversations(other) != {first}
    assert await conversations(Query(trace_id="t3", text="12 + 7?", system="Be kind.")) == {first}


async def test_latency_is_measured_by_the_caller() -> None:
    (reply,) = await replies_of(dispatcher_of(FakeAgents({"a": Say(text="1")})), state_of(query()), asks("a"))
    assert 0 < reply.latency_ms < 10_000


async def test_an_unexpected_error_cancels_the_other_calls() -> None:
    agents = FakeAgents({"a": Hang()})  # b is unknown to the client
    with pytest.raises(KeyError):
        await dispatcher_of(agents).ask(state_of(query()), asks("a", "b"), None)
    assert agents.cancelled in (["a"], [])  # [] where a had not begun
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_patience_is_the_deadlines_or_a_minute() -> None:
    dispatcher = dispatcher_of(FakeAgents({}))
    assert dispatcher.patience(state_of(query())) == PATIENCE_S == 60.0
    assert dispatcher.patience(state_of(query(), deadline_unix_s=time.time() - 5)) == 0.0
    assert dispatcher.patience(state_of(query(), deadline_unix_s=time.time() + 5)) == pytest.approx(5.0, abs=1.0)
