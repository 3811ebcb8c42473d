"""Twenty traces of a real server, routed again: the same decisions, bit for bit, one by one and all together."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from dmoa.agents.pool import build_pool_gate
from dmoa.config import Config
from dmoa.replay import replay_routing
from dmoa.trace import Trace
from tests.integration.one_server.conftest import KEYS
from tests.integration.server import Served

pytestmark = pytest.mark.real_model
NUM_TRACES = 20


async def fetch_trace(client: httpx.AsyncClient, number: int) -> Trace:
    body = {"model": "swarm", "messages": [{"role": "user", "content": f"What is {number} times 3?"}], "max_tokens": 6}
    trace_id = (await client.post("/v1/chat/completions", json=body)).json()["dmoa"]["trace_id"]
    deadline = time.monotonic() + 10
    while (reply := await client.get(f"/v1/dmoa/traces/{trace_id}")).status_code != 200:
        assert time.monotonic() < deadline, "the trace never came"
        await asyncio.sleep(0.05)
    return Trace.model_validate(reply.json())


async def test_replay_repeats_the_routing(server: Served, config: Config) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as client:
        traces = await asyncio.gather(*(fetch_trace(client, number) for number in range(NUM_TRACES)))
    assert sum(len(trace.routes) for trace in traces) > NUM_TRACES, "no query took a second step: the memory is not tested"
    gate, record = build_pool_gate(config)
    assert record.version == server.gate
    together = replay_routing(traces, gate, record.version)
    alone = [replay_routing([trace], gate, record.version)[0] for trace in traces]
    assert [result.differences for result in together] == [()] * NUM_TRACES
    assert [result.differences for result in alone] == [()] * NUM_TRACES
