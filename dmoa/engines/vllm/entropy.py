"""Exact entropy inside vLLM: a logits processor that changes nothing and keeps what it sees, and how a server takes it.

Both classes are named to vLLM by their paths (`logits_processors`, `worker_extension_cls`) and live in its worker processes.
The server gives every call a key of its own (`KEY` in `SamplingParams.extra_args`), and takes the sums of finished calls by
`collective_rpc("take_entropies")`. No Ray here; vLLM is imported by vLLM's own processes alone. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from dmoa.engines.vllm.entropy_store import EntropyStore, RequestSums, Wanted

KEY = "dmoa_entropy_key"
"""In `extra_args` of a call whose entropy is wanted; the ingress lets no client set it."""


class EntropyProcessor(LogitsProcessor):
    """Keeps the entropy of every row before temperature and sampling filters."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        """Called by vLLM."""
        self.store = EntropyStore(device, is_pinned=is_pin_memory)

    def is_argmax_invariant(self) -> bool:
        """Return False, though no argmax is changed: processors that say True are left out where all rows are greedy."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the engine's batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.store.remove(index)
        for index, params, _, outputs in batch_update.added:
            key = (params.extra_args or {}).get(KEY)
            self.store.add(index, key if isinstance(key, str) else None, outputs)
        for source, target, direction in batch_update.moved:
            self.store.move(source, target, swaps=direction == MoveDirectionality.SWAP)

    def apply(self, logits: Tensor) -> Tensor:
        """Keep the entropies of [B, V] and return the logits as they are."""
        self.store.write(logits)
        return logits


class EntropyWorker:
    """Methods that vLLM adds to its worker."""

    model_runner: Any

    def take_entropies(self, wanted: Sequence[Wanted]) -> dict[str, RequestSums]:
        """Return and forget the sums of finished calls (`EntropyStore.take`); nothing where no logits are made here."""
        store = self._entropy_store()
        return {} if store is None else store.take(wanted)

    def count_entropies(self) -> int:
        """Return of how many calls something is kept."""
        store = self._entropy_store()
        return 0 if store is None else len(store)

    def _entropy_store(self) -> EntropyStore | None:
        processors = self.model_runner.input_batch.logitsprocs.all
        return next((processor.store for processor in processors if isinstance(processor, EntropyProcessor)), None)
