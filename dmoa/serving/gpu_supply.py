"""Which GPUs there are: on the nodes of a running Ray, or on this machine. The supply side of `dmoa serve --dry-run`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MIB = 2**20
_TYPE_PREFIX = "accelerator_type:"
PUBLISHED_MIB: dict[str, tuple[int, ...]] = {
    "P4": (7680,),
    "P100": (16384,),
    "T4": (15360,),
    "V100": (16384, 32768),
    "A10G": (23028,),
    "L4": (23034,),
    "L40S": (46068,),
    "A100": (40960, 81920),
    "A100-40G": (40960,),
    "A100-80G": (81920,),
    "H100": (81559,),
    "H20": (97871,),
    "H200": (143771,),
    "B200": (183359,),
    "RTX-PRO-6000": (97887,),
}
"""Memory by Ray's name of a kind of GPU, as its driver reports it; two sizes where the name stands for both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuNode:
    """A machine with GPUs of one kind."""

    name: str
    gpus: float
    """All of them, in use or not."""
    kinds: tuple[str, ...] = ()
    """What `accelerator_type` may say to get them, such as A100 and A100-80G; empty: unknown."""
    asked_bytes: int | None = None
    """Memory of one, where the device itself could be asked."""

    @property
    def memory_bytes(self) -> int | None:
        """Memory of one GPU: as the device says, else as published for its kind; None: unknown."""
        return self.asked_bytes or published_bytes(self.kinds)

    @property
    def label(self) -> str:
        """Kind and memory in words."""
        memory = self.memory_bytes
        return f"{' '.join(self.kinds) or 'GPU of unknown kind'}, {'memory unknown' if memory is None else gib(memory)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """The GPUs of a cluster."""

    source: str
    """Where they were counted, in words."""
    nodes: tuple[GpuNode, ...]
    """Nodes without GPUs are left out."""

    @property
    def gpus(self) -> float:
        """All GPUs."""
        return sum(node.gpus for node in self.nodes)

    def of_kind(self, kind: str | None) -> tuple[GpuNode, ...]:
        """Return the nodes with this kind of GPU; None: all."""
        return tuple(node for node in self.nodes if kind is None or kind in node.kinds)


def published_bytes(kinds: Sequence[str]) -> int | None:
    """Return the memory of a GPU known under these names, None where none of them is in the table.

    The narrowest name decides; of two sizes under one name it is the larger, so that nothing possible is refused.
    """
    known = sorted((PUBLISHED_MIB[kind] for kind in kinds if kind in PUBLISHED_MIB), key=len)
    return known[0][-1] * _MIB if known else None


def is_ambiguous(node: GpuNode) -> bool:
    """Say whether the kind of this node's GPUs comes in several sizes and nothing says which these are."""
    sizes = [len(PUBLISHED_MIB[kind]) for kind in node.kinds if kind in PUBLISHED_MIB]
    return node.asked_bytes is None and bool(sizes) and min(sizes) > 1


def nodes_of_ray(records: Iterable[Mapping[str, Any]]) -> tuple[GpuNode, ...]:
    """Return the living nodes with GPUs out of what `ray.nodes()` returns."""
    found = []
    for record in records:
        resources = record.get("Resources") or {}
        gpus = float(resources.get("GPU", 0.0))
        if not record.get("Alive") or gpus <= 0:
            continue
        name = record.get("NodeManagerHostname") or record.get("NodeManagerAddress") or str(record.get("NodeID", ""))[:12]
        kinds = sorted(key.removeprefix(_TYPE_PREFIX) for key in resources if key.startswith(_TYPE_PREFIX))
        found.append(GpuNode(name=str(name), gpus=gpus, kinds=tuple(kinds)))
    return tuple(found)


def joined_supply(address: str) -> Supply:
    """Return the GPUs of the Ray at `address`: joins it, reads its nodes, leaves. Raises ConfigError where none answers."""
    from dmoa.serving.launch import start_ray

    start_ray(address)
    import ray

    try:
        return Supply(source=f"the Ray at {address}", nodes=nodes_of_ray(ray.nodes()))
    finally:
        ray.shutdown()


def local_supply() -> Supply:
    """Return the GPUs of this machine, as torch sees them."""
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    groups: dict[tuple[str, int], int] = {}
    for device in devices:
        key = (str(device.name), int(device.total_memory))
        groups[key] = groups.get(key, 0) + 1
    # Kinds of one machine are nodes of their own here: a replica over two kinds is nothing to plan with.
    nodes = [
        GpuNode(name="this machine", gpus=count, kinds=(kind_of_device(name),), asked_bytes=memory)
        for (name, memory), count in groups.items()
    ]
    return Supply(source="this machine", nodes=tuple(nodes))


def kind_of_device(name: str) -> str:
    """Return Ray's name for a device by the driver's, such as H100 for "NVIDIA H100 80GB HBM3"."""
    # As Ray 2.60 does it for `accelerator_type`, in a module of its own that is not public.
    match = re.match(r"\w+\s+((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)", name)
    if match and len(match.group(1)) > 1:
        return match.group(1).replace(" ", "-")
    return re.sub(r"^NVIDIA\s+", "", name).strip().replace(" ", "-")


def gib(num_bytes: float) -> str:
    """Return a number of bytes in words, in GiB, small ones in MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / _MIB:.1f} MiB"
