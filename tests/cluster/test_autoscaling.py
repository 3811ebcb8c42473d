"""Replicas on a cluster of four nodes: they follow the load, reach zero and come back, yield when full, keep conversations.

The agents are scripted (fixed replies, set delays), and each has one of nine GPUs, which are declared and not there: what is
tested is where calls go, not what a model says. This file has a cluster of its own, whose delays are short.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI

from dmoa import checkpoint
from dmoa.agents.pool import fingerprint
from dmoa.checkpoint import describe_gate
from dmoa.config import load
from dmoa.routing import build_gate
from tests.cluster.nodes import Nodes, cluster
from tests.integration.server import Served, serve

GPUS = (3, 2, 2, 2)
"""One for every replica that there can be."""

# The gate is made to give every query these probabilities, so that each test knows who is chosen.
RANKED = {"skips": 0.4, "waits": 0.25, "warms": 0.15, "up": 0.1, "tight": 0.04, "elastic": 0.03, "twin": 0.03}
CONFIG = """
name: scaling
llms:
  quick: {model: "scripted:quick", engine: scripted, placement: dedicated, gpus: 1, engine_kwargs: {replies: {up: "Answer: 7"}}}
  slow:
    {model: "scripted:slow", engine: scripted, placement: dedicated, gpus: 1, max_num_seqs: 1, engine_kwargs: {delay_ms: 3000}}
  steady:
    {model: "scripted:steady", engine: scripted, placement: dedicated, gpus: 1, engine_kwargs: {delay_ms: 1000}}
agents:
  - {name: tight, llm: slow, profile: Has room for three calls., autoscaling: {max_queued_calls: 1}}
  - {name: up, llm: quick, profile: Is always there.}
  - {name: skips, llm: quick, profile: Is passed over., autoscaling: {cold: skip, min_replicas: 0, downscale_to_zero_delay_s: 3}}
  - {name: waits, llm: quick, profile: Is waited for., autoscaling: {cold: wait, min_replicas: 0, downscale_to_zero_delay_s: 3}}
  - name: warms
    llm: quick
    profile: Is started early.
    autoscaling: {cold: warm_on_rank, min_replicas: 0, downscale_to_zero_delay_s: 3}
  - name: elastic
    llm: steady
    profile: Grows.
    autoscaling: {max_replicas: 2, target_ongoing_requests: 4, upscale_delay_s: 1, downscale_delay_s: 2}
  - {name: twin, llm: quick, profile: Is there twice., autoscaling: {min_replicas: 2, max_replicas: 2}}
gate: {checkpoint: "GATE", activation: {rule: fixed, max_agents: 3}}
limits: {max_steps: 1}
router: {state_uri: "STATE"}
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster(*GPUS) as found:
        yield found


@pytest.fixture(scope="module")
def server(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("autoscaling")
    path = folder / "pool.yaml"
    path.write_text(CONFIG.replace("STATE", (folder / "state").as_uri()).replace("GATE", str(folder / "gate")), encoding="utf-8")
    config = load(path)
    gate = build_gate(config.gate, config.agent_names)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        logits_A = [config.gate.temperature * math.log(RANKED[name]) for name in config.agent_names]
        gate.head_bias.copy_(torch.tensor(logits_A))
    checkpoint.save(folder / "gate", gate, describe_gate(gate, fingerprint=fingerprint(config), trained_on={"rows": 1}))
    served = serve(path, "--address", nodes.address, env=nodes.env)
    yield served
    assert served.stop() == 0


@pytest.fixture
async def http(server: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=90) as client:
        yield client


async def ask(http: httpx.AsyncClient, text: str = "What is 3 + 4?", *, model: str = "scaling", **fields: Any) -> dict[str, Any]:
    """The agents of a query's one step, by name, that were asked or masked."""
    messages = fields.pop("messages", [{"role": "user", "content": text}])
    reply = await http.post("/v1/chat/completions", json={"model": model, "messages": messages, **fields})
    assert reply.status_code == 200, reply.text
    return agents_of(reply.json())


def agents_of(body: dict[str, Any]) -> dict[str, Any]:
    (step,) = body["dmoa"]["steps"]
    return {agent["name"]: agent for agent in step["agents"] if agent["status"] != "idle"}


def statuses(agents: dict[str, Any]) -> dict[str, str]:
    return {name: agent["status"] for name, agent in agents.items()}


async def states(http: httpx.AsyncClient) -> dict[str, str]:
    """What /readyz tells of the agents; it must answer 200, whoever is cold."""
    reply = await http.get("/readyz")
    assert reply.status_code == 200, reply.text
    found: dict[str, str] = reply.json()["agents"]
    return found


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(0.1)


async def until_state(http: httpx.AsyncClient, agent: str, state: str) -> None:
    async def is_so() -> bool:
        return (await states(http))[agent] == state

    await until(is_so, f"{agent} to be {state}")


def num_replicas(nodes: Nodes, agent: str) -> int:
    return len(nodes.processes(f"ray::ServeReplica:dmoa:agent-{agent}"))


async def test_a_cold_agent_is_passed_over_or_waited_for_and_goes_back_to_zero(nodes: Nodes, http: httpx.AsyncClient) -> None:
    for agent in ("skips", "waits", "warms"):
        await until_state(http, agent, "cold")
        assert num_replicas(nodes, agent) == 0, "asking whether it is ready has woken it"
    assert (await states(http))["up"] == "up"

    # skips is chosen alone: the next-ranked agent that is up answers in its place, and at once.
    found = await ask(http, dmoa={"max_agents": 1})
    assert statuses(found) == {"skips": "cold", "up": "ok"}
    assert found["skips"]["error"] == "it has no replica yet; one is being started"
    # It was woken for later queries; so was warms, which is the third of K = 3 and was not chosen; waits was not.
    await until_state(http, "skips", "up")
    await until_state(http, "warms", "up")
    assert num_replicas(nodes, "waits") == 0

    async def skips_answers() -> bool:
        return statuses(await ask(http, dmoa={"max_agents": 1})) == {"skips": "ok"}

    await until(skips_answers, "an answer of skips itself")

    # waits is chosen too, and the query waits for its replica.
    await until_state(http, "waits", "cold")
    found = await ask(http, dmoa={"max_agents": 2})
    assert statuses(found).get("waits") == "ok"
    assert found["waits"]["error"].startswith("it was cold: its replica was there after ")
    assert num_replicas(nodes, "waits") == 1

    # Nobody asks any more, and asking for the state does not count.
    for agent in ("skips", "waits", "warms"):
        await until_state(http, agent, "cold")

    async def are_all_gone() -> bool:
        return not any(num_replicas(nodes, agent) for agent in ("skips", "waits", "warms"))

    await until(are_all_gone, "the last replicas to end")

    # Chosen while it is cold, warms is waited for.
    found = await ask(http, dmoa={"max_agents": 3})
    assert found["warms"]["status"] == "ok"
    assert found["warms"]["error"].startswith("it was cold")


async def test_a_full_agent_yields_to_the_next_and_the_trace_says_so(http: httpx.AsyncClient) -> None:
    # `single` asks the pool's first agent, tight: at most two calls run and one waits, and the next agent takes the others.
    found = await asyncio.gather(*(ask(http, model="scaling/single") for _ in range(8)))
    outcomes = Counter(tuple(statuses(agents).items()) for agents in found)
    assert set(outcomes) == {(("tight", "ok"),), (("up", "ok"), ("tight", "overloaded"))}
    full = [agents["tight"] for agents in found if agents["tight"]["status"] == "overloaded"]
    assert {agent["error"] for agent in full} == {"agent 'tight': its queue is full"}


async def test_a_full_agent_yields_in_a_stream_as_well(server: Served) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def stream() -> tuple[str, dict[str, str]]:
            events = await client.chat.completions.create(
                model="scaling/single", messages=[{"role": "user", "content": "What is 3 + 4?"}], stream=True
            )
            text, last = "", None
            async for event in events:
                last = event
                if event.choices:
                    text += event.choices[0].delta.content or ""
            assert last is not None
            return text, statuses(agents_of(last.model_dump()))

        found = await asyncio.gather(*(stream() for _ in range(8)))
    yielded = [text for text, agents in found if agents == {"tight": "overloaded", "up": "ok"}]
    assert set(yielded) == {"Answer: 7"}
    assert {text for text, agents in found if agents == {"tight": "ok"}} == {"What is 3 + 4?"}
    assert len(found) == sum(agents in ({"tight": "ok"}, {"tight": "overloaded", "up": "ok"}) for _, agents in found)


async def test_a_conversation_keeps_its_replica_and_others_take_the_other_one(http: httpx.AsyncClient) -> None:
    async def replica(messages: list[dict[str, str]]) -> str:
        name: str = (await ask(http, model="twin", messages=messages))["twin"]["replica"]
        return name

    seen: dict[int, set[str]] = {}
    for number in range(12):
        talk = [{"role": "user", "content": f"Let us talk about {number}."}]
        seen[number] = set()
        for turn in range(3):
            seen[number].add(await replica(talk))
            talk += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": f"And then {turn}?"}]
    assert all(len(replicas) == 1 for replicas in seen.values()), seen
    assert len(set().union(*seen.values())) == 2


@asynccontextmanager
async def load_of(http: httpx.AsyncClient, num_calls: int) -> AsyncIterator[Counter[str]]:
    """Calls of elastic, each a conversation of its own, always this many at a time; yields who answers."""
    answered: Counter[str] = Counter()

    async def caller(number: int) -> None:
        while True:
            text = f"Caller {number}, question {answered.total()}?"
            answered[(await ask(http, text, model="elastic"))["elastic"]["replica"]] += 1

    callers = [asyncio.create_task(caller(number)) for number in range(num_calls)]
    try:
        yield answered
    finally:
        for task in callers:
            task.cancel()
        results = await asyncio.gather(*callers, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results


async def test_replicas_follow_the_load_and_share_it(nodes: Nodes, http: httpx.AsyncClient) -> None:
    async def are(num: int) -> bool:
        return num_replicas(nodes, "elastic") == num

    async with load_of(http, 4) as answered:

        async def has_answered() -> bool:
            return answered.total() >= 12

        await until(has_answered, "a dozen answers at the load that one replica is for")
        assert num_replicas(nodes, "elastic") == len(answered) == 1
    async with load_of(http, 8) as answered:

        async def both_answer() -> bool:
            return len(answered) == 2

        await until(both_answer, "a second replica that new conversations go to")
        assert num_replicas(nodes, "elastic") == 2
        places = [(placed.node, gpu) for placed in nodes.placed() if placed.deployment == "agent-elastic" for gpu in placed.gpus]
        assert len(set(places)) == 2, f"each replica has a GPU of its own: {places}"
    await until(lambda: are(1), "the second replica to go")
    assert statuses(await ask(http, model="elastic")) == {"elastic": "ok"}
