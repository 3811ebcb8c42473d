"""Tells how large a language model is from its configuration alone; no weight is read, on disk or from the network.

`dmoa serve --dry-run` estimates memory from it. Parameters are counted on torch's `meta` device, which holds shapes only.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import httpx

from dmoa.engines.models import CONFIG, INDEX, HubModel, path, resolve_model
from dmoa.errors import DmoaError
from dmoa.reading import home_path, read_bounded, read_json

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_HUB_TIMEOUT_S = 10.0
_KEPT = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules")
"""What libraries call the list of modules, by name or pattern, that a quantisation leaves as they were."""
_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, ArithmeticError)
"""What transformers raises for a configuration that it cannot build; a model that cannot be measured is unknown, no error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What a model's configuration says about memory."""

    num_parameters: int
    """Tied parameters counted once."""
    dtype: str
    """As published: float32, bfloat16, float16."""
    quantization: str | None = None
    """Method of weights that are stored quantised."""
    quantized_bytes: int | None = None
    """Bytes of all weights of a quantised model; None: not quantised, or in a way that is not known here."""
    lora_width: int
    """Inputs plus outputs, summed over the linear layers: the values of an adapter on all of them, per rank. Fused experts,
    which are not linear layers in transformers, are not in it."""
    num_layers: int
    num_heads: int
    """Key-value heads."""
    head_size: int
    latent_size: int = 0
    """Values that a layer with multi-head latent attention keeps per token in place of keys and values; 0: other attention."""
    num_window_layers: int = 0
    """Layers that look back over a window only, or keep a state of fixed size."""
    max_model_len: int | None
    """Longest sequence that the model was made for."""

    def weight_bytes(self, dtype: str) -> int | None:
        """Return the bytes of all weights run in `dtype`; quantised ones stay as they are stored. None: unknown."""
        return self.quantized_bytes if self.quantization else self.num_parameters * DTYPE_BYTES[dtype]

    def token_bytes(
        self, dtype: str, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, counts_windows: bool = True
    ) -> int:
        """Return the bytes per GPU that one token's keys and values take.

        Layers with a window count in full, which is an upper bound, or, without `counts_windows`, not at all: a lower one.
        """
        layers = self.num_layers - (0 if counts_windows else self.num_window_layers)
        heads = -(-self.num_heads // tensor_parallel)  # with fewer heads than GPUs, each head is on several
        values = self.latent_size or 2 * heads * self.head_size
        return -(-layers // pipeline_parallel) * values * DTYPE_BYTES[dtype]


def measure_models(models: Iterable[str], *, timeout_s: float = _HUB_TIMEOUT_S) -> dict[str, ModelSize | str]:
    """Return the size of every model by its `model` field, or a sentence that says why it is unknown.

    Hub models come from the local cache, else from the hub, which has `timeout_s` for all of them together.
    """
    wanted = list(dict.fromkeys(models))
    hub = {model: _Lookup(model) for model in wanted if model.startswith("hub:")}
    deadline = time.monotonic() + timeout_s
    for lookup in hub.values():
        lookup.start()
    for lookup in hub.values():
        lookup.join(max(0.0, deadline - time.monotonic()))
    found: dict[str, ModelSize | str] = {}
    for model in wanted:
        folder = hub[model].result if model in hub else _local_folder(model)
        found[model] = measure_model(folder) if isinstance(folder, Path) else folder
    return found


def measure_model(folder: Path) -> ModelSize | str:
    """Return the size of the model whose config.json is in `folder`, or why it is unknown."""
    try:
        return _measure(folder)
    except _FAULTS as error:
        return f"its config.json cannot be read by transformers: {_short(error)}"


def meta_model(folder: Path, *, has_parts: bool) -> Any | None:
    """Return a model, shapes only; None where transformers cannot build it, or without `has_parts` one that sees or hears."""
    try:
        whole, model = _shapes(folder)
    except _FAULTS:
        return None
    return model if has_parts or whole.get_text_config() is whole else None


def cached_folder(model: str) -> Path | None:
    """Return the folder with an LLM's config.json if it is on this machine; nothing is fetched, no hub is asked."""
    if not model.startswith("hub:"):
        found = _local_folder(model)
        return found if isinstance(found, Path) else None
    from huggingface_hub import constants, try_to_load_from_cache

    hub = resolve_model(model)
    assert isinstance(hub, HubModel)
    file = try_to_load_from_cache(hub.repo, CONFIG, cache_dir=constants.HF_HUB_CACHE, revision=hub.revision)
    return Path(file).parent if isinstance(file, str) else None


def _shapes(folder: Path) -> tuple[Any, Any]:
    """Return a model's configuration and the model on torch's `meta` device; raises one of _FAULTS."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return whole, AutoModelForCausalLM.from_config(whole, trust_remote_code=False)


def _measure(folder: Path) -> ModelSize:
    import torch

    whole, model = _shapes(folder)
    config = whole.get_text_config()
    dtype = str(whole.dtype or config.dtype or "float32").removeprefix("torch.")
    quantization = _as_mapping(getattr(whole, "quantization_config", None))
    linears = [
        part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not model.get_output_embeddings()
    ]
    rank, rope = getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None)
    layers: list[str] = getattr(config, "layer_types", None) or []
    return ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=dtype if dtype in DTYPE_BYTES else "float32",
        quantization=str(quantization.get("quant_method", "unnamed")) if quantization else None,
        quantized_bytes=_quantized_bytes(model, quantization, DTYPE_BYTES.get(dtype, 4), folder) if quantization else None,
        lora_width=sum(part.in_features + part.out_features for part in linears),
        num_layers=config.num_hidden_layers,
        num_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        latent_size=rank + rope if rank and rope else 0,
        num_window_layers=sum(kind != "full_attention" for kind in layers),
        max_model_len=getattr(config, "max_position_embeddings", None),
    )


def _quantized_bytes(model: Any, quantization: Mapping[str, Any], full: int, folder: Path) -> int | None:
    """Return the bytes of quantised weights: as the folder's index says, else from bits and shapes; None: unknown."""
    index = folder / INDEX
    if index.is_file():
        total = read_json(read_bounded(index, most=1 << 26)).get("metadata", {}).get("total_size")
        if isinstance(total, int):
            return total
    bits = _bits(quantization)
    if bits is None:
        return None
    ends = [part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    kept = [module for key in _KEPT for module in quantization.get(key) or ()]
    total_bits = 0.0
    for name, parameter in model.named_parameters():
        is_full = parameter.ndim < 2 or name.endswith("bias") or any(parameter is end for end in ends) or _is_in(name, kept)
        total_bits += parameter.numel() * (8 * full if is_full else bits)
    return round(total_bits / 8)


def _bits(quantization: Mapping[str, Any]) -> float | None:
    """Return the bits per quantised weight with its share of the scales, None for a method not known here."""
    method = quantization.get("quant_method")
    if method == "mxfp4":
        return 4.25  # one byte of scale for 32 weights
    if method == "fp8":
        return 8.0
    if method == "bitsandbytes":
        return 8.0 if quantization.get("load_in_8bit") else 4.5 if quantization.get("load_in_4bit") else None
    group = quantization.get("group_size")
    if method in ("gptq", "awq"):
        bits = quantization.get("bits") or quantization.get("w_bit")
        return None if not bits else bits + ((16 + bits) / group if group and group > 0 else 0.0)
    if method == "compressed-tensors":
        widths = {part["weights"]["num_bits"] for part in quantization.get("config_groups", {}).values()}
        return float(widths.pop()) if len(widths) == 1 else None
    return None


def _is_in(name: str, modules: Iterable[str]) -> bool:
    """Say whether a parameter is in one of the modules: names, shell patterns, or `re:` and a regular expression."""
    for module in modules:
        if module.startswith("re:"):
            if re.match(module[3:], name):
                return True
        elif fnmatchcase(f".{name}", f"*.{module}.*"):
            return True
    return False


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else value.to_dict() if value is not None else {}


def _local_folder(model: str) -> Path | str:
    """Return the folder of a model on this machine, or why its size is unknown; nothing is fetched."""
    source, _, rest = model.partition(":")
    try:
        if source == "embedded":
            return path(rest) or f"not in the cache; `dmoa models fetch {rest}` gets it"
        if source == "path":
            folder = home_path(rest)
            return folder if (folder / CONFIG).is_file() else f"no config.json in {rest} on this machine"
    except DmoaError as error:
        return str(error)
    return f"a model of {source}: is not looked at from here"


class _Lookup(threading.Thread):
    """Fetches a hub model's config.json, and its index of weights where there is one; a daemon, for a hub may hang."""

    def __init__(self, model: str) -> None:
        super().__init__(daemon=True)
        self._model = model
        self.result: Path | str = "the hub did not answer in time, and its config.json is not in the local cache"

    def run(self) -> None:
        """Leave the folder of the files, or why there is none, in `result`."""
        try:
            found = resolve_model(self._model)
            assert isinstance(found, HubModel)
            self.result = _snapshot(found)
        except (DmoaError, httpx.HTTPError, *_FAULTS) as error:
            self.result = f"no config.json in the local cache, and the hub did not give it: {_short(error)}"


def _snapshot(model: HubModel) -> Path:
    """Return the folder of a hub model's small files; raises what huggingface_hub and httpx raise."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    def get(name: str, *, offline: bool) -> Path:
        found = hf_hub_download(
            model.repo, name, revision=model.revision, local_files_only=offline, cache_dir=constants.HF_HUB_CACHE
        )
        return Path(found)

    try:
        return get(CONFIG, offline=True).parent
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise
    # One plain request first, because the hub's own client tries for half a minute before it gives a dead network up.
    httpx.head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S / 2)
    disable_progress_bars()
    folder = get(CONFIG, offline=False).parent
    try:
        get(INDEX, offline=False)
    except (HfHubHTTPError, OSError):
        return folder  # a model in one file has no index
    return folder


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
