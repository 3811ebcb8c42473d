"""Shares out the GPUs among the engines of a pool that run beside one process: `dmoa run`, rollouts and evaluation.

There every engine would take the first GPU that it sees. On Ray Serve every replica sees its own GPUs alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmoa.config import Config, callable_agents
from dmoa.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Variable that names the GPUs which a process sees."""
_TOLERANCE = 1e-6
"""Parts of a GPU are sums of decimal fractions."""


@dataclass(frozen=True, slots=True)
class GpuSlice:
    """GPUs of one engine."""

    positions: tuple[int, ...]
    """Among those that the process sees, as torch counts them."""
    names: tuple[str, ...]
    """What `CUDA_VISIBLE_DEVICES` calls them."""


def share_gpus(wanted: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
    """Return the positions of each LLM's GPUs, counted from 0: whole ones of its own, parts of one beside other parts.

    Whole ones come first, in the order given; a part goes to the first GPU with room for it. What is above 1 and not whole
    takes the next whole number.
    """
    shares: dict[str, tuple[int, ...]] = {}
    taken = 0
    for llm, gpus in wanted.items():
        if gpus >= 1:
            shares[llm] = tuple(range(taken, taken := taken + math.ceil(gpus - _TOLERANCE)))
    rooms: list[float] = []
    for llm, gpus in wanted.items():
        if 0 < gpus < 1:
            place = next((i for i, room in enumerate(rooms) if room + _TOLERANCE >= gpus), len(rooms))
            if place == len(rooms):
                rooms.append(1.0)
            rooms[place] -= gpus
            shares[llm] = (taken + place,)
    return {llm: shares[llm] for llm in wanted if llm in shares}


def pool_gpus(config: Config) -> float:
    """Return the GPUs of a process with all engines of a pool, as Ray takes it: a part of one, or a whole number."""
    wanted = _wanted(config)
    devices = {position for positions in share_gpus(wanted).values() for position in positions}
    return min(1.0, sum(wanted.values())) if len(devices) <= 1 else float(len(devices))


def local_gpus(config: Config, visible: Sequence[str] | None = None) -> dict[str, GpuSlice]:
    """Return the GPUs of each LLM whose engine runs beside this process; `visible` are those it sees, None: look.

    Raises ConfigError where there are fewer than the pool asks for; without any, `transformers` takes the CPU.
    """
    wanted = {llm: gpus for llm, gpus in _wanted(config).items() if not config.llms[llm].engine_entry.is_light}
    if not wanted:
        return {}
    seen = visible_gpus() if visible is None else visible
    if not seen and all(config.llms[llm].engine == "transformers" for llm in wanted):
        return {}
    shares = share_gpus(wanted)
    needed = 1 + max(position for positions in shares.values() for position in positions)
    if needed > len(seen):
        first, *others = wanted
        more = f" and of {', '.join(others)}" if others else ""
        each = ", ".join(f"{llm} {gpus:g}" for llm, gpus in wanted.items())
        raise ConfigError(
            f"llms.{first}.gpus{more}: the pool needs {needed} GPU(s) in all ({each}), and this process sees "
            f"{len(seen)} ({VISIBLE}: {os.environ.get(VISIBLE, 'not set')}); lower gpus (0 for the CPU), let the process see "
            "more, or serve the pool and name the server by --url"
        )
    return {llm: GpuSlice(positions, tuple(seen[i] for i in positions)) for llm, positions in shares.items()}


def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that this process sees, without taking hold of one."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    return tuple(map(str, range(count))) if named is None else tuple(name.strip() for name in named.split(","))[:count]


def _wanted(config: Config) -> dict[str, float]:
    """Return the GPUs of each LLM that has an agent, or the summarizer, by LLM."""
    used = dict.fromkeys(agent.llm for agent in callable_agents(config))
    return {llm: config.llms[llm].gpus for llm in used if config.llms[llm].gpus}
