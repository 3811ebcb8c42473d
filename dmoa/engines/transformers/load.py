"""Loads a language model for the transformers engine as its options say: dtype, device, int8 weights, compilation.

Every option is part of the label that goes into every result, because each may change numbers.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from dmoa.engine_options import TransformersOptions
from dmoa.engines.models import HubModel
from dmoa.errors import ConfigError, EngineError

_LOG = logging.getLogger("dmoa.engine")
_UNLOADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
"""What transformers raises for files that it can make no model of."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A language model ready to run, with what the engine needs to know of it."""

    model: Any
    """The `PreTrainedModel`, in eval mode, without gradients."""
    decode: Any
    """The same model for steps of one token per row: compiled where the options say so."""
    tokenizer: Any
    """The transformers tokenizer; it has a chat template."""
    device: torch.device
    dtype: torch.dtype
    """Type of activations, keys and values."""
    stop_tokens: frozenset[int]
    """Tokens that end a reply."""
    num_layers: int
    num_heads: int
    """Key-value heads."""
    head_size: int
    max_model_len: int
    """Longest prompt plus reply in tokens: as the options say, where the model was made for as many."""
    label: str
    """Engine and the options that may change numbers, such as `transformers/bfloat16+compile`."""


def load_model(
    source: Path | HubModel, options: TransformersOptions, *, has_adapters: bool, gpu: int | None = None
) -> LoadedModel:
    """Load a folder or a hub's repository, on GPU number `gpu` if any. Blocks.

    Raises ConfigError for what cannot run so, EngineError for what is too large.
    """
    device = device_of(options, gpu)
    _check(options, device, has_adapters)
    with in_memory(str(source), device):
        return _load(source, options, device)


@contextmanager
def in_memory(name: str, device: torch.device) -> Iterator[None]:
    """Raise EngineError in place of what torch says where memory does not suffice for a model."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise EngineError(
            f"model: {name!r} does not fit into the memory of {device}: {' '.join(str(error).split())[:300] or 'out of memory'}; "
            "free memory, start fewer engines, or use a smaller model or dtype (`dmoa serve --dry-run` estimates what is needed)"
        ) from error


def _is_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory did not suffice; of processors' memory torch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def _load(source: Path | HubModel, options: TransformersOptions, device: torch.device) -> LoadedModel:
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    disable_progress_bar()
    name, revision = (source.repo, source.revision) if isinstance(source, HubModel) else (str(source), "main")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, attn_implementation="sdpa")
    except _UNLOADABLE as error:
        if _is_memory(error):
            raise
        raise ConfigError(
            f"model: {name!r} is not a folder with a transformers language model and its tokenizer; "
            f"check the path: {' '.join(str(error).split())[:400]}"
        ) from error
    if not tokenizer.chat_template:
        raise ConfigError(f"model: {name!r} has no chat template; agents need one: choose an instruction-tuned model")
    config = model.config.get_text_config()
    _check_attention(name, config)
    model = model.to(device).eval().requires_grad_(False)
    if options.dtype == "int8":
        model = _quantize(model)
    stop = model.generation_config.eos_token_id
    return LoadedModel(
        model=model,
        decode=torch.compile(model, dynamic=True) if options.compile else model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        stop_tokens=frozenset([tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])]) - {None},
        num_layers=config.num_hidden_layers,
        num_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_model_len=_max_model_len(name, config, options),
        label=f"transformers/{options.dtype}{'+compile' if options.compile else ''}",
    )


def use_threads(options: TransformersOptions) -> None:
    """Let the calling thread compute with as many CPU threads as the options say; by default half of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.get_num_threads()  # at its first use a thread takes over the process's number, which an encoder lowers for moments
    torch.set_num_threads(options.threads or max(1, cores // 2))


def give_back(device: torch.device) -> None:
    """Return freed memory to the system: torch's on a GPU, and what the C library keeps for later, where it is glibc."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    # Tensors of some megabytes are cut from arenas, which keep what is freed: 290 MB after a hundred calls.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def device_of(options: TransformersOptions, gpu: int | None = None) -> torch.device:
    """Return the device that an engine computes on. Raises ConfigError for a GPU where there is none."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine_kwargs.device is 'cuda'; this machine has no CUDA device; use 'auto' or 'cpu'")
    if options.device == "auto":
        name = "cuda" if torch.cuda.is_available() and options.dtype != "int8" else "cpu"
    else:
        name = options.device
    return torch.device(name) if name == "cpu" or gpu is None else torch.device(name, gpu)


def _check(options: TransformersOptions, device: torch.device, has_adapters: bool) -> None:
    if options.dtype == "int8" and device.type != "cpu":
        raise ConfigError("engine_kwargs.dtype is 'int8'; int8 weights run on device 'cpu' only; use 'bfloat16' on a GPU")
    if options.dtype == "int8" and has_adapters:
        raise ConfigError(
            "engine_kwargs.dtype is 'int8' with LoRA adapters; adapters need 'float32' or 'bfloat16' weights; "
            "change the dtype or leave the adapters out"
        )
    if options.dtype == "bfloat16" and device.type == "cpu":
        _check_bfloat16()
    if options.compile and has_adapters:
        raise ConfigError(
            "engine_kwargs.compile is true with LoRA adapters; a batch of mixed adapters would be compiled anew for "
            "every mixture; set compile to false or leave the adapters out"
        )
    if options.compile and options.dtype == "int8":
        raise ConfigError("engine_kwargs.compile is true with dtype 'int8'; compile 'float32' or 'bfloat16' weights")
    if options.compile and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ConfigError("engine_kwargs.compile is true; it needs a C++ compiler (g++ or clang++); install one or use false")


def _check_bfloat16() -> None:
    """Raise ConfigError where bfloat16 products kill a process: some virtual machines report AMX but do not run it."""
    code = "import torch; w = torch.ones(64, 64, dtype=torch.bfloat16); torch.nn.functional.linear(w[:8], w)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300, check=False)  # noqa: S603 our own code
    if done.returncode:
        raise ConfigError(
            "engine_kwargs.dtype is 'bfloat16'; this processor reports matrix instructions that it does not run "
            f"(a trial ended with status {done.returncode}); use 'float32', or set the environment variable "
            "ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 before the start"
        )


def _check_attention(name: str, config: Any) -> None:
    """Refuse models whose layers do not all attend to the whole past: their caches are of other shapes."""
    layers = getattr(config, "layer_types", None)
    has_window = getattr(config, "sliding_window", None) is not None if layers is None else set(layers) != {"full_attention"}
    if has_window:
        raise ConfigError(
            f"model: {name!r} has layers with other than full attention; the transformers engine runs models with full "
            "attention only; use engine vllm for this model"
        )


def _max_model_len(name: str, config: Any, options: TransformersOptions) -> int:
    """Return how long a sequence may be; one that is longer than the model knows places fails, with all that run beside it."""
    most = getattr(config, "max_position_embeddings", None) or options.max_model_len
    if most < options.max_model_len:
        _LOG.warning(
            "engine_kwargs.max_model_len is %d; model %s was made for %d tokens, which holds", options.max_model_len, name, most
        )
    return min(most, options.max_model_len)


def _quantize(model: Any) -> Any:
    """Give every linear layer int8 weights with one scale per output; activations are quantised as they come."""
    with warnings.catch_warnings():
        # torch 2.13 announces the move of these parts to another package; without extra packages they are what there is.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        return quantize_dynamic(model, {torch.nn.Linear: per_channel_dynamic_qconfig})  # type: ignore[no-untyped-call]
