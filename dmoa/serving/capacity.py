"""`dmoa serve --dry-run`: which GPUs there are, what a replica needs of each, and whether the pool's deployments fit.

GPUs are those of the nodes of a running Ray, or of this machine. Starts from `placement`; nothing is started or loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dmoa.agents.pool import check_corpus, check_files, check_vllm
from dmoa.config import Config, LlmConfig, callable_agents
from dmoa.engine_options import MemoryUse
from dmoa.engines.models import resolve_adapter
from dmoa.engines.size import DTYPE_BYTES, ModelSize, measure_models
from dmoa.errors import ConfigError
from dmoa.serving.placement import Deployment, Plan, plan_of

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
    """Return the GPUs of this machine, as torch sees them. Raises ConfigError for those that it cannot use."""
    import torch

    count = torch.cuda.device_count()
    try:
        devices = [torch.cuda.get_device_properties(i) for i in range(count)]
    except RuntimeError as error:  # a driver that is too old, or a device that does not answer
        raise ConfigError(
            f"this machine has {count} GPU(s) that torch cannot use ({' '.join(str(error).split())[:300]}); mend the driver, "
            "hide them by CUDA_VISIBLE_DEVICES= , or name a cluster by --address"
        ) from error
    groups = Counter((str(device.name), int(device.total_memory)) for device in devices)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of one GPU of a replica; where it has none, of the replica in its node's own memory. Bytes throughout."""

    device: Literal["gpu", "cpu", "none"]
    """none: nothing is loaded, for the model is scripted or runs at an endpoint."""
    reason: str | None = None
    """Why nothing more is known."""
    num_parameters: int | None = None
    """Of the whole model."""
    dtype: str | None = None
    quantization: str | None = None
    weights_bytes: int | None = None
    adapters_bytes: int = 0
    memory_bytes: int | None = None
    """Of one GPU; None: unknown."""
    budget_bytes: int | None = None
    """What the engine may fill."""
    room_bytes: int | None = None
    """What is left for keys and values; below 0 where the weights alone are too large."""
    token_bytes: int | None = None
    """Keys and values of one token, every layer counted as one of full attention."""
    least_token_bytes: int | None = None
    """The same without the layers that look back over a window only: what it takes at the least."""
    max_model_len: int | None = None
    """Longest sequence."""

    @property
    def room_tokens(self) -> int | None:
        """Tokens whose keys and values fit."""
        return None if self.room_bytes is None or not self.token_bytes else max(0, self.room_bytes) // self.token_bytes

    @property
    def num_sequences(self) -> float | None:
        """Sequences of the longest length whose keys and values fit."""
        return None if self.room_tokens is None or not self.max_model_len else self.room_tokens / self.max_model_len

    @property
    def is_too_long(self) -> bool:
        """Whether not even one of them fits, windows or not."""
        return None not in (self.room_bytes, self.num_sequences) and self.need_bytes > (self.room_bytes or 0)

    @property
    def need_bytes(self) -> int:
        """What one sequence of the longest length takes at the least."""
        return (self.least_token_bytes or 0) * (self.max_model_len or 0)


def estimate(
    deployment: Deployment,
    llm: LlmConfig,
    size: ModelSize | str,
    *,
    memory_bytes: int | None = None,
    adapter_bytes: Mapping[str, int] | None = None,
) -> Memory:
    """Return the memory of a deployment's replicas on GPUs of `memory_bytes`.

    `size` is what is known of the model, or why nothing is; `adapter_bytes` are the sizes of adapter files by name, which
    the transformers engine loads as they are.
    """
    device: Literal["gpu", "cpu"] = "gpu" if deployment.gpus else "cpu"
    use = llm.options.memory_use
    if use is None:
        return Memory(device="none", reason="no model is loaded")
    dtype = _dtype(use, size)
    weights = None if isinstance(size, str) or dtype is None else size.weight_bytes(dtype)
    if isinstance(size, str) or dtype is None or weights is None:
        reason = size if isinstance(size, str) else f"weights of kind {size.quantization or 'int8'} are not estimated"
        return Memory(device=device, reason=reason, memory_bytes=memory_bytes)
    wide, deep = (deployment.tensor_parallel, deployment.pipeline_parallel) if device == "gpu" else (1, 1)
    if use.adapter_rank is not None:
        slots = (use.max_adapters or len(deployment.adapters)) if deployment.adapters else 0
        adapters = size.lora_width * use.adapter_rank * slots * DTYPE_BYTES[dtype]
    else:
        adapters = sum((adapter_bytes or {}).get(name, 0) for name in deployment.adapters)
    weights, adapters = -(-weights // (wide * deep)), -(-adapters // (wide * deep))
    budget = int(memory_bytes * _share(deployment, use)) if deployment.gpus and memory_bytes is not None else None
    room = None if budget is None else budget - weights - adapters
    if device == "cpu" and use.cpu_room_gib is not None:
        room = use.cpu_room_gib * 2**30
    return Memory(
        device=device,
        num_parameters=size.num_parameters,
        dtype=dtype,
        quantization=size.quantization,
        weights_bytes=weights,
        adapters_bytes=adapters,
        memory_bytes=memory_bytes if device == "gpu" else None,
        budget_bytes=budget,
        room_bytes=room,
        token_bytes=size.token_bytes(dtype, tensor_parallel=wide, pipeline_parallel=deep),
        least_token_bytes=size.token_bytes(dtype, tensor_parallel=wide, pipeline_parallel=deep, counts_windows=False),
        max_model_len=use.max_model_len or size.max_model_len,
    )


def _dtype(use: MemoryUse, size: ModelSize | str) -> str | None:
    """Return what weights, keys and values are kept in; None where it is not known, or not one type."""
    if use.dtype == "int8" or isinstance(size, str):
        return None
    if use.dtype != "auto":
        return use.dtype
    return "bfloat16" if size.dtype == "float32" else size.dtype  # vLLM 0.29 runs float32 models in half of it under auto


def _share(deployment: Deployment, use: MemoryUse) -> float:
    """Return the part of a GPU's memory that a replica may fill: with a part of a GPU it has that part."""
    return use.gpu_share or min(1.0, deployment.gpus)


def hosts_of(deployment: Deployment, supply: Supply) -> tuple[GpuNode, ...]:
    """Return the nodes that may take a replica's GPUs: of its kind, and where there are some, wide enough."""
    nodes = supply.of_kind(deployment.accelerator_type)
    return tuple(node for node in nodes if node.gpus >= deployment.gpus_together) or nodes


def memory_of(deployment: Deployment, supply: Supply) -> int | None:
    """Return the memory of the largest GPU that a replica may get, without any that published for its kind; None: unknown."""
    nodes = hosts_of(deployment, supply)
    if not nodes:
        return published_bytes((deployment.accelerator_type,)) if deployment.accelerator_type else None
    sizes = [node.memory_bytes for node in nodes]
    known = [size for size in sizes if size is not None]
    return max(known) if len(known) == len(sizes) else None


def _counts(plan: Plan, supply: Supply) -> Iterator[str]:
    """Yield where more GPUs are needed than there are: of a kind, and in all."""
    for kind in dict.fromkeys(item.accelerator_type for item in plan.deployments if item.accelerator_type):
        asking = [item for item in plan.deployments if item.accelerator_type == kind]
        has = sum(node.gpus for node in supply.of_kind(kind))
        needed = sum(item.min_gpus for item in asking)
        if not has:
            kinds = sorted({name for node in supply.nodes for name in node.kinds})
            yield (
                f"{_field(asking, 'engine_kwargs.accelerator_type')} is {kind!r}; no node of {supply.source} has it; "
                f"it has {', '.join(kinds) or 'no GPU of a known kind'}; name one that it has, or add such nodes"
            )
        elif needed > has:
            yield _too_many(asking, needed, has, f"{kind} on {supply.source} ({_nodes(supply.of_kind(kind))})")
    using = [item for item in plan.deployments if item.gpus]
    if plan.min_gpus > supply.gpus:
        yield _too_many(using, plan.min_gpus, supply.gpus, f"on {supply.source} ({_nodes(supply.nodes)})")


def _shapes(plan: Plan, supply: Supply) -> Iterator[str]:
    """Yield where GPUs that belong together are more than any node has."""
    for item in plan.deployments:
        nodes = supply.of_kind(item.accelerator_type)
        widest = max((node.gpus for node in nodes), default=0.0)
        if nodes and item.gpus_together > widest:
            name = "engine_kwargs.tensor_parallel_size" if item.tensor_parallel > 1 else "gpus"
            kind = f" of kind {item.accelerator_type}" if item.accelerator_type else ""
            yield (
                f"llms.{item.llm}.{name}: a replica's {item.gpus_together:g} GPUs belong on one node, and the "
                f"largest of {supply.source} has {widest:g}{kind} ({_nodes(nodes)}); lower "
                "it (pipeline_parallel_size may span nodes), or add a wider node"
            )


def _pieces(plan: Plan, supply: Supply) -> Iterator[str]:
    """Yield where there are GPUs enough, of a kind or in all, but not in pieces as large as replicas on one node need."""
    for kind in dict.fromkeys((None, *(item.accelerator_type for item in plan.deployments))):
        nodes = supply.of_kind(kind)
        asking = [item for item in plan.deployments if kind in (None, item.accelerator_type)]
        if sum(item.min_gpus for item in asking) > sum(node.gpus for node in nodes):
            continue  # `_counts` says so
        together = [item for item in asking if item.is_on_one_node and item.gpus]
        for width in sorted({item.gpus for item in together}):
            wide = [item for item in together if item.gpus >= width]
            counts = [1 if width > 1 else _pieces_of(item.gpus, width) for item in wide]
            pieces = sum(item.min_replicas * count for item, count in zip(wide, counts, strict=True))
            places = _places(nodes, width)
            if places and pieces > places:
                where = f"and {supply.source} has room for {places}{f' of kind {kind}' if kind else ''} ({_nodes(nodes)})"
                yield f"{_field(wide, 'gpus')}: {_asked(pieces, width, where)}"
                break


def _places(nodes: Iterable[GpuNode], width: float) -> int:
    """Return how many times so many GPUs together the nodes have; a part of a GPU is of one GPU."""
    return sum(_pieces_of(node.gpus, width) for node in nodes)


def _pieces_of(gpus: float, width: float) -> int:
    """Return how many pieces of a width are in so many GPUs; one below 1 is a part of one GPU."""
    if width > 1:
        return int(gpus // width)
    return int(gpus) * int(1 / width + 1e-6) + int(gpus % 1 / width + 1e-6)  # Ray counts in ten-thousandths


def _asked(pieces: int, width: float, where: str) -> str:
    if width > 1:
        return (
            f"{pieces} replicas at min_replicas have {width:g} GPUs or more, each on one node, {where}; lower min_replicas or "
            f"gpus, or add a node with {width:g} GPUs"
        )
    return f"{pieces} times {width:g} of one GPU are asked for at min_replicas, {where}; lower min_replicas or gpus, or add a GPU"


def _memory(config: Config, item: Deployment, memory: Memory, supply: Supply) -> Iterator[str]:
    """Yield where weights, or one sequence beside them, are more than the largest GPU takes."""
    if memory.budget_bytes is None or memory.weights_bytes is None or memory.room_bytes is None:
        return
    assert memory.memory_bytes is not None
    options = config.llms[item.llm].options
    assert options.memory_use is not None  # else there was no budget
    share = _share(item, options.memory_use)
    best = max(hosts_of(item, supply), key=lambda node: node.memory_bytes or 0, default=None)
    whose = f" of {' '.join(best.kinds) or 'the GPUs'} on {best.name}" if best else f" of a {item.accelerator_type} as published"
    where = f"{gib(memory.budget_bytes)} ({share:g} of {gib(memory.memory_bytes)}{whose})"
    adapters = f" and {gib(memory.adapters_bytes)} of adapters" if memory.adapters_bytes else ""
    if memory.room_bytes <= 0:
        ways = "raise tensor_parallel_size and gpus, name a larger kind of GPU" if options.gpu_split else "name a larger GPU"
        yield (
            f"llms.{item.llm}.model: {item.model!r} has {gib(memory.weights_bytes)} of weights{adapters} on "
            f"each of {max(1.0, item.gpus):g} GPU(s), more than {where}; {ways}, or a smaller or quantised model"
        )
    elif memory.is_too_long:
        assert memory.least_token_bytes is not None  # it is what makes a sequence too long
        most = memory.room_bytes // memory.least_token_bytes
        windows = " in the layers without a window" if memory.least_token_bytes != memory.token_bytes else ""
        yield (
            f"llms.{item.llm}.engine_kwargs.max_model_len: {memory.max_model_len} tokens do not fit, at most {most} do: "
            f"{gib(memory.weights_bytes)} of weights{adapters} leave {gib(memory.room_bytes)} of {where} for keys and values, "
            f"{memory.least_token_bytes} bytes a token{windows}; lower it, or give the replica more or larger GPUs"
        )


def _spread(plan: Plan, supply: Supply) -> Iterator[str]:
    """Yield notes on GPUs that are enough, but not at max_replicas, or in pieces as large as the stages of pipelines want."""
    if plan.min_gpus <= supply.gpus < plan.max_gpus:
        yield (
            f"at max_replicas the pool asks for {plan.max_gpus:g} GPUs, {supply.source} has {supply.gpus:g}: replicas beyond "
            "that wait for a GPU"
        )
    piped = [item for item in plan.deployments if not item.is_on_one_node]
    widths = sorted({item.gpus_together for item in piped if item.gpus_together > 1})
    for width in widths:
        wide = [item for item in plan.deployments if item.gpus_together >= width]
        pieces = sum(item.min_replicas * item.pipeline_parallel for item in wide)
        places = _places(supply.nodes, width)
        if plan.min_gpus <= supply.gpus and places and pieces > places:
            yield (
                f"{pieces} times {width:g} GPUs on one node are wanted, {supply.source} has room for {places} "
                f"({_nodes(supply.nodes)}): Ray would spread a stage of a pipeline over nodes, which is slow"
            )


def _remarks(item: Deployment, memory: Memory, supply: Supply) -> Iterator[str]:
    """Yield what to know of one deployment's memory."""
    llm = f"llms.{item.llm}"
    if memory.reason and memory.device != "none":
        unchecked = "memory is not checked" if item.gpus else "memory is not estimated"
        yield f"{llm}: {unchecked}, the size of {item.model} is unknown: {memory.reason}"
    if not item.gpus:
        return
    if memory.num_sequences is not None and memory.num_sequences < 1 and not memory.is_too_long:
        yield (
            f"{llm}: one sequence of {memory.max_model_len} tokens fits only because some layers look back over a window; vLLM "
            "says at its start whether it does"
        )
    nodes = hosts_of(item, supply)
    if nodes and memory.memory_bytes is None and not memory.reason:
        lacking = ", ".join(dict.fromkeys(node.name for node in nodes if node.memory_bytes is None))
        yield f"{llm}: memory is not checked, only counts are: the GPUs of {lacking} are of a kind whose memory is not known here"
    for node in nodes:
        sizes = [len(PUBLISHED_MIB[kind]) for kind in node.kinds if kind in PUBLISHED_MIB]
        if node.asked_bytes is None and min(sizes, default=1) > 1 and node.memory_bytes is not None:
            kinds = " ".join(node.kinds)
            yield f"{node.name}: {kinds} comes in several sizes and is counted with {gib(node.memory_bytes)}, the largest"
    smallest = min((node.memory_bytes for node in nodes if node.memory_bytes is not None), default=None)
    if smallest and memory.memory_bytes and memory.weights_bytes and smallest < memory.memory_bytes and memory.budget_bytes:
        budget = smallest * (memory.budget_bytes / memory.memory_bytes)
        need = memory.weights_bytes + memory.adapters_bytes + memory.need_bytes
        if need > budget >= 0:
            yield (
                f"{llm}: needs {gib(need)} on each GPU with one sequence; GPUs of {gib(memory.memory_bytes)} take it, those of "
                f"{gib(smallest)} do not: set accelerator_type, or Ray may choose either"
            )


def _too_many(asking: list[Deployment], needed: float, has: float, where: str) -> str:
    shown = _listed([f"{item.name} {item.min_replicas} x {item.gpus:g}" for item in asking])
    return (
        f"{_field(asking, 'gpus')}: {needed:g} in all at min_replicas ({shown}), and there are {has:g} {where}; "
        "lower min_replicas or gpus, set placement to shared, add GPUs, or name a cluster that has them with --address"
    )


def _field(items: Iterable[Deployment], name: str) -> str:
    llms = list(dict.fromkeys(item.llm for item in items))
    return f"llms.{llms[0]}.{name}" + (f" and of {', '.join(llms[1:])}" if len(llms) > 1 else "")


def _nodes(nodes: Iterable[GpuNode]) -> str:
    return _listed([f"{node.name} {node.gpus:g}" for node in nodes]) or "no GPU"


def _listed(rows: Sequence[str]) -> str:
    return ", ".join(rows[:12]) + (f" and {len(rows) - 12} more" if len(rows) > 12 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """All that is known of a pool before it starts."""

    plan: Plan
    supply: Supply
    memories: Mapping[str, Memory]
    """By deployment, for the largest GPUs that it may get."""
    faults: tuple[str, ...]
    """Why it cannot start, each with field, value, what is expected and what to do; empty: it fits."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` writes; bytes are per GPU, and of the whole replica where it has none."""
        nodes = [asdict(node) | {"memory_bytes": node.memory_bytes} for node in self.supply.nodes]
        memories = {
            name: asdict(one) | {"room_tokens": one.room_tokens, "num_sequences": one.num_sequences}
            for name, one in self.memories.items()
        }
        return {
            "pool": self.plan.pool,
            "ok": not self.faults,
            "gpus": {
                "source": self.supply.source,
                "available": self.supply.gpus,
                "needed_min": self.plan.min_gpus,
                "needed_max": self.plan.max_gpus,
                "nodes": nodes,
            },
            "deployments": [
                asdict(item) | {"min_gpus": item.min_gpus, "max_gpus": item.max_gpus, "memory": memories[item.name]}
                for item in self.plan.deployments
            ],
            "parts": [asdict(part) for part in self.plan.parts],
            "faults": list(self.faults),
            "notes": list(self.notes),
        }


def dry_run(config: Config, address: str | None = None) -> DryRun:
    """Return what starting a pool on the Ray at `address`, or here, would come to; reads no weights. Raises ConfigError."""
    supply = joined_supply(address) if address else local_supply()
    used = [config.llms[agent.llm] for agent in callable_agents(config)]
    loaded = [llm.model for llm in used if llm.options.memory_use]
    return assemble(config, supply, measure_models(loaded), is_here=not address)


def assemble(config: Config, supply: Supply, sizes: Mapping[str, ModelSize | str], *, is_here: bool = False) -> DryRun:
    """Return the same for GPUs and model sizes, by the `model` field, that are known; `is_here`: agents run on this machine."""
    plan = plan_of(config)
    adapters = _adapter_bytes(config)
    memories = {
        item.name: estimate(
            item,
            config.llms[item.llm],
            sizes.get(item.model, "not measured"),
            memory_bytes=memory_of(item, supply) if item.gpus else None,
            adapter_bytes=adapters,
        )
        for item in plan.deployments
    }
    faults = [*_counts(plan, supply), *_shapes(plan, supply), *_pieces(plan, supply)]
    notes = [*_spread(plan, supply)]
    for item in plan.deployments:
        faults += _memory(config, item, memories[item.name], supply)
        notes += _remarks(item, memories[item.name], supply)
    faults, notes = list(dict.fromkeys(faults)), list(dict.fromkeys(notes))
    for check in (check_files, check_corpus, check_vllm) if is_here else (check_files,):
        try:
            check(config)
        except ConfigError as error:
            faults.append(str(error))
    notes += config.unused_scaling()
    return DryRun(plan=plan, supply=supply, memories=memories, faults=tuple(faults), notes=tuple(notes))


def _adapter_bytes(config: Config) -> dict[str, int]:
    """Return the sizes of the adapters' files by name; those that are not there are `check_files`' to report."""
    found: dict[str, int] = {}
    for name in {agent.adapter for agent in callable_agents(config) if agent.adapter}:
        with suppress(ConfigError):
            found[name] = (resolve_adapter(name) / "adapter_model.safetensors").stat().st_size
    return found
