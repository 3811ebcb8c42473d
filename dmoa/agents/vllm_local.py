"""The `vllm` engine without Ray Serve: `dmoa run`, rollouts and evaluation start a vLLM of their own beside their process."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from dmoa.agents.chat_tokens import load_tokenizer
from dmoa.agents.models import model_id, resolve_adapter
from dmoa.agents.vllm_args import cpu_environment, engine_args, local_source, remote_source, vllm_options
from dmoa.config import LlmConfig, VllmOptions


def start_vllm(part: LlmConfig, llm: str, adapters: Collection[str]) -> Any:
    """Start vLLM for an LLM and return the engine over it, for use in one event loop. Blocks; raises ConfigError."""
    given = vllm_options(part, llm)
    return engine_over(connect(part, given, engine_args(part, given, adapters)), part, given, adapters)


def connect(part: LlmConfig, given: VllmOptions, args: Mapping[str, Any]) -> Any:
    """Start vLLM with these arguments and return the client. Blocks; raises ConfigError."""
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING"}
    for name, value in (quiet | (cpu_environment(given) if part.gpus == 0 else {})).items():
        os.environ.setdefault(name, value)
    # After the environment is set, which is read at import.
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    source = local_source(part.model) or remote_source(part.model)
    return AsyncLLM.from_engine_args(AsyncEngineArgs(model=source, **args))


def engine_over(client: Any, part: LlmConfig, given: VllmOptions, adapters: Collection[str]) -> Any:
    """Return dmoa's engine over a started vLLM client; reads the tokenizer."""
    from dmoa.agents.vllm_engine import Listed, VllmEngine

    built = client.vllm_config.model_config
    return VllmEngine(
        client,
        load_tokenizer(built.tokenizer, built.revision),
        max_model_len=built.max_model_len,
        label=f"vllm/{str(built.dtype).removeprefix('torch.')}",
        adapters={name: resolve_adapter(name) for name in adapters},
        model_label=model_id(part.model),
        listed=None if given.entropy == "exact" else Listed(given.top_logprobs, built.get_vocab_size()),
    )
