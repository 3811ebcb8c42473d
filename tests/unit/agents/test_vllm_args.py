"""What vLLM is started with, worked out by hand from its own documentation; nothing here needs vLLM."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dmoa.config import LlmConfig
from dmoa.engine_options import VllmOptions
from dmoa.engines.vllm.start import cpu_environment, engine_args, local_source, remote_source, vllm_options
from dmoa.errors import ConfigError


def llm(**changes: Any) -> LlmConfig:
    return LlmConfig.model_validate({"model": "hub:org/model@abc", "engine": "vllm", "max_num_seqs": 24, "gpus": 1} | changes)


def started(*adapters: str, **changes: Any) -> dict[str, Any]:
    part = llm(**changes)
    return engine_args(part, vllm_options(part, "big"), adapters)


def test_on_a_gpu_vllm_chooses_what_the_pool_leaves_open() -> None:
    assert started() == {
        "dtype": "auto",
        "max_num_seqs": 24,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "enforce_eager": False,
        "enable_prefix_caching": True,
        "gpu_memory_utilization": 0.9,
        "logits_processors": ["dmoa.engines.vllm.entropy:EntropyProcessor"],
        "worker_extension_cls": "dmoa.engines.vllm.entropy.EntropyWorker",
        "revision": "abc",
        "tokenizer_revision": "abc",
    }


def test_on_a_cpu_blocks_are_small_and_no_graph_is_compiled() -> None:
    found = started(gpus=0, model="embedded:smollm2-135m", engine_kwargs={"max_model_len": 512})
    assert found["enforce_eager"] is True
    assert found["block_size"] == 32
    assert found["max_model_len"] == 512
    assert "gpu_memory_utilization" not in found
    assert "revision" not in found


def test_named_values_win() -> None:
    found = started(gpus=2, engine_kwargs={"tensor_parallel_size": 2, "block_size": 16, "gpu_memory_utilization": 0.5})
    assert (found["tensor_parallel_size"], found["block_size"], found["gpu_memory_utilization"]) == (2, 16, 0.5)


@pytest.mark.parametrize(
    ("gpus", "max_loras", "slots"),
    [(1, None, 3), (1, 2, 2), (0, None, 4), (0, 2, 4), (0, 5, 6)],
    ids=["all", "as told", "cpu: one stays empty", "cpu: never fewer than there are", "cpu: as told, and one"],
)
def test_a_batch_takes_all_adapters_unless_told_otherwise(gpus: int, max_loras: int | None, slots: int) -> None:
    found = started("builtin:a", "builtin:b", "builtin:c", gpus=gpus, engine_kwargs={"max_loras": max_loras})
    assert (found["enable_lora"], found["max_loras"], found["max_lora_rank"]) == (True, slots, 16)


def test_listed_entropies_need_no_processor() -> None:
    found = started(engine_kwargs={"entropy": "listed"})
    assert not {"logits_processors", "worker_extension_cls"} & set(found)


def test_sleep_is_passed_on_and_refused_without_a_gpu() -> None:
    assert "enable_sleep_mode" not in started()
    assert started(engine_kwargs={"enable_sleep_mode": True})["enable_sleep_mode"] is True
    with pytest.raises(ValidationError, match=r"enable_sleep_mode is true with gpus 0; .* leave it out, or set gpus"):
        llm(gpus=0, engine_kwargs={"enable_sleep_mode": True})


def test_sources() -> None:
    assert remote_source("hub:org/model@abc") == "org/model"
    assert remote_source("s3://bucket/model") == "s3://bucket/model"
    assert remote_source("path:/data/model") is None
    assert local_source("hub:org/model") is None
    assert local_source("s3://bucket/model") is None


def test_the_environment_of_a_cpu() -> None:
    found = cpu_environment(VllmOptions(threads=3, cpu_kv_cache_gib=2))
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "2"


def test_another_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"llms\.big\.engine is 'transformers'; expected 'vllm' here"):
        vllm_options(LlmConfig(), "big")
