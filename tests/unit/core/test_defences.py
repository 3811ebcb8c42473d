"""Defences: which contributions of a step a summarizer may read."""

from __future__ import annotations

import pytest

from dmoa.core.aggregate import defended
from dmoa.testing import FakeAgents, Say, Schedule, answer_of, asks, orchestrator_of, query, said
from dmoa.types import Defence


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
        ((1.0, 1.0, 1.0, 0.0), "abcd"),  # no spread to measure by
        ((1.0, 0.0), "ab"),
    ],
)
def test_an_entropy_far_from_the_others_is_left_out(nats: tuple[float, ...], names: str) -> None:
    assert kept("entropy_outlier", *("1" * len(nats)), nats=nats) == names


@pytest.mark.parametrize(("defence", "is_read"), [("none", True), ("agreement", False)])
async def test_a_summarizer_does_not_read_who_was_left_out(defence: Defence, is_read: bool) -> None:
    fates = {"a": Say(text="The answer is 1."), "b": Say(text="The answer is 1."), "c": Say(text="The answer is 66.")}
    agents = FakeAgents(fates | {"summarizer": Say(text="FINAL\nThe answer is 1.")})
    orchestrator = orchestrator_of(agents, "abc", llm=True, defence=defence)
    answer = await answer_of(orchestrator, query(), Schedule(asks("a", "b", "c")))
    prompt = "".join(message.content for message in agents.calls[-1].messages)
    assert ("66" in prompt) is is_read
    assert answer.steps[0].active == ("a", "b", "c")
