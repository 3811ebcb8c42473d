"""The step loop: why a query ends, what its answer says, in which order events come, and that closing it cancels."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from dmoa.errors import BrokenStreamError, DeadlineError, EmptyAnswerError, NoAgentError, RequestError, RoutingError
from dmoa.orchestrator import ANEW_S, begin
from dmoa.policies.baselines import SinglePolicy
from dmoa.testing import (
    Fail,
    FakeAgents,
    Hang,
    Lose,
    Refuse,
    Say,
    Schedule,
    answer_of,
    asks,
    decision,
    events_of,
    jumping,
    orchestrator_of,
    query,
)
from dmoa.types import Activation, Answer, FinishReason, QueryState, StepPlan, StepRecord, Stop, TextDelta


async def test_agreement_of_two_agents_ends_the_query() -> None:
    agents = FakeAgents({"a": Say(text="The answer is 19.", nats=0.9), "b": Say(text="19", nats=0.2)})
    answer = await answer_of(orchestrator_of(agents, "ab"), query(), Schedule(asks("a", "b")))
    assert (answer.stop_reason, answer.finish_reason, len(answer.steps)) == ("agreement", "stop", 1)
    assert answer.text == "19"  # in the surer agent's words
    assert not answer.degraded
    assert (answer.trace_id, answer.policy) == ("t1", "schedule")
    assert (answer.gate_version, answer.gate_trained) == (None, None)


async def test_one_agent_that_repeats_the_summary_ends_the_query() -> None:
    agents = FakeAgents({"a": (Say(text="12 + 7 = 18"), Say(text="The answer is 19."), Say(text="19"))})
    answer = await answer_of(orchestrator_of(agents, "a"), query(), Schedule(asks("a")))
    assert (answer.stop_reason, answer.finish_reason) == ("agreement", "stop")
    assert [step.summary for step in answer.steps] == ["12 + 7 = 18", "The answer is 19.", "19"]
    assert answer.text == "19"


@pytest.mark.parametrize(("slack", "reason", "num_steps"), [(1e-9, "sure", 1), (-1e-9, "max_steps", 4)])
async def test_a_sure_agent_ends_the_query_without_being_asked_again(slack: float, reason: str, num_steps: int) -> None:
    agents = FakeAgents({"a": Say(text="19", nats=0.5)})
    fitted = decision({"a": 1.0}, 1, theta=math.log(0.5 + 1e-3) - 2.0 + slack, anchors=(2.0,))
    answer = await answer_of(orchestrator_of(agents, "a"), query(max_steps=4), Schedule(asks("a", decision=fitted)))
    assert (answer.stop_reason, len(answer.steps)) == (reason, num_steps)


async def test_steps_run_out() -> None:
    agents = FakeAgents({"a": (Say(text="1"), Say(text="2"), Say(text="3"), Say(text="4"))})
    answer = await answer_of(orchestrator_of(agents, "a"), query(max_steps=3), Schedule(asks("a")))
    assert (answer.stop_reason, answer.finish_reason, answer.text) == ("max_steps", "stop", "3")


async def test_tokens_run_out() -> None:
    agents = FakeAgents({"a": (Say(text="1"), Say(text="2"), Say(text="3"))})  # 10 + 4 tokens a call
    answer = await answer_of(orchestrator_of(agents, "a"), query(budget_tokens=28), Schedule(asks("a")))
    assert (answer.stop_reason, answer.finish_reason, answer.text, len(answer.steps)) == ("budget_tokens", "stop", "2", 2)
    agents = FakeAgents({"a": (Say(text="1"), Say(text="2"), Say(text="3"), Say(text="4"))})
    answer = await answer_of(orchestrator_of(agents, "a"), query(budget_tokens=29), Schedule(asks("a")))
    assert len(answer.steps) == 3


async def test_time_runs_out_with_an_answer_so_far() -> None:
    agents = FakeAgents({"a": (Say(text="1"), Hang())})
    answer = await answer_of(orchestrator_of(agents, "a"), query(deadline_s=0.3), Schedule(asks("a")))
    assert (answer.stop_reason, answer.finish_reason, answer.text) == ("deadline", "stop", "1")
    assert [reply.status for reply in answer.steps[1].replies] == ["late"]
    assert answer.steps[1].active == ()
    assert answer.steps[1].summary == "1"
    assert answer.degraded
    assert agents.cancelled == ["a"]


async def test_what_came_in_time_counts() -> None:
    agents = FakeAgents({"a": Hang(), "b": Say(text="2")})
    answer = await answer_of(orchestrator_of(agents, "ab"), query(deadline_s=0.3), Schedule(asks("a", "b")))
    assert (answer.stop_reason, answer.text) == ("deadline", "2")
    assert {reply.agent: reply.status for reply in answer.steps[0].replies} == {"a": "late", "b": "ok"}
    assert answer.steps[0].active == ("b",)


async def test_time_runs_out_before_any_contribution() -> None:
    agents = FakeAgents({"a": Hang()})
    with pytest.raises(DeadlineError, match=r"the deadline of 0\.05 s passed before any agent contributed \(a: late"):
        await events_of(orchestrator_of(agents, "a"), query(deadline_s=0.05), Schedule(asks("a")))
    assert agents.cancelled == ["a"]


@pytest.mark.parametrize("limits", [{}, {"max_steps": 1}, {"budget_tokens": 1}])
async def test_a_single_agent_answers_once(limits: dict[str, int]) -> None:
    agents = FakeAgents({"a": Say(text="19"), "b": Say(text="20")})
    answer = await answer_of(orchestrator_of(agents, "ab"), query(**limits), SinglePolicy(agent="a", stand_ins=("a", "b")))
    assert (answer.stop_reason, answer.finish_reason, answer.text, len(answer.steps)) == ("single", "stop", "19", 1)
    assert [call.agent for call in agents.calls] == ["a"]
    assert answer.steps[0].summarizer.mode == "select"


async def test_nobody_left_after_an_earlier_summary() -> None:
    agents = FakeAgents({"a": (Say(text="1"), Fail())})
    answer = await answer_of(orchestrator_of(agents, "a"), query(), Schedule(asks("a")))
    assert (answer.stop_reason, answer.finish_reason, answer.text, answer.degraded) == ("no_agent", "stop", "1", True)


async def test_the_summarizer_says_when() -> None:
    verdicts = (Say(text="CONTINUE\n12 + 7"), Say(text="Final.\n18"), Say(text="FINAL\nIt is 19."))
    agents = FakeAgents({"a": Say(text="19"), "b": Say(text="19"), "summarizer": verdicts})
    answer = await answer_of(orchestrator_of(agents, "ab", llm=True), query(), Schedule(asks("a", "b")))
    assert (answer.stop_reason, answer.finish_reason, answer.text) == ("summarizer", "stop", "It is 19.")
    assert [step.summarizer.verdict for step in answer.steps] == ["continue", "unparsable", "final"]
    assert [step.summary for step in answer.steps] == ["12 + 7", "Final.\n18", "It is 19."]
    assert {step.summarizer.mode for step in answer.steps} == {"llm"}


async def test_a_query_that_is_done_is_not_cut_short() -> None:
    agents = FakeAgents({"a": Say(text="19"), "b": Say(text="19"), "summarizer": Say(text="FINAL\n19")})
    for llm, reason in ((False, "agreement"), (True, "summarizer")):
        spent = query(max_steps=1, budget_tokens=1)
        answer = await answer_of(orchestrator_of(agents, "ab", llm=llm), spent, Schedule(asks("a", "b")))
        assert (answer.stop_reason, answer.finish_reason) == (reason, "stop")


async def test_a_policy_may_stop() -> None:
    agents = FakeAgents({"a": Say(text="1")})
    answer = await answer_of(orchestrator_of(agents, "a"), query(), Schedule(asks("a"), Stop(reason="single")))
    assert (answer.stop_reason, answer.text) == ("single", "1")


async def test_a_policy_that_stops_at_once_gives_no_empty_answer() -> None:
    with pytest.raises(RequestError, match="'schedule' stopped before any agent was asked"):
        await events_of(orchestrator_of(FakeAgents({}), ()), query(), Schedule(Stop(reason="single")))


async def test_blank_contributions_are_no_answer() -> None:
    agents = FakeAgents({"a": Say(text=" \n"), "b": Fail()})
    with pytest.raises(EmptyAnswerError, match="every contribution was empty"):
        await events_of(orchestrator_of(agents, "ab"), query(), Schedule(asks("a", "b")))


async def test_agents_agree_by_what_the_query_asks_for() -> None:
    """Without regard to capitals a and b would agree, and the first step would end the query."""
    agents = FakeAgents({"a": Say(text="Answer: 'aB'"), "b": (Say(text="Answer: 'ab'"), Say(text="Answer: 'aB'"))})
    asked = replace(query(), text="def f(s): return s\nassert f('aB') == ??")
    answer = await answer_of(orchestrator_of(agents, "ab"), asked, Schedule(asks("a", "b")))
    assert (answer.stop_reason, len(answer.steps), answer.text) == ("agreement", 2, "Answer: 'aB'")


async def test_failures_everywhere_are_named() -> None:
    agents = FakeAgents({"a": Fail(error="out of memory"), "b": Refuse()})
    with pytest.raises(NoAgentError, match=r"a: failed, out of memory; b: overloaded, agent 'b': its queue is full"):
        await events_of(orchestrator_of(agents, "ab"), query(), Schedule(asks("a", "b")))


async def test_an_error_that_ends_a_query_says_what_its_calls_took() -> None:
    """The first step only prepares (`keep`): 10 and 4 tokens for nothing, as all of the second step fail."""
    agents = FakeAgents({"a": (Say(text="plan"), Fail()), "b": Fail()})
    policy = Schedule(asks("a", fold="keep"), asks("a", "b"))
    with pytest.raises(NoAgentError) as found:
        await events_of(orchestrator_of(agents, "ab"), query(), policy)
    assert [(call.agent, call.usage.total) for call in found.value.replies] == [("a", 14), ("a", 0), ("b", 0)]  # type: ignore[attr-defined]


async def test_a_broken_gate_stops_the_query() -> None:
    with pytest.raises(RoutingError, match="no such gate"):
        await events_of(orchestrator_of(FakeAgents({}), ()), query(), Schedule(RoutingError("no such gate")))


def test_a_query_waits_while_no_agent_is_up() -> None:
    async def work() -> Answer:
        agents = FakeAgents({"a": (Say(text="1"), Say(text="1"))})
        policy = Schedule(*[NoAgentError("masked")] * 3, asks("a"))
        return await answer_of(orchestrator_of(agents, "a"), query(), policy)

    answer, waited_s = jumping(work())
    assert answer.stop_reason == "agreement"
    assert waited_s == pytest.approx(0.05 + 0.1 + 0.2)


def test_patience_ends_after_a_minute() -> None:
    async def without_a_summary() -> None:
        with pytest.raises(NoAgentError, match="no agent of the pool is up"):
            await events_of(orchestrator_of(FakeAgents({}), ()), query(), Schedule(NoAgentError("masked")))

    async def with_a_summary() -> Answer:
        agents = FakeAgents({"a": Say(text="1")})
        return await answer_of(orchestrator_of(agents, "a"), query(), Schedule(asks("a"), NoAgentError("masked")))

    _, waited_s = jumping(without_a_summary())
    assert waited_s == pytest.approx(60.0)
    answer, waited_s = jumping(with_a_summary())
    assert (answer.stop_reason, answer.finish_reason, answer.text) == ("no_agent", "stop", "1")
    assert waited_s == pytest.approx(60.0)


async def test_a_deadline_ends_the_wait_for_agents() -> None:
    with pytest.raises(DeadlineError, match="no agent of the pool is up"):
        await events_of(orchestrator_of(FakeAgents({}), ()), query(deadline_s=0.05), Schedule(NoAgentError("masked")))


async def test_a_deadline_that_ends_the_planning_is_no_word_on_the_agents() -> None:
    class Slow(Schedule):
        async def next_step(self, state: QueryState) -> StepPlan | Stop:
            await asyncio.Event().wait()
            raise AssertionError("never planned")

    for deadline_s in (0.0, 0.05):
        with pytest.raises(DeadlineError) as caught:
            await events_of(orchestrator_of(FakeAgents({"a": Say(text="1")}), "a"), query(deadline_s=deadline_s), Slow())
        assert "agent of the pool is up" not in str(caught.value)
        assert f"the deadline of {deadline_s} s passed before any agent contributed" in str(caught.value)


@pytest.mark.parametrize(("ending", "expected"), [("stop", "stop"), ("length", "length")])
async def test_an_answer_that_was_cut_off_says_so(ending: FinishReason, expected: str) -> None:
    says = Say(text="The answer is 19.", finish_reason=ending)
    agents = FakeAgents({"a": says, "b": replace(says, nats=0.9), "summarizer": replace(says, text="FINAL\n19")})
    for orchestrator, policy in (
        (orchestrator_of(agents, "a"), SinglePolicy(agent="a")),
        (orchestrator_of(agents, "ab"), Schedule(asks("a", "b"))),
        (orchestrator_of(agents, "ab", llm=True), Schedule(asks("b"))),
    ):
        answer = await answer_of(orchestrator, query(), policy)
        assert answer.stop_reason in ("single", "agreement", "summarizer")
        assert answer.finish_reason == expected


@pytest.mark.parametrize(("ending", "expected"), [("stop", "stop"), ("length", "length")])
async def test_a_summary_that_stands_ended_as_it_did(ending: FinishReason, expected: str) -> None:
    agents = FakeAgents({"a": (Say(text="1", finish_reason=ending), Fail())})
    for policy in (Schedule(asks("a")), Schedule(asks("a", fold="pass"))):
        answer = await answer_of(orchestrator_of(agents, "a"), query(), policy)
        assert (answer.stop_reason, answer.finish_reason, answer.text) == ("no_agent", expected, "1")
        agents = FakeAgents({"a": (Say(text="1", finish_reason=ending), Fail())})
    agents = FakeAgents({"a": (Say(text="1", finish_reason=ending), Say(text="2", finish_reason=ending))})
    answer = await answer_of(orchestrator_of(agents, "a"), query(max_steps=2), Schedule(asks("a")))
    assert (answer.stop_reason, answer.finish_reason, answer.text) == ("max_steps", expected, "2")


async def test_events_of_a_selecting_pool_are_steps_then_the_answer() -> None:
    agents = FakeAgents({"a": (Say(text="1", pieces=("1",)), Say(text="2"), Say(text="2"))})
    events = await events_of(orchestrator_of(agents, "a"), query(), Schedule(asks("a")))
    assert [type(event) for event in events] == [StepRecord, StepRecord, StepRecord, Answer]
    assert agents.streamed == []


async def test_the_one_call_of_a_single_policy_streams() -> None:
    agents = FakeAgents({"a": Say(text="It is 19.", pieces=("It ", "is 19."))})
    events = await events_of(orchestrator_of(agents, "a"), query(), SinglePolicy(agent="a"))
    assert events[:2] == [TextDelta(text="It "), TextDelta(text="is 19.")]
    assert [type(event) for event in events[2:]] == [StepRecord, Answer]


async def test_only_the_final_summary_streams_without_its_verdict() -> None:
    verdicts = (Say(text="CONTINUE\n18", pieces=("CON", "TINUE\n", "18")), Say(text="FINAL\n19", pieces=("FIN", "AL\n1", "9")))
    agents = FakeAgents({"a": Say(text="19"), "summarizer": verdicts})
    events = await events_of(orchestrator_of(agents, "a", llm=True), query(), Schedule(asks("a")))
    assert [type(event) for event in events] == [StepRecord, TextDelta, TextDelta, StepRecord, Answer]
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["1", "9"]


@pytest.mark.parametrize(("deadline_s", "streamed"), [(None, []), (60.0, ["summarizer"])])
async def test_calls_of_a_query_that_nobody_reads_along_with_do_not_stream(deadline_s: float | None, streamed: list[str]) -> None:
    """A summarizer under a deadline streams all the same: what it has written by then may be the answer."""
    agents = FakeAgents({"a": Say(text="19", pieces=("1", "9")), "summarizer": Say(text="FINAL\n19", pieces=("FINAL\n", "19"))})
    asked = replace(query(deadline_s=deadline_s), is_streamed=False)
    events = await events_of(orchestrator_of(agents, "a"), asked, SinglePolicy(agent="a"))
    assert [type(event) for event in events] == [StepRecord, Answer]
    answer = await answer_of(orchestrator_of(agents, "a", llm=True), asked, Schedule(asks("a")))
    assert (answer.text, answer.stop_reason) == ("19", "summarizer")
    assert agents.streamed == streamed


TWO_STEPS = (asks("a", fold="vote"), asks("b", reserves="c", fold="pass", ends_with="schedule"))


async def test_a_text_that_was_streamed_in_part_is_not_taken_for_an_answer_of_before() -> None:
    agents = FakeAgents({"a": Say(text="18"), "b": Fail(pieces=("It ", "is")), "c": Say(text="19")})
    events = orchestrator_of(agents, "abc").answer(query(), Schedule(*TWO_STEPS))
    seen = [await anext(events) for _ in range(3)]
    assert [event.text for event in seen if isinstance(event, TextDelta)] == ["It ", "is"]
    with pytest.raises(BrokenStreamError, match=r"agent 'b' was lost in mid-stream \(failed, out of memory\)"):
        await anext(events)
    # Where nobody reads along the next agent stands in.
    answer = await answer_of(orchestrator_of(agents, "abc"), replace(query(), is_streamed=False), Schedule(*TWO_STEPS))
    assert answer.text == "19"


async def test_a_deadline_in_mid_stream_is_no_answer_of_before() -> None:
    agents = FakeAgents({"a": Say(text="18"), "b": Hang(pieces=("It ", "is"))})
    with pytest.raises(DeadlineError, match="passed in mid-stream"):
        await events_of(orchestrator_of(agents, "abc"), query(deadline_s=0.2), Schedule(*TWO_STEPS))


async def test_a_step_that_passes_but_does_not_end_is_not_streamed() -> None:
    agents = FakeAgents({"a": Say(text="1"), "b": Say(text="2")})
    policy = Schedule(asks("a", fold="pass"), asks("b", fold="pass", ends_with="single"))
    events = await events_of(orchestrator_of(agents, "ab"), query(), policy)
    assert [type(event) for event in events] == [StepRecord, TextDelta, StepRecord, Answer]
    assert agents.streamed == ["b"]


async def test_tokens_of_agents_and_summarizer_add_up() -> None:
    agents = FakeAgents(
        {
            "a": Say(text="1", tokens=3, prompt_tokens=10),
            "b": Say(text="2", tokens=5, prompt_tokens=11),
            "summarizer": (Say(text="CONTINUE\n1", tokens=7, prompt_tokens=20), Say(text="FINAL\n1", tokens=8, prompt_tokens=30)),
        }
    )
    policy = Schedule(asks("a", "b"))
    answer = await answer_of(orchestrator_of(agents, "ab", llm=True), query(), policy)
    assert [state.tokens_used for state in policy.states] == [0, 10 + 3 + 11 + 5 + 20 + 7]
    assert [step.summarizer.usage.completion_tokens for step in answer.steps] == [7, 8]
    assert [step.summarizer.usage.prompt_tokens for step in answer.steps] == [20, 30]


async def test_history_grows_at_its_end_and_consecutive_prompts_share_their_prefix() -> None:
    agents = FakeAgents({"a": (Say(text="1"), Say(text="2"), Say(text="3")), "b": Fail()})
    policy = Schedule(asks("a", "b"))
    await answer_of(orchestrator_of(agents, "ab"), replace(query(max_steps=3), system="Be kind."), policy)
    histories = [state.history for state in policy.states]
    assert histories == [(), ("1",), ("1", "2")]
    opening = {call.messages[:-1] for call in agents.calls}
    assert len(opening) == 1  # one system text for every agent of every step
    # The role is the last paragraph; all before it is shared within a step and is the beginning of the next step's.
    shared = [
        {call.messages[-1].content.rpartition("\n\n")[0] for call in agents.calls if call.step == step} for step in range(3)
    ]
    assert [len(texts) for texts in shared] == [1, 1, 1]
    first, second, third = (texts.pop() for texts in shared)
    assert first == "What is 12 + 7?"
    assert second.startswith(first)
    assert third.startswith(second)
    assert len(first) < len(second) < len(third)
    roles = {call.agent: call.messages[-1].content.rpartition("\n\n")[2] for call in agents.calls}
    assert "You are a." in roles["a"]
    assert "You are b." in roles["b"]


async def test_closing_the_iterator_cancels_the_calls_in_flight() -> None:
    agents = FakeAgents({"a": (Say(text="1"), Hang()), "b": (Say(text="2"), Hang()), "c": Say(text="3")})
    events = orchestrator_of(agents, "abc").answer(query(), Schedule(asks("a", "b", "c")))
    assert isinstance(await anext(events), StepRecord)
    await agents.until_waiting("a", "b")
    await events.aclose()  # type: ignore[attr-defined]  # it is a generator
    assert sorted(agents.cancelled) == ["a", "b"]


async def test_cancelling_the_reader_cancels_the_calls_in_flight() -> None:
    agents = FakeAgents({"a": Hang(), "b": Hang(), "summarizer": Hang(pieces=("FINAL\n",))})
    reader = asyncio.create_task(events_of(orchestrator_of(agents, "ab"), query(), Schedule(asks("a", "b"))))
    await agents.until_waiting("a", "b")
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert sorted(agents.cancelled) == ["a", "b"]
    agents = FakeAgents({"a": Say(text="1"), "summarizer": Hang(pieces=("FINAL\n",))})
    reader = asyncio.create_task(events_of(orchestrator_of(agents, "a", llm=True), query(), Schedule(asks("a"))))
    await agents.until_waiting("summarizer")
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert agents.cancelled == ["summarizer"]


async def test_an_error_ends_the_iterator_without_an_answer() -> None:
    agents = FakeAgents({"a": Fail()})
    events = orchestrator_of(agents, "a").answer(query(), Schedule(asks("a")))
    with pytest.raises(NoAgentError):
        await anext(events)
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_a_stand_in_changes_the_mass_and_degrades_the_answer() -> None:
    probabilities = {"a": 0.5, "b": 0.3, "c": 0.2}
    plan = asks("a", "b", reserves=("c",))
    plan = replace(
        plan,
        activations=tuple(replace(x, probability=probabilities[x.agent]) for x in plan.activations),
        reserves=tuple(replace(x, probability=probabilities[x.agent]) for x in plan.reserves),
        mass=0.8,
        decision=decision(probabilities, 2),
    )
    agents = FakeAgents({"a": Fail(), "b": Say(text="19"), "c": Say(text="19")})
    answer = await answer_of(orchestrator_of(agents, "abc"), query(), Schedule(plan))
    assert answer.steps[0].active == ("b", "c")
    assert answer.steps[0].mass == pytest.approx(0.3 + 0.2)
    assert answer.degraded
    agents = FakeAgents({"a": Say(text="19"), "b": Say(text="19")})
    answer = await answer_of(orchestrator_of(agents, "abc"), query(), Schedule(plan))
    assert (answer.steps[0].mass, answer.degraded) == (0.8, False)
    assert (answer.gate_version, answer.gate_trained, answer.routed_by) == ("v1", True, "router")


async def test_the_mass_is_that_of_whom_a_budget_of_calls_left_in_the_step() -> None:
    chance = {"a": 0.5, "b": 0.3, "c": 0.2}
    activations = tuple(Activation(agent=name, probability=chance[name]) for name in "ab")
    plan = StepPlan(activations=activations, mass=0.8, decision=decision(chance, 2))
    agents = FakeAgents({"a": Say(text="19"), "b": Say(text="19")})
    answer = await answer_of(orchestrator_of(agents, "abc"), query(budget_calls=1), Schedule(plan))
    assert (answer.steps[0].active, answer.steps[0].mass) == (("a",), 0.5)


async def test_the_answer_says_what_the_gate_was() -> None:
    agents = FakeAgents({"a": (Say(text="1"), Say(text="1"))})
    masked = decision({"a": 1.0, "b": 0.0}, 1, masked=("b",), gate_version="untrained-7")
    local = decision({"a": 1.0, "b": 0.0}, 1, routed_by="ingress", gate_version="untrained-7")
    policy = Schedule(asks("a", decision=masked), asks("a", decision=local))
    answer = await answer_of(orchestrator_of(agents, "ab"), query(), policy)
    assert answer.degraded  # an agent was masked
    assert (answer.gate_version, answer.gate_trained, answer.routed_by) == ("untrained-7", False, "ingress")


class Successive:
    """A policy that plans something else whenever it is asked."""

    name = "successive"

    def __init__(self, *plans: StepPlan) -> None:
        self._plans = iter(plans)

    async def next_step(self, state: QueryState) -> StepPlan:
        return next(self._plans)


def test_a_step_whose_agents_died_is_decided_anew_once_another_is_back() -> None:
    """Its record has the decision that was followed, and who was lost before it."""

    async def work() -> Answer:
        agents = FakeAgents({"a": (Lose(error="node lost"), Hang()), "b": Say(text="2")})
        first = decision({"a": 1.0, "b": 0.0}, 1, masked=("b",), gate_version="v1")
        again = decision({"a": 0.0, "b": 1.0}, 1, masked=("a",), gate_version="v2")
        policy = Successive(asks("a", decision=first), asks("b", decision=again))
        orchestrator = orchestrator_of(agents, "ab", places={"a": "1", "b": "2"})
        return await answer_of(orchestrator, query(max_steps=1), policy)

    answer, waited_s = jumping(work())
    (step,) = answer.steps
    assert (answer.text, answer.gate_version, step.active) == ("2", "v2", ("b",))
    assert [(reply.agent, reply.status, reply.error) for reply in step.replies] == [
        ("a", "failed", "node lost"),
        ("b", "ok", None),
    ]
    assert waited_s == pytest.approx(ANEW_S)


async def test_a_lost_summarizer_falls_back_and_degrades_the_answer() -> None:
    agents = FakeAgents({"a": (Say(text="18"), Say(text="19")), "summarizer": (Lose(error="no GPU"), Say(text="FINAL\n19"))})
    answer = await answer_of(orchestrator_of(agents, "a", llm=True), query(), Schedule(asks("a")))
    assert [step.summary for step in answer.steps] == ["18", "19"]
    assert [step.summarizer.error for step in answer.steps] == ["no GPU", None]
    assert answer.degraded


async def test_a_summarizer_that_never_answers_does_not_outlive_the_deadline() -> None:
    agents = FakeAgents({"a": Say(text="18"), "summarizer": Hang()})
    answer = await answer_of(orchestrator_of(agents, "a", llm=True), query(deadline_s=0.3), Schedule(asks("a")))
    assert (answer.stop_reason, answer.text) == ("deadline", "18")
    assert answer.steps[0].summarizer.error == "the deadline passed before the summary"
    assert agents.cancelled == ["summarizer"]


def test_the_clock_of_a_query_begins_with_it() -> None:
    state = begin(query(deadline_s=2.5))
    assert state.deadline_unix_s == state.started_unix_s + 2.5
    assert (state.steps, state.tokens_used, state.summary, state.history) == ((), 0, "", ())
    assert begin(query()).deadline_unix_s is None
    assert begin(query(deadline_s=0.0)).deadline_unix_s is not None


@pytest.mark.parametrize("llm", [False, True])
async def test_a_querys_limit_on_replies_holds_for_every_call_and_never_raises_one(llm: bool) -> None:
    agents = FakeAgents({"a": Say(text="It is 19."), "summarizer": Say(text="FINAL\n19")})
    orchestrator = orchestrator_of(agents, "a", llm=llm)
    for most, expected in ((20, 20), (60, 50)):  # the agents' own limit is 50
        await answer_of(orchestrator, query(max_steps=1, max_tokens=most), Schedule(asks("a")))
        assert agents.calls_of("a")[-1].sampling.max_tokens == expected
    if llm:
        assert [call.sampling.max_tokens for call in agents.calls_of("summarizer")] == [20, 60]  # its own limit is 70
