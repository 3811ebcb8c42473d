"""What specialist training works on: conversations with the reply that is wanted, as tokens, and a model with its LoRA.

`workflows/specialists` writes the rows that a recipe asks for, `training/specialists` trains on them. Prompts are encoded
exactly as the transformers engine encodes them. Shape letters: N rows, T tokens, K places of targets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from dmoa.core.entropy import token_entropy
from dmoa.engine_options import Node, TransformersOptions
from dmoa.engines.models import resolve_model
from dmoa.engines.transformers.load import load_model
from dmoa.storage import write_whole
from dmoa.types import Message

IGNORED = -100
"""Label of what is not to be learned, for torch and transformers."""


class TrainingRow(BaseModel):
    """One example: a line of a file of rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    messages: tuple[Message, ...]
    """The whole prompt, as the agent will be sent it."""
    target: str
    """The wanted reply, without the token that ends it."""
    source: str = ""
    """Where the row comes from, such as a suite: accuracies are broken down by it."""


def write_training_rows(path: Path, rows: Iterable[TrainingRow]) -> None:
    """Write rows as JSON lines, whole and then renamed."""
    write_whole(path, "".join(row.model_dump_json() + "\n" for row in rows))


def encode(tokenizer: Any, rows: Sequence[TrainingRow]) -> list[dict[str, list[int]]]:
    """Turn rows into tokens, `prompt` and `target`, the latter with the token that ends a reply.

    The tokenizer is one of transformers with a chat template and a token that ends a reply.
    """
    backend = tokenizer.backend_tokenizer
    encoded = []
    for row in rows:
        messages = [asdict(message) for message in row.messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        target = [*backend.encode(row.target, add_special_tokens=False).ids, tokenizer.eos_token_id]
        encoded.append({"prompt": backend.encode(text, add_special_tokens=False).ids, "target": target})
    return encoded


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Lay encoded rows out with their ends aligned: tokens, mask and positions [N, T]; labels [N, K] of the last K tokens.

    Nothing but targets carries a label; K has a place more than the longest target, as a token is predicted from the one before.
    """
    whole = [[*row["prompt"], *row["target"]] for row in rows]
    width, places = max(map(len, whole)), 1 + max(len(row["target"]) for row in rows)
    mask_NT = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in whole])
    return {
        "input_ids": torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in whole]),
        "attention_mask": mask_NT,
        "position_ids": (mask_NT.cumsum(dim=1) - 1).clamp(min=0),
        "labels": torch.tensor([[IGNORED] * (places - len(row["target"])) + row["target"] for row in rows]),
    }


def judge_rows(logits_NKV: Tensor, labels_NK: Tensor) -> Tensor:
    """Return [N, 2]: whether greedy decoding gives the target, and the mean entropy of its tokens in nats."""
    logits_NKV, target_NK = logits_NKV[:, :-1], labels_NK[:, 1:]
    is_asked_NK = target_NK != IGNORED
    is_right_N = ((logits_NKV.argmax(dim=-1) == target_NK) | ~is_asked_NK).all(dim=1)
    entropy_NK = token_entropy(logits_NKV.flatten(0, 1)).view(target_NK.shape)
    entropy_N = torch.where(is_asked_NK, entropy_NK, 0.0).sum(dim=1) / is_asked_NK.sum(dim=1)
    return torch.stack([is_right_N.float(), entropy_N], dim=1)


class LoraSettings(Node):
    """The shape of an adapter."""

    rank: int = Field(default=7, ge=1, le=64)
    alpha: float = Field(default=14.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    first_layer: int = Field(default=0, ge=0)
    """Layers below this one carry no LoRA."""
    targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear parts of a layer that carry LoRA."""


def load_lora(model: str, settings: LoraSettings, *, seed: int) -> tuple[Any, Any]:
    """Load the base of an LLM's `model`, float32, put a fresh adapter, drawn from `seed`, into it; returns it and the tokenizer.

    Blocks for seconds.
    """
    from peft import LoraConfig, get_peft_model

    loaded = load_model(resolve_model(model), TransformersOptions(device="auto"), has_adapters=True)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=list(settings.targets),
        layers_to_transform=list(range(settings.first_layer, loaded.num_layers)),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(loaded.model, config), loaded.tokenizer


def export_adapter(saved: Path, out: Path, *, base: str) -> None:
    """Write an adapter that PEFT saved as it is shipped: weights in bfloat16, `base` for the path of the model it is for."""
    weights = load_file(saved / "adapter_model.safetensors")
    tensors = {name: weight.to(torch.bfloat16).contiguous() for name, weight in sorted(weights.items())}
    config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "inference_mode": True, "target_modules": sorted(config["target_modules"])}
    write_whole(out / "adapter_model.safetensors", serialize(tensors, metadata={"format": "pt"}))
    write_whole(out / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
