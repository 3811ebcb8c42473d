"""Asking agents without a replica: who waits, who is passed over, who is woken, and that no query fails of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pytest

from dmoa.dispatch import Dispatcher, StepReplies
from dmoa.errors import AgentUnavailableError
from dmoa.recovery import COLD_PATIENCE_S
from dmoa.testing import (
    Fail,
    FakeAgents,
    Fate,
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
from dmoa.types import Activation, AgentCall, AgentReply, ColdPolicy, QueryState, StepPlan, TextDelta

POOL = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
PLACES = {name: f"place-{name}" for name in POOL}


class SleepyAgents(FakeAgents):
    """Agents whose places start `starts_s` seconds after the first ping; a call to one that is not up is a mistake."""

    def __init__(
        self, fates: Mapping[str, Fate | Sequence[Fate]], *, starts_s: Mapping[str, float], places: Mapping[str, str] = PLACES
    ) -> None:
        super().__init__(fates)
        self._starts_s = dict(starts_s)
        self._places = places
        self.asleep = {places[name] for name in starts_s}
        self.pings: Counter[str] = Counter()

    async def ping(self, agent: str) -> None:
        self.pings[agent] += 1
        if self._places[agent] in self.asleep:
            await asyncio.sleep(self._starts_s[agent])
            self.asleep.discard(self._places[agent])

    async def call(self, call: AgentCall) -> AgentReply:
        assert self._places[call.agent] not in self.asleep, f"{call.agent} was called before it was up"
        return await super().call(call)


def plan_of(active: Iterable[str], reserves: Iterable[str] = "", *, cold: Iterable[str], max_agents: int = 1) -> StepPlan:
    """A plan of the gate over POOL; its decision knows who is cold."""
    made = decision(POOL, len(list(active)), cold=tuple(cold), max_agents=max_agents)
    return asks(*active, reserves=list(reserves), decision=made)


def dispatcher_of(
    agents: FakeAgents, policies: Mapping[str, ColdPolicy] | ColdPolicy = "wait", places: Mapping[str, str] = PLACES
) -> Dispatcher:
    chosen = defaultdict(lambda: "wait", policies) if isinstance(policies, Mapping) else dict.fromkeys(POOL, policies)
    cards = {name: card(name, places[name], cold=chosen[name]) for name in POOL}
    return Dispatcher(agents=agents, cards=cards, router=None, is_select=True)


def asked(
    agents: SleepyAgents, dispatcher: Dispatcher, plan: StepPlan, *, deadline_s: float | None = None, then_s: float = 0.0
) -> tuple[list[tuple[str, str]], tuple[AgentReply, ...], float]:
    """What came of a step on a clock that jumps: outcomes, replies, seconds; `then_s` more pass before all ends."""

    async def work() -> tuple[tuple[AgentReply, ...], float]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = None if deadline_s is None else time.time() + deadline_s
        found = await dispatcher.ask(state_of(query(), deadline_unix_s=deadline), plan, None)
        took_s = loop.time() - began
        await asyncio.sleep(then_s)
        return found.replies, took_s

    (replies, took_s), _ = jumping(work())
    return [(reply.agent, reply.status) for reply in replies], replies, took_s


ALL = {name: Say(text=name) for name in POOL}


def test_wait_has_the_query_wait_for_the_replica() -> None:
    agents = SleepyAgents(ALL, starts_s={"a": 40.0})
    found, (reply,), took_s = asked(agents, dispatcher_of(agents), plan_of("a", "bcd", cold="a"))
    assert found == [("a", "ok")]
    assert took_s == pytest.approx(40.0)
    assert reply.attempts == 1
    assert reply.error is not None
    assert reply.error.startswith("it was cold: its replica was there after ")
    assert agents.pings == {"a": 1}


def test_wait_outlasts_the_patience_for_dead_places() -> None:
    agents = SleepyAgents(ALL, starts_s={"a": COLD_PATIENCE_S - 1})
    found, _, took_s = asked(agents, dispatcher_of(agents), plan_of("a", "b", cold="a"))
    assert found == [("a", "ok")]
    assert took_s == pytest.approx(COLD_PATIENCE_S - 1)


def test_an_agent_that_never_starts_counts_as_dead_and_the_next_one_answers() -> None:
    agents = SleepyAgents(ALL, starts_s={"a": 1e9})
    found, replies, took_s = asked(agents, dispatcher_of(agents), plan_of("a", "b", cold="a"))
    assert found == [("a", "failed"), ("b", "ok")]
    assert replies[0].error == "agent 'a': no replica of it started within 600 s"
    assert took_s == pytest.approx(COLD_PATIENCE_S)


def test_wait_leaves_half_of_the_deadline_to_an_agent_that_is_up() -> None:
    agents = SleepyAgents(ALL, starts_s={"a": 1e9})
    found, replies, took_s = asked(agents, dispatcher_of(agents), plan_of("a", "b", cold="a"), deadline_s=30.0)
    assert found == [("a", "cold"), ("b", "ok")]
    assert replies[0].error == "it has no replica yet; one is being started"
    assert took_s == pytest.approx(15.0, abs=1.0)


def test_wait_takes_the_whole_deadline_where_nobody_is_up() -> None:
    agents = SleepyAgents(ALL, starts_s={"a": 25.0, "b": 1e9})
    found, _, took_s = asked(agents, dispatcher_of(agents), plan_of("a", "b", cold="ab"), deadline_s=30.0)
    assert found == [("a", "ok")]
    assert took_s == pytest.approx(25.0, abs=1.0)


def test_skip_yields_at_once_to_the_next_that_is_up_and_has_the_agent_started() -> None:
    agents = SleepyAgents(ALL, starts_s={"a": 40.0, "b": 40.0})
    found, replies, took_s = asked(agents, dispatcher_of(agents, "skip"), plan_of("a", "bcd", cold="ab"), then_s=41.0)
    assert found == [("a", "cold"), ("c", "ok")]
    assert took_s == 0.0
    assert replies[0].error == "it has no replica yet; one is being started"
    assert agents.pings == {"a": 1}, "who was not chosen is not woken"
    assert agents.asleep == {"place-b"}


@pytest.mark.parametrize("policy", ["wait", "skip", "warm_on_rank"])
def test_where_everybody_is_cold_the_query_waits(policy: ColdPolicy) -> None:
    agents = SleepyAgents(ALL, starts_s=dict.fromkeys(POOL, 40.0))
    found, _, took_s = asked(agents, dispatcher_of(agents, policy), plan_of("ab", "cd", cold="abcd", max_agents=2))
    assert sorted(found) == [("a", "ok"), ("b", "ok")]
    assert took_s == pytest.approx(40.0)
    assert agents.pings == {"a": 1, "b": 1}


def test_warm_on_rank_starts_those_within_k_before_they_are_chosen() -> None:
    agents = SleepyAgents(ALL, starts_s={"b": 40.0, "c": 40.0, "d": 40.0})
    dispatcher = dispatcher_of(agents, {"b": "wait", "c": "warm_on_rank", "d": "warm_on_rank"})
    found, _, took_s = asked(agents, dispatcher, plan_of("a", "bcd", cold="bcd", max_agents=3), then_s=41.0)
    assert (found, took_s) == ([("a", "ok")], 0.0)
    assert agents.asleep == {"place-b", "place-d"}
    assert agents.pings == {"c": 1}, "b does not ask for it, d is ranked fourth of K = 3"


def test_warm_on_rank_is_waited_for_when_it_is_chosen() -> None:
    agents = SleepyAgents(ALL, starts_s={"a": 40.0})
    found, _, took_s = asked(agents, dispatcher_of(agents, "warm_on_rank"), plan_of("a", "b", cold="a"))
    assert found == [("a", "ok")]
    assert took_s == pytest.approx(40.0)
    assert agents.pings == {"a": 1}


@pytest.mark.parametrize("fate", [Fail(), Refuse(), Lose()])
def test_a_cold_reserve_answers_where_everybody_who_is_up_was_lost(fate: Fate) -> None:
    fates = ALL | {"a": fate, "b": fate}
    agents = SleepyAgents(fates, starts_s={"c": 40.0, "d": 40.0})
    found, _, took_s = asked(agents, dispatcher_of(agents, "skip"), plan_of("a", "bcd", cold="cd"))
    lost = "overloaded" if isinstance(fate, Refuse) else "failed"
    assert found == [("a", lost), ("b", lost), ("c", "ok")]
    assert took_s == pytest.approx(40.0)


@pytest.mark.parametrize("policy", ["wait", "skip"])
def test_a_cold_reserve_that_is_explored_counts_once_where_it_is_needed(policy: ColdPolicy) -> None:
    agents = SleepyAgents(ALL | {"a": Refuse()}, starts_s={"b": 40.0})
    plan = replace(plan_of("a", "b", cold="b"), explored=(Activation(agent="b"), Activation(agent="c")))

    async def work() -> StepReplies:
        return await dispatcher_of(agents, policy).ask(state_of(query()), plan, None)

    found, took_s = jumping(work())
    assert [(reply.agent, reply.status) for reply in found.replies] == [("a", "overloaded"), ("b", "ok")]
    assert [activation.agent for activation, _ in found.explored] == ["c"]
    assert sorted(call.agent for call in agents.calls) == ["a", "b", "c"]
    assert took_s == pytest.approx(40.0)


def test_stand_ins_that_are_up_come_before_cold_ones() -> None:
    agents = SleepyAgents(ALL | {"a": Refuse()}, starts_s={"b": 40.0})
    found, _, took_s = asked(agents, dispatcher_of(agents), plan_of("a", "bc", cold="b"))
    assert (found, took_s) == ([("a", "overloaded"), ("c", "ok")], 0.0)


def test_agents_in_one_place_are_woken_once_and_all_answer() -> None:
    places = dict.fromkeys(POOL, "llm")
    agents = SleepyAgents(ALL, starts_s=dict.fromkeys(POOL, 40.0), places=places)
    found, _, took_s = asked(agents, dispatcher_of(agents, places=places), plan_of("abc", "d", cold="abcd", max_agents=3))
    assert found == [("a", "ok"), ("b", "ok"), ("c", "ok")]
    assert took_s == pytest.approx(40.0)
    assert sum(agents.pings.values()) == 1


def test_many_queries_that_wait_for_one_agent_ping_it_once() -> None:
    agents = SleepyAgents(ALL, starts_s={"a": 40.0})
    dispatcher = dispatcher_of(agents)

    async def work() -> list[str]:
        plan = plan_of("a", "b", cold="a")
        found = await asyncio.gather(*(dispatcher.ask(state_of(query()), plan, None) for _ in range(50)))
        return [reply.text for asked in found for reply in asked.replies]

    texts, took_s = jumping(work())
    assert texts == ["a"] * 50
    assert took_s == pytest.approx(40.0)
    assert agents.pings == {"a": 1}


def test_a_query_that_goes_away_leaves_the_replica_to_the_others() -> None:
    agents = SleepyAgents(ALL, starts_s={"a": 40.0})
    dispatcher = dispatcher_of(agents)

    async def work() -> str:
        plan = plan_of("a", "b", cold="a")
        gone, stays = (asyncio.create_task(dispatcher.ask(state_of(query()), plan, None)) for _ in range(2))
        await asyncio.sleep(1.0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        return (await stays).replies[0].text

    assert jumping(work())[0] == "a"


class BrokenAgents(SleepyAgents):
    """Agents whose places cannot start."""

    async def ping(self, agent: str) -> None:
        self.pings[agent] += 1
        await asyncio.sleep(5.0)
        raise AgentUnavailableError(f"agent {agent!r}: its deployment failed")


def test_a_replica_that_cannot_start_is_a_loss_and_is_reported() -> None:
    agents = BrokenAgents(ALL, starts_s={"a": 1.0})
    router = router_of(fixed_gate(POOL))
    cards = {name: card(name, PLACES[name]) for name in POOL}
    dispatcher = Dispatcher(agents=agents, cards=cards, router=router, is_select=True)
    found, replies, _ = asked(agents, dispatcher, plan_of("a", "b", cold="a"))
    assert found == [("a", "failed"), ("b", "ok")]
    assert replies[0].error == "agent 'a': its deployment failed"
    assert router.masked == {"a"}


def test_a_cold_agent_streams_like_any_other() -> None:
    agents = SleepyAgents(ALL | {"a": Say(text="hello", pieces=("hel", "lo"))}, starts_s={"a": 3.0})
    dispatcher = dispatcher_of(agents)
    pieces: list[str] = []

    async def work() -> list[tuple[str, str]]:
        def emit(delta: TextDelta) -> None:
            pieces.append(delta.text)

        state: QueryState = state_of(query())
        found = await dispatcher.ask(state, plan_of("a", "b", cold="a"), emit)
        return [(reply.agent, reply.status) for reply in found.replies]

    found, took_s = jumping(work())
    assert (found, pieces) == ([("a", "ok")], ["hel", "lo"])
    assert took_s == pytest.approx(3.0)
