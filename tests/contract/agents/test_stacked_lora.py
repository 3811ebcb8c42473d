"""Stacked LoRA against PEFT's own layers: every row gets its own adapter's part and nothing of the others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dmoa.engines.transformers.lora import Adapters, StackedLora
from dmoa.errors import ConfigError
from tests.unit.agents.conftest import peft_warnings_off

SHAPES = {"low": (2, ["first", "second"]), "high": (5, ["first"]), "other": (3, ["second"])}
"""Adapter -> its rank and the layers that it changes."""


class Two(nn.Module):
    """Two linear layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(4, 5, bias=False)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return out


def plain() -> Two:
    torch.manual_seed(0)
    return Two()


def saved(folder: Path, name: str, rank: int, targets: list[str], **settings: Any) -> Path:
    torch.manual_seed(rank)
    with peft_warnings_off():
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, init_lora_weights=False, **settings)
        adapted = get_peft_model(plain(), config)
        adapted.save_pretrained(folder / name)
    return folder / name


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Adapters of different ranks that change different layers."""
    return {name: saved(tmp_path, name, *shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    "rows",
    [
        ["low", None, "high", "other", "low"],
        ["high"] * 3,
        ["other"] * 2,
        [None] * 4,
        [None, "other"],
        ["high", "low", "low", None, "other"],
    ],
)
def test_rows_are_computed_as_by_peft_with_their_adapter_alone(folders: dict[str, Path], rows: list[str | None]) -> None:
    model = plain()
    adapters = Adapters(model, folders)
    adapters.choose(rows)
    torch.manual_seed(9)
    x_BTI = torch.randn(len(rows), 3, 6)
    with torch.inference_mode():
        found = model(x_BTI)
        for row, name in enumerate(rows):
            alone: nn.Module = plain()
            if name is not None:
                with peft_warnings_off():
                    alone = PeftModel.from_pretrained(alone, folders[name])  # type: ignore[arg-type]
            torch.testing.assert_close(found[row], alone(x_BTI[row]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"first": 7}, "rank_pattern": {"fir.t": 3, "first": 4}},
        {"alpha_pattern": {"sec.*": 5, "second": 9}, "use_rslora": True},
    ],
)
def test_a_layer_is_scaled_as_by_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    """By rsLoRA's root of the rank, and by patterns of layers' names, of which the first that fits counts."""
    folder = saved(tmp_path, "own", 2, ["first", "second"], **settings)
    model = plain()
    Adapters(model, {"own": folder}).choose(["own"])
    with peft_warnings_off():
        reference: nn.Module = PeftModel.from_pretrained(plain(), folder)  # type: ignore[arg-type]
    x_BTI = torch.randn(1, 3, 6)
    with torch.inference_mode():
        torch.testing.assert_close(model(x_BTI), reference(x_BTI), rtol=1e-5, atol=1e-5)


def test_a_choice_holds_until_the_next(folders: dict[str, Path]) -> None:
    model = plain()
    adapters = Adapters(model, folders)
    x_BTI = torch.randn(2, 1, 6)
    adapters.choose(["low", "high"])
    first = model(x_BTI)
    adapters.choose([None, None])
    base = model(x_BTI)
    adapters.choose(["low", "high"])
    assert torch.equal(model(x_BTI), first)
    assert torch.equal(base, plain()(x_BTI))
    assert (first != base).any(dim=-1).all()


def test_layers_that_no_adapter_changes_stay_as_they_are(folders: dict[str, Path]) -> None:
    model = plain()
    Adapters(model, {"high": folders["high"]})
    assert isinstance(model.first, StackedLora)
    assert isinstance(model.second, nn.Linear)


def test_lora_on_an_embedding_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "table", 2, ["table"])
    with pytest.raises(ConfigError, match=r"adapters: table: LoRA on a layer of type Embedding"):
        Adapters(plain(), {"table": folder})
