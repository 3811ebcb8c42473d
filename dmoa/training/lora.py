"""What specialist training works on: conversations with the reply that is wanted, packed as tokens, and a model with its LoRA.

`workflows/specialists` writes the rows that a recipe asks for, `training/specialists` trains on them. Prompts are encoded
exactly as the transformers engine encodes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from dmoa.core.entropy import token_entropy
from dmoa.engine_options import Node, TransformersOptions
from dmoa.engines.models import resolve_model
from dmoa.engines.transformers.load import load_model
from dmoa.errors import ConfigError
from dmoa.validation import describe


class TrainingMessage(BaseModel):
    """One message of a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    content: str


class TrainingRow(BaseModel):
    """One example: a line of a file of rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    messages: tuple[TrainingMessage, ...]
    """The whole prompt, as the agent will be sent it."""
    target: str
    """The wanted reply, without the token that ends it."""
    source: str = ""
    """Where the row comes from, such as a suite: accuracies are broken down by it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as tokens."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    """With the token that ends a reply."""
    source: str


def write_training_rows(path: Path, rows: Iterable[TrainingRow]) -> None:
    """Write rows as JSON lines, whole and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(path)


def read_training_rows(path: Path) -> list[TrainingRow]:
    """Read rows from JSON lines. Raises ConfigError naming file, line and field."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)  # not splitlines: texts may hold other line separators, which JSON does not escape
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rows: cannot read {str(path)!r}: {error}; name a file of JSON lines (messages, target)") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(TrainingRow.model_validate(json.loads(line)))
        except ValidationError as error:
            raise ConfigError(f"rows: {path.name}, line {number}: {describe(error, TrainingRow)}") from error
        except ValueError as error:
            raise ConfigError(f"rows: {path.name}, line {number}: not valid JSON: {error}; correct or remove it") from error
    if not rows:
        raise ConfigError(f"rows: {str(path)!r} holds no row; at least one is needed; write the rows again")
    return rows


def encode(tokenizer: Any, rows: Sequence[TrainingRow]) -> list[Encoded]:
    """Turn rows into tokens with a transformers tokenizer that has a chat template and a token that ends a reply."""
    backend = tokenizer.backend_tokenizer
    encoded = []
    for row in rows:
        text = tokenizer.apply_chat_template(
            [message.model_dump() for message in row.messages], tokenize=False, add_generation_prompt=True
        )
        prompt = backend.encode(text, add_special_tokens=False).ids
        target = [*backend.encode(row.target, add_special_tokens=False).ids, tokenizer.eos_token_id]
        encoded.append(Encoded(tuple(prompt), tuple(target), row.source))
    return encoded


@dataclass(frozen=True, slots=True)
class Packs:
    """Rows laid out for one forward."""

    tokens_NT: Tensor
    positions_NT: Tensor
    mask_N1TT: Tensor
    """Bool: which earlier tokens each token attends to."""
    asked_M: Tensor
    """Index into the flattened [N * T] of the token whose logits predict each target token."""
    target_M: Tensor
    row_M: Tensor
    """Which of the given rows each target token belongs to."""


def pack_training_rows(rows: Sequence[Encoded], rows_per_pack: int) -> Packs:
    """Lay rows out, `rows_per_pack` to a sequence; at least one row."""
    columns = zip(*(row.prompt[:-1] for row in rows), strict=False)  # every row keeps a token of its own to predict from
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    # Rows of like length side by side in turn, so that the packs come out equally long.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].prompt) + len(rows[number].target))
    num_packs = -(-len(rows) // rows_per_pack)
    groups = [order[first::num_packs] for first in range(num_packs)]
    width = max(shared + sum(_own(rows[number], shared) for number in group) for group in groups)
    tokens_NT = torch.zeros(num_packs, width, dtype=torch.long)
    positions_NT = torch.zeros(num_packs, width, dtype=torch.long)
    segment_NT = torch.full((num_packs, width), -1)
    asked: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    for index, group in enumerate(groups):
        tokens_NT[index, :shared] = torch.tensor(rows[group[0]].prompt[:shared])
        positions_NT[index, :shared] = torch.arange(shared)
        segment_NT[index, :shared] = 0
        start = shared
        for segment, number in enumerate(group, 1):
            row = rows[number]
            own = torch.tensor((*row.prompt[shared:], *row.target[:-1]))
            end = start + len(own)
            tokens_NT[index, start:end] = own
            positions_NT[index, start:end] = torch.arange(shared, shared + len(own))
            segment_NT[index, start:end] = segment
            asked.extend(index * width + place for place in range(end - len(row.target), end))
            target.extend(row.target)
            owner.extend([number] * len(row.target))
            start = end
    return Packs(tokens_NT, positions_NT, _mask(segment_NT), torch.tensor(asked), torch.tensor(target), torch.tensor(owner))


def _own(row: Encoded, shared: int) -> int:
    return len(row.prompt) - shared + len(row.target) - 1


def _mask(segment_NT: Tensor) -> Tensor:
    """A token sees what came before it in its own row and in the shared beginning; padding sees padding: it must see some."""
    width = segment_NT.shape[1]
    is_same_NTT = segment_NT[:, :, None] == segment_NT[:, None, :]
    is_shared_NTT = (segment_NT == 0)[:, None, :] & (segment_NT >= 0)[:, :, None]
    is_earlier_TT = torch.ones(width, width, dtype=torch.bool).tril()
    return ((is_same_NTT | is_shared_NTT) & is_earlier_TT)[:, None]


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
        packs = pack_training_rows(rows, rows_per_pack)
        logits_MV = self._logits(packs)
        return torch.nn.functional.cross_entropy(logits_MV, packs.target_M.to(self._device), reduction="sum")

    @torch.inference_mode()
    def judge(self, rows: Sequence[Encoded], rows_per_pack: int) -> list[Judged]:
        """Put every row's target before the model."""
        packs = pack_training_rows(rows, rows_per_pack)
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
