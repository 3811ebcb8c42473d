"""Trainings in the process of a test."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from dmoa.config import Config
from dmoa.training.options import TrainOptions
from dmoa.training.state import EpochRecord
from dmoa.training.trainer import TrainContext, TrainResult, run_training

AROUND = TrainContext(open_ray=nullcontext, say=lambda text: None, watch=lambda epoch, most: None)
"""For what trains without a command."""
BASE: dict[str, Any] = {"workers": 0, "track": "jsonl"}
FINISH_TIMEOUT_S = 120.0
"""On a busy machine W&B takes its time."""


def no_ray() -> AbstractContextManager[None]:
    raise AssertionError("a training in process starts no Ray")


def train(folder: Path, rollouts: Path, config: Config, *, said: list[str] | None = None, **options: Any) -> TrainResult:
    seen: list[EpochRecord] = []
    around = TrainContext(
        open_ray=no_ray,
        say=(said if said is not None else []).append,
        watch=lambda epoch, _: seen.append(epoch),
        finish_timeout_s=FINISH_TIMEOUT_S,
    )
    return run_training(TrainOptions.parse({**BASE, "rollouts": str(rollouts), "out": folder, **options}), config, around)
