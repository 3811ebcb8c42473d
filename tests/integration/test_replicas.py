"""Two agents on LLMs with several replicas: every step asks all of them at once, and none of its calls is lost.

The agents are scripted: what is tested is that calls reach a replica, and which one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.integration.server import Served, serve

CONFIG = """
name: replicas
llms:
  pair: {model: "scripted:pair", engine: scripted, placement: shared, autoscaling: {min_replicas: 2, max_replicas: 2}}
  grows:
    model: "scripted:grows"
    engine: scripted
    placement: shared
    engine_kwargs: {delay_ms: 400}
    autoscaling: {max_replicas: 3, target_ongoing_requests: 2, upscale_delay_s: 0.5}
agents:
  - {name: a1, llm: pair, profile: Solves problems.}
  - {name: a2, llm: pair, profile: Checks sums.}
  - {name: b1, llm: grows, profile: Solves problems slowly.}
  - {name: b2, llm: grows, profile: Checks sums slowly.}
gate: {activation: {rule: fixed, max_agents: 4}}
limits: {max_steps: 2}
router: {state_uri: "STATE"}
"""
AGENTS = {"a1", "a2", "b1", "b2"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("replicas")
    path = folder / "pool.yaml"
    path.write_text(CONFIG.replace("STATE", (folder / "state").as_uri()), encoding="utf-8")
    served = serve(path)
    yield served
    assert served.stop() == 0


@pytest.fixture
async def http(server: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        yield client


async def chat(http: httpx.AsyncClient, policy: str, *texts: str) -> list[dict[str, Any]]:
    """Ask with this conversation of a user and an assistant; returns the agents of every step, all of which answered."""
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    reply = await http.post("/v1/chat/completions", json={"model": f"replicas/{policy}", "messages": messages})
    assert reply.status_code == 200, reply.text
    steps: list[dict[str, Any]] = reply.json()["dmoa"]["steps"]
    found = [{agent["name"]: agent for agent in step["agents"]} for step in steps]
    for agents in found:
        assert {name: agent["status"] for name, agent in agents.items()} == dict.fromkeys(AGENTS, "ok"), agents
    return found


def num_replicas(server: Served, llm: str) -> int:
    return len(server.processes(f"ray::ServeReplica:dmoa:llm-{llm}"))


async def test_every_agent_is_up_and_stays_so(http: httpx.AsyncClient) -> None:
    for _ in range(3):
        replies = await asyncio.gather(*(http.get("/readyz") for _ in range(8)))
        assert [reply.status_code for reply in replies] == [200] * 8, [reply.text for reply in replies]


@pytest.mark.parametrize("policy", ["dmoa", "dense"])
async def test_all_agents_of_a_step_answer_many_queries_at_a_time(http: httpx.AsyncClient, policy: str) -> None:
    found = await asyncio.gather(*(chat(http, policy, f"What is {n} + {n}? ({policy})") for n in range(24)))
    assert len({agents["a1"]["replica"] for steps in found for agents in steps}) == 2


async def test_a_conversation_stays_on_one_replica(http: httpx.AsyncClient) -> None:
    seen = set()
    for number in range(8):
        talk = [f"Let us talk about {number}."]
        places = set()
        for turn in range(2):
            places |= {agents[name]["replica"] for agents in await chat(http, "dense", *talk) for name in ("a1", "a2")}
            talk += ["Yes.", f"And then {turn}?"]
        assert len(places) == 1, places
        seen |= places
    assert len(seen) == 2


async def test_replicas_are_added_under_load_and_no_query_fails(http: httpx.AsyncClient, server: Served) -> None:
    assert num_replicas(server, "grows") >= 1
    deadline, used = time.monotonic() + 60, set[str]()

    async def ask_on(number: int) -> None:
        turn = 0
        while len(used) < 3:
            assert time.monotonic() < deadline, f"answers came from {used} alone"
            found = await chat(http, "dense", f"Question {turn} of caller {number}?")
            used.update(agents[name]["replica"] for agents in found for name in ("b1", "b2"))
            turn += 1

    await asyncio.gather(*(ask_on(number) for number in range(16)))
    assert num_replicas(server, "grows") == 3
