"""Every YAML file of the repository loads: the pools as pools, the job as a job, the rest as YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmoa.agents.pool import check_files, load_pool
from dmoa.cli.jobs import read_job
from dmoa.config import Config
from dmoa.training.options import TrainOptions
from dmoa.workflows.console import Common
from tests.contract.cluster.manifests import CLUSTER, JOB, ROOT, documents, one

SKIPPED = {".venv", ".git", "out", "build", "dist", "node_modules", ".hypothesis"}
FILES = sorted(path for path in [*ROOT.rglob("*.yaml"), *ROOT.rglob("*.yml")] if not SKIPPED & set(path.relative_to(ROOT).parts))
POOLS = CLUSTER / "pools"
IN_IMAGE = "/opt/dmoa/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_loads(path: Path) -> None:
    assert documents(path)


def test_files_of_all_folders_are_seen() -> None:
    assert {"cluster", "dmoa", "jobs"} <= {path.relative_to(ROOT).parts[0] for path in FILES}


def gpus(config: Config) -> float:
    """GPUs of the pool's least replicas."""
    shared = sum(llm.gpus * llm.autoscaling.min_replicas for llm in config.llms.values() if llm.placement == "shared")
    dedicated = [agent for agent in config.agents if config.llms[agent.llm].placement == "dedicated"]
    return shared + sum(config.llms[agent.llm].gpus * agent.autoscaling.min_replicas for agent in dedicated)


@pytest.mark.parametrize(
    ("name", "agents", "num_gpus"),
    [("paper", 8, 8), ("ensemble", 6, 7), ("roles", 16, 1), ("lora", 7, 1), ("recorded", 3, 0)],
)
def test_pools_load_with_the_gpus_that_they_promise(name: str, agents: int, num_gpus: int) -> None:
    config = load_pool(POOLS / f"{name}.yaml")
    check_files(config)
    assert config.name == name
    assert len(config.agents) == agents
    assert gpus(config) == num_gpus


def test_ensemble_holds_one_agent_per_model() -> None:
    config = load_pool(POOLS / "ensemble.yaml")
    assert sorted(agent.llm for agent in config.agents) == sorted(config.llms)
    assert len({llm.model for llm in config.llms.values()}) == len(config.llms)


def test_lora_pool_has_an_adapter_for_every_agent_but_the_base() -> None:
    config = load_pool(POOLS / "lora.yaml")
    assert [agent.name for agent in config.agents if agent.adapter is None] == ["base"]


def test_remote_pool_loads() -> None:
    assert load_pool(POOLS / "remote.yaml").name == "remote"


def test_remote_pool_names_variables_and_holds_no_key() -> None:
    for llm in one(POOLS / "remote.yaml")["llms"].values():
        assert llm["engine"] == "openai"
        assert llm["engine_kwargs"]["api_key_env"].isupper()
        assert "api_key" not in llm["engine_kwargs"]


def test_every_pool_is_tested_here() -> None:
    assert {path.stem for path in POOLS.iterdir()} == {"paper", "ensemble", "roles", "lora", "remote", "recorded"}


def test_job_of_the_manifest_is_a_training_of_a_shipped_pool(tmp_path: Path) -> None:
    _, script, _, config = one(JOB)["spec"]["entrypoint"].split()
    assert (ROOT / script.removeprefix(IN_IMAGE)).is_file()
    path = ROOT / config.removeprefix(IN_IMAGE)
    local = tmp_path / "job.yaml"
    local.write_text(path.read_text(encoding="utf-8").replace(IN_IMAGE, f"{ROOT}/"), encoding="utf-8")
    pool, values = read_job(Common(config=local))
    options = TrainOptions.parse(values)
    assert pool == load_pool(POOLS / "paper.yaml")
    assert options.workers == one(JOB)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    assert options.out.is_absolute()
