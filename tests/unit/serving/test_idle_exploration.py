"""Exploration stands behind the queries: one at a time, in an idle moment, and no more of the time than its share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_pool_gate
from dmoa.config import Config, RouterConfig
from dmoa.feedback import is_held_back, tenant_of
from dmoa.protocols import Turn
from dmoa.routing import LocalRouter
from dmoa.serving.feedback import Explorer, asked_again, may_be_explored
from dmoa.swarm import Swarm
from dmoa.testing import FakeAgents, Say
from dmoa.trace import AnsweredQuery
from dmoa.types import AgentCall, AgentReply, Answer, FinalCall, Limits, Query, StepRecord


@dataclass
class Clock:
    """A clock that is set by hand."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Explored:
    """Counts explorations; each takes `took_s` on the clock."""

    clock: Clock
    took_s: float = 1.0
    began: list[float] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self) -> None:
        self.began.append(self.clock())
        self.clock.now += self.took_s
        self.done.set()


async def until(is_so: Callable[[], bool]) -> None:
    """Let other tasks run until something is so."""
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 -- other tasks are to run, and no time to pass
            await asyncio.sleep(0)


async def quiet(explorer: Explorer) -> None:
    """Let an exploration that is under way end."""
    await until(lambda: explorer._task is None)


async def test_it_waits_until_nobody_waits_for_an_answer() -> None:
    clock = Clock()
    explorer, explored = Explorer(lambda: 1.0, idle_wait_s=30.0, clock=clock), Explored(clock)
    with explorer.answering():
        explorer.offer(explored)
        await until(lambda: explorer._share == 1.0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not explored.began
    await quiet(explorer)
    assert explored.began == [0.0]
    assert explorer.explored == 1


async def test_a_swarm_that_is_never_idle_is_explored_too() -> None:
    clock = Clock()
    explorer, explored = Explorer(lambda: 1.0, idle_wait_s=0.01, clock=clock), Explored(clock)
    with explorer.answering():
        explorer.offer(explored)
        await quiet(explorer)
        assert explored.began == [0.0]


async def test_it_takes_no_more_of_the_time_than_its_share() -> None:
    clock, share = Clock(), 0.25
    explorer, explored = Explorer(lambda: share, clock=clock), Explored(clock, took_s=2.0)
    while clock.now < 1000.0:
        explorer.offer(explored)
        await quiet(explorer)
        clock.now += 0.05
    # A query in twenty of a second, one in four drawn: far more than a quarter of the time would be asked for.
    assert 0.2 <= len(explored.began) * 2.0 / clock.now <= share
    assert min(later - one for one, later in zip(explored.began, explored.began[1:], strict=False)) >= 8.0 - 1e-9


async def test_one_at_a_time_and_none_where_none_is_wanted() -> None:
    clock, running = Clock(), asyncio.Event()
    explorer = Explorer(lambda: 1.0, clock=clock)
    begun: list[int] = []

    def slow(number: int) -> Callable[[], Awaitable[None]]:
        async def explore() -> None:
            begun.append(number)
            await running.wait()

        return explore

    explorer.offer(slow(1))
    await until(lambda: begun == [1])
    explorer.offer(slow(2))
    running.set()
    await quiet(explorer)
    assert begun == [1]
    never = Explorer(lambda: 0.0, clock=clock)
    never.offer(slow(3))
    await quiet(never)
    assert begun == [1]


@dataclass
class Exploration:
    """A dense query to four scripted agents, whose calls end when they are let go; the clock goes on one second a call."""

    explorer: Explorer
    clock: Clock
    turn: Turn | None = None
    """None: the explorer's."""
    llm: bool = False
    """Whether the summarizer is an agent, too."""
    begun: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    most: int = 0
    """Calls that ran at a time."""
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    answers: list[Answer] = field(default_factory=list)
    asked: Query = field(default_factory=lambda: Query(trace_id="t", text="12 + 7?", limits=Limits(max_steps=2)))

    async def __call__(self) -> None:
        swarm = self._swarm()
        asked = asked_again(self.asked, 0.2)
        self.answers += [event async for event in swarm.ask(asked, "exploring") if isinstance(event, Answer)]

    def _swarm(self) -> Swarm:
        names = ("one", "two", "three", "four")
        config = Config.model_validate(
            {
                "name": "pool",
                "llms": {"tiny": {"model": "scripted:x", "engine": "scripted"}},
                "agents": [{"name": name, "llm": "tiny", "profile": f"You are {name}."} for name in names],
                "gate": {"hidden": 8, "activation": {"rule": "fixed", "max_agents": 1 + self.llm}},
                "summarizer": {"mode": "llm", "llm": "tiny"} if self.llm else {},
            }
        )
        gate, record = build_pool_gate(config)
        router, agents = LocalRouter(), _Slow(self)
        router.install(record.version, gate)
        return Swarm(config, agents=agents, router=router, encoder=HashEncoder(), turn=self.turn or self.explorer.turn)


class _Slow(FakeAgents):
    def __init__(self, of: Exploration) -> None:
        names = ("one", "two", "three", "four", "summarizer")
        super().__init__({name: Say(text=f"It is {number}.", nats=0.5) for number, name in enumerate(names)})
        self._of = of

    async def call(self, call: AgentCall) -> AgentReply:
        of, name = self._of, f"{call.agent}/{call.step}"
        of.begun.append(name)
        of.running.add(name)
        of.most = max(of.most, len(of.running))
        await of.go_on.wait()
        await asyncio.sleep(0)
        of.clock.now += 1.0
        of.running.discard(name)
        return await super().call(call)


def steps_of(answer: Answer) -> list[tuple[object, ...]]:
    """What a rollout records of each step, times left out."""

    def shown(step: StepRecord) -> tuple[object, ...]:
        assert step.decision is not None
        replies = sorted((replace(reply, latency_ms=0.0, sent_unix_s=0.0) for reply in step.replies), key=lambda one: one.agent)
        return replies, step.active, sorted(step.explored), step.summary, step.decision.ranking, step.decision.gate_version

    return [shown(step) for step in answer.steps]


async def test_a_query_that_comes_in_between_meets_one_explored_call_and_no_other_begins() -> None:
    clock = Clock()
    explorer = Explorer(lambda: 1.0, idle_wait_s=30.0, clock=clock)
    explored = Exploration(explorer, clock)
    explorer.offer(explored)
    await until(lambda: len(explored.begun) == 1)
    with explorer.answering():
        explored.go_on.set()
        await until(lambda: not explored.running)
        for _ in range(200):
            await asyncio.sleep(0)
        assert len(explored.begun) == 1, "a call began while a query was answered"
        before = time.time()
    await quiet(explorer)
    sent_unix_s = [reply.sent_unix_s for step in explored.answers[0].steps for reply in step.replies]
    assert sorted(one >= before for one in sent_unix_s) == [False] + 7 * [True], "what a call waited for is no part of it"
    assert (explored.most, len(explored.begun), explorer.hurried) == (1, 8, 0), "four agents in each of two steps, one by one"


async def test_one_by_one_the_same_is_recorded_as_all_at_once() -> None:
    clock = Clock()
    explorer = Explorer(lambda: 1.0, clock=clock)
    one_by_one = Exploration(explorer, clock)
    at_once = Exploration(explorer, clock, turn=nullcontext)
    for explored in (one_by_one, at_once):
        explored.go_on.set()
        explorer.offer(explored)
        await quiet(explorer)
        clock.now += 1.0
    assert (one_by_one.most, at_once.most) == (1, 4)
    assert steps_of(one_by_one.answers[0]) == steps_of(at_once.answers[0])
    assert {chance for step in one_by_one.answers[0].steps for _, chance in step.explored} == {1.0}


async def test_a_summarizer_that_is_an_agent_gives_way_too() -> None:
    clock = Clock()
    explorer = Explorer(lambda: 1.0, idle_wait_s=30.0, clock=clock)
    explored = Exploration(explorer, clock, llm=True)
    explored.go_on.set()
    explorer.offer(explored)
    await until(lambda: len(explored.begun) == 4)
    with explorer.answering():
        for _ in range(200):
            await asyncio.sleep(0)
        assert explored.begun[4:] == []
    await quiet(explorer)
    assert explored.begun[4] == "summarizer/0"


async def test_the_form_that_the_client_wanted_is_written_for_nobody_a_second_time() -> None:
    clock = Clock()
    explorer = Explorer(lambda: 1.0, clock=clock)
    limits = Limits(max_steps=2, deadline_s=7.0, quorum=1, hedge_after_ms=5.0)
    form = FinalCall(n=2, schema={"type": "object"})
    explored = Exploration(
        explorer, clock, asked=Query(trace_id="t", text="12 + 7?", limits=limits, final=form, is_streamed=True)
    )
    explored.go_on.set()
    explorer.offer(explored)
    await quiet(explorer)
    assert (len(explored.begun), len(explored.answers[0].steps), explored.answers[0].choices) == (8, 2, ())
    again = asked_again(explored.asked, 0.2)
    assert again.limits == Limits(max_steps=2), "nobody waits for it, so it has no deadline"
    assert (again.text, again.is_streamed, again.trace_id == "t") == ("12 + 7?", False, False)


async def test_among_queries_that_never_end_it_goes_on_after_a_while_and_says_so() -> None:
    clock = Clock()
    explorer = Explorer(lambda: 1.0, idle_wait_s=0.01, clock=clock)
    explored = Exploration(explorer, clock)
    explored.go_on.set()
    with explorer.answering():
        explorer.offer(explored)
        await quiet(explorer)
    assert (explored.most, len(explored.begun), explorer.hurried) == (1, 8, 9), "its beginning, and the calls of two steps"


async def test_among_queries_that_never_end_each_call_pays_for_its_time_by_a_pause() -> None:
    clock, share = Clock(), 0.5
    explorer = Explorer(lambda: share, idle_wait_s=0.0, clock=clock)
    explorer._share, calls, paused_s = share, 0, 100.0

    async def call() -> None:
        nonlocal calls
        async with explorer.turn():
            calls += 1
            clock.now += paused_s

    with explorer.answering():
        await call()
        waiting = asyncio.create_task(call())
        for _ in range(50):
            await asyncio.sleep(0)
        assert (calls, explorer.hurried) == (1, 1), "the second one began within the pause of the first"
        waiting.cancel()
        await asyncio.wait({waiting})
        clock.now += paused_s
        await call()
        assert (calls, explorer.hurried) == (2, 2), "the pause is as long as the call, at a share of a half"
    await call()
    assert (calls, explorer.hurried) == (3, 2), "an idle moment ends a pause"


async def test_calls_among_queries_are_charged_once() -> None:
    clock = Clock()
    explorer = Explorer(lambda: 0.5, idle_wait_s=0.0, clock=clock)

    async def explore() -> None:
        async with explorer.turn():
            clock.now += 4.0

    with explorer.answering():
        while not explorer.explored:  # one draw in two
            explorer.offer(explore)
            await quiet(explorer)
    assert (clock.now, explorer.hurried) == (4.0, 2)
    assert explorer._rest_until_s == 8.0, "the pause behind the last call, and no rest for the same four seconds"


async def test_the_time_in_which_it_gives_way_is_not_of_its_share() -> None:
    clock = Clock()
    explorer = Explorer(lambda: 0.5, idle_wait_s=30.0, clock=clock)
    explored = Exploration(explorer, clock)
    while not explored.begun:  # one draw in two
        explorer.offer(explored)
        await until(lambda: bool(explorer._task is None or explored.begun))
    with explorer.answering():
        explored.go_on.set()
        await until(lambda: not explored.running)
        for _ in range(50):
            await asyncio.sleep(0)
        clock.now += 100.0
    await quiet(explorer)
    assert clock.now == 108.0
    assert explorer._rest_until_s == 116.0, "eight seconds of calls, and as long a rest"


async def test_a_call_that_is_given_up_while_it_waits_leaves_its_place_to_the_next() -> None:
    clock = Clock()
    explorer = Explorer(lambda: 1.0, idle_wait_s=30.0, clock=clock)
    explorer._patient_until_s = 30.0

    async def call() -> None:
        async with explorer.turn():
            pass

    with explorer.answering():
        given_up = asyncio.create_task(call())
        await until(explorer._place.locked)
        given_up.cancel()
        await asyncio.wait({given_up})
    await call()
    assert (given_up.cancelled(), explorer.hurried) == (True, 0)


def test_what_is_held_back_to_judge_by_is_so_when_it_is_asked_again() -> None:
    queries = [Query(trace_id=f"{number:032x}", text="12 + 7?") for number in range(200)]
    again = [asked_again(query, 0.2).trace_id for query in queries]
    assert [is_held_back(one, 0.2) for one in again] == [is_held_back(query.trace_id, 0.2) for query in queries]
    assert len({*again, *(query.trace_id for query in queries)}) == 400


def test_only_queries_that_may_teach_are_explored() -> None:
    mine, other = "a" * 64, "b" * 64

    def may(key_hash: str, *, policy: str = "dmoa", is_stored: bool = True, **router: object) -> bool:
        answer = Answer(
            trace_id="t", text="", policy=policy, stop_reason="single", steps=(), degraded=False, finish_reason="stop"
        )
        answered = AnsweredQuery(query=Query(trace_id="t", text="12 + 7?"), answer=answer, is_stored=is_stored)
        return may_be_explored(answered, key_hash, RouterConfig.model_validate({"adaptation": "canary"} | router))

    assert may(mine)
    assert not may(mine, adaptation="off")
    assert not may(mine, policy="exploring")
    assert not may(mine, is_stored=False)
    assert (may(""), may("", feedback_anonymous=True)) == (False, True)
    for name in (mine, tenant_of(mine)):
        assert [may(key, feedback_exclude=[name]) for key in (mine, other)] == [False, True]
