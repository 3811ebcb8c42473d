"""One server with a Ray of its own, as `dmoa serve` starts it, for the tests of this folder, which break nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dmoa.config import Config, load
from tests.integration.server import Served, serve

KEYS = ("alpha-key", "beta-key")

CONFIG = """
name: swarm
llms:
  smollm2: {model: "embedded:smollm2-135m", engine: transformers, max_num_seqs: 16}
agents:
  - {name: solver, llm: smollm2, profile: Solves arithmetic problems step by step., sampling: {max_tokens: 24}, tags: [math]}
  - {name: calculator, llm: smollm2, profile: Works sums out., tools: [calculator], sampling: {max_tokens: 24}, tags: [math]}
  - {name: programmer, llm: smollm2, profile: Writes short Python functions., sampling: {max_tokens: 24}, tags: [code]}
  - {name: expert, llm: smollm2, profile: Answers general questions., sampling: {max_tokens: 24}, tags: [open]}
gate: {activation: {rule: top_mass, mass: 0.6, max_agents: 3}}
limits: {max_steps: 3}
router: {state_uri: "STATE"}
"""


@pytest.fixture(scope="package")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    path = folder / "pool.yaml"
    path.write_text(CONFIG.replace("STATE", (folder / "state").as_uri()), encoding="utf-8")
    return path


@pytest.fixture(scope="package")
def config(config_path: Path) -> Config:
    return load(config_path)


@pytest.fixture(scope="package")
def server(config_path: Path) -> Iterator[Served]:
    served = serve(config_path, env={"DMOA_API_KEYS": ",".join(KEYS)})
    yield served
    assert served.stop() == 0
