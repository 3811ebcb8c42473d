"""Adapters that do not fit: refused by their files, with the key that has no place, for both engines and before a model loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmoa.agents.pool import check_files
from dmoa.config import Config
from dmoa.engine_options import TransformersOptions
from dmoa.engines.adapter_files import EngineName, check_adapter, read_adapter
from dmoa.engines.models import resolve_adapter
from dmoa.engines.transformers.engine import TransformersEngine
from dmoa.engines.vllm.start import start_vllm
from dmoa.errors import ConfigError
from dmoa.serving.capacity import dry_run
from tests.unit.agents.conftest import ADAPTERS

Weights = dict[str, Tensor]
LAYER = "base_model.model.model.layers.1.self_attn.q_proj"
FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
SETTINGS = '{"peft_type": "LORA", "r": 4, "lora_alpha": %s, "target_modules": ["q_proj"]}'
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
ENGINES: tuple[EngineName, ...] = ("transformers", "vllm")


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def plus(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.ones(*shape)}


def lora(layer: str, height: int) -> Callable[[Weights], Weights]:
    more = {f"{layer}.lora_A.weight": torch.ones(4, 48), f"{layer}.lora_B.weight": torch.ones(height, 4)}
    return lambda weights: weights | more


def spoilt(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        found = {name: tensor.to(dtype) for name, tensor in weights.items()}
        found[f"{LAYER}.lora_B.weight"][-1, -1] = value
        return found

    return change


def shaped(half: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {f"{LAYER}.lora_{half}.weight": torch.ones(*shape)}


def same(weights: Weights) -> Weights:
    return weights


BAD_WEIGHTS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "another prefix": (
        renamed("base_model.model.model.layers", "base_model.model.transformer.h"),
        "transformer.h.0.mlp.down_proj.lora_A.weight' has no place",
    ),
    "no prefix": (renamed("base_model.model.", ""), "key 'model.layers.0.mlp.down_proj.lora_A.weight' has no place"),
    "an adapter's name in the keys": (renamed(".weight", ".default.weight"), r"lora_A.default.weight' has no place"),
    "a layer that the model has not": (
        renamed("layers.1.", "layers.7."),
        "key 'base_model.model.model.layers.7.mlp.down_proj.lora_A.weight' has no place",
    ),
    "half of the layers": (
        without("layers.1."),
        "key 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight' is missing",
    ),
    "one kind of layer": (without("v_proj"), r"key 'base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight' is missing"),
    "no B": (without("lora_B"), r"down_proj.lora_B.weight' is missing, the other half"),
    "one A less": (without("layers.1.self_attn.q_proj.lora_A"), rf"key '{LAYER}.lora_A.weight' is missing"),
    "nothing": (lambda weights: {}, "holds no tensors"),
    "a surplus layer": (
        lora("base_model.model.lm_head", 320),
        "key 'base_model.model.lm_head.lora_A.weight' has no place: .*leaves this layer out",
    ),
    "a surplus tensor": (plus("base_model.model.lm_head.weight", 320, 48), "key 'base_model.model.lm_head.weight' has no place"),
    "a bias": (plus(f"{LAYER}.lora_B.bias", 48), rf"key '{LAYER}.lora_B.bias' has no place"),
    "a magnitude of DoRA": (plus(f"{LAYER}.lora_magnitude_vector", 48), "lora_magnitude_vector' has no place"),
    "a norm": (plus("base_model.model.model.norm.weight", 48), "key 'base_model.model.model.norm.weight' has no place"),
    "LoRA on a norm": (
        lora("base_model.model.model.norm", 48),
        "model.norm: LoRA on a layer of type LlamaRMSNorm|leaves this layer out",
    ),
    "NaN": (spoilt(float("nan")), rf"key '{LAYER}.lora_B.weight' holds NaN or infinity"),
    "infinity": (spoilt(float("inf")), "holds NaN or infinity"),
    "-infinity": (spoilt(float("-inf")), "holds NaN or infinity"),
    "NaN in bfloat16": (spoilt(float("nan"), torch.bfloat16), "holds NaN or infinity"),
    "NaN in float16": (spoilt(float("nan"), torch.float16), "holds NaN or infinity"),
    "beyond float32": (spoilt(1e300, torch.float64), "holds NaN or infinity"),
    "whole numbers": (lambda weights: {name: value.to(torch.int32) for name, value in weights.items()}, "numbers of type I32"),
    "another width": (
        shaped("A", 4, 40),
        rf"key '{LAYER}.lora_A.weight' has no place: its shape is \[4, 40\], \[4, 48\] is what fits",
    ),
    "another height": (
        shaped("B", 40, 4),
        rf"key '{LAYER}.lora_B.weight' has no place: its shape is \[40, 4\], \[48, 4\] is what fits",
    ),
    "another rank": (shaped("A", 3, 48), r"has the shape \[3, 48\], which is not of rank 4"),
    "three dimensions": (shaped("A", 4, 48, 1), r"has the shape \[4, 48, 1\]"),
}
BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "lora_bias": ({"lora_bias": True}, "lora_bias: True; expected null or false"),
    "a pattern of layers": (
        {"layers_to_transform": [0], "layers_pattern": "("},
        r"layers_pattern: '\(' fails .*expected a reg",
    ),
    "bias": ({"bias": "lora_only"}, "bias: 'lora_only'; expected 'none'"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\]"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "another start": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4'"),
    "IA3": ({"peft_type": "IA3"}, "IA3; only plain LoRA is allowed"),
    "no type": ({"peft_type": None}, "None; only plain LoRA is allowed"),
    "DoRA": ({"use_dora": True}, "DoRA; only plain LoRA"),
    "rank": ({"r": 8}, "which is not of rank 8"),
    "no rank": ({"r": 0}, "r: 0; expected a whole number from 1"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha: 0"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha: nan"),
    "alpha of a layer": ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: {'q_proj': None}; expected finite numbers"),
    "no targets": ({"target_modules": None}, "target_modules: None"),
    "more targets": ({"target_modules": [*TARGETS, "o_proj"]}, r"self_attn.o_proj.lora_A.weight' is missing"),
    "all linear": ({"target_modules": "all-linear"}, "self_attn.k_proj.lora_A.weight' is missing"),
    "a pattern": (
        {"target_modules": r".*\.(q|k|v)_proj"},
        "(k_proj.lora_A.weight' is missing|down_proj.lora_A.weight' has no place)",
    ),
    "no pattern": ({"target_modules": "("}, "a regular expression"),
    "fewer targets": (
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        f"key '{FIRST}' has no place: .*leaves this layer out",
    ),
    "one layer": ({"layers_to_transform": [1]}, f"key '{FIRST}' has no place: .*leaves this layer out"),
    "an excluded layer": ({"exclude_modules": ["down_proj"]}, f"key '{FIRST}' has no place"),
    "a tied layer": ({"target_modules": [*TARGETS, "lm_head"]}, "lm_head.lora_A.weight' is missing"),
}


def changed(source: Path, into: Path, change: Callable[[Weights], Weights] = same, **settings: Any) -> Path:
    """Copy an adapter with other weights and settings."""
    into.mkdir()
    save_file(change(load_file(source / "adapter_model.safetensors")), into / "adapter_model.safetensors")
    known = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    (into / "adapter_config.json").write_text(json.dumps(known | settings), encoding="utf-8")
    return into


def pool_of(model: Path, adapter: Path, engine: str) -> Config:
    return Config.model_validate(
        {
            "name": "p",
            "llms": {"one": {"model": f"path:{model}", "engine": engine}},
            "agents": [{"name": "math", "llm": "one", "profile": "Works.", "adapter": f"path:{adapter}"}],
        }
    )


@pytest.fixture
def plain(tiny_adapters: dict[str, Path]) -> Path:
    return tiny_adapters[ADAPTERS[0]]


def refusal(call: Callable[[], object]) -> str:
    """What a call is refused with, empty where it is not."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    return ""


def is_refused_everywhere(model: Path, adapter: Path, reason: str) -> bool:
    """Whether both engines and the checks of the commands refuse it for this reason."""
    said: list[tuple[str, str]] = []
    for engine in ENGINES:
        config = pool_of(model, adapter, engine)
        alone = partial(check_adapter, "adapters.math", adapter, base=model, engine=engine)
        said.append((rf"^adapters?(\.math)?: .*{reason}", refusal(alone)))
        said.append((rf"^agents\.math\.adapter: .*{reason}", refusal(partial(check_files, config))))
    options = TransformersOptions(threads=1)
    said.append((reason, refusal(partial(TransformersEngine, model, options, adapters={"math": adapter}))))
    said.append((reason, refusal(partial(start_vllm, config.llms["one"], "one", [f"path:{adapter}"]))))
    return all(re.search(pattern, message) for pattern, message in said)


@pytest.mark.parametrize("what", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(tiny_model: Path, plain: Path, tmp_path: Path, what: str) -> None:
    change, reason = BAD_WEIGHTS[what]
    assert is_refused_everywhere(tiny_model, changed(plain, tmp_path / "bad", change), reason)


@pytest.mark.parametrize("what", BAD_SETTINGS)
def test_settings_that_do_not_fit_are_refused(tiny_model: Path, plain: Path, tmp_path: Path, what: str) -> None:
    settings, reason = BAD_SETTINGS[what]
    assert is_refused_everywhere(tiny_model, changed(plain, tmp_path / "bad", **settings), reason)


@pytest.mark.parametrize("keeps", [0, 7, 100, 2000, -1])
def test_a_file_that_is_cut_short_is_refused(tiny_model: Path, plain: Path, tmp_path: Path, keeps: int) -> None:
    folder = changed(plain, tmp_path / "bad")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:keeps])
    assert is_refused_everywhere(tiny_model, folder, "adapter_model.safetensors is damaged or cut short .*copy the file again")


def _tensors(count: int) -> bytes:
    told = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(count))
    return (len(told) + 2).to_bytes(8, "little") + b"{" + told + b"}"


@pytest.mark.parametrize(
    ("file", "attack", "reason"),
    [
        ("adapter_model.safetensors", lambda path: path.write_bytes((1 << 30).to_bytes(8, "little")), "its header claims"),
        ("adapter_model.safetensors", lambda path: path.write_bytes(_tensors(320_000)), "its header claims"),
        ("adapter_model.safetensors", os.mkfifo, "no regular file"),
        ("adapter_model.safetensors", lambda path: path.symlink_to("/dev/zero"), "no regular file"),
        ("adapter_config.json", lambda path: path.write_bytes(b"[" * 100_000), "recursion"),
        ("adapter_config.json", lambda path: path.symlink_to("/dev/zero"), "no regular file"),
        ("adapter_config.json", lambda path: path.write_text(SETTINGS % ("1" + "0" * 400)), "lora_alpha: 1000"),
    ],
)
def test_a_file_that_is_made_to_stall_is_refused(
    plain: Path, tmp_path: Path, file: str, attack: Callable[[Path], object], reason: str
) -> None:
    folder = changed(plain, tmp_path / "bad")
    (folder / file).unlink()
    attack(folder / file)
    with pytest.raises(ConfigError, match=reason) as caught:
        check_adapter("adapters.math", folder, base=None, engine="transformers")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


BACKTRACKS = r"([\w.]+)+!"
"""Takes ages to find out that no name of a layer ends so."""


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"target_modules": BACKTRACKS}, "target_modules"),
        ({"exclude_modules": BACKTRACKS}, "exclude_modules"),
        ({"layers_pattern": [BACKTRACKS], "layers_to_transform": [0, 1]}, "layers_pattern"),
        ({"rank_pattern": {BACKTRACKS: 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8, BACKTRACKS: 8}}, "alpha_pattern"),
        ({"target_modules": "(?i)" + "[\0-\U0010fffe]" * 4_000}, "target_modules"),
        ({"target_modules": "(" * 5_000}, "target_modules"),
        ({"target_modules": "a{99999999999}"}, "target_modules"),
    ],
)
def test_a_pattern_that_is_made_to_stall_is_refused(
    tiny_model: Path, plain: Path, tmp_path: Path, settings: dict[str, Any], field: str
) -> None:
    folder = changed(plain, tmp_path / "bad", **settings)
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: {field}: .*soon done") as caught:
        check_adapter("adapters.math", folder, base=tiny_model, engine="transformers")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_pattern_that_is_made_to_fill_the_memory_is_refused(plain: Path, tmp_path: Path) -> None:
    """It keeps a note a character, of some 180 bytes each; a key may have millions."""
    folder = changed(plain, tmp_path / "bad", target_modules="((a)|b)*c")
    weights = load_file(folder / "adapter_model.safetensors") | {
        f"base_model.model.{'a' * 3_000_000}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"
    }
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"target_modules: .* fails \(MemoryError\); expected a regular") as caught:
        read_adapter("adapters.math", folder)
    assert len(str(caught.value)) < 1000


def test_patterns_of_known_trainers_are_taken(tiny_model: Path, plain: Path, tmp_path: Path) -> None:
    """With look-ahead, and many stars one after the other."""
    for number, pattern in enumerate(
        (
            r"^(model)(?!.*(lm_head|output|embed)).*\.(q_proj|v_proj|up_proj|down_proj)$",
            r"(?:.*?(?:model|text).*?(?:self_attn|mlp|ffn).*?(?:q_proj|v_proj|up_proj|down_proj).*?)"
            r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj|down_proj)))",
        )
    ):
        folder = changed(plain, tmp_path / str(number), target_modules=pattern)
        check_adapter("adapters.math", folder, base=tiny_model, engine="transformers")
        assert read_adapter("adapters.math", folder).settings["target_modules"] == pattern


@pytest.mark.parametrize("text", ["", "[]", '"LORA"', "{"])
def test_settings_that_are_no_object_are_refused(tiny_model: Path, plain: Path, tmp_path: Path, text: str) -> None:
    folder = changed(plain, tmp_path / "bad")
    (folder / "adapter_config.json").write_text(text)
    assert is_refused_everywhere(tiny_model, folder, "a folder with a PEFT adapter")


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (same, {}),
        (lambda weights: {name: value.to(torch.bfloat16) for name, value in weights.items()}, {}),
        (without("layers.0."), {"layers_to_transform": [1], "layers_pattern": "layers"}),
        (without("layers.0."), {"layers_to_transform": 1}),
        (without("down_proj"), {"exclude_modules": ["down_proj"]}),
        (without("mlp"), {"target_modules": r".*\.(q|v)_proj"}),
        (without("mlp"), {"target_modules": ["q_proj", "v_proj", "a_layer_of_other_models"]}),
        (same, {"use_rslora": True, "lora_dropout": 0.5, "init_lora_weights": True, "modules_to_save": [], "unknown": 1}),
    ],
    ids=["plain", "bfloat16", "a layer", "the layer's number", "excluded", "pattern", "foreign target", "harmless settings"],
)
def test_adapters_that_fit_are_taken(
    tiny_model: Path, plain: Path, tmp_path: Path, change: Callable[[Weights], Weights], settings: dict[str, Any]
) -> None:
    folder = changed(plain, tmp_path / "good", change, **settings)
    assert [refusal(partial(check_files, pool_of(tiny_model, folder, engine))) for engine in ENGINES] == ["", ""]
    if "unknown" not in settings:
        TransformersEngine(tiny_model, TransformersOptions(threads=1), adapters={"math": folder})


def test_ranks_by_pattern_are_for_the_transformers_engine_alone(tiny_model: Path, plain: Path, tmp_path: Path) -> None:
    def change(weights: Weights) -> Weights:
        return weights | {f"{LAYER}.lora_A.weight": torch.ones(2, 48), f"{LAYER}.lora_B.weight": torch.ones(48, 2)}

    folder = changed(plain, tmp_path / "ranks", change, rank_pattern={r"layers\.1\.self_attn\.q_proj": 2})
    check_files(pool_of(tiny_model, folder, "transformers"))
    with pytest.raises(ConfigError, match="rank_pattern is set, and vLLM scales all layers alike"):
        check_files(pool_of(tiny_model, folder, "vllm"))


def test_vllm_has_room_for_ranks_up_to_its_option(tiny_model: Path, plain: Path) -> None:
    check_adapter("adapters.math", plain, base=tiny_model, engine="vllm", max_rank=4)
    with pytest.raises(ConfigError, match=r"its rank is 4, engine_kwargs.max_lora_rank is 3; raise engine_kwargs.max_lora_rank"):
        check_adapter("adapters.math", plain, base=tiny_model, engine="vllm", max_rank=3)


def test_the_dry_run_names_it(tiny_model: Path, plain: Path, tmp_path: Path) -> None:
    folder = changed(plain, tmp_path / "bad", without("layers.1."))
    for engine in ENGINES:
        (fault,) = [fault for fault in dry_run(pool_of(tiny_model, folder, engine)).faults if "adapter" in fault]
        assert fault.startswith("agents.math.adapter: ")
        assert "layers.1.self_attn.q_proj.lora_A.weight' is missing" in fault


def test_a_model_that_is_not_here_leaves_the_adapter_itself_to_be_looked_at(plain: Path, tmp_path: Path) -> None:
    for model in ("hub:nobody/nothing", "s3://bucket/model"):
        config = pool_of(tmp_path, plain, "vllm")
        config = config.model_copy(update={"llms": {"one": config.llms["one"].model_copy(update={"model": model})}})
        check_files(config)
    with pytest.raises(ConfigError, match="holds NaN"):
        check_adapter("adapter", changed(plain, tmp_path / "bad", spoilt(float("nan"))), base=None, engine="vllm")


@pytest.mark.contract
def test_headers_settle_what_fits_and_nothing_heavy_is_loaded(tiny_model: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "model.safetensors", tmp_path)  # no config.json: no model could be built
    code = (
        "import sys; from pathlib import Path; from dmoa.engines.adapter_files import check_adapter, read_adapter\n"
        f"check_adapter('adapter', Path({str(plain)!r}), base=Path({str(tmp_path)!r}), engine='transformers')\n"
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"


def test_embeddings_are_for_vllm_alone(tiny_model: Path, plain: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    change = lambda weights: plus(f"{name}B", 48, 4)(plus(f"{name}A", 4, 320)(weights))  # noqa: E731
    targets = [*TARGETS, "embed_tokens"]
    folder = changed(plain, tmp_path / "table", change, target_modules=targets)
    check_files(pool_of(tiny_model, folder, "vllm"))
    with pytest.raises(ConfigError, match=r"model.embed_tokens: LoRA on a layer of type Embedding"):
        check_files(pool_of(tiny_model, folder, "transformers"))


@pytest.mark.contract
def test_shipped_adapters_fit_the_embedded_model(smollm2: Path) -> None:
    for name in ("words", "arith"):
        folder = resolve_adapter(f"builtin:{name}")
        fits = [partial(check_adapter, "adapter", folder, base=smollm2, engine=engine, max_rank=16) for engine in ENGINES]
        assert [refusal(fit) for fit in fits] == ["", ""]
