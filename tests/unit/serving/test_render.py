"""What a reply says of lost, masked, idle and repeated agents, and of numbers that JSON cannot carry."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.serving.http.responses import step_line, usage_of
from dmoa.trace import ReplyDmoa, answer_of_reply, reply_dmoa
from dmoa.types import AgentReply, EntropySum, StepRecord, SummarizerRecord, TokenUsage
from tests.unit.serving.fake_service import decision, make_answer, make_step, reply

LOST = AgentReply(agent="adder", status="late", error="no reply after 2 s")


def states(step: StepRecord) -> list[tuple[str, str, float]]:
    """Name, status and probability of every agent of a step's reply."""
    (found,) = reply_dmoa(make_answer("t", steps=(step,))).steps
    return [(agent.name, agent.status, agent.probability) for agent in found.agents]


def test_every_agent_of_the_gate_is_listed_with_what_became_of_it() -> None:
    step = make_step(
        0, "x", replies=(LOST, reply("sorter")), active=("sorter",), decision=decision([0.75, 0.25, 0.0], ("dater",))
    )
    assert states(step) == [("sorter", "ok", 0.25), ("adder", "late", 0.75), ("dater", "masked", 0.0)]
    found = reply_dmoa(make_answer("t", steps=(step,))).steps[0]
    assert found.k == 1
    lost = found.agents[1]
    assert (lost.error, lost.finish_reason, lost.entropy_nats) == ("no reply after 2 s", None, None)


def test_a_large_pool_shows_the_most_probable_idle_agents() -> None:
    names = tuple(f"agent-{i}" for i in range(40))
    chances_A = np.arange(40, dtype=np.float32) / 780
    gate = replace(decision([1.0, 0.0, 0.0]), agents=names, probability_A=chances_A, masked=("agent-0", "agent-2"))
    step = make_step(0, "x", decision=gate, replies=(reply("agent-39"),), active=("agent-39",))
    found = states(step)
    assert [(name, status) for name, status, _ in found[:3]] == [("agent-39", "ok"), ("agent-0", "masked"), ("agent-2", "masked")]
    assert [(name, status) for name, status, _ in found[3:]] == [(f"agent-{i}", "idle") for i in range(38, 22, -1)]
    assert found[3][2] == pytest.approx(38 / 780, abs=1e-6)


def test_without_a_gate_only_the_asked_agents_are_listed() -> None:
    step = make_step(0, "x", decision=None, replies=(reply("adder"), reply("adder", "20")), active=("adder",))
    assert states(step) == [("adder", "ok", 1.0), ("adder", "ok", 1.0)]


@pytest.mark.parametrize(("is_trained", "untrained"), [(True, False), (False, True), (None, False)])
def test_an_untrained_gate_is_said(is_trained: bool | None, untrained: bool) -> None:
    assert reply_dmoa(make_answer("t", gate_trained=is_trained)).untrained is untrained


def test_texts_are_there_only_when_asked_for_and_empty_ones_are_kept() -> None:
    answer = make_answer("t", steps=(make_step(0, "", replies=(reply("adder", ""),), active=("adder",)),))
    plain, full = (reply_dmoa(answer, with_texts=has).model_dump(mode="json") for has in (False, True))
    assert "summary" not in plain["steps"][0]
    assert [("text" in agent) for agent in plain["steps"][0]["agents"]] == [False] * 3
    assert full["steps"][0]["summary"] == ""
    assert [agent.get("text") for agent in full["steps"][0]["agents"]] == ["", None, None]
    assert ReplyDmoa.model_validate(full) == reply_dmoa(answer, with_texts=True)


@given(
    latency=st.floats(),
    entropy=st.floats(),
    tokens=st.integers(0, 9),
    mass=st.floats(),
    probability=st.floats(width=32),
    wall=st.floats(),
)
def test_a_reply_is_always_valid_json(
    latency: float, entropy: float, tokens: int, mass: float, probability: float, wall: float
) -> None:
    broken = reply("adder", latency_ms=latency, entropy_sum_nats=entropy, entropy_tokens=tokens)
    summarizer = SummarizerRecord(mode="llm", verdict="final", latency_ms=latency)
    gate = decision([probability, 0.0, 0.0])
    step = make_step(0, "x", replies=(broken,), active=("adder",), mass=mass, wall_ms=wall, decision=gate, summarizer=summarizer)
    text = json.dumps(reply_dmoa(make_answer("t", steps=(step,))).model_dump(mode="json"), allow_nan=False)
    ReplyDmoa.model_validate_json(text)
    step_line(step)


def test_numbers_are_rounded_but_keep_a_thousandth_of_a_nat() -> None:
    step = make_step(
        0, "x", replies=(reply("adder", entropy_sum_nats=1.0, entropy_tokens=3, latency_ms=1.23456),), active=("adder",)
    )
    agent = reply_dmoa(make_answer("t", steps=(step,))).steps[0].agents[0]
    assert (agent.entropy_nats, agent.latency_ms) == (0.333333, 1.235)


def test_usage_counts_lost_calls_and_the_summarizer() -> None:
    lost = AgentReply(agent="dater", status="late", usage=TokenUsage(prompt_tokens=100, cached_tokens=10, completion_tokens=7))
    usage = usage_of(make_answer("t", steps=(make_step(0, "x", replies=(reply("adder"), lost)),)))
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (115, 13, 128)
    assert usage.prompt_tokens_details.cached_tokens == 17


def test_a_line_says_who_was_lost_and_stays_one_line() -> None:
    step = make_step(1, "a\n\n b" + "c" * 600, replies=(LOST, reply("sorter")), active=("sorter",))
    line = step_line(step)
    assert line.startswith("Step 2: sorter (p 0.250, entropy 0.500 nats); lost: adder late -> a bccc")
    assert line.endswith("c...\n")
    assert line.count("\n") == 1
    assert len(line.partition(" -> ")[2]) == 501
    nobody = make_step(0, "old", replies=(LOST,), active=())
    assert step_line(nobody) == "Step 1: nobody; lost: adder late -> old\n"


def test_the_schema_names_every_field_of_the_contract() -> None:
    schema = ReplyDmoa.model_json_schema()
    assert set(schema["required"]) == {
        *("trace_id", "pool", "policy", "gate_version", "untrained", "routed_by", "degraded", "stop_reason", "steps")
    }
    agent = {"name", "probability", "status", "entropy_nats", "entropy_tokens", "entropy_kind", "finish_reason", "prompt_tokens"}
    assert set(schema["$defs"]["ReplyAgent"]["required"]) == agent | {
        *("cached_tokens", "completion_tokens", "latency_ms", "engine_ms", "engine", "attempts", "error")
    }
    assert set(schema["$defs"]["ReplyStep"]["required"]) == {"step", "k", "wall_ms", "mass", "agents", "summarizer"}


SUMMED = AgentReply(agent="dater", status="ok", text="?", finish_reason="length", entropy=EntropySum(sum_nats=1.0, tokens=3))
STEPS = {
    "a gate": make_step(0, "18 or 19"),
    "lost, masked": make_step(
        0, "x", replies=(LOST, reply("sorter")), active=("sorter",), decision=decision([0.75, 0.25, 0.0], ("dater",))
    ),
    "explored": make_step(0, "x", replies=(SUMMED, reply("adder")), active=("adder",), explored=(("dater", 0.1),)),
    "bounds": make_step(0, "x", replies=(reply("adder", entropy_kind="truncated", entropy_slack_nats=0.1),), active=("adder",)),
    "broken numbers": make_step(0, "x", replies=(reply("adder", entropy_sum_nats=float("nan")),), active=("adder",)),
    "no gate": make_step(0, "x", decision=None, replies=(reply("adder", is_memoised=True, attempts=2),), active=("adder",)),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_an_answer_read_from_its_reply_is_told_in_the_same_words(step: StepRecord) -> None:
    gate = {"gate_version": None, "gate_trained": None} if step.decision is None else {}
    answer = make_answer("t", steps=(step, step), degraded=True, **gate)
    told = reply_dmoa(answer, pool="tiny", with_texts=True)
    sent = ReplyDmoa.model_validate_json(told.model_dump_json())
    read = answer_of_reply(sent, text=answer.text, finish_reason="stop", wall_ms=2.0)
    assert reply_dmoa(read, pool="tiny", with_texts=True) == told
    assert (read.usage, read.steps[0].active, read.gate_trained) == (answer.usage, step.active, answer.gate_trained)
    assert [reply.text for reply in read.steps[1].replies] == [
        agent.text for agent in told.steps[1].agents if agent.text is not None
    ]
    assert read.steps[0].replies[0].entropy.tokens == told.steps[0].agents[0].entropy_tokens


def test_entropy_read_from_a_reply_is_the_mean_times_the_tokens() -> None:
    answer = make_answer("t", steps=(make_step(0, "x"),))
    read = answer_of_reply(reply_dmoa(answer), text="", finish_reason="length", wall_ms=2.0)
    adder, sorter = read.steps[0].replies
    assert (adder.agent, adder.entropy.sum_nats, sorter.agent, sorter.entropy.sum_nats) == ("adder", 2.0, "sorter", 8.0)
    assert (read.finish_reason, read.wall_ms, adder.text, read.steps[0].summary) == ("length", 2.0, "", "")
