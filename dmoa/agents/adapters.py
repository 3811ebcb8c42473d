"""LoRA adapters of the transformers engine: loaded once beside the base weights, chosen per row of a batch.

PEFT computes mixed batches from a list of adapter names, one per row. Its own way to hand that list over registers and
removes a hook on every layer in every forward; here the hooks are registered once and read the current list.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmoa.errors import ConfigError, EngineError

_BASE = "__base__"
"""PEFT's name for a row without an adapter."""


class Adapters:
    """The LoRA adapters of one model. Loading puts adapter layers into the model in place."""

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        """Load every folder under its name. Raises ConfigError for one that is no LoRA adapter of this model."""
        for name, folder in folders.items():
            _check(name, folder)
        # PEFT's names become module names, which may not hold dots.
        self._peft_names = {name: f"adapter{number}" for number, name in enumerate(folders)}
        self._rows: list[str] = []
        if folders:
            self._load(model, folders)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order of loading."""
        return tuple(self._peft_names)

    def check(self, adapter: str | None) -> None:
        """Raise EngineError for an adapter that is not loaded."""
        if adapter is not None and adapter not in self._peft_names:
            allowed = ", ".join(self._peft_names) or "none is loaded"
            raise EngineError(f"adapter: value seen: {adapter!r}; allowed: null, {allowed}; name it in the pool, then restart")

    def choose(self, adapters: Sequence[str | None]) -> None:
        """Set the adapter of every row of the next forwards; None is the base model."""
        self._rows[:] = [_BASE if adapter is None else self._peft_names[adapter] for adapter in adapters]

    def _load(self, model: Any, folders: Mapping[str, Path]) -> None:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        wrapped: Any = None
        for name, folder in folders.items():
            try:
                with warnings.catch_warnings():
                    # PEFT 0.21 asks for an attribute that transformers 5.23 has renamed.
                    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
                    if wrapped is None:
                        wrapped = PeftModel.from_pretrained(model, folder, adapter_name=self._peft_names[name])
                    else:
                        wrapped.load_adapter(folder, adapter_name=self._peft_names[name])
            except (RuntimeError, ValueError, OSError, KeyError) as error:
                raise ConfigError(
                    f"adapters.{name}: value seen: {str(folder)!r}; a LoRA adapter of this model is allowed; "
                    f"train it on this model: {' '.join(str(error).split())[:400]}"
                ) from error
        wrapped.eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.register_forward_pre_hook(self._inject, with_kwargs=True)

    def _inject(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": self._rows}


def _check(name: str, folder: Path) -> None:
    """Raise ConfigError unless `folder` holds a plain LoRA adapter."""
    seen = f"adapters.{name}: value seen: {str(folder)!r}"
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{seen}; a folder with a PEFT adapter (adapter_config.json, adapter_model.safetensors) is allowed; "
            f"give its path or leave the adapter out: {error}"
        ) from error
    kind = settings.get("peft_type")
    if kind != "LORA" or settings.get("use_dora"):
        raise ConfigError(
            f"{seen}: {'DoRA' if settings.get('use_dora') else kind}; "
            "only plain LoRA is allowed, because rows with different adapters share a batch; train one with use_dora off"
        )
