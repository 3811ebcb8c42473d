"""The entropy processor with a clock around it, for P8 on vLLM; loaded by vLLM's own processes."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate

from dmoa.engines.vllm.entropy import EntropyProcessor, EntropyWorker


class TimedProcessor(EntropyProcessor):
    """Counts the seconds that vLLM spends in the processor; on a GPU only those of the host."""

    spent_s = 0.0

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the engine's batch."""
        began = time.perf_counter()
        super().update_state(batch_update)
        self.spent_s += time.perf_counter() - began

    def apply(self, logits: Tensor) -> Tensor:
        """Keep the entropies of [B, V] and return the logits as they are."""
        began = time.perf_counter()
        found = super().apply(logits)
        self.spent_s += time.perf_counter() - began
        return found


class TimedWorker(EntropyWorker):
    """Adds the clock's reading to the worker's methods."""

    model_runner: Any

    def processor_seconds(self) -> float:
        """Return the seconds spent in the processor so far."""
        processors = self.model_runner.input_batch.logitsprocs.all
        return next((processor.spent_s for processor in processors if isinstance(processor, TimedProcessor)), 0.0)
