"""Starts a vLLM beside this process for `dmoa run`, rollouts and evaluation, with the `vllm` engine over it. No Ray Serve."""

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
from dmoa.engines.models import model_id, resolve_adapter
from dmoa.engines.size import cached_folder
from dmoa.engines.vllm.options import cpu_environment, engine_args, local_source, remote_source, vllm_options
from dmoa.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from dmoa.engines.gpus import GpuSlice


_ENVIRONMENT = threading.Lock()
"""Held while this process's environment is that of an engine which starts."""


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
