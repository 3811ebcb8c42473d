"""Pools on vLLM behind the HTTP contract: the default pool's roles, and specialists whose adapters share a batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import OpenAI

from dmoa.agents.pool import load_pool
from dmoa.serving.launch import free_port
from tests.integration.server import Served

START_S = 400.0
VLLM = {"engine": "vllm", "max_num_seqs": 16, "engine_kwargs": {"dtype": "float32", "max_model_len": 2048}}


def pool_on_vllm(name: str | None) -> dict[str, Any]:
    """A packaged pool with its model on vLLM."""
    tree = load_pool(name).model_dump(mode="json")
    for llm in tree["llms"].values():
        llm |= VLLM
    tree["limits"]["max_steps"] = 2
    return tree


@pytest.fixture(
    scope="module", params=[pytest.param(None, id="roles", marks=pytest.mark.accept), pytest.param("specialists", id="adapters")]
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A pool's server, on a Ray and a vLLM of its own."""
    path = tmp_path_factory.mktemp("pool") / "pool.yaml"
    tree = pool_on_vllm(request.param) | {"router": {"state_uri": (path.parent / "state").as_uri()}}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    server = Served([str(Path(sys.executable).with_name("dmoa")), "serve", "--config", str(path), "--port", str(free_port())])
    try:
        yield server.wait_ready(START_S)
    finally:
        server.stop()


def test_a_pool_on_vllm_answers_through_the_contract(served: Served) -> None:
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
