"""A pool whose agents live behind another dmoa server: the openai engine against the real HTTP front, over a real socket.

The agents at the far end are scripted; everything in between is what is shipped.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from dmoa.agents.embedder import HashEncoder
from dmoa.agents.pool import build_local, build_pool_gate
from dmoa.config import Config
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm
from dmoa.types import AgentReply, Answer, Query, TextDelta


@asynccontextmanager
async def swarm_at(url: str) -> AsyncIterator[Swarm]:
    """A pool of one scripted agent here, and two behind the server at `url`."""
    near = {"model": "scripted:near", "engine": "scripted", "engine_kwargs": {"replies": {"near": "The answer is 19."}}}
    far = {"engine": "openai", "engine_kwargs": {"base_url": f"{url}/v1"}}
    config = Config.model_validate(
        {
            "name": "mixed",
            "llms": {"near": near, "far": far | {"model": "openai:adder"}, "whole-pool": far | {"model": "openai:tiny"}},
            "agents": [
                {"name": "near", "llm": "near", "profile": "Adds."},
                {"name": "far", "llm": "far", "profile": "Adds too."},
                {"name": "pool", "llm": "whole-pool", "profile": "A whole swarm."},
            ],
            "gate": {"hidden": 8, "activation": {"mass": 1.0, "max_agents": 3}},
        }
    )
    agents, engines = build_local(config)
    gate, record = build_pool_gate(config)
    router = LocalRouter()
    router.install(record.version, gate)
    yield Swarm(config, agents=agents, router=router, encoder=HashEncoder())
    for engine in engines:
        await engine.close()


async def ask(swarm: Swarm, policy: str, agent: str | None = None) -> tuple[list[Any], Answer, dict[str, AgentReply]]:
    events = [event async for event in swarm.ask(Query(trace_id="t", text="What is 12 + 7?"), policy, agent)]
    assert isinstance(events[-1], Answer)
    return events, events[-1], {reply.agent: reply for step in events[-1].steps for reply in step.replies}


async def test_agents_behind_a_server_and_agents_here_agree(url: str) -> None:
    async with swarm_at(url) as swarm:
        _, answered, replies = await ask(swarm, "dmoa")
    assert (answered.text, answered.stop_reason, answered.degraded) == ("The answer is 19.", "agreement", False)
    assert {name: reply.status for name, reply in replies.items()} == dict.fromkeys(("near", "far", "pool"), "ok")
    assert replies["far"].text == "The answer is 19."
    assert (replies["near"].entropy.kind, replies["near"].entropy.tokens) == ("exact", 8)
    # dmoa's server refuses `logprobs`: the call is sent again without, and nothing is known of the entropy.
    assert (replies["far"].entropy.kind, replies["far"].entropy.tokens, replies["far"].entropy.mean_nats) == (
        "truncated",
        0,
        None,
    )
    assert (replies["far"].usage.completion_tokens, replies["far"].are_tokens_estimated) == (8, False)
    assert replies["pool"].usage.completion_tokens >= 16  # the far swarm tells what all its agents used


async def test_a_far_agent_streams(url: str) -> None:
    async with swarm_at(url) as swarm:
        events, answered, replies = await ask(swarm, "single", "far")
    assert answered.text == replies["far"].text == "The answer is 19."
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "The answer is 19."
