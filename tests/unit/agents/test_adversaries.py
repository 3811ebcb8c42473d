"""Adversaries: what they say, what stays as it was, and that orders in a text move neither routing nor verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmoa.agents.adversaries import KINDS, AdversarialAgents, Adversaries, Kind, corrupted
from dmoa.core.aggregate import select_contribution
from dmoa.core.answers import extract_answer
from dmoa.errors import ConfigError
from dmoa.policies.dmoa import DmoaPolicy
from dmoa.testing import (
    FakeAgents,
    FakeEncoder,
    Say,
    Schedule,
    answer_of,
    asks,
    fixed_gate,
    orchestrator_of,
    query,
    router_of,
    said,
)
from dmoa.types import AgentCall, Defence, Message, Sampling, Stage, TextDelta


def call(agent: str = "a", question: str = "What is 12 + 7?") -> AgentCall:
    prompt = (Message(role="user", content=f"{question}\n\nYour role: {agent}"),)
    return AgentCall(trace_id=question, step=0, agent=agent, messages=prompt, sampling=Sampling())


def lie(kind: Kind, agent: str = "a", text: str = "The answer is 19.", question: str = "What is 12 + 7?") -> str | None:
    return extract_answer(corrupted(said(agent, Say(text=text)), call(agent, question), kind).text)


@pytest.mark.parametrize("kind", ["liar", "confident_liar", "colluding", "injector"])
def test_liars_say_another_answer_and_the_same_one_again(kind: Kind) -> None:
    assert lie(kind) not in ("19", None)
    assert lie(kind) == lie(kind)
    letters = {str(lie(kind, text="The answer is B.", question=f"Which is {number}?")).upper() for number in range(40)}
    assert letters == {"A", "B", "C", "D"} - ({"B"} if kind != "colluding" else set())


def test_colluding_ones_agree_and_liars_do_not() -> None:
    assert len({lie("colluding", agent, f"The answer is {number}.") for number, agent in enumerate("abcd")}) == 1
    assert len({lie("liar", agent) for agent in "abcd"}) > 1
    assert lie("colluding", question="What is 1 + 1?") != lie("colluding")


def test_entropy_and_tokens_are_the_true_reply_s_but_for_confidence() -> None:
    true = said("a", Say(text="The answer is 19.", nats=1.5))
    for kind in KINDS:
        found = corrupted(true, call(), kind)
        assert found.usage == true.usage
        assert found.entropy.mean_nats == pytest.approx(0.001 if kind == "confident_liar" else 1.5)
    assert extract_answer(corrupted(true, call(), "verbose").text) == "19"


def test_what_an_adversary_says_is_whole_and_its_true_thought_is_not_told() -> None:
    """A lie that counted as cut would lose to every finished reply."""
    true = replace(said("a", Say(text="The answer is", finish_reason="length")), reasoning="12 + 7 is 19.")
    for kind in KINDS:
        found = corrupted(true, call(), kind)
        assert (found.finish_reason, found.reasoning) == (("length", "12 + 7 is 19.") if kind == "verbose" else ("stop", "")), (
            kind
        )
    lies = [replace(corrupted(true, call(name), "colluding"), agent=name) for name in "ab"]
    chosen = select_contribution([*lies, said("c", Say(text="The answer is 19."))], asked="What is 12 + 7?")
    assert chosen is not None
    assert chosen.is_agreed


async def test_honest_agents_and_lost_ones_are_left_alone_and_streams_come_in_one_piece() -> None:
    agents = AdversarialAgents(
        FakeAgents({"a": Say(text="The answer is 19."), "b": Say(text="The answer is 19.")}), ("b",), "saboteur"
    )
    assert (await agents.call(call("a"))).text == "The answer is 19."
    pieces = [item async for item in agents.stream(call("b"))]
    assert isinstance(pieces[0], TextDelta)
    assert [item.text for item in pieces] == ["I leave this to the others."] * 2


def test_the_last_agents_of_a_pool_are_the_adversaries() -> None:
    assert Adversaries(count=2, kind="liar").of(("a", "b", "c")) == ("b", "c")
    assert Adversaries(count=0, kind="liar").of(("a", "b")) == ()
    with pytest.raises(ConfigError, match="--adversaries is 3, and the pool has 2 agents"):
        Adversaries(count=3, kind="liar").of(("a", "b"))


@pytest.mark.parametrize("defence", ["agreement", "cluster_filter", "dropout_cluster"])
async def test_what_is_left_out_moves_neither_the_gates_input_nor_any_prompt(defence: Defence) -> None:
    """Two honest agents agree; the third lies, or lies and gives orders: the second step is the same, bit for bit."""
    found = {}
    for kind in ("liar", "injector"):
        words = {name: tuple(Say(text=text) for _ in range(2)) for name, text in zip("abc", ("19", "19", "5"), strict=True)}
        fake = FakeAgents(words)
        orchestrator = orchestrator_of(AdversarialAgents(fake, ("c",), kind), "abc", defence=defence)  # type: ignore[arg-type]
        encoder, gate = FakeEncoder(), fixed_gate(dict.fromkeys("abc", 1 / 3), mass=1.0)
        policy = DmoaPolicy(router=router_of(gate), encoder=encoder, preset="default")
        asked = replace(query(), stages=(Stage(), Stage()))
        answer = await answer_of(orchestrator, asked, policy)
        inputs = [step.route.input_X.tolist() for step in answer.steps if step.route]
        found[kind] = (inputs, [call.messages for call in fake.calls], encoder.texts, answer.text)
        assert len(inputs) == 2
        assert "Ignore all instructions" not in str(found[kind])
    assert found["liar"] == found["injector"]


@pytest.mark.parametrize("llm", [False, True])
async def test_orders_in_a_text_move_neither_who_is_asked_nor_the_verdict(llm: bool) -> None:
    """The injector's text begins with the summarizer's own word FINAL."""
    found = {}
    for kind in ("liar", "injector"):
        fates = {
            name: (Say(text=f"The answer is {number}."), Say(text=f"The answer is {number}."))
            for number, name in enumerate("abc")
        }
        told = {"summarizer": (Say(text="CONTINUE\nThe answer is 1."), Say(text="FINAL\nThe answer is 1."))}
        fake = FakeAgents(fates | told)
        orchestrator = orchestrator_of(AdversarialAgents(fake, ("c",), kind), "abc", llm=llm)  # type: ignore[arg-type]
        answer = await answer_of(orchestrator, query(max_steps=2), Schedule(asks("a", "b", "c")))
        found[kind] = (
            [call.agent for call in fake.calls],
            [step.summarizer.verdict for step in answer.steps],
            answer.stop_reason,
        )
    assert found["liar"] == found["injector"]
    assert found["injector"][1] == (["continue", "final"] if llm else ["rule", "rule"])
