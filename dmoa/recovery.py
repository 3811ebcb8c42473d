"""Makes one call of one agent, with its deadline, a cold start, the one retry loop, and streams that go on after a loss.

An agent that answers pings and nothing else is masked after a few replies in a row that came too late, each time for longer.

A lost contribution (failed, late, overloaded) is data, and calls are idempotent by (trace, step, agent). A cold agent has no
replica; that is not a failure: it is waited for or passed over as its policy says.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from functools import partial
from typing import TypeVar

from dmoa.errors import AgentOverloadedError, AgentUnavailableError, BrokenStreamError, CallNotTakenError, NoAgentError
from dmoa.protocols import AgentClient, Router
from dmoa.step_calls import AgentCard, NextCall, Places
from dmoa.types import AgentCall, AgentReply, AgentStatus, TextDelta
from dmoa.validation import redact_text

_LOG = logging.getLogger("dmoa.dispatch")
T = TypeVar("T")
COLD_PATIENCE_S = 600.0
"""How long a replica may take to start; a large model's takes minutes. After that its agent counts as dead."""
PATIENCE_S = 60.0
"""How long a query without a deadline waits for a dead place to come back."""
MAX_LATE = 3
"""Late replies in a row after which an agent is masked."""
LATE_FACTOR, LEAST_LATE_S, UNKNOWN_LATE_S = 3.0, 1.0, 10.0
"""A late reply counts where it was given this many times the agent's usual latency, at least; 10 s where that is not known."""
LONGEST_MASK_S = 60.0
RECENT, FEWEST_RECENT = 100, 20
"""Latencies of an agent that its 95th percentile is taken over, and how many there must be."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeat `attempt` with growing pauses while it finds no agent; the caller sets the time limit."""
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return await attempt()
        except (NoAgentError, AgentUnavailableError):
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def time_left(deadline_unix_s: float | None) -> float | None:
    """Return the seconds until a deadline, 0 where it passed; None without one."""
    return None if deadline_unix_s is None else max(0.0, deadline_unix_s - time.time())


class ColdStarter:
    """Has replicas started by pinging agents without one."""

    def __init__(self, agents: AgentClient) -> None:
        self._agents = agents
        self._starting: dict[str, asyncio.Task[None]] = {}

    def start(self, card: AgentCard) -> asyncio.Task[None]:
        """Have a replica started at the agent's place; returns at once the task that ends when it answers."""
        if card.place not in self._starting:
            starting = self._starting[card.place] = asyncio.create_task(self._ping(card.name))
            starting.add_done_callback(lambda task: self._over(card.place, task))
        return self._starting[card.place]

    async def is_up(self, card: AgentCard, *, within_s: float | None) -> bool:
        """Wait until the agent's place answers; False if it does not in time (None: no limit), and then it goes on starting.

        Raises AgentUnavailableError where it cannot start, AgentOverloadedError where its queue is full.
        """
        task = self.start(card)
        done, _ = await asyncio.wait((task,), timeout=within_s)
        if done:
            task.result()
        return bool(done)

    async def _ping(self, agent: str) -> None:
        try:
            async with asyncio.timeout(COLD_PATIENCE_S):
                await self._agents.ping(agent)
        except TimeoutError:
            raise AgentUnavailableError(f"agent {agent!r}: no replica of it started within {COLD_PATIENCE_S:.0f} s") from None

    def _over(self, place: str, task: asyncio.Task[None]) -> None:
        del self._starting[place]
        if not task.cancelled() and task.exception() is not None:
            _LOG.warning("%s was not woken: %s", place, redact_text(str(task.exception())))


class StreamedText:
    """What was handed on of a step's one streamed reply; a repeated call repeats its text, and goes on from there."""

    def __init__(self, emit: Callable[[TextDelta], None]) -> None:
        self._emit = emit
        self._text = ""
        self._thought = ""

    def __bool__(self) -> bool:
        return bool(self._text)

    def go_on(self, seen: str, agent: str, *, is_whole: bool = False) -> None:
        """Hand on what is new in the text `seen` of an attempt, or of its whole reply; white space waits for the first word.

        Raises BrokenStreamError where it says something else than what was handed on. It need not repeat its text: an engine's
        numbers may depend on what else is in its batch.
        """
        if not seen.startswith(self._text if is_whole else self._text[: len(seen)]):
            raise BrokenStreamError(
                f"agent {agent!r} was lost in mid-stream, and said something else when asked again; ask again"
            )
        if len(seen) > len(self._text) and seen.strip():
            self._emit(TextDelta(text=seen[len(self._text) :]))
            self._text = seen

    def think(self, seen: str) -> None:
        """Hand on what is new in the thought `seen` of an attempt; one that goes another way than the first is not."""
        if len(seen) > len(self._thought) and seen.startswith(self._thought):
            self._emit(TextDelta(text=seen[len(self._thought) :], is_reasoning=True))
            self._thought = seen


class LateReplies:
    """Counts an agent's late replies in a row."""

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()
        self._masked_at_s: dict[str, float] = {}
        self._usual_s: dict[str, float] = {}
        self._recent_s: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def p95_s(self, agent: str) -> float | None:
        """Return the 95th percentile of the agent's recent latencies; None: there are too few yet."""
        recent = sorted(self._recent_s[agent])
        return recent[math.ceil(0.95 * len(recent)) - 1] if len(recent) >= FEWEST_RECENT else None

    def overtaken(self, agent: str, after_s: float) -> None:
        """Note a call that took longer than `after_s` and then another's reply came first.

        It counts as just that long: left out, the percentile would sink with every such call; by what it waited, it would climb.
        """
        self._recent_s[agent].append(after_s)

    def answered(self, agent: str, latency_s: float | None) -> None:
        """Note a reply that came in time; None: the agent failed, and it does not say how long one takes."""
        self._in_a_row.pop(agent, None)
        if latency_s is None:
            return
        self._recent_s[agent].append(latency_s)
        self._usual_s[agent] = 0.8 * self._usual_s.get(agent, latency_s) + 0.2 * latency_s

    def late(self, agent: str, begun_s: float, now_s: float) -> float:
        """Note a reply that came too late; return for how long the agent is to be masked, 0: it is not.

        One of a call that was under way when it was masked last tells nothing new, however many those are.
        """
        usual_s = self._usual_s.get(agent)
        least_s = UNKNOWN_LATE_S if usual_s is None else max(LEAST_LATE_S, LATE_FACTOR * usual_s)
        if now_s - begun_s < least_s or begun_s < self._masked_at_s.get(agent, begun_s):
            return 0.0
        self._in_a_row[agent] += 1
        over = self._in_a_row[agent] - MAX_LATE
        if over < 0:
            return 0.0
        self._masked_at_s[agent] = now_s
        return min(LONGEST_MASK_S, 2.0**over)


class AgentCaller:
    """Makes calls through an agent client, and tells the router of dead places."""

    def __init__(self, agents: AgentClient, router: Router | None) -> None:
        self._agents = agents
        self._router = router
        self.cold_starter = ColdStarter(agents)
        self.late_replies = LateReplies()

    async def call_with_recovery(
        self, call: AgentCall, card: AgentCard, wanted: NextCall, places: Places, text: StreamedText | None, *, has_other: bool
    ) -> AgentReply:
        """Return an agent's reply, or one that says how it was lost; what is learned of its place is noted in `places`.

        With `text` the reply is streamed. `has_other`: an agent that is up could answer in place of a cold one.
        Raises BrokenStreamError.
        """
        if wanted.lost is not None:
            return await self._send_until_back(call, wanted.lost, places.dead, card.place, text)
        started, begun_s = time.perf_counter(), asyncio.get_running_loop().time()
        status: AgentStatus
        try:
            async with asyncio.timeout(time_left(call.deadline_unix_s)):
                if card.place not in places.cold:
                    return await self._send(call, text)
                if await self._comes_up(call, card, insists=wanted.insists, has_other=has_other):
                    places.cold.discard(card.place)
                    waited_ms = (time.perf_counter() - started) * 1e3
                    reply = await self._send(call, text)
                    error = reply.error or f"it was cold: its replica was there after {waited_ms / 1e3:.1f} s"
                    return replace(reply, latency_ms=reply.latency_ms + waited_ms, error=error)
            status, error = "cold", "it has no replica yet; one is being started"
        except AgentUnavailableError as lost:
            status, error = "failed", redact_text(str(lost))
            places.dead.add(card.place)
            if isinstance(lost, CallNotTakenError):
                places.waited_out.add(card.place)
            if self._router is not None:
                self._router.report_unavailable(call.agent, error)
        except AgentOverloadedError as busy:
            status, error = "overloaded", redact_text(str(busy))
        except TimeoutError:
            status, error = "late", "the deadline passed before the reply"
            masked_s = self.late_replies.late(call.agent, begun_s, asyncio.get_running_loop().time())
            if masked_s and self._router is not None:
                self._router.report_unavailable(call.agent, f"its last replies came too late, {MAX_LATE} or more", masked_s)
        latency_ms = (time.perf_counter() - started) * 1e3
        return AgentReply(agent=call.agent, status=status, error=error, latency_ms=latency_ms)

    async def first_back(self, agents: Collection[str]) -> None:
        """Return once one of the agents answers pings."""
        pings = [asyncio.create_task(patiently(partial(self._agents.ping, agent))) for agent in agents]
        try:
            await asyncio.wait(pings, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for ping in pings:
                ping.cancel()
            await asyncio.gather(*pings, return_exceptions=True)

    async def _comes_up(self, call: AgentCall, card: AgentCard, *, insists: bool, has_other: bool) -> bool:
        """Have a cold agent's replica started; tell whether it came up in the time that the agent's policy gives it."""
        if card.cold == "skip" and not insists:
            self.cold_starter.start(card)
            return False
        left = time_left(call.deadline_unix_s)
        within_s = left / 2 if left is not None and has_other and not insists else left
        return await self.cold_starter.is_up(card, within_s=within_s)

    async def _send_until_back(
        self, call: AgentCall, lost: AgentReply, dead: set[str], place: str, text: StreamedText | None
    ) -> AgentReply:
        """Send the call again until its place is back; patience is for the place, the reply has until the deadline.

        The reply keeps what the lost attempt met. `dead` are the places that are known to be dead, this one while it is.
        """
        attempts, loop, left = lost.attempts, asyncio.get_running_loop(), time_left(call.deadline_unix_s)
        give_up = loop.time() + (PATIENCE_S if left is None else left)
        too_late = None if left is None else loop.time() + left

        async def attempt() -> AgentReply:
            nonlocal attempts
            await self._agents.ping(call.agent)
            attempts += 1
            limit.reschedule(too_late)
            dead.discard(place)
            try:
                return await self._send(call, text)
            except AgentUnavailableError:
                dead.add(place)
                limit.reschedule(give_up)
                raise

        try:
            async with asyncio.timeout_at(give_up) as limit:
                reply = await patiently(attempt)
        except TimeoutError:
            status: AgentStatus = "late" if call.deadline_unix_s else "failed"
            return replace(lost, status=status, attempts=attempts)
        except AgentOverloadedError as busy:
            return replace(lost, status="overloaded", error=redact_text(str(busy)), attempts=attempts)
        return replace(reply, attempts=attempts, error=reply.error or f"an earlier attempt was lost: {lost.error}")

    async def _send(self, call: AgentCall, text: StreamedText | None) -> AgentReply:
        started = time.perf_counter()
        reply = await (self._agents.call(call) if text is None else self._stream(call, text))
        latency_s = time.perf_counter() - started
        if reply.status != "late":
            self.late_replies.answered(call.agent, latency_s if reply.status == "ok" else None)
        return replace(reply, latency_ms=latency_s * 1e3)

    async def _stream(self, call: AgentCall, text: StreamedText) -> AgentReply:
        seen, thought = "", ""
        async for item in self._agents.stream(call):
            if isinstance(item, AgentReply):
                if item.status == "ok":
                    text.go_on(seen, call.agent, is_whole=True)
                return item
            if item.is_reasoning:
                thought += item.text
                text.think(thought)
            else:
                seen += item.text
                text.go_on(seen, call.agent)
        raise AgentUnavailableError(f"agent {call.agent!r}: the stream ended without a reply")
