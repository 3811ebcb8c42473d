"""The model of specialist training: frozen base weights with LoRA layers in the upper part, its loss, its files.

Between `lora_packs` and `lora_loop`. Only the layers from `first_layer` on carry LoRA: below them nothing needs a
gradient, so the backward pass ends there. Logits are computed for target tokens alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from dmoa.config import Node, TransformersOptions
from dmoa.core.entropy import token_entropy
from dmoa.engines.models import resolve_model
from dmoa.engines.transformers.load import load_model
from dmoa.training.lora_packs import Packs, pack
from dmoa.training.lora_rows import Encoded


class LoraSettings(Node):
    """The shape of an adapter."""

    rank: int = Field(default=7, ge=1, le=64)
    alpha: float = Field(default=14.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    first_layer: int = Field(default=0, ge=0)
    """Layers below this one carry no LoRA."""
    targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear parts of a layer that carry LoRA."""


@dataclass(frozen=True, slots=True)
class Judged:
    """How a row fared when its target was put before the model token by token."""

    is_right: bool
    """Every target token was the most probable one: greedy decoding gives the target."""
    entropy_nats: float
    """Mean entropy over the target's tokens, the one that ends it included."""
    loss_nats: float
    """Sum over the target's tokens of -log p."""


class LoraModel:
    """A base model with one adapter in training, float32."""

    def __init__(self, model: str, settings: LoraSettings, *, seed: int) -> None:
        """Load the base of an LLM's `model` and put a fresh adapter, drawn from `seed`, into it. Blocks for seconds."""
        from peft import LoraConfig, get_peft_model

        loaded = load_model(resolve_model(model), TransformersOptions(device="auto"), has_adapters=True)
        self.tokenizer = loaded.tokenizer
        self._device = loaded.device
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
        self._peft: Any = get_peft_model(loaded.model, config)
        self._model: Any = loaded.model

    @property
    def weights(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's weights by name, in a fixed order."""
        return {name: value for name, value in sorted(self._peft.named_parameters()) if value.requires_grad}

    def loss(self, rows: Sequence[Encoded], rows_per_pack: int) -> Tensor:
        """Return the sum over all target tokens of -log p, in nats, with its gradient."""
        packs = pack(rows, rows_per_pack)
        logits_MV = self._logits(packs)
        return torch.nn.functional.cross_entropy(logits_MV, packs.target_M.to(self._device), reduction="sum")

    @torch.inference_mode()
    def judge(self, rows: Sequence[Encoded], rows_per_pack: int) -> list[Judged]:
        """Put every row's target before the model."""
        packs = pack(rows, rows_per_pack)
        logits_MV = self._logits(packs)
        target_M = packs.target_M.to(self._device)
        is_right_M = (logits_MV.argmax(dim=1) == target_M).cpu()
        loss_M = torch.nn.functional.cross_entropy(logits_MV, target_M, reduction="none").cpu()
        entropy_M = token_entropy(logits_MV).cpu()
        judged = []
        for number in range(len(rows)):
            own_M = packs.row_M == number
            judged.append(Judged(bool(is_right_M[own_M].all()), float(entropy_M[own_M].mean()), float(loss_M[own_M].sum())))
        return judged

    def _logits(self, packs: Packs) -> Tensor:
        hidden_NTD = self._model.model(
            input_ids=packs.tokens_NT.to(self._device),
            position_ids=packs.positions_NT.to(self._device),
            attention_mask=packs.mask_N1TT.to(self._device),
            use_cache=False,
        ).last_hidden_state
        logits_MV: Tensor = self._model.lm_head(hidden_NTD.flatten(0, 1)[packs.asked_M.to(self._device)])
        return logits_MV

    def save(self, folder: Path, *, base: str) -> None:
        """Write the adapter as PEFT reads it, weights in bfloat16; `base` is the name of the base model in its settings."""
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(self._peft)
        tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in sorted(weights.items())}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self._peft.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
        plain = json.loads(json.dumps(config, default=_plain))
        plain["target_modules"] = sorted(plain["target_modules"])
        text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _plain(value: object) -> object:
    """Return an entry of PEFT's settings as JSON knows it: sets as lists, enumerations as their values."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
