"""A pool of agents that think in every known shape: what they thought is kept, and neither read, shared, nor answered.

Every thought holds a poison answer, which two agents would agree on; queries are numbers, and every right answer is the number.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local, build_pool_gate
from dmoa.config import Config
from dmoa.core.answers import extract_answer
from dmoa.protocols import AgentClient
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm
from dmoa.testing import Schedule, asks, decision
from dmoa.types import AgentCall, AgentReply, Answer, Event, Limits, Query, TextDelta
from tests.examples import is_all
from tests.unit.serving.fake_service import FakeService, connect, make_app

POISON = "99"
"""Ahead of the query it is the answer of the thoughts."""
THOUGHT, SAID = f"I guess. The answer is {POISON}{{query}}", "The answer is {query}."
SHAPES = {
    "think": f"<think>\n{THOUGHT}\n</think>\n\n{SAID}",
    "opened": f"{THOUGHT}\n</think>\n\n{SAID}",
    "twice": f"<think>{THOUGHT}</think>\n<think>{THOUGHT}</think>\n{SAID}",
    "thinking": f"<thinking>{THOUGHT}</thinking>{SAID}",
    "square": f"[THINK]{THOUGHT}[/THINK]{SAID}",
    "kimi": f"\u25c1think\u25b7{THOUGHT}\u25c1/think\u25b7{SAID}",
    "begun": f"<|begin_of_thought|>{THOUGHT}<|end_of_thought|>{SAID}",
    "harmony": f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{SAID}<|return|>",
    "glued": f"analysis{THOUGHT}assistantcommentary{THOUGHT}assistantfinal{SAID}",
    "cut": f"<think>\n{THOUGHT}",
    "cut-harmony": f"<|channel|>analysis<|message|>{THOUGHT}",
}
CUT = {"cut", "cut-harmony"}
NUM_QUERIES = 200 if is_all() else 20
"""Every query meets every shape; another one brings another number alone."""
QUERIES = [str(1000 + 7 * i) for i in range(NUM_QUERIES)]
PARTS = [QUERIES[start : start + 50] for start in range(0, NUM_QUERIES, 50)]


class Listening:
    """An `AgentClient` that remembers every prompt."""

    def __init__(self, agents: AgentClient) -> None:
        self._agents = agents
        self.prompts: list[str] = []

    async def call(self, call: AgentCall) -> AgentReply:
        self._note(call)
        return await self._agents.call(call)

    def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        self._note(call)
        return self._agents.stream(call)

    async def ping(self, agent: str) -> None:
        await self._agents.ping(agent)

    def _note(self, call: AgentCall) -> None:
        self.prompts.append("\n".join(message.content for message in call.messages))


def swarm_of(kind: str, folder: Path, verdict: str | None = None, **summarizer: Any) -> tuple[Swarm, Listening]:
    """A pool of one agent a shape, `scripted` or `recorded`; `verdict`: what its summarizer says, None: mode select."""
    llm: dict[str, Any] = {"model": f"{kind}:x", "engine": kind}
    if kind == "scripted":
        low = dict.fromkeys(CUT, 0.01)
        written = {"summarizer": f"<think>{THOUGHT}</think>\n{verdict}\n{SAID}"}
        llm["engine_kwargs"] = {"replies": SHAPES | written, "entropies_nats": low, "tokens": 24}
    else:
        rows = [{"agent": name, "query": q, "text": text.replace("{query}", q)} for name, text in SHAPES.items() for q in QUERIES]
        (folder / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        llm["engine_kwargs"] = {"replies": str(folder / "replies.jsonl")}
    tree = {
        "name": "thinkers",
        "llms": {"tiny": llm},
        "agents": [{"name": name, "llm": "tiny", "profile": "Thinks."} for name in SHAPES],
        "gate": {"hidden": 8},
        "limits": {"max_steps": 1 if kind == "recorded" else 2},
        "summarizer": {"mode": "llm", "llm": "tiny", **summarizer} if verdict else {},
    }
    config = Config.model_validate(tree)
    gate, record = build_pool_gate(config)
    router = LocalRouter()
    router.install(record.version, gate)
    local, engines = build_local(config)
    agents = Listening(local)
    return Swarm(config, agents=agents, router=router, encoder=HashEncoder(), engines=engines), agents


async def asked(swarm: Swarm, text: str) -> tuple[Answer, list[Event]]:
    limits = swarm.config.limits
    query = Query(trace_id=f"t{text}", text=text, limits=Limits(max_steps=limits.max_steps))
    events = [event async for event in swarm.ask(query, "dense")]
    assert isinstance(events[-1], Answer)
    return events[-1], events


@pytest.mark.parametrize("texts", PARTS, ids=lambda texts: texts[0])
@pytest.mark.parametrize(
    ("kind", "verdict", "reason"),
    [("scripted", None, "agreement"), ("recorded", None, "agreement"), ("scripted", "FINAL", "summarizer"),
     ("scripted", "CONTINUE", "max_steps")],
)  # fmt: skip
async def test_no_thought_is_read_shared_or_answered(
    kind: str, verdict: str | None, reason: str, texts: list[str], tmp_path: Path
) -> None:
    swarm, agents = swarm_of(kind, tmp_path, verdict)
    for text in texts:
        agents.prompts.clear()
        answer, events = await asked(swarm, text)
        assert (answer.stop_reason, extract_answer(answer.text)) == (reason, text)
        poison = POISON + text
        streamed = "".join(event.text for event in events if isinstance(event, TextDelta) and not event.is_reasoning)
        for seen in (answer.text, streamed, *agents.prompts, *(step.summary for step in answer.steps)):
            assert poison not in seen
        for reply in (reply for step in answer.steps for reply in step.replies):
            assert poison in reply.reasoning
            assert reply.usage.reasoning_tokens > 0
            if reply.agent in CUT:
                assert (reply.text, reply.finish_reason) == ("", "length")
            else:
                assert (reply.text.strip(), reply.finish_reason) == (f"The answer is {text}.", "stop")
        assert answer.usage.reasoning_tokens == sum(step.usage.reasoning_tokens for step in answer.steps) > 0
    await swarm.close()


async def test_a_sure_thought_neither_stops_the_query_nor_the_cascade(tmp_path: Path) -> None:
    swarm, _ = swarm_of("scripted", tmp_path)
    for text in QUERIES[:50]:
        fitted = decision({"cut": 0.6, "think": 0.4}, 1, theta=math.log(0.02), limit=2)
        plan = asks("cut", reserves=("think",), decision=fitted)
        query = Query(trace_id=f"t{text}", text=text, limits=Limits(max_steps=1))
        events = [event async for event in swarm.follow(query, Schedule(plan))]
        answer = events[-1]
        assert isinstance(answer, Answer)
        assert [reply.agent for reply in answer.steps[0].replies] == ["cut", "think"]
        assert (answer.stop_reason, answer.text) == ("max_steps", f"The answer is {text}.")


async def test_thoughts_are_shared_with_the_summarizer_where_the_pool_says_so(tmp_path: Path) -> None:
    swarm, agents = swarm_of("scripted", tmp_path, "FINAL", share_reasoning=True)
    await asked(swarm, "1007")
    *others, last = agents.prompts
    assert not any(f"{POISON}1007" in prompt for prompt in others)
    assert last.count(f"{POISON}1007") >= len(SHAPES) - len(CUT)
    assert "Thoughts of think:\nI guess. The answer is 991007\n\nContribution of think:\nThe answer is 1007." in last


class Serving(FakeService):
    """The HTTP front over a swarm."""

    swarm: Swarm

    async def ask(self, query: Query, policy: str, agent: str | None = None) -> AsyncGenerator[Event]:
        async for event in self.swarm.ask(query, policy, agent):
            yield event


async def post(client: Any, text: str, model: str = "tiny/dense", **more: Any) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    return await client.post("/v1/chat/completions", json=body)


def joined(response: Any, name: str, is_wanted: Callable[[dict[str, Any]], bool] = lambda delta: True) -> str:
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(name) or "" for delta in deltas if is_wanted(delta))


@pytest.mark.parametrize("texts", PARTS, ids=lambda texts: texts[0])
@pytest.mark.parametrize(("verdict", "model"), [(None, "dense"), ("FINAL", "dense"), ("CONTINUE", "dense"), (None, "think")])
async def test_whole_and_streamed_replies_over_http_are_equal(
    verdict: str | None, model: str, texts: list[str], tmp_path: Path
) -> None:
    service = Serving(policies=("dense", "single"), agents=tuple(SHAPES))
    service.swarm, _ = swarm_of("scripted", tmp_path, verdict)
    name = "tiny/dense" if model == "dense" else model
    async with connect(make_app(service)) as client:
        for text in texts:
            whole = (await post(client, text, name, dmoa={"max_steps": 2})).json()
            streamed = await post(client, text, name, stream=True, dmoa={"max_steps": 2})
            message = whole["choices"][0]["message"]
            assert joined(streamed, "content") == message["content"] == f"The answer is {text}."
            thought = message.get("reasoning_content", "")
            assert joined(streamed, "reasoning_content", lambda delta: "dmoa_step" not in delta) == thought
            assert thought == ("" if verdict is None and model == "dense" else f"I guess. The answer is {POISON}{text}")
            assert POISON + text not in joined(streamed, "reasoning_content", lambda delta: "dmoa_step" in delta)
            assert POISON + text not in json.dumps(whole["dmoa"])
            assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


async def test_clients_get_agents_thoughts_with_the_trace(tmp_path: Path) -> None:
    service = Serving(policies=("dense",), agents=tuple(SHAPES))
    service.swarm, _ = swarm_of("scripted", tmp_path)
    async with connect(make_app(service)) as client:
        reply = (await post(client, "1007", dmoa={"trace": True})).json()
    agents = reply["dmoa"]["steps"][0]["agents"]
    assert {agent["name"] for agent in agents if f"{POISON}1007" in agent["reasoning"]} == set(SHAPES)
    assert not any(f"{POISON}1007" in agent["text"] for agent in agents)
    assert "reasoning_content" not in reply["choices"][0]["message"]
