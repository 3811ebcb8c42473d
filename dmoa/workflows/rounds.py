"""On-policy rounds for `jobs/train_rounds.py`: collect with the current gate, train, collect again.

The gate decides which agents' work the next step builds on, so a better gate meets other states than those it was trained on.
Every round is a folder of rollouts and one of training; a job that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from dmoa.config import Address, Config, Options
from dmoa.errors import ConfigError
from dmoa.storage import localized, under
from dmoa.training.options import RolloutOptions, TrainOptions
from dmoa.workflows.collect import run_rollouts
from dmoa.workflows.console import Common
from dmoa.workflows.evaluate import opened_ray
from dmoa.workflows.terminal import goes_on
from dmoa.workflows.train import run_train

if TYPE_CHECKING:
    from dmoa.training.trainer import TrainResult

_SET_HERE = ("out", "round", "rollouts", "start_from", "address")
_NO_POOL = ("url", "from_traffic")


class RoundsOptions(Options):
    """The `job:` section of `jobs/train_rounds.yaml`."""

    out: Path
    """Folder of all rounds; the same folder goes on."""
    rounds: int = Field(default=3, ge=1, le=100)
    """How often to collect and train."""
    rollouts: dict[str, Any]
    """Options of `dmoa rollouts`; `limit` is per round."""
    train: dict[str, Any] = Field(default={})
    """Options of `dmoa train`."""
    address: Address = None
    """A Ray cluster to run on (auto, HOST:PORT); None: RAY_ADDRESS, else a Ray of its own."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build the options from plain values. Raises ConfigError, also for what every round sets itself."""
        options = super().parse(values)
        for section in ("rollouts", "train"):
            taken = [name for name in _SET_HERE if name in getattr(options, section)]
            if taken:
                raise ConfigError(f"job.{section}: {', '.join(taken)}: every round sets it itself; leave it out")
        elsewhere = [name for name in _NO_POOL if options.rollouts.get(name) is not None]
        if elsewhere:
            raise ConfigError(
                f"job.rollouts: {', '.join(elsewhere)}: a round asks its own pool, by the gate that was trained last, and "
                "a server has another gate; leave it out"
            )
        return options


def run_rounds(options: RoundsOptions, config: Config, common: Common, command: str) -> TrainResult:
    """Run all rounds and return the last training; its checkpoint is the gate.

    The first round explores everyone, later ones as `rollouts` says; every training begins with the round's gate and learns
    from the rollouts of all rounds so far. Raises ConfigError, CheckpointError, DmoaError; what was written is kept.
    """
    for number in (0, 1)[: options.rounds]:  # now, and not after hours of collecting
        collecting = collection_of(options, number)
        training_of(options, config, [collecting.out], collecting.out.parent / "gate")
    collected: list[Path] = []
    way_on = goes_on("the same command goes on from here")
    with way_on, localized(options, common.say, writes=("out",)) as here, opened_ray(options.address):
        for number in range(options.rounds):
            common.say(f"round {number + 1} of {options.rounds}")
            collecting = collection_of(here, number)
            run_rollouts(collecting, config, common, command)
            collected.append(collecting.out)
            result = run_train(training_of(here, config, collected, collecting.out.parent / "gate"), config, common, command)
            config = config.changed("gate", checkpoint=str(result.checkpoint))
    return result


def collection_of(options: RoundsOptions, number: int) -> RolloutOptions:
    """Return the options of a round's collection."""
    values = {**options.rollouts, "out": options.out / f"round-{number}" / "rollouts", "round": number}
    return RolloutOptions.parse(values | ({} if number else {"epsilon": None, "dense": True}))


def training_of(options: RoundsOptions, config: Config, collected: Sequence[Path], out: Path) -> TrainOptions:
    """Return the options of a round's training, which begins with the gate of `config`, untrained weights where it has none."""
    values = {**options.train, "rollouts": tuple(collected), "out": out}
    if values.get("storage_path") is not None:
        values["storage_path"] = under(str(values["storage_path"]), out.parent.name)  # each round has a state of its own
    if config.gate.checkpoint is not None:
        values["start_from"] = config.gate.checkpoint
    return TrainOptions.parse(values)
