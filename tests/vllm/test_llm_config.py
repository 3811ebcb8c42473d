"""What ray.serve.llm makes of an LLM's options: placement group, executor, sleep. Starts neither Ray nor vLLM."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dmoa.config import Config
from dmoa.engines.chat_template import load_tokenizer
from dmoa.engines.models import resolve_model
from dmoa.engines.vllm.engine import _Reply
from dmoa.engines.vllm.thoughts import ReasoningFormat, ReplyText
from dmoa.errors import EngineError
from dmoa.types import TextDelta

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray 2.60's own and vLLM's, with this pydantic
    from ray.serve.llm import LLMServer

    from dmoa.serving.agent_replica import hosted_agents
    from dmoa.serving.vllm_replica import VllmReplica, llm_config, vllm_deployment


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deployment options hold the driver's runtime environment; whoever asks Ray for it starts one."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))


def pool(gpus: int, **kwargs: Any) -> Config:
    part = {"model": "hub:org/model@abc", "engine": "vllm", "gpus": gpus, "engine_kwargs": kwargs}
    agents = [{"name": "solver", "llm": "big", "profile": "Works."}]
    return Config.model_validate({"name": "p", "llms": {"big": part}, "agents": agents})


def placed(gpus: int, **kwargs: Any) -> tuple[str, list[dict[str, float]]]:
    """Strategy and bundles that Serve is told for a replica, resources of none left out."""
    config = pool(gpus, **kwargs)
    options = {"name": "llm-big", "ray_actor_options": {"num_cpus": 1, "num_gpus": gpus}}
    deployment = vllm_deployment(config, "big", hosted_agents(config, "big", None), options)
    replica = deployment._replica_config
    bundles = [{name: value for name, value in bundle.items() if value} for bundle in replica.placement_group_bundles]
    return replica.placement_group_strategy, bundles


@pytest.mark.parametrize(
    ("gpus", "kwargs", "strategy"),
    [
        (1, {}, "PACK"),
        (2, {"tensor_parallel_size": 2}, "STRICT_PACK"),
        (8, {"tensor_parallel_size": 8}, "STRICT_PACK"),
        (2, {"pipeline_parallel_size": 2}, "PACK"),
        (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "PACK"),
    ],
)
def test_tensor_parallel_gpus_are_on_one_node(gpus: int, kwargs: dict[str, Any], strategy: str) -> None:
    assert placed(gpus, **kwargs) == (strategy, [{"GPU": 1}] * gpus)


def test_a_kind_of_gpu_is_asked_for_in_every_bundle() -> None:
    bundle = {"GPU": 1, "accelerator_type:H100": 0.001}
    assert placed(2, tensor_parallel_size=2, accelerator_type="H100") == ("STRICT_PACK", [bundle] * 2)
    assert placed(2, pipeline_parallel_size=2, accelerator_type="H100") == ("PACK", [bundle] * 2)


def test_ray_takes_it_for_gpus_and_runs_its_own_executor() -> None:
    config = pool(2, tensor_parallel_size=2)
    found = llm_config(config, "big", hosted_agents(config, "big", None)).get_engine_config()
    assert found.accelerator.requires_remote_initialization
    assert found.get_initialization_kwargs()["distributed_executor_backend"] == "ray"
    assert "VLLM_RAY_PER_WORKER_GPUS" not in found.get_runtime_env_with_local_env_vars()["env_vars"]
    assert (found.num_devices, found.placement_strategy, found.placement_bundles) == (2, "STRICT_PACK", [{"GPU": 1}] * 2)


def test_a_replica_on_cpus_asks_for_no_gpu() -> None:
    assert placed(0, tensor_parallel_size=2) == ("PACK", [{"CPU": 1}] * 2)


class Sleeper:
    """Stands in for the vLLM client of a replica's engine."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    async def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    async def wake_up(self, tags: list[str] | None) -> None:
        self.calls.append(("wake_up", tags))

    async def is_sleeping(self) -> bool:
        return self.calls[-1][0] == "sleep"


async def test_a_replica_hands_sleep_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    monkeypatch.setattr(LLMServer, "__del__", lambda self: None)  # Serve awaits Ray's; here nobody would
    config = pool(1, enable_sleep_mode=True)
    found = llm_config(config, "big", hosted_agents(config, "big", None))
    assert found.get_engine_config().get_initialization_kwargs()["enable_sleep_mode"] is True
    host = VllmReplica.__new__(VllmReplica)
    host.engine = VLLMEngine(found)
    host.engine._engine_client = client = Sleeper()
    await host.sleep(level=1)
    assert await host.is_sleeping()
    await host.wakeup()
    assert not await host.is_sleeping()
    assert client.calls == [("sleep", 1), ("wake_up", None)]


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_call_that_vllm_gave_up_is_no_reply(reason: str) -> None:
    reply = _Reply(3, 0.0, None, ReplyText(ReasoningFormat(load_tokenizer(str(resolve_model("embedded:smollm2-135m")))), [1]))

    def told(text: str, finish_reason: str | None) -> Any:
        part = SimpleNamespace(text=text, token_ids=[1], finish_reason=finish_reason, logprobs=None)
        return SimpleNamespace(outputs=[part], num_cached_tokens=0, metrics=None)

    assert reply.take(told("The", None)) == [TextDelta(text="The")]
    with pytest.raises(EngineError, match=rf"vLLM gave the call up after 1 tokens \({reason}\)"):
        reply.take(told("", reason))
