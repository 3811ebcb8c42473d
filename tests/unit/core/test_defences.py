"""Defences: which contributions of a step a summarizer may read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dmoa.core.aggregate import contributions
from dmoa.core.defences import barred, defended, examined_groups, is_refuted
from dmoa.core.scores import raw_score
from dmoa.evaluation.answering import answered
from dmoa.evaluation.records import Task
from dmoa.policies.registry import build_policy
from dmoa.testing import (
    Fail,
    FakeAgents,
    Say,
    Schedule,
    answer_of,
    asks,
    decision,
    orchestrator_of,
    query,
    said,
)
from dmoa.trace import answer_of_reply, reply_dmoa
from dmoa.types import Defence, Price, Stage, StepPlan
from tests.unit.policies.schedules import context_of


def kept(defence: Defence, *answers: str, nats: tuple[float, ...] = ()) -> str:
    replies = [
        said(name, Say(text=f"The answer is {answer}.", nats=nats[number] if nats else 1.0))
        for number, (name, answer) in enumerate(zip("abcdef", answers, strict=False))
    ]
    return "".join(reply.agent for reply in defended(replies, defence))


@pytest.mark.parametrize(
    ("defence", "answers", "names"),
    [
        ("none", ("1", "1", "2"), "abc"),
        ("agreement", ("1", "2", "1", "3"), "ac"),
        ("agreement", ("1", "2", "1", "2"), "abcd"),  # neither has more
        ("agreement", ("1", "2", "3"), "abc"),
        ("agreement", ("1", "2"), "ab"),
        ("cluster_filter", ("1", "2", "1", "2", "3"), "abcd"),
        ("cluster_filter", ("1", "2", "3"), "abc"),
    ],
)
def test_answers_decide_who_is_read(defence: Defence, answers: tuple[str, ...], names: str) -> None:
    assert kept(defence, *answers) == names


@pytest.mark.parametrize(
    ("nats", "names"),
    [
        ((1.0, 1.1, 0.9, 0.001), "abc"),  # median 0.95, deviations 0.05, 0.15, 0.05, 0.949: 0.6745 x 0.949 / 0.1 is 6.4
        ((1.0, 1.1, 0.9, 0.7), "abcd"),  # 0.6745 x 0.25 / 0.1 is 1.7
        ((1.0, 1.0, 1.0, 0.0), "abc"),  # most are alike: a twentieth of the median, 0.6745 x 1 / 0.05 is 13.5
        ((1.0, 1.0, 1.0, 0.9), "abcd"),  # 0.6745 x 0.1 / 0.05 is 1.3
        ((0.0, 0.0, 0.0, 0.004), "abcd"),  # 0.6745 x 0.004 / 0.001 is 2.7
        ((1.0, 0.0), "ab"),
    ],
)
def test_an_entropy_far_from_the_others_is_left_out(nats: tuple[float, ...], names: str) -> None:
    assert kept("entropy_outlier", *("1" * len(nats)), nats=nats) == names


@pytest.mark.parametrize(
    ("answers", "nats", "names"),
    [
        # Of the 3 halves of two, {a, b} agree; {a, c} and {b, c} do not, and choose nothing.
        (("1", "1", "2"), (0.5, 0.5, 0.1), "ab"),
        (("1", "1", "2"), (0.5, 0.5, 0.9), "ab"),
        (("1", "1", "1", "2"), (0.5, 0.5, 0.5, 0.1), "abc"),  # as many halves hold the liar as do not
        (("1", "1", "2", "3", "4"), (0.5, 0.5, 0.6, 0.6, 0.1), "ab"),  # 3 of the 10 halves agree
        (("1", "1", "2", "2"), (0.5, 0.5, 0.6, 0.1), "cd"),  # of equals the surest
        # Of the 10 halves of three of five, three of one answer and two of another: 7 have two or more of the first.
        (("1", "1", "1", "2", "2"), (0.5, 0.5, 0.5, 0.1, 0.1), "abc"),
        (("1", "2", "3", "4"), (0.5, 0.4, 0.3, 0.6), "abcd"),  # nobody agrees with anybody: all stay, as with the others
    ],
)
def test_the_answer_of_most_halves_is_left(answers: tuple[str, ...], nats: tuple[float, ...], names: str) -> None:
    assert kept("dropout_cluster", *answers, nats=nats) == names


def test_many_contributions_are_dropped_by_draws_that_repeat() -> None:
    answers = ["1"] * 9 + ["2"] * 5
    replies = [said(f"a{i}", Say(text=f"The answer is {x}.")) for i, x in enumerate(answers)]
    assert [reply.agent for reply in defended(replies, "dropout_cluster")] == [f"a{i}" for i in range(9)]


@pytest.mark.parametrize("defence", ["agreement", "cluster_filter"])
def test_what_is_left_out_is_marked_and_counts_no_more(defence: Defence) -> None:
    lost = replace(said("d", Say(text="")), status="failed")
    replies = [*(said(name, Say(text=f"The answer is {n}.")) for name, n in zip("abc", "121", strict=True)), lost]
    found = barred(replies, defence)
    assert [(reply.agent, reply.is_barred) for reply in found] == [("a", False), ("b", True), ("c", False), ("d", False)]
    assert [reply.agent for reply in contributions(found)] == ["a", "c"]


@pytest.mark.parametrize(("defence", "is_read"), [("none", True), ("agreement", False)])
async def test_a_summarizer_does_not_read_who_was_left_out(defence: Defence, is_read: bool) -> None:
    fates = {"a": Say(text="The answer is 1."), "b": Say(text="The answer is 1."), "c": Say(text="The answer is 66.")}
    agents = FakeAgents(fates | {"summarizer": Say(text="FINAL\nThe answer is 1.")})
    orchestrator = orchestrator_of(agents, "abc", llm=True, defence=defence)
    answer = await answer_of(orchestrator, query(), Schedule(asks("a", "b", "c")))
    prompt = "".join(message.content for message in agents.calls[-1].messages)
    assert ("66" in prompt) is is_read
    assert answer.steps[0].active == ("a", "b", "c")


def sure_plan(*names: str, **changes: Any) -> StepPlan:
    """A gate's step that ends at once where a contribution is as sure as 0.2 nats."""
    return asks(*names, decision=decision(dict.fromkeys("abcd", 0.25), len(names), theta=raw_score(0.2), **changes))


@pytest.mark.parametrize(("defence", "stop"), [("none", "sure"), ("entropy_outlier", "max_steps")])
async def test_a_lie_that_is_left_out_is_neither_sure_nor_chosen(defence: Defence, stop: str) -> None:
    nats = {"a": 1.0, "b": 1.1, "c": 0.9, "d": 0.001}
    fates = {name: Say(text=f"The answer is {n}.", nats=nats[name]) for name, n in zip("abcd", "1234", strict=True)}
    orchestrator = orchestrator_of(FakeAgents(fates), "abcd", defence=defence)
    answer = await answer_of(orchestrator, query(max_steps=1), Schedule(sure_plan("a", "b", "c", "d")))
    assert answer.stop_reason == stop
    assert answer.text == ("The answer is 4." if defence == "none" else "The answer is 3.")


@pytest.mark.parametrize(("defence", "asked"), [("none", 4), ("entropy_outlier", 5)])
async def test_a_sure_lie_that_is_left_out_does_not_keep_the_step_from_asking_more(defence: Defence, asked: int) -> None:
    nats = {"a": 1.0, "b": 1.1, "c": 0.9, "d": 0.001, "e": 1.0}
    agents = FakeAgents({name: Say(text=f"The answer is {n}.", nats=value) for n, (name, value) in enumerate(nats.items())})
    plan = asks(*"abcd", reserves="e", decision=decision(dict.fromkeys("abcde", 0.2), 4, theta=raw_score(0.2), limit=5))
    await answer_of(orchestrator_of(agents, "abcde", defence=defence), query(max_steps=1), Schedule(plan))
    assert len(agents.calls) == asked


async def test_aggregators_and_votes_read_what_the_defence_leaves() -> None:
    words = {"a": "1", "b": "1", "c": "1", "d": "66"}
    agents = FakeAgents({name: tuple(Say(text=f"The answer is {n}.") for _ in range(2)) for name, n in words.items()})
    policy = build_policy("moa", replace(context_of("moa"), agent="layers=2"))
    answer = await answer_of(orchestrator_of(agents, "abcd", defence="agreement"), query(max_steps=4), policy)
    prompt = agents.calls[-1].messages[-1].content
    assert prompt.count("The answer is 1.") == 3
    assert "66" not in prompt
    assert [reply.is_barred for reply in answer.steps[0].replies] == [False, False, False, True]


def test_an_answer_is_examined_by_who_did_not_give_it() -> None:
    replies = [said(name, Say(text=f"The answer is {n}.")) for name, n in zip("abcd", "1213", strict=True)]
    found = [(examiner, "".join(reply.agent for reply in group)) for examiner, group in examined_groups(replies, "?")]
    # Who can examine 1: b or d; 2: a, c or d, the second of them; 3: a, b or c, the third.
    assert found == [("b", "ac"), ("c", "b"), ("c", "d")]
    assert examined_groups([replies[0], replies[2], replies[2]], "?") == []
    assert examined_groups(replies[:2], "?") == []


def test_a_verdict_is_its_last_word() -> None:
    words = {
        "WRONG": True,
        "right": False,
        "It is not RIGHT. Wrong!": True,
        "": False,
        "wrongly": False,
        "WRONG? No: RIGHT": False,
    }
    assert {text: is_refuted(text) for text in words} == words


@pytest.mark.parametrize(("verdict", "text"), [("WRONG", "The answer is 1."), ("RIGHT", "The answer is 2.")])
async def test_who_is_found_wrong_is_left_out_and_its_examiners_are_counted(verdict: str, text: str) -> None:
    # b examines the answer of a, and a that of b and c.
    fates = {
        "a": (Say(text="The answer is 1.", nats=1.0), Say(text=verdict)),
        "b": (Say(text="The answer is 2.", nats=0.5), Say(text="RIGHT")),
        "c": Say(text="The answer is 2.", nats=0.5),
    }
    agents = FakeAgents(fates)
    orchestrator = orchestrator_of(agents, "abc", defence="cross_examination")
    answer = await answer_of(orchestrator, query(max_steps=1), Schedule(asks("a", "b", "c")))
    assert [call.agent for call in agents.calls] == ["a", "b", "c", "b", "a"]
    assert "The answer is 2." in agents.calls[-1].messages[-1].content
    assert answer.text == text
    (step,) = answer.steps
    assert [(reply.agent, reply.status) for reply in step.replies][:2] == [("b", "examiner"), ("a", "examiner")]
    assert (step.active, len(step.calls)) == (("a", "b", "c"), 5)
    assert step.usage.total == sum(reply.usage.total for reply in step.replies)
    again = answer_of_reply(reply_dmoa(answer, with_texts=True), text=answer.text, finish_reason="stop", wall_ms=0.0).steps[0]
    assert again.active == step.active
    assert {(r.agent, r.status, r.is_barred) for r in again.replies} == {(r.agent, r.status, r.is_barred) for r in step.replies}
    line = answered(Task(row_id="r", benchmark="b", text="?"), "p", answer)
    assert line.calls == 5
    assert line.active == ((("a",),) if verdict == "WRONG" else (("a", "b", "c"),))


@pytest.mark.parametrize("limits", [{"budget_calls": 4}, {"budget_tokens": 42}, {"budget_price": 9.0}])
async def test_what_is_not_left_is_not_spent_to_examine(limits: dict[str, Any]) -> None:
    agents = FakeAgents({name: Say(text=f"The answer is {n}.") for name, n in zip("abc", "122", strict=True)})
    price = Price(prompt_per_1m=1e5, completion_per_1m=5e5)  # of a call of 10 + 4 tokens: 1 + 2
    orchestrator = orchestrator_of(agents, "abc", defence="cross_examination", price=price)
    answer = await answer_of(orchestrator, query(**limits), Schedule(asks("a", "b", "c")))
    assert len(agents.calls) == 3
    assert answer.text == "The answer is 2."


async def test_examinations_that_a_paced_budget_does_not_pay_for_are_left_out() -> None:
    """Three answers take 42 of 80 tokens and the first examination 34: another one would be too much."""
    answers = {"a": "The answer is 1.", "b": "The answer is 2.", "c": "The answer is 3."}
    fates = {name: (Say(text=text), Say(text="RIGHT", prompt_tokens=30)) for name, text in answers.items()}
    agents = FakeAgents(fates)
    orchestrator = orchestrator_of(agents, "abc", defence="cross_examination")
    answer = await answer_of(orchestrator, query(max_steps=1, budget_tokens=80, within_steps=True), Schedule(asks("a", "b", "c")))
    assert len(agents.calls) == 4
    assert answer.usage.total == 76
    assert answer.text == "The answer is 1."


async def test_an_examiner_that_is_lost_takes_no_active_agents_place_in_a_trace() -> None:
    answers = {"a": "The answer is 1.", "b": "The answer is 2.", "c": "The answer is 3."}
    fates = {name: (Say(text=text), Fail()) for name, text in answers.items()}
    orchestrator = orchestrator_of(FakeAgents(fates), "abc", defence="cross_examination")
    answer = await answer_of(orchestrator, query(max_steps=1), Schedule(asks("a", "b", "c")))
    again = answer_of_reply(reply_dmoa(answer, with_texts=True), text=answer.text, finish_reason="stop", wall_ms=0.0).steps[0]
    assert again.active == answer.steps[0].active == ("a", "b", "c")
    assert [(reply.agent, reply.status) for reply in again.replies][3:] == [("a", "failed"), ("b", "failed"), ("c", "failed")]


async def test_an_examiner_sees_the_answer_at_a_stage_that_shows_no_earlier_work() -> None:
    answers = {"a": "The answer is 1.", "b": "The answer is 2.", "c": "The answer is 3."}
    agents = FakeAgents({name: (Say(text=text), Say(text="RIGHT")) for name, text in answers.items()})
    asked = replace(query(), stages=(Stage(part="one?", has_history=False),))
    orchestrator = orchestrator_of(agents, "abc", defence="cross_examination")
    await answer_of(orchestrator, asked, Schedule(asks("a", "b", "c")))
    prompts = [call.messages[-1].content for call in agents.calls[3:]]
    assert [answer in prompt for answer, prompt in zip(answers.values(), prompts, strict=True)] == [True] * 3
