"""An agent that is hostile or broken, beside others in a swarm of two steps: what they and the answer notice of it.

In process, over real sockets; `tests/accept/accept_hostile_agents.py` asks the same of a served pool, with times.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local, build_pool_gate
from dmoa.config import Config
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm
from dmoa.types import AgentReply, Answer, Limits, Query
from tests.accept.endpoint import HOSTILE, MARK, TOKENS, Endpoint, endpoint

GOOD = ("one", "two", "three")
COUNTS = ("control tokens", "negative entropy", "NaN entropy", "no UTF-8")
"""Kinds that hold a text, which is a contribution like any other; what is wrong with it reaches nobody."""


@asynccontextmanager
async def swarm(models: Endpoint) -> AsyncIterator[Swarm]:
    """Three agents and a bad one, all asked in both of two steps."""
    options = {"base_url": models.url, "max_retries": 0}
    config = Config.model_validate(
        {
            "name": "hostile",
            "llms": {name: {"model": f"openai:{name}", "engine": "openai", "engine_kwargs": options} for name in (*GOOD, "bad")},
            "agents": [
                {"name": name, "llm": name, "profile": f"Says {name}.", "sampling": {"max_tokens": 64}} for name in (*GOOD, "bad")
            ],
            "gate": {"hidden": 8, "activation": {"rule": "fixed", "max_agents": 4}},
            "limits": {"max_steps": 2},
        }
    )
    agents, engines = build_local(config)
    gate, record = build_pool_gate(config)
    router = LocalRouter()
    router.install(record.version, gate)
    yield Swarm(config, agents=agents, router=router, encoder=HashEncoder())
    for engine in engines:
        await engine.close()


async def ask(models: Endpoint, deadline_s: float = 30.0) -> tuple[Answer, list[AgentReply]]:
    """Ask one query; return its answer and all replies."""
    async with swarm(models) as asked:
        query = Query(trace_id="t", text="What is it?", limits=Limits(max_steps=2, deadline_s=deadline_s))
        events = [event async for event in asked.ask(query, "dmoa")]
    assert isinstance(events[-1], Answer)
    return events[-1], [reply for step in events[-1].steps for reply in step.replies]


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_reply_reaches_nobody(kind: str) -> None:
    for _ in range(7 if kind == "wrong form" else 2):  # one form after the other
        async with endpoint(delay_s=0.0) as models:
            models.behaviours["bad"] = HOSTILE[kind]
            answered, replies = await ask(models)
        assert MARK not in answered.text or kind == "control tokens", "the others are surer, or as sure and in the majority"
        assert len(answered.steps) == 2
        assert {reply.status for reply in replies if reply.agent in GOOD} == {"ok"}
        bad = [reply for reply in replies if reply.agent == "bad"]
        assert all(reply.status == "failed" or kind in COUNTS for reply in bad)
        assert all(reply.entropy.mean_nats is None for reply in bad if "entropy" in kind)
        heard = [text for name in GOOD for text in models.prompts[name]]
        assert len(heard) == 2 * len(GOOD)
        assert not any(token in text for text in heard for token in TOKENS)
        assert kind == "control tokens" or not any(MARK in text for text in heard)


async def test_a_silent_agent_is_late_and_the_others_answer() -> None:
    async with endpoint(delay_s=0.0) as models:
        models.silent = {"bad"}
        answered, replies = await ask(models, deadline_s=1.0)
    assert answered.text.startswith("Answer: ")
    assert [reply.status for reply in replies if reply.agent == "bad"] == ["late"]
    assert {reply.status for reply in replies if reply.agent in GOOD} == {"ok"}
