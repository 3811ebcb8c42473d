"""Works out what vLLM is started with for an LLM of a pool, in vLLM's own names. Imports neither vLLM nor Ray."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from dmoa.config import LlmConfig
from dmoa.engine_options import VllmOptions
from dmoa.engines.models import HubModel, resolve_model
from dmoa.errors import ConfigError

_CPU_BLOCK_SIZE = 32
"""vLLM's own 128 on a CPU spoils the reuse of prompts that differ in their last lines."""


def vllm_options(part: LlmConfig, llm: str) -> VllmOptions:
    """Return the options of an LLM whose engine is `vllm`. Raises ConfigError for another engine."""
    options = part.options
    if not isinstance(options, VllmOptions):
        raise ConfigError(f"llms.{llm}.engine is {part.engine!r}; expected 'vllm' here")
    return options


def engine_args(part: LlmConfig, given: VllmOptions, adapters: Collection[str]) -> dict[str, Any]:
    """Return what vLLM is started with, but for where the weights are; `adapters`: those that requests may name.

    Looks the revision of a hub's model up in the configuration only.
    """
    on_cpu = part.gpus == 0
    block_size = given.block_size or (_CPU_BLOCK_SIZE if on_cpu else None)
    found: dict[str, Any] = {
        "dtype": given.dtype,
        "max_num_seqs": part.max_num_seqs,
        "tensor_parallel_size": given.tensor_parallel_size,
        "pipeline_parallel_size": given.pipeline_parallel_size,
        "enforce_eager": given.enforce_eager or on_cpu,
        "enable_prefix_caching": given.prefix_cache,
    }
    if given.entropy == "exact":
        found["logits_processors"] = ["dmoa.engines.vllm.entropy:EntropyProcessor"]
        found["worker_extension_cls"] = "dmoa.engines.vllm.entropy.EntropyWorker"
    if given.enable_sleep_mode:
        found["enable_sleep_mode"] = True
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
    if adapters:
        # vLLM's CPU operations give rows without an adapter that of the last slot: it stays empty, and is zero.
        slots = max(given.max_loras or 0, len(adapters)) + 1 if on_cpu else given.max_loras or len(adapters)
        found |= {"enable_lora": True, "max_loras": slots, "max_lora_rank": given.max_lora_rank}
    return found


def local_source(model: str) -> str | None:
    """Return the folder of a model that this machine resolves itself; None for one that vLLM fetches. Blocks."""
    if model.startswith("s3:"):
        return None
    found = resolve_model(model)
    return None if isinstance(found, HubModel) else str(found)


def remote_source(model: str) -> str | None:
    """Return a model that vLLM fetches by the name it goes by there: a hub's repository, an s3:// address; None for others."""
    if model.startswith("s3:"):
        return model
    found = resolve_model(model) if model.startswith("hub:") else None
    return found.repo if isinstance(found, HubModel) else None


def cpu_environment(given: VllmOptions) -> dict[str, str]:
    """Return the environment in which a vLLM on a CPU starts, its processes too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(given.cpu_kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(given.threads or max(1, cores // 2)),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
