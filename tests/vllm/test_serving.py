"""Pools on vLLM behind the HTTP contract: the default pool's roles, and specialists whose adapters share a batch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import OpenAI

from dmoa.agents.pool import load_pool
from tests.integration.server import Served, free_port

START_S = 400.0
VLLM = {"engine": "vllm", "max_num_seqs": 16, "engine_kwargs": {"dtype": "float32", "max_model_len": 2048}}


def pool_on_vllm(name: str | None) -> dict[str, Any]:
    """A packaged pool with its model on vLLM."""
    tree = load_pool(name).model_dump(mode="json")
    for llm in tree["llms"].values():
        llm |= VLLM
    tree["limits"]["max_steps"] = 2
    return tree


POOLS = {"roles": None, "adapters": "specialists"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """Both pools, each on a Ray and a vLLM of its own; they start side by side, because most of that is waiting."""
    started: dict[str, Served] = {}
    try:
        for name, packaged in POOLS.items():
            path = tmp_path_factory.mktemp(name) / "pool.yaml"
            tree = pool_on_vllm(packaged) | {"router": {"state_uri": (path.parent / "state").as_uri()}}
            path.write_text(yaml.safe_dump(tree), encoding="utf-8")
            dmoa = str(Path(sys.executable).with_name("dmoa"))
            started[name] = server = Served([dmoa, "serve", "--config", str(path), "--port", str(free_port())])
            wait_for_serve(server)  # two Rays that start at the same moment come into each other's way
        for server in started.values():
            server.wait_ready(START_S)
        yield started
    finally:
        for server in started.values():
            server.stop()


def wait_for_serve(server: Served) -> None:
    """Return once Serve runs on the server's own Ray, while vLLM still loads."""
    deadline = time.monotonic() + START_S
    while not server.processes("ray::ServeController"):
        assert server.process.poll() is None, "".join(server.errors[-60:])
        assert time.monotonic() < deadline, "Ray and Serve did not start"
        time.sleep(0.1)


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_on_vllm_answers_through_the_contract(name: str, servers: dict[str, Served]) -> None:
    served = servers[name]
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        reply = client.chat.completions.create(
            model=served.pool, messages=[{"role": "user", "content": "How much is 412 + 423?"}]
        )
        dmoa: dict[str, Any] = reply.model_extra["dmoa"]  # type: ignore[index]
        asked = [agent for step in dmoa["steps"] for agent in step["agents"] if agent["status"] == "ok"]
        assert asked
        for agent in asked:
            assert agent["entropy_tokens"] == agent["completion_tokens"] > 0
            assert agent["entropy_nats"] > 0
            assert agent["entropy_kind"] == "exact"
        stream = client.chat.completions.create(
            model=served.pool, messages=[{"role": "user", "content": "Name a color."}], stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices).strip()
