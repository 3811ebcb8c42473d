"""What vLLM is started with for an LLM of a pool, in vLLM's own names; and a vLLM that is started beside this process.

The second is for `dmoa run`, rollouts and evaluation; on Ray Serve ray.serve.llm starts it. vLLM is imported where it starts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoa.config import LlmConfig
from dmoa.engine_options import VllmOptions
from dmoa.engines.adapter_files import check_adapter
from dmoa.engines.chat_template import load_tokenizer
from dmoa.engines.models import HubModel, model_id, resolve_adapter, resolve_model
from dmoa.engines.size import cached_folder
from dmoa.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from dmoa.engines.gpus import GpuSlice

_CPU_BLOCK_SIZE = 32
"""vLLM's own 128 on a CPU spoils the reuse of prompts that differ in their last lines."""
_ENVIRONMENT = threading.Lock()
"""Held while this process's environment is that of an engine which starts."""


def vllm_options(part: LlmConfig, llm: str) -> VllmOptions:
    """Return the options of an LLM whose engine is `vllm`. Raises ConfigError for another engine."""
    options = part.options
    if not isinstance(options, VllmOptions):
        raise ConfigError(f"llms.{llm}.engine is {part.engine!r}; expected 'vllm' here")
    return options


def engine_args(part: LlmConfig, given: VllmOptions, adapters: Collection[str]) -> dict[str, Any]:
    """Return what vLLM is started with, but for where the weights are; `adapters`: those that requests may name."""
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


def start_vllm(part: LlmConfig, llm: str, adapters: Collection[str], gpus: GpuSlice | None = None) -> Any:
    """Start vLLM for an LLM and return the engine over it, for use in one event loop. Blocks; raises ConfigError, EngineError.

    `gpus` are its own of those that this process sees; None: all of them.
    """
    given = vllm_options(part, llm)
    check_adapters(part, given, adapters)
    check_parser(given, llm)
    return engine_over(connect(part, given, engine_args(part, given, adapters), gpus), part, given, adapters)


def keep_usage_private() -> None:
    """Keep a vLLM that this process starts from telling its makers about it, unless the environment says otherwise."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def check_parser(given: VllmOptions, llm: str) -> None:
    """Check that vLLM has the parsers that an LLM names, before vLLM starts. Blocks; raises ConfigError."""
    if given.reasoning_parser is None and given.tool_parser is None:
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read when vLLM is imported
    from dmoa.engines.vllm.thoughts import parser_class
    from dmoa.engines.vllm.tools import tool_parser_class

    try:
        parser_class(given.reasoning_parser)
        tool_parser_class(given.tool_parser)
    except ConfigError as error:
        raise ConfigError(f"llms.{llm}.{error}") from error


def check_adapters(part: LlmConfig, given: VllmOptions, adapters: Collection[str]) -> None:
    """Check that adapters fit an LLM's model, before vLLM starts, which passes over what does not. Blocks; raises ConfigError."""
    source = local_source(part.model) if adapters else None
    base = Path(source) if source else cached_folder(part.model)
    for name in adapters:
        check_adapter(f"adapters.{name}", resolve_adapter(name), base=base, engine="vllm", max_rank=given.max_lora_rank)


def _start(args: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    # Kept by vLLM for the first GPU that was visible: by now it may be one of another kind.
    forget = getattr(current_platform.get_device_capability, "cache_clear", None)
    if forget is not None:
        forget()
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))


def connect(
    part: LlmConfig,
    given: VllmOptions,
    args: Mapping[str, Any],
    gpus: GpuSlice | None = None,
    start: Callable[[dict[str, Any]], Any] = _start,
) -> Any:
    """Start vLLM with these arguments, on GPUs of its own, and return the client. Blocks; raises ConfigError, EngineError.

    `start` makes the client of vLLM's arguments, with the environment that its processes need.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read when vLLM is imported
    keep_usage_private()
    source = local_source(part.model) or remote_source(part.model)
    # Its workers run beside this process, also where that is a part of a Ray job.
    beside = {"distributed_executor_backend": "mp"} if given.num_workers > 1 else {}
    # On GPUs its process has to be a fresh one: a fork would keep what this process found out about CUDA.
    own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus.names), "VLLM_WORKER_MULTIPROC_METHOD": "spawn"} if gpus else {}
    with environment(cpu_environment(given) if part.gpus == 0 else own):
        try:
            return start({"model": source, **args, **beside})
        except Exception as error:  # whatever vLLM has against the model, its options or the machine
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            raise EngineError(f"model {part.model!r}: vLLM did not start: {why}; what it wrote before may say more") from error


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for a while, for the processes that it starts then; one caller after the other."""
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def engine_over(client: Any, part: LlmConfig, given: VllmOptions, adapters: Collection[str]) -> Any:
    """Return dmoa's engine over a started vLLM client; reads the tokenizer."""
    from dmoa.engines.vllm.engine import Listed, VllmEngine

    built = client.vllm_config.model_config
    return VllmEngine(
        client,
        load_tokenizer(built.tokenizer, built.revision),
        max_model_len=built.max_model_len,
        label=f"vllm/{str(built.dtype).removeprefix('torch.')}",
        adapters={name: resolve_adapter(name) for name in adapters},
        model_label=model_id(part.model),
        listed=None if given.entropy == "exact" else Listed(given.top_logprobs, built.get_vocab_size()),
        reasoning_parser=given.reasoning_parser,
        tool_parser=given.tool_parser,
    )
