"""Asks the agents of a step in parallel, explored ones beside them.

Stands between the orchestrator and an agent client: `step_calls` decides whom to ask next, `recovery` makes each call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from dmoa.agents.prompts import agent_messages
from dmoa.core.aggregate import contributions
from dmoa.errors import RequestError
from dmoa.protocols import AgentClient, Router, Turn
from dmoa.recovery import PATIENCE_S, AgentCaller, LateReplies, StreamedText, time_left
from dmoa.step_calls import AgentCard, NextCall, Places, StepCalls
from dmoa.types import (
    Activation,
    AgentCall,
    AgentReply,
    Defence,
    Limits,
    Price,
    Query,
    QueryState,
    Sampling,
    StepPlan,
    TextDelta,
    priced,
    question_key,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReplies:
    """What the agents of a step replied."""

    replies: tuple[AgentReply, ...]
    """Replies that count, in the order they were asked; lost ones included."""
    explored: tuple[tuple[Activation, AgentReply], ...] = ()
    """Replies that are only to learn from; no agent of them is among `replies`."""
    is_outdated: bool = False
    """Whether nobody contributed, and an agent that was masked is back, before the places of those that were asked."""


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are over, whatever their outcome."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    if ending:
        await asyncio.gather(*ending, return_exceptions=True)


_Running = dict[asyncio.Task[AgentReply], NextCall]


async def _end_waits(
    step: StepCalls, contributed: NextCall, running: _Running, done: Collection[asyncio.Task[AgentReply]]
) -> None:
    """Wait no longer for places that are not back, now that there is a contribution."""
    for task, call in [(x, call) for x, call in running.items() if step.is_vain(call, contributed) and x not in done]:
        del running[task]
        await _end((task,))
        step.withdrawn(call)


class Hedges:
    """Asks the next-ranked agent beside a call that takes long; of the two the first contribution counts.

    Source: Dean and Barroso, The Tail at Scale (2013), hedged requests; that another agent is asked is ours.
    """

    def __init__(self, step: StepCalls, latencies: LateReplies, plan: StepPlan, limits: Limits) -> None:
        self._step, self._latencies = step, latencies
        self._after = limits.hedge_after_ms if plan.fold == "summarizer" else None
        self._due_s: dict[asyncio.Task[AgentReply], float] = {}
        self._hedged: dict[int, tuple[str, float]] = {}

    def begun(self, task: asyncio.Task[AgentReply], call: NextCall) -> None:
        """Note that a call was sent; one that is sent beside another, or after one was, is not hedged itself."""
        if self._after is None or call.chain in self._hedged:
            return
        after_s = self._latencies.p95_s(call.activation.agent) if self._after == "p95" else self._after / 1e3
        if after_s is not None:
            self._due_s[task] = asyncio.get_running_loop().time() + after_s
            self._hedged[call.chain] = (call.activation.agent, after_s)

    def wait_s(self) -> float | None:
        """Return the seconds until a call takes too long; None: none can."""
        now = asyncio.get_running_loop().time()
        return max(0.0, min(self._due_s.values()) - now) if self._due_s else None

    def due(self, running: _Running) -> list[NextCall]:
        """Return the calls to send beside those that take too long now."""
        now = asyncio.get_running_loop().time()
        late = [task for task, due_s in self._due_s.items() if due_s <= now or task not in running]
        for task in late:
            del self._due_s[task]
        return [another for task in late if task in running for another in self._step.hedge(running[task])]

    async def overtake(self, call: NextCall, running: _Running, done: Collection[asyncio.Task[AgentReply]]) -> None:
        """End the call beside one that brought a contribution."""
        beside = [(x, other) for x, other in running.items() if other.chain == call.chain and other.lost is None]
        for task, other in [(x, other) for x, other in beside if x not in done]:
            del running[task]
            await _end((task,))
            agent, error = other.activation.agent, f"{call.activation.agent}, asked beside it, replied first"
            if agent == self._hedged[call.chain][0]:
                self._latencies.overtaken(*self._hedged[call.chain])
            self._step.overtaken(other, AgentReply(agent=agent, status="late", error=error))


class Dispatcher:
    """Asks the agents of a step through an agent client."""

    def __init__(
        self,
        *,
        agents: AgentClient,
        cards: Mapping[str, AgentCard],
        router: Router | None,
        is_select: bool,
        turn: Turn = nullcontext,
    ) -> None:
        """A call of a step is made in its `turn`, and what it waits for that is no part of its latency."""
        self.cards = cards
        """The agents by name, in the pool's order."""
        self.is_select = is_select
        """Whether the summarizer only selects: then rules decide when to stop."""
        self._turn = turn
        self._has_recorded = any(card.is_recorded for card in cards.values())
        self._caller = AgentCaller(agents, router)

    async def ask_once(self, call: AgentCall, card: AgentCard, emit: Callable[[TextDelta], None] | None) -> AgentReply:
        """Make a call that belongs to no step; with `emit` its text is handed on as it comes.

        Where it is lost with its place it is sent again once that is back: nobody stands in.
        """
        wanted = NextCall(activation=Activation(agent=card.name), chain=0, tokens_used=0)
        places, text, sent_unix_s = Places(), StreamedText(emit) if emit else None, time.time()
        reply = await self._caller.call_with_recovery(call, card, wanted, places, text, has_other=False)
        if card.place in places.dead - places.waited_out:
            again = replace(wanted, lost=reply)
            reply = await self._caller.call_with_recovery(call, card, again, places, text, has_other=False)
        return replace(priced(reply, card.price), prompt=call.messages, sent_unix_s=sent_unix_s)

    def calls_left(self, state: QueryState, plan: StepPlan) -> int | None:
        """Return how many agents' calls the query's budget allows a step, the summarizer's kept back; None: any number."""
        budget, own = state.query.limits.budget_calls, 0 if self.is_select or plan.fold != "summarizer" else 1
        return None if budget is None else budget - state.calls_used - own

    def patience(self, state: QueryState) -> float:
        """Seconds that the query may still wait for an agent to come back."""
        left = time_left(state.deadline_unix_s)
        return PATIENCE_S if left is None else left

    def sampling_for(self, query: Query, sampling: Sampling, *, is_final: bool) -> Sampling:
        """Return the sampling of a call: the client's fields apply to the final call, in `select` mode to every call.

        The query's own limit on the length of a reply holds for all of them.
        """
        if query.sampling and (is_final or self.is_select):
            sampling = replace(sampling, **query.sampling, given=tuple(query.sampling))
        most = query.limits.max_tokens
        return sampling if most is None else replace(sampling, max_tokens=min(sampling.max_tokens, most))

    async def ask(
        self, state: QueryState, plan: StepPlan, emit: Callable[[TextDelta], None] | None, defence: Defence = "none"
    ) -> StepReplies:
        """Ask the plan's agents in parallel, explored ones beside them, then those that losses and unsure replies call for.

        With `emit` the text of the one agent is handed on as it comes. A reserve that is needed while it is being explored
        is not asked twice: its reply counts, and it is no longer explored.
        """
        places, text = Places(cold=self._cold_places(plan)), StreamedText(emit) if emit else None
        left = self.calls_left(state, plan)
        left = None if left is None else left - len(plan.explored)
        step = StepCalls(plan, self.cards, places, state, calls_left=left, defence=defence)

        def start(call: NextCall, text: StreamedText | None) -> asyncio.Task[AgentReply]:
            agent_call = self._agent_call(state, call, is_final=plan.ends_with is not None)
            return asyncio.create_task(self._priced_call(agent_call, call, places, text, has_other=step.has_agent_up))

        quorum, hedges = _quorum(plan, state.query.limits), Hedges(step, self._caller.late_replies, plan, state.query.limits)
        exploring: dict[str, asyncio.Task[AgentReply]] = {}
        running: dict[asyncio.Task[AgentReply], NextCall] = {}
        back: asyncio.Task[None] | None = None
        try:
            for activation in plan.explored:
                exploring[activation.agent] = start(NextCall(activation=activation, chain=-1, tokens_used=0), None)
            upcoming = step.begin()
            while upcoming or running:
                for call in upcoming:
                    explored = exploring.pop(call.activation.agent, None)
                    if explored is not None and call.insists:
                        await _end((explored,))  # it was passed over as cold, or would be
                        explored = None
                    running[task := explored or start(call, text)] = call
                    hedges.begun(task, call)
                if back is None and (missed := step.missed()):
                    back = asyncio.create_task(self._caller.first_back(missed))
                awaited: list[asyncio.Task[Any]] = [*running, back] if back and step.missed() else [*running]
                done, _ = await asyncio.wait(awaited, timeout=hedges.wait_s(), return_when=asyncio.FIRST_COMPLETED)
                if back in done and not done.intersection(running) and step.missed():
                    return StepReplies(replies=step.replies, is_outdated=True)
                upcoming = hedges.due(running) if not done else []
                for task in [task for task in running if task in done]:
                    reply, has_time = task.result(), state.deadline_unix_s is None or time.time() < state.deadline_unix_s
                    call = running.pop(task)
                    if contributions((reply,)):
                        await hedges.overtake(call, running, done)
                    if reply.status == "ok":
                        await _end_waits(step, call, running, done)
                    upcoming += step.after(call, reply, has_time=has_time, has_text=bool(text))
                if quorum is not None and len(contributions(step.replies)) >= quorum:
                    break
            await asyncio.gather(*exploring.values())
        finally:
            await _end((*running, *exploring.values(), *([back] if back else ())))
        late = f"the step had its {quorum} contributions before"
        cut = [x.activation.agent for x in running.values() if x.lost is None]  # one sent again keeps how it was lost
        return StepReplies(
            replies=(*step.replies, *(AgentReply(agent=name, status="late", error=late) for name in cut)),
            explored=tuple((x, exploring[x.agent].result()) for x in plan.explored if x.agent in exploring),
        )

    async def _priced_call(
        self, call: AgentCall, wanted: NextCall, places: Places, text: StreamedText | None, *, has_other: bool
    ) -> AgentReply:
        card = self.cards[call.agent]
        async with self._turn():
            sent_unix_s = time.time()
            reply = await self._caller.call_with_recovery(call, card, wanted, places, text, has_other=has_other)
        return replace(priced(reply, card.price), prompt=call.messages, sent_unix_s=sent_unix_s)

    def check_recorded(self, state: QueryState, plan: StepPlan, whose: str) -> None:
        """Check that agents with recorded replies alone are asked no more than the query. Raises RequestError saying `whose`."""
        for activation in (*plan.activations, *plan.reserves, *plan.explored) if self._has_recorded else ():
            extra = _extra(*_seen(state, activation), activation) if self.cards[activation.agent].is_recorded else ""
            if extra:
                raise RequestError(
                    f"{whose}: step {len(state.steps) + 1} asks {activation.agent} with {extra} in the prompt; its replies are "
                    "recorded, to the query alone; ask one question without earlier turns, by single, dense, random or dmoa, or "
                    "use a pool whose engines generate"
                )

    def _cold_places(self, plan: StepPlan) -> set[str]:
        """Return the places without a replica, and start those of agents among the K most probable that want it so."""
        decision = plan.decision
        if decision is None or not decision.cold:
            return set()
        ranked = {decision.agents[index] for index in decision.ranking[: decision.max_agents]}
        for name in decision.cold:
            if name in ranked and self.cards[name].cold == "warm_on_rank":
                self._caller.cold_starter.start(self.cards[name])
        return {self.cards[name].place for name in decision.cold}

    def _agent_call(self, state: QueryState, wanted: NextCall, *, is_final: bool) -> AgentCall:
        activation = wanted.activation
        card = self.cards[activation.agent]
        query, history = _seen(state, activation)
        sampling = _sampling_of(activation, self.sampling_for(query, card.sampling, is_final=is_final))
        return AgentCall(
            trace_id=query.trace_id,
            step=len(state.steps),
            agent=activation.agent,
            messages=agent_messages(
                query, history, profile=card.profile, tools=card.tools_text, instruction=activation.instruction
            ),
            sampling=_affordable(state, wanted, sampling, card.price),
            deadline_unix_s=state.deadline_unix_s,
            conversation=state.query.conversation,
            question=question_key(query.text) if card.is_recorded and not _extra(query, history, activation) else "",
            query_id=query.query_id,
            sample=activation.sample,
        )


def _affordable(state: QueryState, wanted: NextCall, sampling: Sampling, price: Price | None) -> Sampling:
    """Return the sampling with replies no longer than what is left pays for.

    Where budgets hold within steps, pace decides whether a call is made at all, and a reply that is begun is whole.
    """
    limits, most = state.query.limits, sampling.max_tokens
    if limits.within_steps:
        return sampling
    if limits.budget_tokens is not None:
        most = min(most, limits.budget_tokens - state.tokens_used - wanted.tokens_used)
    if limits.budget_price is not None and price is not None and price.completion_per_1m > 0:
        money = limits.budget_price - state.price_used - wanted.price_used
        most = int(min(money / price.completion_per_1m * 1e6, most))
    return replace(sampling, max_tokens=max(1, most))


def _quorum(plan: StepPlan, limits: Limits) -> int | None:
    """Return how many contributions end the step: the plan's own number, or the query's where the plan asks more agents."""
    if plan.quorum is not None or plan.fold != "summarizer" or limits.quorum is None:
        return plan.quorum
    return limits.quorum if limits.quorum < len(plan.activations) else None


def _sampling_of(activation: Activation, sampling: Sampling) -> Sampling:
    """Return how a call is decoded: what its activation asks for comes before the agent's and the client's wishes."""
    return replace(
        sampling,
        temperature=sampling.temperature if activation.temperature is None else activation.temperature,
        max_tokens=min(sampling.max_tokens, activation.max_tokens or sampling.max_tokens),
        seed=None if sampling.seed is None else sampling.seed + activation.sample,
    )


def _seen(state: QueryState, activation: Activation) -> tuple[Query, tuple[str, ...]]:
    """Return the query and the earlier work as an agent sees them at the next step."""
    query, stage = state.query, state.stage
    earlier = state.history if stage is None or stage.has_history else ()
    history = earlier if activation.history is None else activation.history  # as of who examines another's answer
    return (query if stage is None or stage.part is None else replace(query, text=stage.part)), history


def _extra(query: Query, history: tuple[str, ...], activation: Activation) -> str:
    """Return what a prompt holds beside the query's text and the agent's role; empty where that is all."""
    parts = {"an instruction of its own": activation.instruction, "earlier work": history, "earlier turns": query.turns}
    parts["results of tools"] = query.exchange
    return " and ".join(name for name, part in parts.items() if part)
