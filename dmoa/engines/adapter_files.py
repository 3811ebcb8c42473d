"""Tells whether a LoRA adapter's files fit a model, before any weights are loaded.

Loaders take what they find: a key that fits nothing is passed over, a layer that is missing stays as the base model has it,
and the agent speaks as if it had no adapter. Both local engines and the checks of a pool ask here first. Shape letters: R rank,
I inputs, O outputs of a layer.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dmoa.errors import ConfigError
from dmoa.reading import read_bounded, read_json, regular
from dmoa.validation import is_finite, short

MAX_HEADER_BYTES = 16 << 20
"""Of a safetensors file; a model of a thousand layers has a hundredth of it."""
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Shape = tuple[int, ...]
EngineName = Literal["transformers", "vllm"]
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB])")
_FORM = "base_model.model.LAYER.lora_A.weight and base_model.model.LAYER.lora_B.weight"
_SAYING = f"{SETTINGS} (target_modules, layers_to_transform)"
_PIECE = 1 << 24
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MORE_THAN_LORA = (
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of PEFT with which an adapter is more than two matrices beside a linear layer."""
_FORMS = {
    "target_modules": "PATTERN",
    "exclude_modules": "PATTERN",
    "layers_pattern": r"(?:^|.*?\.)PATTERN\.(\d+)\.",
    "rank_pattern": r"(.*\.)?(PATTERN)$",
    "alpha_pattern": r"(.*\.)?(PATTERN)$",
}
"""Fields of regular expressions, and what PEFT looks for in the name of a layer."""
_TRIAL = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
patterns, names = json.load(sys.stdin)
for field, value, pattern in patterns:
    print(f"{field}: {value}", flush=True)
    found = re.compile(pattern)
    for name in names:
        found.fullmatch(name)
"""
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model's weights as they are; others change them for every agent."""


class Layer(NamedTuple):
    """A layer of a base model."""

    kind: str
    """Its type, such as Linear; empty: not known, it has a matrix of weights."""
    shape: Shape | None
    """Of its weights: [O, I] of a linear layer, [vocabulary, dimensions] of an embedding; None for others."""
    is_output: bool = False
    """Whether it gives the logits: PEFT's `all-linear` leaves it out."""


Layers = Mapping[str, Layer]


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter that is sound in itself: plain LoRA, both halves of every layer, finite numbers."""

    where: str
    """Names it in errors, such as `adapters.math`."""
    folder: Path
    settings: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    """By key, sorted."""

    @property
    def layers(self) -> frozenset[str]:
        """The layers that it changes."""
        return frozenset(layer_of(key)[0] for key in self.shapes)

    def targets(self, layer: str) -> bool:
        """Return whether the settings say that a layer is changed, as PEFT reads them; `all-linear` is for the caller."""
        settings = self.settings
        excluded, wanted = settings.get("exclude_modules"), settings["target_modules"]
        if excluded and (re.fullmatch(excluded, layer) if isinstance(excluded, str) else _is_among(layer, excluded)):
            return False
        if isinstance(wanted, str):
            return re.fullmatch(wanted, layer) is not None
        if layer in wanted:
            return True
        return _is_among(layer, wanted) and self._is_at_its_depth(layer)

    def _is_at_its_depth(self, layer: str) -> bool:
        only, patterns = self.settings.get("layers_to_transform"), self.settings.get("layers_pattern")
        if only is None or only == []:
            return True
        starts = [r".*?\.[^.]*"] if not patterns else [rf"(?:^|.*?\.){p}" for p in _as_list(patterns)]
        found = next((match for start in starts if (match := re.match(rf"{start}\.(\d+)\.", layer))), None)
        return found is not None and int(found[1]) in _as_list(only)

    def refusal(self, what: str, todo: str = "train it on this model, or leave the adapter out") -> ConfigError:
        """Return the error that names the adapter."""
        return ConfigError(f"{self.where}: {str(self.folder)!r}: {what}; {todo}")


def check_adapter(
    where: str, folder: Path, *, base: Path | None, engine: EngineName, max_rank: int | None = None
) -> AdapterFiles:
    """Return an adapter that fits the model in the folder `base`, as far as files tell. Raises ConfigError naming a fault.

    `base` None: the model's files are not here, and only the adapter itself is looked at. `max_rank`: the engine's limit.
    """
    adapter = read_adapter(where, folder)
    if engine == "vllm":
        _check_vllm(adapter, max_rank)
    if base is None:
        return adapter
    try:
        layers = _header_layers(base)
        if _is_settled_by(adapter, layers):
            check_fit(adapter, layers, engine)
            return adapter
    except (OSError, ValueError, KeyError, TypeError):  # ConfigError is a ValueError
        pass  # the files may name layers otherwise than the model does: the model itself decides
    from dmoa.engines.size import meta_model

    model = meta_model(base, has_parts=engine == "transformers")
    if model is not None:
        check_fit(adapter, layers_of(model), engine)
    return adapter


def check_fit(adapter: AdapterFiles, layers: Layers, engine: EngineName) -> None:
    """Check that every key has a place among a model's layers, and that none is missing. Raises ConfigError naming the first."""
    _try_patterns(f"{adapter.where}: {str(adapter.folder)!r}", adapter.settings, layers)
    for key, shape in adapter.shapes.items():
        name, _ = layer_of(key)
        layer = layers.get(name)
        if layer is None:
            if engine == "vllm" and ".experts." in name:
                continue  # vLLM names experts one by one, transformers has them in one
            raise adapter.refusal(f"key {key!r} has no place: the model has no layer {name!r}")
        _check_layer(adapter, key, shape, layer, engine)
        if not _is_wanted(adapter, name, layer):
            raise adapter.refusal(f"key {key!r} has no place: {_SAYING} leaves this layer out")
    held = adapter.layers
    for name, layer in layers.items():
        if name not in held and layer.shape is not None and _is_wanted(adapter, name, layer):
            part = "lora_embedding_A" if layer.kind == "Embedding" else "lora_A.weight"
            raise adapter.refusal(f"key {f'base_model.model.{name}.{part}'!r} is missing: {_SAYING} names this layer")


def _check_layer(adapter: AdapterFiles, key: str, shape: Shape, layer: Layer, engine: EngineName) -> None:
    name, part = layer_of(key)
    is_embedding = part.startswith("lora_embedding")
    kind = layer.kind or ("Embedding" if is_embedding else "Linear")
    if kind != ("Embedding" if is_embedding else "Linear") or (is_embedding and engine == "transformers"):
        raise ConfigError(
            f"{adapter.where.partition('.')[0]}: {name}: LoRA on a layer of type {kind}; expected LoRA on linear "
            f"layers; train {str(adapter.folder)!r} without it"
        )
    assert layer.shape is not None
    outputs, inputs = layer.shape[::-1] if is_embedding else layer.shape
    rank = _rank(adapter.settings, name)
    wanted = (rank, inputs) if "_A" in part else (outputs, rank)
    if shape != wanted:
        raise adapter.refusal(f"key {key!r} has no place: its shape is {list(shape)}, {list(wanted)} is what fits the model")


def _is_wanted(adapter: AdapterFiles, name: str, layer: Layer) -> bool:
    if str(adapter.settings["target_modules"]).lower() == "all-linear":
        return layer.kind == "Linear" and not layer.is_output
    return adapter.targets(name)


def layer_of(key: str) -> tuple[str, str]:
    """Return the layer of a key and which half of its LoRA it is. Raises ValueError for a key of another form."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(key)
    return match["layer"], match["part"]


def layers_of(model: Any) -> dict[str, Layer]:
    """Return the layers of a transformers model, or of any module, by name."""
    import torch

    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output else None
    found = {}
    for name, part in model.named_modules():
        is_matrix = isinstance(part, torch.nn.Linear | torch.nn.Embedding)
        kind = "Linear" if isinstance(part, torch.nn.Linear) else "Embedding" if is_matrix else type(part).__name__
        found[name] = Layer(kind, tuple(part.weight.shape) if is_matrix else None, part is output)
    return found


# The adapter by itself.


def read_adapter(where: str, folder: Path) -> AdapterFiles:
    """Return an adapter that is sound in itself. Raises ConfigError naming the first fault."""
    settings = _settings(where, folder)
    bare = AdapterFiles(where, folder, settings, {})
    shapes: dict[str, Shape] = {}
    try:
        for key, shape, is_finite in _tensors(folder / WEIGHTS):
            if _KEY.fullmatch(key) is None:
                raise bare.refusal(
                    f"key {key!r} has no place: the keys of plain LoRA are {_FORM}", "save it with PEFT as plain LoRA"
                )
            if not is_finite:
                raise bare.refusal(f"key {key!r} holds NaN or infinity", "train it again, or leave the adapter out")
            shapes[key] = shape
    except ConfigError:
        raise
    except Exception as error:  # safetensors' own error is a plain Exception
        raise bare.refusal(
            f"{WEIGHTS} is damaged or cut short ({' '.join(str(error).split())[:200]})", "copy the file again"
        ) from error
    adapter = AdapterFiles(where, folder, settings, dict(sorted(shapes.items())))
    _try_patterns(f"{where}: {str(folder)!r}", settings, adapter.layers)
    _check_pairs(adapter)
    return adapter


def _settings(where: str, folder: Path) -> dict[str, Any]:
    """Return the settings of a plain LoRA adapter. Raises ConfigError for another kind."""
    seen = f"{where}: {str(folder)!r}"
    try:
        settings = json.loads(read_bounded(folder / SETTINGS))
        if not isinstance(settings, dict):
            raise ValueError(f"{SETTINGS} is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{seen}; a folder with a PEFT adapter ({SETTINGS}, {WEIGHTS}) is allowed; "
            f"give its path or leave the adapter out: {error}"
        ) from error
    kind = settings.get("peft_type")
    if kind != "LORA" or settings.get("use_dora"):
        raise ConfigError(
            f"{seen}: {'DoRA' if settings.get('use_dora') else kind}; "
            "only plain LoRA is allowed, because rows with different adapters share a batch; train one with use_dora off"
        )
    for name, is_allowed, allowed in _judged(settings):
        if not is_allowed:
            saw = short(settings.get(name))
            raise ConfigError(f"{seen}: {SETTINGS}: {name}: {saw}; expected {allowed}; train it as plain LoRA")
    _try_patterns(seen, settings, ())
    return settings


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield field, value and what PEFT makes of it, for the regular expressions of an adapter; plain names are none."""
    for name, form in _FORMS.items():
        values = settings.get(name) or ()
        for value in (values,) if isinstance(values, str) else values if name.endswith("_pattern") else ():
            if re.fullmatch(r"[\w.-]*", value) is None:
                yield name, short(value), form.replace("PATTERN", value)


def _try_patterns(seen: str, settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ConfigError for patterns that fail or run long; they are tried in a process, as nothing else stops `re`."""
    patterns = list(_patterns(settings))
    if not patterns:
        return
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    tried = json.dumps([patterns, list(names)])
    done = subprocess.run(command, input=tried, capture_output=True, text=True, check=False)  # noqa: S603 a fixed command
    if done.returncode:
        last, what = (text.rstrip().rpartition("\n")[2][:200] for text in (done.stdout, done.stderr))
        why = "takes too long to match" if done.returncode < 0 else f"fails ({what})"
        raise ConfigError(f"{seen}: {SETTINGS}: {last} {why}; expected a regular expression that is soon done, or names")


def _judged(settings: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """Yield settings, whether each is allowed, and what is."""
    for name in _MORE_THAN_LORA:
        yield name, not settings.get(name), "null or false"
    yield "bias", settings.get("bias", "none") in ("none", None), "'none'"
    start = settings.get("init_lora_weights")
    yield (
        "init_lora_weights",
        isinstance(start, bool | str | None) and start in _PLAIN_STARTS,
        "one that leaves the base as it is",
    )
    yield "r", _is_rank(settings.get("r")), "a whole number from 1"
    alpha = settings.get("lora_alpha")
    yield "lora_alpha", is_finite(alpha) and alpha != 0, "a finite number other than 0"
    for name in ("rank_pattern", "alpha_pattern"):
        yield name, isinstance(settings.get(name) or {}, dict), "an object"
    targets = settings.get("target_modules")
    yield "target_modules", bool(targets) and _is_text_or_texts(targets), "a pattern, or a list of layers' names"
    yield "exclude_modules", _is_text_or_texts(settings.get("exclude_modules") or []), "a pattern, or a list of layers' names"
    layers = _as_list(settings.get("layers_pattern") or [])
    yield "layers_pattern", all(isinstance(pattern, str) for pattern in layers), "regular expressions"
    yield "rank_pattern", all(map(_is_rank, (settings.get("rank_pattern") or {}).values())), "whole numbers from 1"
    yield "alpha_pattern", all(map(is_finite, (settings.get("alpha_pattern") or {}).values())), "finite numbers"


def _check_pairs(adapter: AdapterFiles) -> None:
    """Check that every layer has both halves, of the rank that the settings say."""
    if not adapter.shapes:
        raise adapter.refusal(f"{WEIGHTS} holds no tensors", "train it again, or leave the adapter out")
    for key, shape in adapter.shapes.items():
        name, part = layer_of(key)
        is_down = "_A" in part
        sibling = f"base_model.model.{name}.{part.replace('_A', '_B') if is_down else part.replace('_B', '_A')}"
        if sibling not in adapter.shapes:
            raise adapter.refusal(f"key {sibling!r} is missing, the other half of {key!r}", "save it with PEFT again")
        rank = _rank(adapter.settings, name)
        if len(shape) != 2 or shape[0 if is_down else 1] != rank:
            raise adapter.refusal(
                f"key {key!r} has the shape {list(shape)}, which is not of rank {rank}, as {SETTINGS} says",
                "save it with PEFT again",
            )


def _check_vllm(adapter: AdapterFiles, max_rank: int | None) -> None:
    """Check what vLLM reads otherwise than PEFT, or not at all."""
    for name in ("rank_pattern", "alpha_pattern"):
        if adapter.settings.get(name):
            raise adapter.refusal(
                f"{SETTINGS}: {name} is set, and vLLM scales all layers alike", "train it without, or use engine transformers"
            )
    if max_rank is not None and adapter.settings["r"] > max_rank:
        raise adapter.refusal(
            f"its rank is {adapter.settings['r']}, engine_kwargs.max_lora_rank is {max_rank}", "raise engine_kwargs.max_lora_rank"
        )


def _rank(settings: Mapping[str, Any], layer: str) -> int:
    return int(_of_layer(settings, "rank_pattern", "r", layer))


def scale_of(settings: Mapping[str, Any], layer: str) -> float:
    """Return the factor of a layer's LoRA product, as PEFT reads the settings: alpha by the rank, or by its root (rsLoRA)."""
    alpha, rank = float(_of_layer(settings, "alpha_pattern", "lora_alpha", layer)), _rank(settings, layer)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_layer(settings: Mapping[str, Any], patterns: str, name: str, layer: str) -> Any:
    """Return a layer's own value by the first pattern of its name, else everybody's."""
    own: Mapping[str, Any] = settings.get(patterns) or {}
    return next((value for pattern, value in own.items() if re.match(rf"(.*\.)?({pattern})$", layer)), settings[name])


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text_or_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_among(layer: str, names: list[str]) -> bool:
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


# Files of safetensors.


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the tensors of a file by name and where their bytes begin. Raises OSError and ValueError."""
    with open(path, "rb", opener=regular) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(path.stat().st_size, MAX_HEADER_BYTES):
            raise ValueError(f"its header claims {length} bytes, more than the file has or {MAX_HEADER_BYTES >> 20} MiB")
        table = read_json(file.read(length))
    table.pop("__metadata__", None)
    return table, 8 + length


def _tensors(path: Path) -> Iterator[tuple[str, Shape, bool]]:
    """Yield every tensor's name, its shape and whether all its numbers are finite in float32; raises what safetensors raises."""
    from safetensors import safe_open

    table, start = _header(path)
    with safe_open(path, framework="numpy"):  # checks the header against the file
        pass
    with path.open("rb") as file:
        for name in sorted(table):
            dtype, (begin, end) = table[name]["dtype"], table[name]["data_offsets"]
            if dtype not in _DTYPES:
                raise ValueError(f"{name}: numbers of type {dtype}; expected {', '.join(_DTYPES)}")
            file.seek(start + begin)
            is_sound = all(_is_sound(file.read(min(_PIECE, end - at)), dtype) for at in range(begin, end, _PIECE))
            yield name, tuple(table[name]["shape"]), is_sound


def _is_sound(data: bytes, dtype: str) -> bool:
    """Tell whether all numbers are finite in float32."""
    values = np.frombuffer(data, _DTYPES[dtype])
    if dtype == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float32)).all())


def _header_layers(base: Path) -> dict[str, Layer]:
    """Return the layers with a matrix of weights, as a model's files name them. Raises OSError and ValueError."""
    found = {}
    for file in sorted(base.glob("*.safetensors")):
        for name, entry in _header(file)[0].items():
            if name.endswith(".weight") and len(entry["shape"]) == 2:
                found[name.removesuffix(".weight")] = Layer("", tuple(entry["shape"]))
    return found


def _is_settled_by(adapter: AdapterFiles, layers: Layers) -> bool:
    """Return whether every target is among the layers: one that shares its weights, or is not a matrix, is not in the files."""
    wanted = adapter.settings["target_modules"]
    return not isinstance(wanted, str) and all(any(_is_among(layer, [name]) for layer in layers) for name in wanted)
