"""How a replica's memory is filled: weights, adapters, and what is left for keys and values. Pure arithmetic.

An estimate for `dmoa serve --dry-run`: activations, CUDA graphs and the driver's own memory are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dmoa.config import LlmConfig, TransformersOptions, VllmOptions
from dmoa.engines.size import DTYPE_BYTES, ModelSize
from dmoa.serving.placement import Deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of one GPU of a replica; where it has none, of the replica in its node's own memory. Bytes throughout."""

    deployment: str
    device: Literal["gpu", "cpu", "none"]
    """none: nothing is loaded, for the model is scripted or runs at an endpoint."""
    reason: str | None = None
    """Why nothing more is known."""
    num_parameters: int | None = None
    """Of the whole model."""
    dtype: str | None = None
    quantization: str | None = None
    weights_bytes: int | None = None
    adapters_bytes: int = 0
    memory_bytes: int | None = None
    """Of one GPU; None: unknown."""
    budget_bytes: int | None = None
    """What the engine may fill."""
    room_bytes: int | None = None
    """What is left for keys and values; below 0 where the weights alone are too large."""
    token_bytes: int | None = None
    """Keys and values of one token, every layer counted as one of full attention."""
    least_token_bytes: int | None = None
    """The same without the layers that look back over a window only: what it takes at the least."""
    max_model_len: int | None = None
    """Longest sequence."""

    @property
    def room_tokens(self) -> int | None:
        """Tokens whose keys and values fit."""
        return None if self.room_bytes is None or not self.token_bytes else max(0, self.room_bytes) // self.token_bytes

    @property
    def num_sequences(self) -> float | None:
        """Sequences of the longest length whose keys and values fit."""
        return None if self.room_tokens is None or not self.max_model_len else self.room_tokens / self.max_model_len

    @property
    def is_too_long(self) -> bool:
        """Whether not even one of them fits, windows or not."""
        return None not in (self.room_bytes, self.num_sequences) and self.need_bytes > (self.room_bytes or 0)

    @property
    def need_bytes(self) -> int:
        """What one sequence of the longest length takes at the least."""
        return (self.least_token_bytes or 0) * (self.max_model_len or 0)


def estimate(
    deployment: Deployment,
    llm: LlmConfig,
    size: ModelSize | str,
    *,
    memory_bytes: int | None = None,
    adapter_bytes: Mapping[str, int] | None = None,
) -> Memory:
    """Return the memory of a deployment's replicas on GPUs of `memory_bytes`.

    `size` is what is known of the model, or why nothing is; `adapter_bytes` are the sizes of adapter files by name, which
    the transformers engine loads as they are.
    """
    device: Literal["gpu", "cpu"] = "gpu" if deployment.gpus else "cpu"
    options = llm.options
    if not isinstance(options, VllmOptions | TransformersOptions):
        return Memory(deployment=deployment.name, device="none", reason="no model is loaded")
    dtype = _dtype(options, size)
    weights = None if isinstance(size, str) or dtype is None else size.weight_bytes(dtype)
    if isinstance(size, str) or dtype is None or weights is None:
        reason = size if isinstance(size, str) else f"weights of kind {size.quantization or 'int8'} are not estimated"
        return Memory(deployment=deployment.name, device=device, reason=reason, memory_bytes=memory_bytes)
    wide, deep = (deployment.tensor_parallel, deployment.pipeline_parallel) if device == "gpu" else (1, 1)
    if isinstance(options, VllmOptions):
        slots = (options.max_loras or len(deployment.adapters)) if deployment.adapters else 0
        adapters = size.lora_width * options.max_lora_rank * slots * DTYPE_BYTES[dtype]
    else:
        adapters = sum((adapter_bytes or {}).get(name, 0) for name in deployment.adapters)
    weights, adapters = -(-weights // (wide * deep)), -(-adapters // (wide * deep))
    budget = _budget(deployment, options, memory_bytes)
    room = None if budget is None else budget - weights - adapters
    if device == "cpu" and isinstance(options, VllmOptions):
        room = options.cpu_kv_cache_gib * 2**30
    return Memory(
        deployment=deployment.name,
        device=device,
        num_parameters=size.num_parameters,
        dtype=dtype,
        quantization=size.quantization,
        weights_bytes=weights,
        adapters_bytes=adapters,
        memory_bytes=memory_bytes if device == "gpu" else None,
        budget_bytes=budget,
        room_bytes=room,
        token_bytes=size.token_bytes(dtype, tensor_parallel=wide, pipeline_parallel=deep),
        least_token_bytes=size.token_bytes(dtype, tensor_parallel=wide, pipeline_parallel=deep, counts_windows=False),
        max_model_len=options.max_model_len or size.max_model_len,
    )


def _dtype(options: VllmOptions | TransformersOptions, size: ModelSize | str) -> str | None:
    """Return what weights, keys and values are kept in; None where it is not known, or not one type."""
    if options.dtype == "int8" or isinstance(size, str):
        return None
    if options.dtype != "auto":
        return options.dtype
    return "bfloat16" if size.dtype == "float32" else size.dtype  # vLLM 0.29 runs float32 models in half of it under auto


def _budget(deployment: Deployment, options: VllmOptions | TransformersOptions, memory_bytes: int | None) -> int | None:
    if not deployment.gpus or memory_bytes is None:
        return None
    if isinstance(options, VllmOptions):
        return int(memory_bytes * options.gpu_memory_utilization)
    return int(memory_bytes * min(1.0, deployment.gpus))  # a replica with a part of a GPU has that part of its memory
