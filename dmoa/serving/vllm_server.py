"""The `vllm` engine on Ray Serve: a replica is an `LLMServer` of ray.serve.llm that answers for agents.

Placement groups, accelerators, parallelism, model sources, metrics and health are Ray's; ours are the prompts, the entropies
and the agents. The home of ray.serve.llm, which imports only where vLLM is installed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.llm import LLMConfig, LLMServer

from dmoa.agents.chat_tokens import load_tokenizer
from dmoa.agents.models import HubModel, model_id, resolve_adapter, resolve_model
from dmoa.agents.vllm_engine import VllmEngine
from dmoa.config import AgentConfig, Config, LlmConfig, VllmOptions
from dmoa.errors import ConfigError
from dmoa.serving.agents import Answers, hosted_agents

_CPU_BLOCK_SIZE = 32
"""vLLM's own 128 on a CPU spoils the reuse of prompts that differ in their last lines."""


class VllmHost(Answers, LLMServer):
    """A replica with one vLLM for some or all agents of one LLM."""

    async def __init__(self, config_json: str, llm: str, agent: str | None = None) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start vLLM. `agent` names the one agent of a dedicated deployment, None hosts all of the LLM's."""
        config = Config.model_validate_json(config_json)
        hosted = hosted_agents(config, llm, agent)
        source = await asyncio.to_thread(local_source, config.llms[llm].model)
        await super().__init__(llm_config(config, llm, hosted, source=source))
        engine: Any = self.engine
        client = engine._engine_client
        built = client.vllm_config.model_config
        self._host(
            config,
            llm,
            hosted,
            VllmEngine(
                client,
                await asyncio.to_thread(load_tokenizer, built.tokenizer, built.revision),
                max_model_len=built.max_model_len,
                label=f"vllm/{str(built.dtype).removeprefix('torch.')}",
                adapters={item.adapter: resolve_adapter(item.adapter) for item in hosted if item.adapter},
                model_label=model_id(config.llms[llm].model),
            ),
        )


def vllm_deployment(config: Config, llm: str, hosted: Sequence[AgentConfig], options: dict[str, Any]) -> Any:
    """Return the deployment of a vLLM for some agents; `options` are Serve's, without what ray.serve.llm works out itself."""
    found = llm_config(config, llm, hosted, options=options)
    return serve.deployment(VllmHost).options(**VllmHost.get_deployment_options(found))


def llm_config(
    config: Config,
    llm: str,
    hosted: Sequence[AgentConfig],
    *,
    source: str | None = None,
    options: dict[str, Any] | None = None,
) -> LLMConfig:
    """Return ray.serve.llm's configuration of an LLM; `source`: where a replica loads the weights from, if not by their name.

    Raises ConfigError for an LLM whose engine is another.
    """
    part = config.llms[llm]
    given = part.options
    if not isinstance(given, VllmOptions):
        raise ConfigError(f"llms.{llm}.engine: value seen: {part.engine!r}; allowed here is 'vllm'")
    on_cpu = part.gpus == 0
    loading: dict[str, Any] = {"model_id": llm, "model_source": source or _remote_source(part.model)}
    deployment = {name: value for name, value in (options or {}).items() if name != "ray_actor_options"}
    return LLMConfig(
        model_loading_config=loading,
        engine_kwargs=_engine_kwargs(part, given, hosted, on_cpu=on_cpu),
        accelerator_type=given.accelerator_type,
        placement_group_config={"bundles": [{"CPU": 1}] * given.num_workers} if on_cpu else None,
        runtime_env={"env_vars": _environment(given)} if on_cpu else None,
        deployment_config={**deployment, "ray_actor_options": {"num_cpus": 0}},
    )


def local_source(model: str) -> str | None:
    """Return the folder of a model that this machine resolves itself; None for one that vLLM fetches. Blocks."""
    if model.startswith("s3:"):
        return None
    found = resolve_model(model)
    return None if isinstance(found, HubModel) else str(found)


def _remote_source(model: str) -> Any:
    if model.startswith("s3://"):
        return {"bucket_uri": model}
    if model.startswith("hub:"):
        found = resolve_model(model)
        assert isinstance(found, HubModel)
        return found.repo
    return None


def _engine_kwargs(part: LlmConfig, given: VllmOptions, hosted: Sequence[AgentConfig], *, on_cpu: bool) -> dict[str, Any]:
    """Return what vLLM is started with."""
    block_size = given.block_size or (_CPU_BLOCK_SIZE if on_cpu else None)
    found: dict[str, Any] = {
        "dtype": given.dtype,
        "max_num_seqs": part.max_num_seqs,
        "tensor_parallel_size": given.tensor_parallel_size,
        "pipeline_parallel_size": given.pipeline_parallel_size,
        "enforce_eager": given.enforce_eager or on_cpu,
        "enable_prefix_caching": given.prefix_cache,
        "logits_processors": ["dmoa.agents.vllm_entropy:EntropyProcessor"],
        "worker_extension_cls": "dmoa.agents.vllm_entropy.EntropyWorker",
    }
    if given.max_model_len is not None:
        found["max_model_len"] = given.max_model_len
    if block_size is not None:
        found["block_size"] = block_size
    if not on_cpu:
        found["gpu_memory_utilization"] = given.gpu_memory_utilization
    if part.model.startswith("hub:"):
        source = resolve_model(part.model)
        assert isinstance(source, HubModel)
        found["revision"] = found["tokenizer_revision"] = source.revision
    adapters = {item.adapter for item in hosted if item.adapter}
    if adapters:
        # vLLM's CPU operations give rows without an adapter that of the last slot: it stays empty, and is zero.
        slots = max(given.max_loras or 0, len(adapters)) + 1 if on_cpu else given.max_loras or len(adapters)
        found |= {"enable_lora": True, "max_loras": slots, "max_lora_rank": given.max_lora_rank}
    return found


def _environment(given: VllmOptions) -> dict[str, str]:
    """Return the environment of a vLLM on a CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(given.cpu_kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(given.threads or max(1, cores // 2)),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
