"""Settings of the study, its pools and what is fixed in the code; and its folder: one set of settings, whatever is in it.

First stop of `jobs/study_gate.py`: a folder that was begun with other settings or other adapters is refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from study_endpoints import SINGLE

from dmoa.agents.pool import fingerprint, load_pool
from dmoa.config import Config
from dmoa.errors import ConfigError
from dmoa.evaluation.run_folder import write_whole
from dmoa.workflows.console import Common

POOL, CONSTANT, WRONG = "specialists", "specialists-liar-constant", "specialists-liar-wrong"
MATRIX_SUITES = (*SINGLE, "shared")
SCORES, EPOCHS = ("raw", "anchored"), (10, 20, 40)
ALPHAS = tuple(product((0.1, 0.3, 0.5), (0.5, 0.3, 0.1)))
"""(alpha of tau, alpha of theta)."""
MOST_ACTIVE = 1.6
"""Agents of a step, on average: the budget within which the pair of alphas is chosen."""
MEMORY_EPOCHS = 60
"""A memory takes more passes than a lookup: fixed beforehand, for both arms alike."""
CLUSTERS = 8
"""Of the rival, k-means + surest agent."""
MATRIX_SEED = 7
"""Of the matrices' rows. Of its test rows none has been looked at; of its validation rows the first 40 of each suite have,
with labels, when the second set of specialists was decided on."""
ROLLOUT_SEED = 100
"""Seeds of rollouts begin here, far from those of the matrices."""
COMMAND = "jobs/study_gate.py"
_NOT_COMPARED = ("common", "workers", "out")
"""How the study is run and where it lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Settings of the study, from its YAML file."""

    out: Path
    test_rows: int = 1000
    validation_rows: int = 300
    seeds: int = 5
    shuffles: int = 20
    """Gates per seed that are trained on entropies shuffled within rows."""
    queries: int = 80
    relay_queries: int = 60
    relay_test: int = 300
    chain_test: int = 500
    workers: int = 2
    """Answering actors, each with an engine of its own."""
    common: Common

    @property
    def calls(self) -> Path:
        """Cache of greedy calls: the same question to the same agent is paid for once."""
        return self.out / "calls"


def pool(name: str) -> Config:
    """Return a packaged pool that answers in one step."""
    config = load_pool(name)
    return config.model_copy(update={"limits": config.limits.model_copy(update={"max_steps": 1})})


def everyone() -> Config:
    """Return the pool of all agents, liars included: one matrix serves every pool."""
    config = pool(POOL)
    names = {agent.name for agent in config.agents}
    liars = [agent for other in (CONSTANT, WRONG) for agent in pool(other).agents if agent.name not in names]
    return config.model_copy(update={"name": "specialists-all", "agents": (*config.agents, *liars)})


def check_same(study: Study) -> None:
    """Write down what the folder is begun with, or raise ConfigError naming what differs from what it was begun with.

    Fingerprints of pools hold the hash of every adapter's bytes.
    """
    now: dict[str, Any] = {name.name: getattr(study, name.name) for name in fields(Study) if name.name not in _NOT_COMPARED}
    now |= {"MATRIX_SEED": MATRIX_SEED, "ROLLOUT_SEED": ROLLOUT_SEED, "EPOCHS": list(EPOCHS), "MEMORY_EPOCHS": MEMORY_EPOCHS}
    now |= {"CLUSTERS": CLUSTERS, **{f"pool {name}": fingerprint(pool(name)) for name in (POOL, CONSTANT, WRONG)}}
    path = study.out / "study.json"
    if not path.exists():
        write_whole(path, json.dumps(now, indent=2) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    different = [
        f"{name}: begun with {before.get(name)}, now {now.get(name)}"
        for name in now | before
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ConfigError(
            f"job.out: {'; '.join(different)}; repeat the settings, and the adapters, of {str(path)!r}, or name another folder"
        )


def plain(value: Any) -> Any:
    """Return a result as plain JSON values; numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_result(study: Study, result: dict[str, Any]) -> None:
    """Write what is known so far as `result.json`."""
    write_whole(study.out / "result.json", json.dumps(plain(result), indent=2, allow_nan=False) + "\n")
