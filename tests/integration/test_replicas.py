"""A server with a Ray of its own, and two agents on one LLM of two replicas: both are asked at once, no call is lost.

Another process of its Ray reaches its encoder, as the demo does, from one event loop after another.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from dmoa.agents.embedder import HashEncoder
from dmoa.loopback import is_loopback
from tests.integration.server import Served, serve

CONFIG = """
name: replicas
llms:
  pair:
    model: "scripted:pair"
    engine: scripted
    placement: shared
    engine_kwargs: {delay_ms: 100}
    autoscaling: {min_replicas: 2, max_replicas: 2}
agents:
  - {name: a1, llm: pair, profile: Solves problems.}
  - {name: a2, llm: pair, profile: Checks sums.}
gate: {activation: {rule: fixed, max_agents: 2}}
limits: {max_steps: 2}
router: {state_uri: "STATE"}
"""
QUERIES = 16
JOINED = """
import asyncio, json, sys
from dmoa.serving.launch import start_ray

assert not start_ray(sys.argv[1])

from dmoa.serving.encoder import ServeEncoder
from dmoa.serving.handles import reach

encoder = ServeEncoder(reach("encoder", "dmoa"))
found = [asyncio.run(encoder.embed([text])) for text in ("one", "two", "one")]
print(json.dumps([row[0].tolist() for row in found]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("replicas")
    path = folder / "pool.yaml"
    path.write_text(CONFIG.replace("STATE", (folder / "state").as_uri()), encoding="utf-8")
    served = serve(path, "--set", "server.listener=proxy")
    yield served
    assert served.stop() == 0


async def test_all_agents_of_a_step_answer_and_both_replicas_work(server: Served) -> None:
    body = {"model": "replicas/dense"}
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as http:
        asked = [
            http.post("/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": f"Query {number}?"}]})
            for number in range(QUERIES)
        ]
        replies = await asyncio.gather(*asked)
    assert [reply.status_code for reply in replies] == [200] * QUERIES, [reply.text for reply in replies]
    agents = [agent for reply in replies for step in reply.json()["dmoa"]["steps"] for agent in step["agents"]]
    assert {agent["name"] for agent in agents} == {"a1", "a2"}
    assert {agent["status"] for agent in agents} == {"ok"}, agents
    assert len(agents) >= 2 * QUERIES
    assert len({agent["replica"] for agent in agents}) == 2
    assert not listening_elsewhere(server)


def test_another_process_of_its_ray_reaches_its_encoder(server: Served) -> None:
    deadline = time.monotonic() + 30  # it says so after it is ready
    while (address := re.search(r"--address (\S+)", "".join([*server.lines, *server.errors]))) is None:
        assert time.monotonic() < deadline, server.lines
        time.sleep(0.05)
    env = {**os.environ, "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}  # what a process that starts a server has set
    command = [sys.executable, "-c", JOINED, address[1]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two, again = json.loads(done.stdout.splitlines()[-1])
    expected = asyncio.run(HashEncoder().embed(["one", "two"]))
    assert (one, two, again) == (expected[0].tolist(), expected[1].tolist(), expected[0].tolist())


def listening_elsewhere(server: Served) -> dict[str, str]:
    """Return the processes of a server that other machines could reach, and where."""
    tree = [psutil.Process(server.process.pid), *server.processes("")]
    ports = {process.name(): process.net_connections(kind="tcp") for process in tree}
    assert any(port.status == psutil.CONN_LISTEN for port in ports["raylet"])
    heard = {
        (name, port.laddr.ip.removeprefix("::ffff:"))
        for name, found in ports.items()
        for port in found
        if port.status == psutil.CONN_LISTEN
    }
    return {name: ip for name, ip in heard if not is_loopback(ip)}
