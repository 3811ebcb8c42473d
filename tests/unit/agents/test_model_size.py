"""Model sizes from configurations alone, against sums by hand and the embedded model's published figures."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from dmoa.engines.size import ModelSize, _bits, _is_in, measure_model, measure_models

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
EMBEDDINGS = 32 * 8
LINEARS = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)  # q, k and v, o, the three of the MLP; two layers
NORMS = 2 * 2 * 8 + 8


def folder_of(tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY | changes), encoding="utf-8")
    return tmp_path


def size_of(tmp_path: Path, **changes: Any) -> ModelSize:
    found = measure_model(folder_of(tmp_path, **changes))
    assert isinstance(found, ModelSize), found
    return found


def test_a_tiny_model_by_hand(tmp_path: Path) -> None:
    size = size_of(tmp_path)
    assert size.num_parameters == EMBEDDINGS + LINEARS + NORMS == 1448
    assert (size.num_layers, size.num_heads, size.head_size, size.max_model_len, size.dtype) == (2, 2, 2, 64, "bfloat16")
    assert size.lora_width == 2 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16))
    assert size.weight_bytes("bfloat16") == 2 * 1448
    assert size.weight_bytes("float32") == 4 * 1448
    assert size.token_bytes("bfloat16") == 2 * (2 * 2 * 2) * 2  # layers x (keys and values x heads x size) x bytes


def test_untied_ends_count_twice(tmp_path: Path) -> None:
    assert size_of(tmp_path, tie_word_embeddings=False).num_parameters == 2 * EMBEDDINGS + LINEARS + NORMS


def test_keys_and_values_of_a_part_of_the_model(tmp_path: Path) -> None:
    size = size_of(tmp_path)
    assert size.token_bytes("bfloat16", tensor_parallel=2) == 2 * (2 * 1 * 2) * 2
    assert size.token_bytes("bfloat16", tensor_parallel=4) == 2 * (2 * 1 * 2) * 2  # two heads on four GPUs: each on two
    assert size.token_bytes("bfloat16", pipeline_parallel=2) == 1 * (2 * 2 * 2) * 2


@pytest.mark.real_model
def test_the_embedded_model_by_its_published_figures() -> None:
    size = measure_models(["embedded:smollm2-135m"])["embedded:smollm2-135m"]
    assert isinstance(size, ModelSize)
    assert size.num_parameters == 134_515_008
    assert (size.num_layers, size.num_heads, size.head_size, size.max_model_len) == (30, 3, 64, 8192)
    assert size.token_bytes("float32") == 30 * 2 * 3 * 64 * 4 == 46080
    assert size.lora_width == 30 * ((576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3)
    assert size.quantization is None


def test_layers_with_a_window_are_counted_apart(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    size = size_of(
        tmp_path, model_type="qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=16, max_window_layers=1
    )
    assert size.num_window_layers == 1
    assert size.token_bytes("bfloat16") == 2 * 8 * 2
    assert size.token_bytes("bfloat16", counts_windows=False) == 1 * 8 * 2


def test_latent_attention_keeps_one_vector_for_all_heads(tmp_path: Path) -> None:
    more = {"kv_lora_rank": 6, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 2, "q_lora_rank": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 4}
    size = size_of(tmp_path, model_type="deepseek_v3", num_key_value_heads=4, **more, **experts)
    assert size.token_bytes("bfloat16") == size.token_bytes("bfloat16", tensor_parallel=4) == 2 * (6 + 2) * 2


def test_weights_in_mxfp4_are_counted_by_their_bits(tmp_path: Path) -> None:
    """gpt-oss-120b: 116.8 B parameters; experts in 4.25 bits, attention, routers, norms, biases and both ends in bfloat16."""
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    size = measure_model(tmp_path)
    assert isinstance(size, ModelSize)
    experts = 36 * 128 * (2880 * 5760 + 2880 * 2880)
    assert size.num_parameters == 116_829_156_672
    assert size.weight_bytes("bfloat16") == experts * 4.25 / 8 + (116_829_156_672 - experts) * 2
    assert size.weight_bytes("bfloat16") == pytest.approx(65.2e9, rel=0.01)  # the published files have 65.2 GB
    assert (size.quantization, size.num_window_layers) == ("mxfp4", 18)


def test_an_index_tells_the_bytes_of_quantised_weights(tmp_path: Path) -> None:
    folder_of(tmp_path, quantization_config={"quant_method": "nobody-knows"})
    unknown = measure_model(tmp_path)
    assert isinstance(unknown, ModelSize)
    assert (unknown.quantization, unknown.weight_bytes("bfloat16")) == ("nobody-knows", None)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 4321}}', encoding="utf-8")
    known = measure_model(tmp_path)
    assert isinstance(known, ModelSize)
    assert known.weight_bytes("bfloat16") == 4321


def test_eight_bits_on_the_linear_layers_alone(tmp_path: Path) -> None:
    size = size_of(tmp_path, quantization_config={"quant_method": "fp8"})
    assert size.weight_bytes("bfloat16") == LINEARS + 2 * (EMBEDDINGS + NORMS)


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "fp8"}, 8.0),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4.0),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8.0),
        ({"quant_method": "awq"}, None),
        ({"quant_method": "something"}, None),
    ],
)
def test_bits_of_a_weight(quantization: dict[str, Any], bits: float | None) -> None:
    assert _bits(quantization) == bits


@pytest.mark.parametrize(
    ("module", "is_in"),
    [
        ("lm_head", False),
        ("self_attn", True),
        ("model.layers.*.self_attn", True),
        ("attn", False),
        (r"re:.*q_proj", True),
        (r"re:.*k_proj", False),
    ],
)
def test_modules_left_as_they_were(module: str, is_in: bool) -> None:
    assert _is_in("model.layers.0.self_attn.q_proj.weight", [module]) is is_in


@pytest.mark.parametrize(
    "config", ["{", "{}", '{"model_type": "unheard-of"}', '{"model_type": "llama", "num_attention_heads": 0}']
)
def test_a_config_that_cannot_be_built_is_unknown(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    found = measure_model(tmp_path)
    assert isinstance(found, str)
    assert "config.json" in found


def test_models_elsewhere_are_unknown_with_the_reason(tmp_path: Path) -> None:
    found = measure_models([f"path:{tmp_path}/gone", "s3://bucket/model", "hub:a/b/c", "embedded:nothing"])
    assert "no config.json" in str(found[f"path:{tmp_path}/gone"])
    assert "not looked at" in str(found["s3://bucket/model"])
    assert "hub:OWNER/REPO" in str(found["hub:a/b/c"])
    assert "not an embedded model" in str(found["embedded:nothing"])


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, and no network to fill it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_model_comes_from_the_cache(hub_cache: Path) -> None:
    repo = hub_cache / "models--me--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40, encoding="ascii")
    folder_of(snapshot)
    size = measure_models(["hub:me/tiny"])["hub:me/tiny"]
    assert isinstance(size, ModelSize), size
    assert size.num_parameters == 1448


def test_a_hub_that_hangs_is_given_up(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        found = measure_models(["hub:me/one", "hub:me/two"], timeout_s=0.5)
        assert time.monotonic() - started < 20.0
    assert set(found.values()) == {"the hub did not answer in time, and its config.json is not in the local cache"}


def test_a_hub_that_is_away_is_told(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    found = measure_models(["hub:me/one"], timeout_s=30.0)["hub:me/one"]
    assert "and the hub did not give it: [Errno" in str(found)


def test_a_hub_model_that_is_nowhere_is_unknown_at_once(hub_cache: Path) -> None:
    started = time.monotonic()
    found = measure_models(["hub:me/none"], timeout_s=30.0)["hub:me/none"]
    assert "no config.json in the local cache" in str(found)
    assert time.monotonic() - started < 20.0
