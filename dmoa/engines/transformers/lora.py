"""LoRA adapters of the `transformers` engine: loaded into the model, and added to every row's linear layers in two products.

The adapters of a layer lie side by side. Rows of an adapter that lie together take its two narrow products; other batches take
one product with all adapters, what a row's own did not compute set to zero, and one product back. Source of the method: ours
(cf. the batched LoRA of Punica and S-LoRA).
Shape letters: B rows, T tokens, I inputs, O outputs, N adapters, M ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmoa.engines.adapter_files import WEIGHTS, AdapterFiles, check_fit, layers_of, read_adapter, scale_of
from dmoa.errors import EngineError


class Layout:
    """Which columns of M belong to which adapter, and which the next forward's rows use; layers of equal ranks share one."""

    def __init__(self, ranks: Sequence[int]) -> None:
        """`ranks` holds every adapter's rank in these layers, 0 where it leaves them alone."""
        ends = [sum(ranks[: number + 1]) for number in range(len(ranks))]
        self._spans = [(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]
        self._owner_M = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks, dtype=torch.long))
        self.runs: list[tuple[int, int, int, int]] = []
        """Rows from and to, and the columns to compute for them, from and to; rows without an adapter here are in none."""
        self.mask_B1M: Tensor | None = None
        """True where a row has another adapter; None: every row uses all columns of its run."""

    def choose(self, adapters: Sequence[int | None], device: torch.device) -> None:
        """Set the adapter of every row of the next forwards by its number; None is the base model.

        Rows of an adapter that lie together are computed with its columns alone.
        """
        own = [(-1 if number is None else number, row) for row, number in enumerate(adapters)]
        runs = [(number, [row for _, row in those]) for number, those in groupby(own, key=itemgetter(0))]
        if len(runs) == len({number for number, _ in runs}):
            spans = [(rows[0], rows[-1] + 1, *self._spans[number]) for number, rows in runs if number >= 0]
            self.runs, self.mask_B1M = [run for run in spans if run[2] < run[3]], None
            return
        own_B = torch.tensor([number for number, _ in own])
        self.runs = [(0, len(own), 0, len(self._owner_M))]
        self.mask_B1M = (own_B[:, None, None] != self._owner_M).to(device)


class StackedLora(nn.Module):
    """A linear layer with the LoRA of all adapters beside it."""

    # PEFT's mixed batches take the adapters one after another, which costs more than the layers themselves where rows are few.

    def __init__(self, base: nn.Linear, down_IM: Tensor, up_MO: Tensor, layout: Layout) -> None:
        """`down_IM` and `up_MO` hold the adapters' A and B transposed, side by side, B with its scale in it."""
        super().__init__()
        self.base = base
        self.layout = layout
        self.register_buffer("down_IM", down_IM, persistent=False)
        self.register_buffer("up_MO", up_MO, persistent=False)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return [B, T, O]."""
        y_BTO: Tensor = self.base(x_BTI)
        down_IM: Tensor = self.down_IM  # type: ignore[assignment]
        up_MO: Tensor = self.up_MO  # type: ignore[assignment]
        for first, last, start, end in self.layout.runs:
            low_BTM = x_BTI[first:last] @ down_IM[:, start:end]
            if self.layout.mask_B1M is not None:
                # Filled, not multiplied: another row's adapter may give infinity here, and 0 x inf is NaN.
                low_BTM.masked_fill_(self.layout.mask_B1M, 0.0)
            y_NO = y_BTO[first:last].view(-1, y_BTO.shape[-1])
            y_NO.addmm_(low_BTM.flatten(0, 1), up_MO[start:end])  # in place: a sum costs as much again
        return y_BTO


class Adapters:
    """The LoRA adapters of one model. Loading puts adapter layers into the model in place."""

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        """Load every folder under its name. Raises ConfigError for one that is not a LoRA adapter of this model."""
        layers = layers_of(model) if folders else {}
        found = [read_adapter(f"adapters.{name}", folder) for name, folder in folders.items()]
        for adapter in found:
            check_fit(adapter, layers, "transformers")
        self._numbers = {name: number for number, name in enumerate(folders)}
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._device: torch.device = model.device
        self._load(model, found)

    def check(self, adapter: str | None) -> None:
        """Raise EngineError for an adapter that is not loaded."""
        if adapter is not None and adapter not in self._numbers:
            allowed = ", ".join(self._numbers) or "none is loaded"
            raise EngineError(f"adapter is {adapter!r}; expected null, {allowed}; name it in the pool, then restart")

    def choose(self, adapters: Sequence[str | None]) -> None:
        """Set the adapter of every row of the next forwards; None is the base model."""
        numbers = [None if adapter is None else self._numbers[adapter] for adapter in adapters]
        for layout in self._layouts.values():
            layout.choose(numbers, self._device)

    def _load(self, model: Any, adapters: Sequence[AdapterFiles]) -> None:
        """Put layers that compute all adapters at once in place of the model's."""
        # Not by PEFT, which makes layers of its own for every adapter: a third of an engine's start.
        weights = [load_file(adapter.folder / WEIGHTS) for adapter in adapters]
        for layer in dict.fromkeys(name for adapter in adapters for name in sorted(adapter.layers)):
            base: nn.Linear = model.get_submodule(layer)
            keys = [f"base_model.model.{layer}.lora_{half}.weight" for half in "AB"]
            downs, ups, ranks = [], [], [0] * len(adapters)
            for number, (adapter, tensors) in enumerate(zip(adapters, weights, strict=True)):
                if layer in adapter.layers:
                    down_IM, up_MO = (tensors[key].to(base.weight.device, torch.float32).T for key in keys)
                    downs.append(down_IM)
                    ups.append(up_MO * scale_of(adapter.settings, layer))
                    ranks[number] = down_IM.shape[1]
            layout = self._layouts.setdefault(tuple(ranks), Layout(ranks))
            dtype = base.weight.dtype
            stacked = StackedLora(base, torch.cat(downs, 1).to(dtype).contiguous(), torch.cat(ups).to(dtype).contiguous(), layout)
            parent, _, child = layer.rpartition(".")
            setattr(model.get_submodule(parent), child, stacked.requires_grad_(False))
