"""Exploration stands behind the queries: one at a time, in an idle moment, and no more of the time than its share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from dmoa.serving.feedback import Explorer


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
