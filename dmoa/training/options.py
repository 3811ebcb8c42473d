"""What a training of the gate is asked to do: the options of `dmoa train` and of the `job:` section of `jobs/train_gate.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dmoa.config import Config, parse_gate
from dmoa.core.calibration import ALPHAS
from dmoa.errors import ConfigError
from dmoa.validation import describe

PRESETS: dict[str, dict[str, Any]] = {
    "few-shot": {"epochs": 10, "batch_queries": 4, "lr": 1e-3, "patience": 5},
    "full": {"epochs": 60, "batch_queries": 16, "lr": 1e-3, "patience": 8},
}
"""Preset -> what it sets where the options do not. Source: 40-80 queries from the paper; the rest ours."""
NOT_COMPARED = ("out", "workers", "gpu", "track", "address", "max_failures", "storage_path")
"""Options that a run may be continued with other values of: they change where and how it runs, not what it learns."""


def _folders(value: object) -> object:
    """Accept one folder, or `a,b`, where a list of folders is expected."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, Path) else value


def _workers(value: object) -> object:
    """Accept `auto`, or a number in words too."""
    if isinstance(value, str) and value != "auto" and not value.isdecimal():
        raise ValueError("allowed are auto or a whole number from 0")
    return int(value) if isinstance(value, str) and value != "auto" else value


def _alpha(value: object) -> object:
    """Accept `auto`, or a number in words too."""
    if not isinstance(value, str) or value == "auto":
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError("allowed are auto or a number between 0 and 1") from None


class TrainOptions(BaseModel):
    """One training of the gate."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    rollouts: Annotated[tuple[Path, ...], BeforeValidator(_folders)] = Field(min_length=1)
    """Folders that `dmoa rollouts` wrote; several are learned from together."""
    out: Path
    """Folder of the run: `checkpoint/`, `train.json`, curves. The same folder goes on with the run in it."""
    preset: Literal["few-shot", "full"] = "few-shot"
    """few-shot: some 40-80 queries; full: thousands. Sets epochs, batch_queries, lr and patience where these are not given."""
    workers: Annotated[Annotated[int, Field(ge=0, le=1024)] | Literal["auto"], BeforeValidator(_workers)] = "auto"
    """Ray Train workers; 0: in this process, without Ray; auto: as many as are not slower than one."""
    gpu: bool = False
    """Give every worker a GPU (all-reduce over nccl; on CPUs over gloo)."""
    epochs: int = Field(default=10, ge=1, le=100_000)
    batch_queries: int = Field(default=4, ge=1, le=65536)
    """Queries of a global batch, shared out among the workers."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of AdamW."""
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Greatest norm of the gradient."""
    loss: Literal["soft", "hard", "hinge", "listnet"] = "soft"
    score: Literal["raw", "anchored"] | None = None
    """What of a reply is ranked; None, here and below: as the pool's `gate` section says."""
    core: Literal["gru", "reset", "linear", "mlp"] | None = None
    head: Literal["linear", "profile"] | None = None
    hidden: int | None = Field(default=None, ge=1, le=4096)
    temperature: float | None = Field(default=None, gt=0, le=100)
    max_agents: int | None = Field(default=None, ge=1, le=1024)
    start_from: Path | None = None
    """Checkpoint whose weights the training begins with: its version becomes `parent`. None: untrained weights."""
    alpha: Annotated[Annotated[float, Field(gt=0, lt=1)] | Literal["auto"], BeforeValidator(_alpha)] = "auto"
    """tau covers the surest agent on a share of 1 - alpha of the held-back rows; auto: chosen, together with theta_alpha."""
    theta_alpha: float | None = Field(default=None, gt=0, lt=1)
    """theta lies above the surest reply's score on a share of 1 - theta_alpha of those rows; None: alpha, or chosen with it."""
    agent_price: float = Field(default=0.1, ge=0)
    """What one more agent per step must lower the logarithm of the winner's entropy by to be worth asking, where alphas are
    chosen: 0.1, to make it a tenth surer."""
    anchor_rollouts: Path | None = None
    """Folder with dense rollouts that the anchor set is taken from; None: the dense rollouts that are learned from."""
    clusters: int = Field(default=8, ge=1, le=1024)
    """Embedding clusters over which the anchor set is balanced."""
    discount_constant: bool = True
    """With score anchored, an agent that gives one reply to nearly all dense steps, where others do not, counts as less sure
    than everybody else."""
    holdout: float = Field(default=0.25, gt=0, lt=1)
    """Share of the queries held back, those with the lowest hashes of their ids."""
    patience: int = Field(default=5, ge=1)
    """Epochs without a lower loss on the held-back queries, after which training ends."""
    seed: int = Field(default=0, ge=0)
    """Seed of the untrained weights and of the order of the queries."""
    max_bad_steps: int = Field(default=10, ge=0)
    """Updates that may be skipped because loss or gradient was not finite; one more fails the run."""
    max_failures: int = Field(default=3, ge=0)
    """Lost workers that a run gets over."""
    dtype: Literal["float32", "float64"] = "float32"
    storage_path: str | None = None
    """Where workers keep the run's state (a folder, s3://, gs://) that all of them and this process reach; None: in `out`."""
    address: str | None = None
    """A Ray cluster to run on; None: RAY_ADDRESS, else a Ray of its own."""
    track: Literal["auto", "wandb", "jsonl", "none"] = "auto"
    """Where curves are logged; auto: W&B, offline without a key."""

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        return {**PRESETS.get(str(given.get("preset", "few-shot")), {}), **given}

    @property
    def alphas(self) -> tuple[float, ...]:
        """Values of alpha to choose from."""
        return ALPHAS if self.alpha == "auto" else (self.alpha,)

    @property
    def theta_alphas(self) -> tuple[float, ...]:
        """Values of theta_alpha to choose from."""
        return self.alphas if self.theta_alpha is None else (self.theta_alpha,)

    def gate_config(self, config: Config) -> Config:
        """Return the pool with the gate that these options ask for: untrained, or `start_from`'s. Raises ConfigError."""
        section = config.gate.model_dump(exclude={"checkpoint", "seed"})
        for name in ("score", "core", "head", "hidden", "temperature"):
            value = getattr(self, name)
            section |= {} if value is None else {name: value}
        if self.max_agents is not None:
            section["activation"]["max_agents"] = self.max_agents
        checkpoint = str(self.start_from.absolute()) if self.start_from else None
        gate = parse_gate({**section, "seed": self.seed, "checkpoint": checkpoint})
        return config.model_copy(update={"gate": gate})

    def identity(self) -> dict[str, Any]:
        """Return the options that decide what is learned: a run is continued only with the same."""
        return self.model_dump(mode="json", exclude=set(NOT_COMPARED) | {"rollouts", "anchor_rollouts", "start_from"})


def parse_options(values: dict[str, Any]) -> TrainOptions:
    """Build the options from plain values. Raises ConfigError naming field, value seen and what is allowed."""
    try:
        return TrainOptions.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"train: {describe(error, TrainOptions)}") from error
