"""Two agents on LLMs with several replicas: every step asks all of them at once, and none of its calls is lost.

The models are scripted, or an endpoint of the test that sees which calls are open: what is tested is that calls reach a
replica, which one, and that they end with their query.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.server import Served, serve

CONFIG = """
name: replicas
llms:
  pair:
    model: "openai:pair"
    engine: openai
    placement: shared
    engine_kwargs: {base_url: "ENDPOINT", top_logprobs: 0}
    autoscaling: {min_replicas: 2, max_replicas: 2}
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
NEVER = "Never answer this."


class Endpoint(ThreadingHTTPServer):
    """Says yes to every call at once, but never to one about `NEVER`."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self._lock = threading.Lock()
        self.waiting = 0
        """Calls without an answer whose client is still there."""

    def until_gone(self, connection: Any) -> None:
        """Wait until the client hangs up."""
        with self._lock:
            self.waiting += 1
        try:
            connection.recv(1)
        except ConnectionError:
            pass
        finally:
            with self._lock:
                self.waiting -= 1


class Answering(BaseHTTPRequestHandler):
    """One connection to the endpoint."""

    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        """Answer a call, or wait."""
        asked = self.rfile.read(int(self.headers["content-length"])).decode()
        if NEVER in asked:
            self.server.until_gone(self.connection)
            self.close_connection = True
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
        body = json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def server(endpoint: Endpoint, folder: Path) -> Iterator[Served]:
    path = folder / "pool.yaml"
    path.write_text(CONFIG.replace("STATE", (folder / "state").as_uri()).replace("ENDPOINT", endpoint.url), encoding="utf-8")
    served = serve(path, "--json", str(folder / "serve.json"))
    yield served
    assert served.stop() == 0


@pytest.fixture
async def http(server: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        yield client


def statuses(step: dict[str, Any]) -> dict[str, str]:
    return {agent["name"]: agent["status"] for agent in step["agents"]}


async def chat(http: httpx.AsyncClient, policy: str, *texts: str) -> list[dict[str, str]]:
    """Ask with this conversation of a user and an assistant; returns the replicas of every step, by agent: all answered."""
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    reply = await http.post("/v1/chat/completions", json={"model": f"replicas/{policy}", "messages": messages})
    assert reply.status_code == 200, reply.text
    steps: list[dict[str, Any]] = reply.json()["dmoa"]["steps"]
    for step in steps:
        assert statuses(step) == dict.fromkeys(AGENTS, "ok"), step["agents"]
    return [{agent["name"]: agent["replica"] for agent in step["agents"]} for step in steps]


async def until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(0.02)


async def test_every_agent_is_up_and_stays_so(http: httpx.AsyncClient) -> None:
    for _ in range(3):
        replies = await asyncio.gather(*(http.get("/readyz") for _ in range(8)))
        assert [reply.status_code for reply in replies] == [200] * 8, [reply.text for reply in replies]


@pytest.mark.parametrize("policy", ["dmoa", "dense"])
async def test_all_agents_of_a_step_answer_many_queries_at_a_time(http: httpx.AsyncClient, policy: str) -> None:
    found = await asyncio.gather(*(chat(http, policy, f"What is {n} + {n}? ({policy})") for n in range(24)))
    assert len({step["a1"] for steps in found for step in steps}) == 2


async def test_streams_of_agents_beside_each_other_are_whole(http: httpx.AsyncClient) -> None:
    async def stream(agent: str, number: int) -> str:
        body = {"model": agent, "messages": [{"role": "user", "content": f"Say {number}."}], "stream": True}
        reply = await http.post("/v1/chat/completions", json=body)
        events = [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: {")]
        return "".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices", ()))

    texts = await asyncio.gather(*(stream(agent, number) for number in range(8) for agent in ("b1", "b2")))
    assert texts == [f"Say {number}." for number in range(8) for _ in range(2)]


async def test_a_conversation_stays_on_one_replica(http: httpx.AsyncClient) -> None:
    async def places(number: int) -> set[str]:
        talk, found = [f"Let us talk about {number}."], set[str]()
        for turn in range(3):
            found |= {step[agent] for step in await chat(http, "dense", *talk) for agent in ("a1", "a2")}
            talk += ["Yes.", f"And then {turn}?"]
        return found

    seen = await asyncio.gather(*(places(number) for number in range(12)))
    assert {len(found) for found in seen} == {1}, seen
    assert len(set().union(*seen)) == 2


async def test_a_client_that_goes_away_ends_all_calls_of_its_step(http: httpx.AsyncClient, endpoint: Endpoint) -> None:
    queries = [asyncio.create_task(chat(http, "dense", f"{NEVER} {number}")) for number in range(3)]
    await until(lambda: endpoint.waiting == 6, "both agents of three queries to be asked", 20)
    queries[0].cancel()
    await until(lambda: endpoint.waiting == 4, "the calls of the first to end, and no others", 2)
    for query in queries:
        query.cancel()
    await asyncio.gather(*queries, return_exceptions=True)
    await until(lambda: endpoint.waiting == 0, "the others' to end", 2)
    assert endpoint.waiting == 0


def test_a_call_counts_as_taken_while_its_replica_is_at_work(server: Served, endpoint: Endpoint, folder: Path) -> None:
    address = json.loads((folder / "serve.json").read_text())["ray_address"]
    command = [sys.executable, "-m", "tests.cluster.taken", address, str(folder / "pool.yaml"), NEVER]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as asking:
        watch = threading.Timer(60, asking.kill)
        watch.start()
        try:
            assert asking.stdout is not None
            found = next((line.strip() for line in iter(asking.stdout.readline, "") if line.startswith("taken")), "")
            waiting = endpoint.waiting
            _, errors = asking.communicate("now\n")
        finally:
            watch.cancel()
    assert found == "taken, at first [False, False]", errors[-3000:]
    assert waiting == 2, "taken, and not at work"
    deadline = time.monotonic() + 5
    while endpoint.waiting:
        assert time.monotonic() < deadline, "cancelled, and still at work"
        time.sleep(0.05)


async def test_calls_end_at_the_deadline_where_they_run(http: httpx.AsyncClient, endpoint: Endpoint) -> None:
    body = {"model": "replicas/dense", "messages": [{"role": "user", "content": NEVER}], "dmoa": {"deadline_s": 3}}
    reply = await http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert statuses(reply.json()["dmoa"]["steps"][0]) == {"a1": "late", "a2": "late", "b1": "ok", "b2": "ok"}
    await until(lambda: endpoint.waiting == 0, "the late calls to end", 2)


async def test_replicas_are_added_under_load_and_no_query_fails(http: httpx.AsyncClient, server: Served) -> None:
    deadline, used = time.monotonic() + 60, set[str]()

    async def ask_on(number: int) -> None:
        turn = 0
        while len(used) < 3:
            assert time.monotonic() < deadline, f"answers came from {used} alone"
            steps = await chat(http, "dense", f"Question {turn} of caller {number}?")
            used.update(step[agent] for step in steps for agent in ("b1", "b2"))
            turn += 1

    await asyncio.gather(*(ask_on(number) for number in range(16)))
    assert len(server.processes("ray::ServeReplica:dmoa:llm-grows")) == 3
