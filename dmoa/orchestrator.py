"""The step loop: plan, ask, fold, record, decide whether to go on.

It knows protocols only, so the same loop runs in unit tests, in one process, in the Serve ingress, in rollouts and in
evaluation. A policy says whom to ask, `dispatch` reaches the agents, a summarizer folds what they say, `core/stopping`
holds the rules.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace

from dmoa.agents.summarizer import Fold, SelectSummarizer, Summarizer
from dmoa.core.aggregate import Selection, anchors_of, contributions, select_contribution, surest_contribution
from dmoa.core.answers import THOUGHT_ONLY
from dmoa.core.defences import EXAMINE, EXAMINE_TOKENS, barred, examined_groups, is_refuted
from dmoa.core.in_step import Judgement, judge
from dmoa.core.stopping import budget_stop, rule_stop
from dmoa.dispatch import Dispatcher, StepReplies
from dmoa.errors import (
    AgentUnavailableError,
    BrokenStreamError,
    DeadlineError,
    DmoaError,
    EmptyAnswerError,
    NoAgentError,
    RequestError,
)
from dmoa.final_call import FinalCaller
from dmoa.protocols import Policy, ended
from dmoa.recovery import PATIENCE_S, patiently
from dmoa.step_calls import AgentCard
from dmoa.types import (
    Activation,
    AgentReply,
    Answer,
    Choice,
    Defence,
    Event,
    FinalCall,
    Query,
    QueryState,
    Sampling,
    StepPlan,
    StepRecord,
    Stop,
    StopReason,
    SummarizerRecord,
    TextDelta,
    is_untrained,
    priced,
)

Emit = Callable[[Event], None]
_Stepped = tuple[StepRecord, Fold, Judgement | None]
_CLOCK_SLACK_S = 0.05
ANEW_S = 0.1
"""How long a step whose agents died waits before it is decided anew."""
EMPTY = "every contribution was empty; ask again, or raise max_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Orchestrator:
    """Answers queries with the agents of one pool."""

    dispatcher: Dispatcher
    """Reaches the agents, with the one retry loop."""
    summarizer: Summarizer
    defence: Defence = "none"
    """Which contributions count, for the pool's summarizer, votes, stopping rules and later steps."""
    writer: AgentCard | None = None
    """The `llm` summarizer, which also writes answers in the form that a client wants; None: agents do."""

    def check(self, query: Query, agent: str | None = None) -> None:
        """Check that somebody can write the answer that a query wants; `agent`: who alone is asked. Raises RequestError."""
        if query.final is not None:
            FinalCaller(self.dispatcher, self.writer).check(query.final, agent)

    async def answer(self, query: Query, policy: Policy, done: tuple[StepRecord, ...] = ()) -> AsyncGenerator[Event]:
        """Yield every finished step, pieces of the final text where it streams, and last the Answer.

        `done`: steps that the query goes on from; they are part of the Answer. Closing the iterator cancels the query's agent
        calls. Raises NoAgentError, EmptyAnswerError, DeadlineError, BrokenStreamError.
        """
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        task = asyncio.create_task(self._run(query, policy, events.put_nowait, done))
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self, query: Query, policy: Policy, emit: Emit, done: tuple[StepRecord, ...]) -> None:
        started = time.perf_counter()
        state = begin(query)
        for step in done:
            state = advance(state, step)
        reason: StopReason | None = None
        # Where the answer is written by a call of its own, no text before is the answer's.
        tell = emit if query.final is None else lambda event: None if isinstance(event, TextDelta) else emit(event)
        lost, step_started = tuple[AgentReply, ...](), started
        while reason is None:
            step_started = step_started if lost else time.perf_counter()
            plan = await self._plan(state, policy)
            if isinstance(plan, Stop):
                is_lost = plan.reason == "schedule" and state.steps and not contributions(state.steps[-1].replies)
                reason = "no_agent" if is_lost else plan.reason
                break
            plan = self._within_calls(state, plan)
            self.dispatcher.check_recorded(state, plan, f"policy: {policy.name!r}")
            previous = state.summary
            asked = await self._ask(state, plan, tell)
            again = {reply.agent for reply in asked.replies}
            asked = replace(asked, replies=(*(reply for reply in lost if reply.agent not in again), *asked.replies))
            if asked.is_outdated and time.perf_counter() - step_started < PATIENCE_S:
                lost = asked.replies
                await asyncio.sleep(ANEW_S)
                continue
            step, fold, judgement = await self._step(state, plan, asked, tell, step_started)
            state, lost = advance(state, step), ()
            emit(step)
            reason = self._stop_reason(state, step, fold, plan, previous, judgement)
        if not state.summary:
            raise _no_answer(state, policy.name, reason)
        text, choices = ended(policy, state), tuple[Choice, ...]()
        # What a search ends with need not be its last summary.
        told = replace(state, steps=(*state.steps[:-1], replace(state.steps[-1], summary=text)))
        written = None if query.final is None else await self._written(told, query.final, emit)
        is_late = query.final is not None and written is None
        if written is not None:
            step, choices = written
            state, text = advance(state, step), step.summary
            emit(step)
        wall_ms = (time.perf_counter() - started) * 1e3
        answer = finish(state, policy.name, "deadline" if is_late else reason, wall_ms=wall_ms, choices=choices)
        emit(replace(answer, text=text, degraded=answer.degraded or is_late))

    async def _written(self, state: QueryState, final: FinalCall, emit: Emit) -> tuple[StepRecord, tuple[Choice, ...]] | None:
        """Write the answer as the client wants it; None where the deadline passed first and the text so far is an answer too."""
        has_text = False

        def told(event: TextDelta) -> None:
            nonlocal has_text
            has_text = has_text or (not event.is_reasoning and bool(event.text.strip()))
            emit(event)

        try:
            return await FinalCaller(self.dispatcher, self.writer).write(state, told if state.query.is_streamed else None)
        except DeadlineError:
            if has_text or not final.may_be_text:
                raise
            return None

    async def _plan(self, state: QueryState, policy: Policy) -> StepPlan | Stop:
        """Ask the policy, waiting while no agent is up, until the deadline."""
        why = "the first step was still being planned"

        async def attempt() -> StepPlan | Stop:
            nonlocal why
            try:
                return await policy.next_step(state)
            except (NoAgentError, AgentUnavailableError) as error:
                why = f"no agent of the pool is up, or could be asked: {error}"
                raise

        try:
            async with asyncio.timeout(self.dispatcher.patience(state)):
                return await patiently(attempt)
        except TimeoutError:
            if state.summary:
                return Stop(reason="no_agent" if state.deadline_unix_s is None else "deadline")
            raise _no_contribution(state, why) from None

    async def _ask(self, state: QueryState, plan: StepPlan, emit: Emit) -> StepReplies:
        """Ask the planned agents. Raises BrokenStreamError, DeadlineError where the text that was handed on is no answer."""
        is_last_word = plan.ends_with is not None and plan.fold == "pass" and len(plan.activations) == 1
        is_heard, handed_on = state.query.is_streamed and state.query.final is None, list[str]()

        def words(event: TextDelta) -> None:
            handed_on.extend(() if event.is_reasoning else (event.text,))
            emit(event)

        asked = await self.dispatcher.ask(state, plan, words if is_last_word and is_heard else None, self.defence)
        if state.summary and "".join(handed_on).strip() and not contributions(asked.replies):
            raise _broken_off(state, asked.replies)
        return asked

    async def _step(self, state: QueryState, plan: StepPlan, asked: StepReplies, emit: Emit, started: float) -> _Stepped:
        """Fold what the agents contributed; the step's clock began with its planning."""
        counted, examiners = await self._defended(state, plan, asked.replies)
        usable = tuple(contributions(counted))
        if not usable and not state.summary and not self._goes_on(state, plan, asked.replies):
            raise _nothing_said(state, asked.replies, tuple(reply for _, reply in asked.explored))
        judgement = judge(plan.decision, counted, asked=state.asked) if plan.fold == "summarizer" else None
        fold = await self._fold(state, plan, usable, emit, judgement)
        replies = (*examiners, *(_judged(reply, judgement) for reply in counted))
        ranked = {activation.agent: i for i, activation in enumerate((*plan.activations, *plan.reserves))}
        active = sorted((reply.agent for reply in asked.replies if reply.status == "ok"), key=lambda name: ranked[name])
        step = StepRecord(
            step=len(state.steps),
            replies=(*replies, *(reply for _, reply in asked.explored)),
            active=tuple(active),
            explored=tuple((activation.agent, activation.propensity) for activation, _ in asked.explored),
            summary=fold.summary,
            summarizer=fold.record,
            mass=_mass(plan, active),
            wall_ms=(time.perf_counter() - started) * 1e3,
            decision=plan.decision,
            route=plan.route,
            right_probability=judgement.probability if judgement else None,
        )
        return step, fold, judgement

    async def _defended(
        self, state: QueryState, plan: StepPlan, replies: tuple[AgentReply, ...]
    ) -> tuple[tuple[AgentReply, ...], tuple[AgentReply, ...]]:
        """Return a step's replies, marked where the defence leaves them out, and those of the agents that examined them."""
        if plan.fold in ("pass", "keep"):
            return replies, ()
        if self.defence != "cross_examination":
            return barred(replies, self.defence, asked=state.asked), ()
        groups = examined_groups(replies, state.asked)
        left = self.dispatcher.calls_left(state, plan)
        if not groups or _spent(state, replies) or (left is not None and left < len(replies) + len(groups)):
            return replies, ()
        examination = StepPlan(
            activations=tuple(
                Activation(
                    agent=examiner, instruction=EXAMINE, history=(group[0].text,), max_tokens=EXAMINE_TOKENS, sample=number
                )
                for number, (examiner, group) in enumerate(groups)
            ),
            fold="keep",
        )
        self.dispatcher.check_recorded(state, examination, "summarizer.defence: 'cross_examination'")
        used = replace(state, tokens_used=state.tokens_used + sum(reply.usage.total for reply in replies))
        verdicts = (await self.dispatcher.ask(used, examination, None)).replies
        # Fewer than asked where what is left of a paced budget does not pay for the last ones.
        found_wrong = [group for (_, group), verdict in zip(groups, verdicts, strict=False) if is_refuted(verdict.text)]
        out = {id(reply) for group in found_wrong for reply in group} if len(found_wrong) < len(groups) else set()
        examiners = tuple(replace(x, status="examiner") if x.status == "ok" else x for x in verdicts)
        return tuple(replace(reply, is_barred=True) if id(reply) in out else reply for reply in replies), examiners

    async def _fold(
        self, state: QueryState, plan: StepPlan, usable: tuple[AgentReply, ...], emit: Emit, judgement: Judgement | None
    ) -> Fold:
        if plan.fold == "keep":
            usable = ()
        if not state.summary and not usable:
            return Fold(summary="", record=SummarizerRecord(mode="select", verdict="rule"), selection=None)
        if not usable or plan.fold == "pass":
            # Without a contribution the last summary stands, and it ended as it did.
            source = usable[0] if usable else state.steps[-1].summarizer
            text, ending = usable[0].text if usable else state.summary, source.finish_reason
            is_final = not usable or plan.ends_with is not None  # else the thought of one agent among others
            record = SummarizerRecord(
                mode="select", verdict="rule", reasoning=source.reasoning if is_final else "", finish_reason=ending
            )
            return Fold(summary=text, record=record, selection=None)
        leading, anchors = judgement.selection if judgement else None, anchors_of(plan.decision)

        def choose(replies: Sequence[AgentReply]) -> Selection | None:
            if plan.fold == "surest":
                return surest_contribution(replies, anchors)
            return leading or select_contribution(replies, anchors, asked=state.asked)

        writer = self.writer if plan.fold == "summarizer" else None
        folder = self.summarizer if plan.fold == "summarizer" else SelectSummarizer()
        sampling = self.dispatcher.sampling_for(state.query, writer.sampling if writer else Sampling(), is_final=True)
        fold = await folder.fold(state, usable, sampling, emit, choose)
        return fold if writer is None else replace(fold, record=priced(fold.record, writer.price))

    def _within_calls(self, state: QueryState, plan: StepPlan) -> StepPlan:
        """Return the plan with as many agents as the calls left allow, the summarizer's kept back; the others may stand in."""
        left = self.dispatcher.calls_left(state, plan)
        if left is None:
            return plan
        asked, cut = plan.activations[: max(1, left)], plan.activations[max(1, left) :]
        explored = plan.explored[: max(0, left - len(asked))]
        mass = sum(x.probability for x in asked) if cut and plan.decision is not None else plan.mass
        return replace(plan, activations=asked, reserves=(*cut, *plan.reserves), explored=explored, mass=mass)

    def _goes_on(self, state: QueryState, plan: StepPlan, replies: Sequence[AgentReply]) -> bool:
        """Tell whether a set schedule goes on after a step without a contribution: not its last one, and there is more to ask.

        Where all were lost that is another agent, within the time that a query is patient.
        """
        if plan.fold == "summarizer" or plan.ends_with is not None or state.query.stages:
            return False
        is_other_left = len({reply.agent for reply in replies}) < len(self.dispatcher.cards)
        is_early = time.time() < state.started_unix_s + PATIENCE_S
        return any(reply.status == "ok" for reply in replies) or (is_other_left and is_early)

    def _stop_reason(
        self, state: QueryState, step: StepRecord, fold: Fold, plan: StepPlan, previous: str, judgement: Judgement | None
    ) -> StopReason | None:
        """Apply the stopping rules to the step just finished, then the budgets."""
        usable = contributions([reply for reply in step.replies if reply.agent in step.active])
        rule: StopReason | None = None
        if usable and plan.ends_with:
            return plan.ends_with
        if state.query.stages and len(state.steps) == len(state.query.stages):
            return "stages"
        if usable and plan.fold == "summarizer" and not state.query.stages:
            rule = rule_stop(
                mode="select" if self.dispatcher.is_select else "llm",
                verdict=step.summarizer.verdict,
                active_replies=usable,
                selection=fold.selection,
                previous_summary=previous,
                theta=plan.decision.theta if plan.decision else None,
                anchors=anchors_of(plan.decision),
                judgement=judgement,
                asked=state.query.text,
            )
        return rule or _spent(state) or (None if usable or self._goes_on(state, plan, step.replies) else "no_agent")


def _spent(state: QueryState, more: Sequence[AgentReply] = ()) -> StopReason | None:
    """Return the budget of a query that is spent, with `more` replies than those of its steps."""
    limits = state.query.limits
    return budget_stop(
        step=len(state.steps),
        max_steps=limits.max_steps,
        tokens_used=state.tokens_used + sum(reply.usage.total for reply in more),
        budget_tokens=limits.budget_tokens,
        price_used=state.price_used + sum(reply.price or 0.0 for reply in more),
        budget_price=limits.budget_price,
        calls_used=state.calls_used + len(more),
        budget_calls=limits.budget_calls,
        is_paced=limits.within_steps,
        now=time.time(),
        deadline=state.deadline_unix_s,
    )


def begin(query: Query) -> QueryState:
    """Return the state of a query before its first step; its clock starts now."""
    now = time.time()
    deadline_s = query.limits.deadline_s
    return QueryState(query=query, started_unix_s=now, deadline_unix_s=None if deadline_s is None else now + deadline_s)


def advance(state: QueryState, step: StepRecord) -> QueryState:
    """Return the state after one more step."""
    return replace(state, steps=(*state.steps, step), tokens_used=state.tokens_used + step.usage.total)


def finish(state: QueryState, policy: str, reason: StopReason, *, wall_ms: float, choices: tuple[Choice, ...] = ()) -> Answer:
    """Return the answer: the newest summary, and what became of the query.

    Its finish reason is `length` only where the text itself was cut; which budget ended the query says `reason`.
    """
    decisions = [step.decision for step in state.steps if step.decision]
    last = decisions[-1] if decisions else None
    return Answer(
        trace_id=state.query.trace_id,
        text=state.summary,
        reasoning=state.steps[-1].summarizer.reasoning,
        policy=policy,
        stop_reason=reason,
        steps=state.steps,
        degraded=any(_has_lost(step) for step in state.steps) or any(decision.masked for decision in decisions),
        finish_reason="length" if state.steps[-1].summarizer.finish_reason == "length" else "stop",
        gate_version=last.gate_version if last else None,
        gate_trained=None if last is None else not is_untrained(last.gate_version),
        routed_by="ingress" if any(d.routed_by == "ingress" for d in decisions) else "router",
        wall_ms=wall_ms,
        choices=choices,
    )


def _judged(reply: AgentReply, judgement: Judgement | None) -> AgentReply:
    """Return a reply with the probability that it is right, where that is known."""
    right = judgement.right.get(reply.agent) if judgement else None
    return reply if right is None else replace(reply, right_probability=right)


def _has_lost(step: StepRecord) -> bool:
    """Tell whether a contribution that counts, or the summarizer, was lost; explored agents do not count."""
    explored = {name for name, _ in step.explored}
    replies = [reply for reply in step.replies if reply.agent not in explored]
    lost = any(reply.status in ("failed", "late", "overloaded", "cold") or reply.attempts > 1 for reply in replies)
    return lost or step.summarizer.error is not None


def _mass(plan: StepPlan, active: list[str]) -> float:
    """Probability of the agents that did contribute; the plan's own where nobody was lost."""
    if plan.decision is None or {a.agent for a in plan.activations} == set(active):
        return plan.mass
    probability = {a.agent: a.probability for a in (*plan.activations, *plan.reserves)}
    return sum(probability[name] for name in active)


def _no_answer(state: QueryState, policy: str, reason: StopReason) -> Exception:
    """Return why a query has no answer where its steps, if any, only prepared one, as a manager's or a recruiter's do."""
    if not state.steps:
        return RequestError(f"policy: {policy!r} stopped before any agent was asked; use another policy")
    asked = tuple(reply for step in state.steps for reply in step.replies)
    if not contributions(asked):
        return _nothing_said(replace(state, steps=()), asked)
    seen = f"policy {policy!r} was ended by {reason} after {len(asked)} calls, before an agent wrote an answer"
    return EmptyAnswerError(f"{seen}; allow more, or use a policy that answers at its first step", asked)


def _nothing_said(state: QueryState, replies: tuple[AgentReply, ...], explored: tuple[AgentReply, ...] = ()) -> Exception:
    """Return why the replies of a step, after those of `state`, are no answer; what all of them cost goes with it."""
    calls = (*(call for step in state.steps for call in step.calls), *replies, *explored)
    if any(reply.status == "ok" for reply in replies):
        is_thought = any(reply.reasoning and reply.finish_reason == "length" for reply in replies)
        why = f"{THOUGHT_ONLY}, and nothing else was said; raise max_tokens" if is_thought else EMPTY
        return EmptyAnswerError(why, calls)
    if replies and all(reply.status == "failed" and reply.finish_reason == "length" for reply in replies):
        return RequestError(f"messages: {replies[0].error}", param="messages", code="context_length_exceeded")
    reasons = "; ".join(f"{reply.agent}: {reply.status}, {reply.error}" for reply in replies)
    # What an engine itself says has failed does not pass by waiting.
    has_failed = bool(replies) and all(reply.status == "failed" and reply.engine for reply in replies)
    error = _no_contribution(state, reasons, "mend what failed, or ask again" if has_failed else "try again later")
    error.replies = calls
    if isinstance(error, NoAgentError):
        error.has_bug = any(reply.is_bug for reply in replies)
    return error


def _broken_off(state: QueryState, replies: tuple[AgentReply, ...]) -> Exception:
    """Return why a text that was handed on in part is no answer, and what was said before must not follow it."""
    last = replies[-1]
    if last.status == "late":
        return DeadlineError(f"the deadline of {state.query.limits.deadline_s} s passed in mid-stream; allow more time")
    return BrokenStreamError(f"agent {last.agent!r} was lost in mid-stream ({last.status}, {last.error}); ask again")


def _no_contribution(state: QueryState, why: str, advice: str = "try again later") -> DmoaError:
    # The event loop's timers may fire a clock tick before the wall clock gets there.
    if state.deadline_unix_s is not None and time.time() >= state.deadline_unix_s - _CLOCK_SLACK_S:
        seen = f"the deadline of {state.query.limits.deadline_s} s passed before any agent contributed ({why})"
        return DeadlineError(f"{seen}; allow more time")
    return NoAgentError(f"no agent of the pool answered ({why}); {advice}")
