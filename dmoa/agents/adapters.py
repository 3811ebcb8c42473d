"""LoRA adapters of the transformers engine: loaded once beside the base weights, chosen per row of a batch.

`adapter_files` checks the folders, PEFT reads them; its layers are then replaced by `stacked_lora`'s, which compute mixed
batches faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmoa.agents.adapter_files import check_fit, layers_of, read_adapter
from dmoa.agents.stacked_lora import Layout, StackedLora
from dmoa.errors import ConfigError, EngineError


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
            raise EngineError(f"adapter: value seen: {adapter!r}; allowed: null, {allowed}; name it in the pool, then restart")

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
                    f"adapters.{name}: value seen: {str(folder)!r}; a LoRA adapter of this model is allowed; "
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
