"""`dmoa serve --dry-run` as a command: what it prints, what it writes, how it ends. It starts nothing."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from dmoa.agents.pool import vllm_builds
from tests.unit.cli.conftest import Invoke

GPUS = """
name: many
llms:
  big:
    model: path:/none
    engine: vllm
    placement: dedicated
    gpus: 500
    engine_kwargs: {tensor_parallel_size: 50, pipeline_parallel_size: 10}
agents:
  - {name: one, llm: big, profile: Adds numbers.}
  - {name: two, llm: big, profile: Adds numbers., autoscaling: {min_replicas: 2, max_replicas: 3}}
"""


def test_a_pool_without_gpus_fits_anywhere(dmoa: Invoke, pool: Path, tmp_path: Path) -> None:
    result = dmoa("serve", "--dry-run", "--config", pool, "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert "llm-fake" in result.stdout
    assert "pool tiny: fits; nothing was started" in result.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["ok"], plan["gpus"]["needed_max"], plan["faults"]) == (True, 0, [])
    assert [(row["name"], row["agents"]) for row in plan["deployments"]] == [("llm-fake", ["adder", "guesser", "echo"])]
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


@pytest.mark.skipif(len(vllm_builds()) == 1, reason="vLLM is installed")
def test_a_pool_whose_engine_is_not_installed_cannot_start_here(dmoa: Invoke, tmp_path: Path) -> None:
    text = "name: p\nllms: {cpu: {model: 's3://bucket/model', engine: vllm}}\nagents: [{name: a, llm: cpu, profile: Works.}]\n"
    (tmp_path / "pool.yaml").write_text(text, encoding="utf-8")
    result = dmoa("serve", "--dry-run", "--config", tmp_path / "pool.yaml")
    assert result.exit_code == 2
    assert "1. llms.cpu.engine is 'vllm'; vLLM is not installed here" in result.stderr


def test_an_impossible_pool_is_refused_with_the_numbers(dmoa: Invoke, tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(GPUS, encoding="utf-8")
    result = dmoa("serve", "--dry-run", "--config", tmp_path / "pool.yaml", "--json", tmp_path / "plan.json")
    assert result.exit_code == 2
    assert "1. llms.big.gpus: 1500 in all at min_replicas (agent-one 1 x 500, agent-two 2 x 500)" in result.stderr
    assert "1500 to 2000" in result.stdout  # the table comes first, whatever is wrong
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["ok"], plan["gpus"]["needed_min"], plan["gpus"]["needed_max"]) == (False, 1500, 2000)
    assert len(plan["faults"]) >= 1


@pytest.mark.parametrize("word", ["--dry-run", "does it fit on that cluster?"])
def test_help_teaches_it(dmoa: Invoke, word: str) -> None:
    assert word in dmoa("serve", "--help").stdout


def test_an_address_where_nothing_listens_is_refused_at_once(dmoa: Invoke, pool: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    result = dmoa("serve", "--dry-run", "--config", pool, "--address", address)
    assert result.exit_code == 2
    assert f"address is '{address}'; nothing listens there" in result.stderr
