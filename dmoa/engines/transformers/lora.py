"""LoRA adapters of the `transformers` engine: loaded into the model, and added to every row's linear layers in two products.

The adapters of a layer lie side by side: one narrow product with all of them, what a row's adapter did not compute set to
zero, one product back. Source of the method: ours (cf. the batched LoRA of Punica and S-LoRA).
Shape letters: B rows, T tokens, I inputs, O outputs, N adapters, M ranks of all adapters together.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmoa.engines.adapter_files import check_fit, layers_of, read_adapter
from dmoa.errors import ConfigError, EngineError


class Layout:
    """Which columns of M belong to which adapter, and which of them the rows of the next forward use.

    Layers whose adapters have the same ranks share one.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        """`ranks` holds every adapter's rank in these layers, 0 where it leaves them alone."""
        ends = [sum(ranks[: number + 1]) for number in range(len(ranks))]
        self._spans = [(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]
        self._owner_M = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks, dtype=torch.long))
        self.span: tuple[int, int] = (0, 0)
        """Columns to compute, from and to; the same where no row has an adapter here."""
        self.mask_B1M: Tensor | None = None
        """True where a row has another adapter, of the columns of `span`; None: every row uses all of them."""

    def choose(self, adapters: Sequence[int | None], device: torch.device) -> None:
        """Set the adapter of every row of the next forwards by its number; None is the base model."""
        used = set(adapters)
        if len(used) == 1:
            (only,) = used
            self.span, self.mask_B1M = (0, 0) if only is None else self._spans[only], None
            return
        own_B = torch.tensor([-1 if number is None else number for number in adapters])
        self.span = (0, len(self._owner_M))
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
        start, end = self.layout.span
        if start == end:
            return y_BTO
        down_IM: Tensor = self.down_IM  # type: ignore[assignment]
        up_MO: Tensor = self.up_MO  # type: ignore[assignment]
        low_BTM = x_BTI @ down_IM[:, start:end]
        if self.layout.mask_B1M is not None:
            # Filled, not multiplied: another row's adapter may give infinity here, and 0 x inf is NaN.
            low_BTM.masked_fill_(self.layout.mask_B1M, 0.0)
        y_BTO.view(-1, y_BTO.shape[-1]).addmm_(low_BTM.flatten(0, 1), up_MO[start:end])  # in place: a sum costs as much again
        return y_BTO


class Adapters:
    """The LoRA adapters of one model. Loading puts adapter layers into the model in place."""

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        """Load every folder under its name. Raises ConfigError for one that is not a LoRA adapter of this model."""
        layers = layers_of(model) if folders else {}
        self._changed: dict[str, frozenset[str]] = {}
        for name, folder in folders.items():
            adapter = read_adapter(f"adapters.{name}", folder)
            check_fit(adapter, layers, "transformers")
            self._changed[name] = adapter.layers
        self._numbers = {name: number for number, name in enumerate(folders)}
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._device: torch.device = model.device
        if folders:
            self._load(model, folders)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order of loading."""
        return tuple(self._numbers)

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

    def _load(self, model: Any, folders: Mapping[str, Path]) -> None:
        from peft import PeftModel

        wrapped: Any = None
        for name, folder in folders.items():
            try:
                with warnings.catch_warnings():
                    # PEFT 0.21 asks for an attribute that transformers 5.23 has renamed.
                    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
                    if wrapped is None:
                        wrapped = PeftModel.from_pretrained(model, folder, adapter_name=_peft_name(self._numbers[name]))
                    else:
                        wrapped.load_adapter(folder, adapter_name=_peft_name(self._numbers[name]))
            except (RuntimeError, ValueError, OSError, KeyError) as error:
                raise ConfigError(
                    f"adapters.{name}: {str(folder)!r} is not a LoRA adapter of this model; "
                    f"train it on this model: {' '.join(str(error).split())[:400]}"
                ) from error
        wrapped.eval().requires_grad_(False)
        self._stack(model)

    def _stack(self, model: Any) -> None:
        """Put layers that compute all adapters at once in place of PEFT's."""
        from peft.tuners.lora import LoraLayer

        found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
        for adapter, number in self._numbers.items():
            changed = {name for name, module in found if _peft_name(number) in module.lora_A}
            if changed != self._changed[adapter]:
                first = min(changed ^ self._changed[adapter])
                raise ConfigError(
                    f"adapters.{adapter}: PEFT and the adapter's file differ on layer {first!r}; save it with PEFT again"
                )
        for name, module in found:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, self._stacked(name, module))

    def _stacked(self, name: str, module: Any) -> StackedLora:
        base = module.get_base_layer()
        downs, ups, ranks = [], [], []
        for number in self._numbers.values():
            peft_name = _peft_name(number)
            if peft_name not in module.lora_A:
                ranks.append(0)
                continue
            down_IM = module.lora_A[peft_name].weight.detach().T
            downs.append(down_IM)
            ups.append(module.lora_B[peft_name].weight.detach().T * module.scaling[peft_name])
            ranks.append(down_IM.shape[1])
        layout = self._layouts.setdefault(tuple(ranks), Layout(ranks))
        dtype = base.weight.dtype
        return StackedLora(base, torch.cat(downs, 1).to(dtype).contiguous(), torch.cat(ups).to(dtype).contiguous(), layout)


def _peft_name(number: int) -> str:
    """Return an adapter's name in PEFT: names become module names there, which may not hold dots."""
    return f"adapter{number}"
