"""The engines that a bench can compare here, and a pool moved from one to the other."""

from __future__ import annotations

from typing import Any

from dmoa.agents.pool import vllm_builds
from dmoa.config import Config, LlmConfig
from dmoa.errors import ConfigError
from dmoa.validation import did_you_mean

LABELS = {"transformers": "transformers/float32", "vllm": "vllm/float32"}
"""Name of an engine -> its label, with the dtype that benches run it in."""
_VLLM_OPTIONS: dict[str, Any] = {"dtype": "float32", "cpu_kv_cache_gib": 2}


def engines_here(only: str | None = None) -> tuple[str, ...]:
    """Return the engines that can run the embedded model here, vLLM only where it is installed; or just the one that is named.

    Raises ConfigError for one that is not among them.
    """
    here = ("transformers", *(["vllm"] if len(vllm_builds()) == 1 else []))
    if only is None:
        return here
    if only not in here:
        nearest = did_you_mean(only, here)
        raise ConfigError(
            f"--engine: value seen: {only!r}; allowed: {', '.join(here)}, the engines that are installed here{nearest}"
        )
    return (only,)


def on_engine(pool: Config, engine: str, **options: Any) -> Config:
    """Return a pool of `transformers` LLMs with all of them on an engine, as long in context, wide and placed as they were.

    `options`: entries of `engine_kwargs` for vLLM, over those that benches set.
    """
    if engine == "transformers":
        return pool
    return pool.model_copy(update={"llms": {name: _on_vllm(part, options) for name, part in pool.llms.items()}})


def _on_vllm(part: LlmConfig, options: dict[str, Any]) -> LlmConfig:
    kept = {key: part.engine_kwargs[key] for key in ("max_model_len",) if key in part.engine_kwargs}
    return LlmConfig.model_validate(part.model_dump() | {"engine": "vllm", "engine_kwargs": kept | _VLLM_OPTIONS | options})
