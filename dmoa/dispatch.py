"""Asks the agents of a step in parallel, with stand-ins for lost ones, the one retry loop, and more agents while all are unsure.

Stands between the orchestrator and an agent client: a lost contribution (failed, late, overloaded) is data, and the next-ranked
agent in a living place takes over while the deadline allows. Calls are idempotent by (trace, step, agent).

A cold agent has no replica; that is not a failure. It is waited for or passed over as its policy says, and where nobody else can
answer, the query waits for a cold one, whatever the policy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from dmoa.agents.prompts import agent_messages
from dmoa.core.aggregate import Anchors, anchors_of, contributions, doubt
from dmoa.errors import AgentOverloadedError, AgentUnavailableError, BrokenStreamError, CallNotTakenError, NoAgentError
from dmoa.protocols import AgentClient, Router
from dmoa.types import (
    Activation,
    AgentCall,
    AgentReply,
    AgentStatus,
    ColdPolicy,
    Query,
    QueryState,
    RouteDecision,
    Sampling,
    StepPlan,
    TextDelta,
)
from dmoa.validation import redact_text


def should_escalate(decision: RouteDecision | None, replies: Sequence[AgentReply]) -> bool:
    """Tell whether the step should ask one agent more, given the replies that count so far.

    True where the gate version fitted theta, fewer than `decision.limit` agents replied, and no contribution is as sure
    as theta. Agents that were lost take no place of the limit. Source: ours (cf. arXiv 2403.07652).
    """
    if decision is None or decision.theta is None:
        return False
    if sum(reply.status == "ok" for reply in replies) >= decision.limit:
        return False
    return not is_any_sure(replies, decision.theta, anchors_of(decision))


def is_any_sure(replies: Sequence[AgentReply], theta: float, anchors: Anchors) -> bool:
    """Tell whether the score of at least one contribution is at most theta; blank and lost replies do not count."""
    return any(doubt(reply, anchors) <= theta for reply in contributions(replies))


_LOG = logging.getLogger("dmoa.dispatch")
COLD_PATIENCE_S = 600.0
"""How long a replica may take to start; a large model's takes minutes. After that its agent counts as dead."""


class ColdStarter:
    """Has replicas started by pinging agents without one."""

    def __init__(self, agents: AgentClient) -> None:
        self._agents = agents
        self._waking: dict[str, asyncio.Task[None]] = {}

    def wake(self, place: str, agent: str) -> asyncio.Task[None]:
        """Have a replica started at the place of `agent`; returns at once the task that ends when it answers."""
        found = self._waking.get(place)
        if found is None:
            found = asyncio.get_running_loop().create_task(self._ping(agent))
            self._waking[place] = found
            found.add_done_callback(lambda task: self._over(place, task))
        return found

    async def is_up(self, place: str, agent: str, *, within_s: float | None) -> bool:
        """Wait until the place of `agent` answers; False if it does not in time (None: no limit), and then it goes on starting.

        Raises AgentUnavailableError where it cannot start, AgentOverloadedError where its queue is full.
        """
        task = self.wake(place, agent)
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
        del self._waking[place]
        if not task.cancelled() and task.exception() is not None:
            _LOG.warning("%s was not woken: %s", place, redact_text(str(task.exception())))


T = TypeVar("T")
Chain = list[tuple[Activation, AgentReply]]
"""An agent that was asked and the stand-ins after it, each with its reply."""
PATIENCE_S = 60.0
"""How long a query without a deadline waits for a dead place to come back."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCard:
    """What the orchestrator must know of an agent to ask it."""

    name: str
    profile: str
    tools_text: str
    """How to call the agent's tools, part of its role prompt."""
    sampling: Sampling
    place: str
    """What dies together: the LLM's name in shared placement, the agent's own name in dedicated placement."""
    cold: ColdPolicy = "wait"
    """What to do with the agent while its place has no replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReplies:
    """What the agents of a step replied."""

    replies: tuple[AgentReply, ...]
    """Replies that count, in the order they were asked; lost ones included."""
    explored: tuple[tuple[Activation, AgentReply], ...] = ()
    """Replies that are only to learn from; no agent of them is among `replies`."""


@dataclass(slots=True, kw_only=True)
class StepDispatch:
    """One step while its agents are being asked."""

    state: QueryState
    """The query before the step; its tokens grow by those of the step before every call of the cascade."""
    reserves: deque[Activation]
    dead_places: set[str]
    waited_out: set[str]
    """Those of the dead places that a call has waited for already, for as long as patience lasts."""
    cold_places: set[str]
    """Places without a replica, as the router knew when it decided; those that came up since are taken out."""
    active: tuple[Activation, ...]
    """The agents that the plan chose."""
    is_final: bool
    """Whether the one reply of this step is the query's answer."""
    emit: Callable[[TextDelta], None] | None
    emitted: str = ""
    """What was handed on of the one streamed reply; a repeated call repeats its text, and goes on from here."""
    exploring: dict[str, asyncio.Task[AgentReply]] = field(default_factory=dict)
    """Calls of explored agents; one that is needed after all is taken out, and its reply counts."""


async def _in_parallel(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results, in order; where one raises or this is cancelled, the others are cancelled and awaited."""
    tasks = [asyncio.create_task(part) for part in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(task for task in tasks if not task.done())


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are over, whatever their outcome."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    if ending:
        await asyncio.gather(*ending, return_exceptions=True)


class Dispatcher:
    """Asks the agents of a step through an agent client."""

    def __init__(self, *, agents: AgentClient, sheets: Mapping[str, AgentCard], router: Router | None, is_select: bool) -> None:
        self._agents = agents
        self._sheets = sheets
        self._router = router
        self._is_select = is_select
        self._waker = ColdStarter(agents)

    def patience(self, state: QueryState) -> float:
        """Seconds that the query may still wait for an agent to come back."""
        if state.deadline_unix_s is None:
            return PATIENCE_S
        return max(0.0, state.deadline_unix_s - time.time())

    async def patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat `attempt` with growing pauses while it finds no agent; the caller sets the time limit."""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return await attempt()
            except (NoAgentError, AgentUnavailableError):
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def sampling_for(self, query: Query, sampling: Sampling, *, is_final: bool) -> Sampling:
        """Return the sampling of a call: the client's fields apply to the final call, in `select` mode to every call.

        The query's own limit on the length of a reply holds for all of them.
        """
        if query.sampling and (is_final or self._is_select):
            sampling = replace(sampling, **query.sampling)
        most = query.limits.max_tokens
        return sampling if most is None else replace(sampling, max_tokens=min(sampling.max_tokens, most))

    async def ask(self, state: QueryState, plan: StepPlan, emit: Callable[[TextDelta], None] | None) -> StepReplies:
        """Ask the plan's agents in parallel, explored ones beside them, then those that the cascade adds.

        With `emit` the text of the one agent is handed on as it comes. A reserve that is needed while it is being explored
        is not asked twice: its reply counts, and it is no longer explored.
        """
        is_final = plan.ends_with is not None
        asking = StepDispatch(
            state=state,
            reserves=deque(plan.reserves),
            dead_places=set(),
            waited_out=set(),
            cold_places=self._cold_places(plan),
            active=plan.activations,
            is_final=is_final,
            emit=emit,
        )
        silent = replace(asking, emit=None)  # shares the sets of places
        exploring = {x.agent: asyncio.create_task(self._ask_once(silent, x)) for x in plan.explored}
        asking.exploring = dict(exploring)
        try:
            replies = await self._ask_active(asking, plan)
            await asyncio.gather(*asking.exploring.values())
        finally:
            await _end(exploring.values())
        left = asking.exploring
        return StepReplies(replies=replies, explored=tuple((x, left[x.agent].result()) for x in plan.explored if x.agent in left))

    def _cold_places(self, plan: StepPlan) -> set[str]:
        """Return the places without a replica, and wake those of agents among the K most probable that want it so."""
        decision = plan.decision
        if decision is None or not decision.cold:
            return set()
        ranked = {decision.agents[index] for index in decision.ranking[: decision.max_agents]}
        for name in decision.cold:
            if name in ranked and self._sheets[name].cold == "warm_on_rank":
                self._waker.wake(self._sheets[name].place, name)
        return {self._sheets[name].place for name in decision.cold}

    async def _ask_active(self, asking: StepDispatch, plan: StepPlan) -> tuple[AgentReply, ...]:
        """Ask the active agents and, one by one, those that unsure replies call for."""
        before = asking.state
        chains = await _in_parallel(self._ask_or_replace(asking, activation) for activation in plan.activations)
        if not any(reply.status == "ok" for chain in chains for _, reply in chain) and self._has_time(before):
            chains = await _in_parallel(self._insist(asking, chain) for chain in chains)
        while True:
            replies = tuple(reply for chain in chains for _, reply in chain)
            if plan.fold == "pass" or not should_escalate(plan.decision, replies):
                return replies
            used = before.tokens_used + sum(reply.usage.total for reply in replies)
            asking.state = replace(before, tokens_used=used)
            another = self._stand_in(asking) if self._can_afford(asking.state) else None
            if another is None:
                return replies
            chains.append(await self._ask_or_replace(asking, another))

    async def _ask_or_replace(self, asking: StepDispatch, activation: Activation) -> Chain:
        """Ask one agent and, while it is lost, its stand-ins."""
        chain: Chain = []
        current: Activation | None = activation
        while current is not None:
            explored = asking.exploring.pop(current.agent, None)
            reply = await (self._ask_once(asking, current) if explored is None else explored)
            chain.append((current, reply))
            current = self._stand_in(asking) if reply.status != "ok" and self._has_time(asking.state) else None
        return chain

    async def _insist(self, asking: StepDispatch, chain: Chain) -> Chain:
        """Nobody contributed: wait for a cold agent, of the chain or else of the reserves, and then for a dead place."""
        passed_over = (activation for activation, reply in chain if reply.status == "cold")
        cold = next(passed_over, None) if not asking.emitted else None
        waited_for = cold or self._stand_in(asking, among_cold=True)
        if waited_for is not None:
            reply = await self._ask_once(asking, waited_for, insists=True)
            chain = [*(link for link in chain if link[0] is not cold), (waited_for, reply)]
            if reply.status == "ok":
                return chain
        return await self._wait_for_place(asking, chain)

    async def _wait_for_place(self, asking: StepDispatch, chain: Chain) -> Chain:
        """Send the newest call that was lost with its place again until the place is back."""
        for index in reversed(range(len(chain))):
            activation, lost = chain[index]
            if lost.status == "failed" and self._sheets[activation.agent].place in asking.dead_places - asking.waited_out:
                reply = await self._ask_until_back(asking, activation, lost)
                return [*chain[:index], (activation, reply), *chain[index + 1 :]]
        return chain

    def _has_time(self, state: QueryState) -> bool:
        return state.deadline_unix_s is None or time.time() < state.deadline_unix_s

    def _can_afford(self, state: QueryState) -> bool:
        budget = state.query.limits.budget_tokens
        return self._has_time(state) and (budget is None or state.tokens_used < budget)

    def _stand_in(self, asking: StepDispatch, *, among_cold: bool = False) -> Activation | None:
        """Take the next-ranked agent whose place is up, or is cold; none once text has been handed on."""
        for activation in list(asking.reserves) if not asking.emitted else ():
            place = self._sheets[activation.agent].place
            if place in asking.dead_places:
                asking.reserves.remove(activation)
            elif (place in asking.cold_places) == among_cold:
                asking.reserves.remove(activation)
                return activation
        return None

    async def _ask_once(self, asking: StepDispatch, activation: Activation, *, insists: bool = False) -> AgentReply:
        """Ask one agent; a cold one is waited for as its policy says, with `insists` for as long as the query has."""
        started = time.perf_counter()
        status: AgentStatus
        try:
            async with asyncio.timeout(self._time_left(asking.state)):
                if self._sheets[activation.agent].place not in asking.cold_places:
                    return await self._send(asking, activation)
                if await self._comes_up(asking, activation, insists=insists):
                    waited_ms = (time.perf_counter() - started) * 1e3
                    reply = await self._send(asking, activation)
                    error = reply.error or f"it was cold: its replica was there after {waited_ms / 1e3:.1f} s"
                    return replace(reply, latency_ms=reply.latency_ms + waited_ms, error=error)
            status, error = "cold", "it has no replica yet; one is being started"
        except AgentUnavailableError as lost:
            status, error = "failed", str(lost)
            asking.dead_places.add(self._sheets[activation.agent].place)
            if isinstance(lost, CallNotTakenError):
                asking.waited_out.add(self._sheets[activation.agent].place)
            if self._router is not None:
                self._router.report_unavailable(activation.agent, error)
        except AgentOverloadedError as busy:
            status, error = "overloaded", str(busy)
        except TimeoutError:
            status, error = "late", "the deadline passed before the reply"
        latency_ms = (time.perf_counter() - started) * 1e3
        return AgentReply(agent=activation.agent, status=status, error=error, latency_ms=latency_ms)

    async def _comes_up(self, asking: StepDispatch, activation: Activation, *, insists: bool) -> bool:
        """Have a cold agent's replica started; tell whether it came up in the time that the agent's policy gives it."""
        sheet = self._sheets[activation.agent]
        if sheet.cold == "skip" and not insists:
            self._waker.wake(sheet.place, sheet.name)
            return False
        is_up = await self._waker.is_up(sheet.place, sheet.name, within_s=self._cold_patience(asking, insists=insists))
        if is_up:
            asking.cold_places.discard(sheet.place)
        return is_up

    def _cold_patience(self, asking: StepDispatch, *, insists: bool) -> float | None:
        """Seconds to wait for a replica, None for as long as one may take to start.

        With a deadline half of what is left, where an agent that is up could still answer.
        """
        left = self._time_left(asking.state)
        if left is None:
            return None
        unfit = asking.cold_places | asking.dead_places
        has_other = any(self._sheets[x.agent].place not in unfit for x in (*asking.active, *asking.reserves))
        return left / 2 if has_other and not insists else left

    async def _ask_until_back(self, asking: StepDispatch, activation: Activation, lost: AgentReply) -> AgentReply:
        """Send the call again until its place is back; patience is for the place, the reply has until the deadline.

        The reply keeps what the lost attempt met.
        """
        attempts, loop = lost.attempts, asyncio.get_running_loop()
        give_up = loop.time() + self.patience(asking.state)
        time_left = self._time_left(asking.state)
        too_late = None if time_left is None else loop.time() + time_left

        async def attempt() -> AgentReply:
            nonlocal attempts
            await self._agents.ping(activation.agent)
            attempts += 1
            limit.reschedule(too_late)
            try:
                return await self._send(asking, activation)
            except AgentUnavailableError:
                limit.reschedule(give_up)
                raise

        try:
            async with asyncio.timeout_at(give_up) as limit:
                reply = await self.patiently(attempt)
        except TimeoutError:
            status: AgentStatus = "late" if asking.state.deadline_unix_s else "failed"
            return replace(lost, status=status, attempts=attempts)
        except AgentOverloadedError as busy:
            return replace(lost, status="overloaded", error=str(busy), attempts=attempts)
        return replace(reply, attempts=attempts, error=reply.error or f"an earlier attempt was lost: {lost.error}")

    async def _send(self, asking: StepDispatch, activation: Activation) -> AgentReply:
        started = time.perf_counter()
        reply = await self._receive(asking, activation)
        return replace(reply, latency_ms=(time.perf_counter() - started) * 1e3)

    async def _receive(self, asking: StepDispatch, activation: Activation) -> AgentReply:
        call = self._call(asking.state, activation, is_final=asking.is_final)
        if asking.emit is None:
            return await self._agents.call(call)
        seen = ""
        async for item in self._agents.stream(call):
            if isinstance(item, AgentReply):
                if item.status == "ok":
                    _check_goes_on(asking.emitted, seen, activation.agent, is_whole=True)
                return item
            seen += item.text
            _check_goes_on(asking.emitted, seen, activation.agent)
            if len(seen) > len(asking.emitted):
                asking.emit(TextDelta(text=seen[len(asking.emitted) :]))
                asking.emitted = seen
        raise AgentUnavailableError(f"agent {activation.agent!r}: the stream ended without a reply")

    def _time_left(self, state: QueryState) -> float | None:
        return None if state.deadline_unix_s is None else max(0.0, state.deadline_unix_s - time.time())

    def _call(self, state: QueryState, activation: Activation, *, is_final: bool) -> AgentCall:
        sheet = self._sheets[activation.agent]
        history = state.history if activation.history is None else activation.history
        query, stage = state.query, state.stage
        if stage is not None:
            history = history if stage.has_history else ()
            query = query if stage.part is None else replace(query, text=stage.part)
        return AgentCall(
            trace_id=query.trace_id,
            step=len(state.steps),
            agent=activation.agent,
            messages=agent_messages(
                query, history, profile=sheet.profile, tools=sheet.tools_text, instruction=activation.instruction
            ),
            sampling=self._within_budget(state, self.sampling_for(query, sheet.sampling, is_final=is_final)),
            deadline_unix_s=state.deadline_unix_s,
            conversation=state.query.conversation,
        )

    def _within_budget(self, state: QueryState, sampling: Sampling) -> Sampling:
        budget = state.query.limits.budget_tokens
        if budget is None:
            return sampling
        return replace(sampling, max_tokens=max(1, min(sampling.max_tokens, budget - state.tokens_used)))


def _check_goes_on(emitted: str, seen: str, agent: str, *, is_whole: bool = False) -> None:
    """Raise BrokenStreamError where a repeated call says something else than what was handed on.

    It need not repeat its text: an engine's numbers may depend on what else is in its batch.
    """
    if not seen.startswith(emitted if is_whole else emitted[: len(seen)]):
        raise BrokenStreamError(f"agent {agent!r} was lost in mid-stream, and said something else when asked again; ask again")
