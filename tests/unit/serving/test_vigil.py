"""Slow calls are given up once their agent has no replica, and not before."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    # Ray 2.60's own, with this pydantic.
    warnings.filterwarnings("ignore", message="Using extra keyword arguments", category=DeprecationWarning)
    from dmoa.serving.agent_client import CallWatchdog, MissingReplicas, WatchedCall


class Router:
    """Says who is gone, and counts how often it was asked."""

    def __init__(self) -> None:
        self.gone: frozenset[str] = frozenset()
        self.cold: frozenset[str] = frozenset()
        self.asked = 0

    async def __call__(self) -> MissingReplicas:
        self.asked += 1
        return MissingReplicas(self.gone, "v", self.cold)


def watchdog_of(router: Router, **changes: float) -> CallWatchdog:
    return CallWatchdog(router, **({"slow_s": 0.02, "check_interval_s": 0.02} | changes))


async def within(event: asyncio.Event, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        await event.wait()


async def test_a_slow_call_to_an_agent_without_replica_is_given_up_once() -> None:
    router, given_up = Router(), asyncio.Event()
    watched = WatchedCall(watchdog_of(router), "solver", given_up.set)
    async with asyncio.timeout(5):
        while router.asked < 3:  # noqa: ASYNC110 the fake counts
            await asyncio.sleep(0.005)
    assert not given_up.is_set()
    assert not watched.is_given_up
    router.gone = frozenset({"solver"})
    await within(given_up)
    assert watched.is_given_up
    watched.end()


async def test_others_go_on() -> None:
    router = Router()
    router.gone = frozenset({"other"})
    other_given_up, given_up = asyncio.Event(), asyncio.Event()
    watchdog = watchdog_of(router)
    calls = [WatchedCall(watchdog, "solver", given_up.set), WatchedCall(watchdog, "other", other_given_up.set)]
    await within(other_given_up)
    assert not given_up.is_set()
    for call in calls:
        call.end()


async def test_a_call_that_ends_in_time_asks_nobody() -> None:
    router = Router()
    watched = WatchedCall(watchdog_of(router), "solver", lambda: pytest.fail("given up"))
    watched.end()
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, later.set)
    await within(later)
    assert router.asked == 0


async def test_many_slow_calls_share_one_look() -> None:
    router, given_up = Router(), asyncio.Event()
    watchdog = watchdog_of(router)
    calls = [WatchedCall(watchdog, f"agent-{n}", given_up.set) for n in range(50)]
    async with asyncio.timeout(5):
        while router.asked < 3:  # noqa: ASYNC110 the fake counts
            await asyncio.sleep(0.005)
    # Fifty calls that each asked for themselves would be far ahead.
    assert router.asked < 20
    assert not given_up.is_set()
    for call in calls:
        call.end()


async def test_a_call_that_no_replica_takes_is_given_up_when_its_patience_ends() -> None:
    router, given_up = Router(), asyncio.Event()
    watched = WatchedCall(watchdog_of(router), "solver", given_up.set, is_taken=lambda: False, patience_s=0.1)
    await within(given_up)
    assert watched.is_given_up
    assert watched.is_untaken
    assert router.asked >= 3, "given up before its patience ended"
    watched.end()


async def test_a_call_that_was_taken_may_take_its_time() -> None:
    router = Router()
    watched = WatchedCall(watchdog_of(router), "solver", lambda: pytest.fail("given up"), is_taken=lambda: True, patience_s=0.05)
    async with asyncio.timeout(5):
        while router.asked < 8:  # noqa: ASYNC110 the fake counts
            await asyncio.sleep(0.005)
    watched.end()


async def test_a_cold_agents_replica_may_take_longer_to_start() -> None:
    router, given_up = Router(), asyncio.Event()
    router.cold = frozenset({"solver"})
    watchdog = watchdog_of(router)
    watched = WatchedCall(watchdog, "solver", given_up.set, is_taken=lambda: False, patience_s=0.05)
    async with asyncio.timeout(5):
        while router.asked < 8:  # noqa: ASYNC110 the fake counts
            await asyncio.sleep(0.005)
    assert not given_up.is_set()
    router.cold = frozenset()  # its replica is there, and takes nothing
    await within(given_up)
    assert watched.is_untaken

    router.cold = frozenset({"solver"})
    given_up.clear()
    WatchedCall(watchdog_of(router, cold_patience_s=0.1), "solver", given_up.set, is_taken=lambda: False, patience_s=0.05)
    await within(given_up)  # a cold start ends too


async def test_a_queue_that_moves_is_waited_in_and_one_that_others_pass_is_not() -> None:
    router, given_up, passed = Router(), asyncio.Event(), asyncio.Event()
    watchdog = watchdog_of(router)
    before = [WatchedCall(watchdog, "solver", lambda: None, queue="llm") for _ in range(12)]
    waits = WatchedCall(watchdog, "solver", given_up.set, is_taken=lambda: False, patience_s=0.15, queue="llm")
    left_behind = WatchedCall(watchdog, "other", passed.set, is_taken=lambda: False, patience_s=0.15, queue="other llm")
    after = [WatchedCall(watchdog, "other", lambda: None, queue="other llm") for _ in range(12)]
    for first, later in zip(before, after, strict=True):
        await asyncio.sleep(0.03)
        first.answered()
        later.answered()
    assert passed.is_set()
    assert left_behind.is_untaken
    assert not given_up.is_set()
    await within(given_up)
    assert waits.is_untaken


def never() -> None:
    pytest.fail("given up")


async def test_what_nobody_takes_after_a_loss_is_given_up_at_once() -> None:
    """Serve keeps a call that was sent between a replica's death and its successor's start, which takes seconds."""
    watchdog = CallWatchdog(slow_s=60.0, lost_s=0.02)
    before, after = asyncio.Event(), asyncio.Event()
    llm: dict[str, Any] = {"queue": "llm", "has_replica": lambda: True}

    early = WatchedCall(watchdog, "solver", before.set, is_taken=lambda: False, **llm)
    others = [
        WatchedCall(watchdog, "solver", never, is_taken=lambda: True, **llm),  # another replica has it
        WatchedCall(watchdog, "solver", never, is_taken=lambda: False, queue="llm"),  # a ping, which waits for the next replica
        WatchedCall(watchdog, "other", never, is_taken=lambda: False, queue="other llm", has_replica=lambda: True),
    ]
    watchdog.lost("llm")
    await within(before)
    late = WatchedCall(watchdog, "solver", after.set, is_taken=lambda: False, **llm)
    await within(after)
    assert (early.is_given_up, late.is_given_up, late.is_untaken) == (True, True, False)
    back = WatchedCall(watchdog, "solver", never, is_taken=lambda: True, **llm)
    back.answered()
    others.append(WatchedCall(watchdog, "solver", never, is_taken=lambda: False, **llm))  # it waits its turn
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, done.set)
    await within(done)
    for call in (early, late, *others):
        call.end()


async def test_what_no_replica_is_left_for_is_given_up_though_no_call_was_lost() -> None:
    watchdog, given_up, replicas = CallWatchdog(slow_s=60.0, lost_s=0.02), asyncio.Event(), [True]
    looks = asyncio.Event()

    def has_replica() -> bool:
        looks.set()
        return replicas[0]

    waits = WatchedCall(watchdog, "solver", given_up.set, is_taken=lambda: False, has_replica=has_replica)
    taken = WatchedCall(watchdog, "solver", never, is_taken=lambda: True, has_replica=lambda: False)
    await within(looks)
    assert not given_up.is_set(), "its queue is full, no more"
    replicas[0] = False
    await within(given_up)
    assert (waits.is_given_up, waits.is_untaken, taken.is_given_up) == (True, False, False)
    for call in (waits, taken):
        call.end()
