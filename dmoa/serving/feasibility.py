"""Whether a pool fits a cluster: every reason why it cannot, with the numbers, and what deserves a second look. Pure.

A fault is only what cannot work on any placement of these nodes; what may work out is a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from dmoa.config import Config, VllmOptions
from dmoa.serving.gpu_memory import Memory
from dmoa.serving.gpu_supply import GpuNode, Supply, gib, is_ambiguous, published_bytes
from dmoa.serving.placement import Deployment, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What is wrong with a plan on a cluster, and what to know of it."""

    faults: tuple[str, ...]
    """Each names field, value seen, what is allowed and what to do; empty: it fits."""
    notes: tuple[str, ...]


def judge(config: Config, plan: Plan, supply: Supply, memories: Mapping[str, Memory]) -> Judgement:
    """Return every fault of a plan and the notes on it; `memories` are by deployment, for the largest GPUs that it may get."""
    faults = [*_counts(plan, supply), *_shapes(plan, supply), *_pieces(plan, supply)]
    for deployment in plan.deployments:
        faults += _memory(config, deployment, memories[deployment.name], supply)
    notes = [*_growth(plan, supply), *_spread(plan, supply)]
    for deployment in plan.deployments:
        notes += _remarks(deployment, memories[deployment.name], supply)
    return Judgement(faults=tuple(dict.fromkeys(faults)), notes=tuple(dict.fromkeys(notes)))


def hosts_of(deployment: Deployment, supply: Supply) -> tuple[GpuNode, ...]:
    """Return the nodes that may take a replica's GPUs: of its kind, and where there are some, wide enough."""
    nodes = supply.of_kind(deployment.accelerator_type)
    return tuple(node for node in nodes if node.gpus >= deployment.gpus_together) or nodes


def memory_of(deployment: Deployment, supply: Supply) -> int | None:
    """Return the memory of the largest GPU that a replica may get; None: unknown of one of them.

    Where there is none, what is published for the kind that it asks for.
    """
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
                f"{_field(asking, 'engine_kwargs.accelerator_type')}: value seen: {kind!r}; no node of {supply.source} has it; "
                f"allowed are {', '.join(kinds) or 'none: it has no GPU of a known kind'}; name one of these, or add such nodes"
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
            name = "engine_kwargs.tensor_parallel_size" if item.engine == "vllm" else "gpus"
            yield (
                f"llms.{item.llm}.{name}: value seen: {item.gpus_together:g}; a replica's GPUs belong on one node, and the "
                f"largest of {supply.source} has {widest:g}{_of(item)} ({_nodes(nodes)}); allowed are at most {widest:g}; lower "
                "it (pipeline_parallel_size may span nodes), or add a wider node"
            )


def _pieces(plan: Plan, supply: Supply) -> Iterator[str]:
    """Yield where there are GPUs enough, of a kind or in all, but not in pieces as large as replicas on one node need."""
    for kind in dict.fromkeys((None, *(item.accelerator_type for item in plan.deployments))):
        nodes = supply.of_kind(kind)
        asking = [item for item in plan.deployments if kind in (None, item.accelerator_type)]
        if sum(item.min_gpus for item in asking) > sum(node.gpus for node in nodes):
            continue  # `_counts` says so
        for width in sorted({item.gpus_together for item in asking if item.is_on_one_node and item.gpus_together > 1}):
            wide = [item for item in asking if item.is_on_one_node and item.gpus_together >= width]
            pieces, places = sum(item.min_replicas for item in wide), _places(nodes, width)
            if places and pieces > places:
                yield (
                    f"{_field(wide, 'gpus')}: value seen: {pieces} replicas at min_replicas with {width:g} GPUs or more, each on "
                    f"one node; allowed are {places}: {supply.source} has room for so many{f' of kind {kind}' if kind else ''} "
                    f"({_nodes(nodes)}); lower min_replicas or gpus, or add a node with {width:g} GPUs"
                )
                break


def _places(nodes: Iterable[GpuNode], width: float) -> int:
    """Return how many times so many GPUs together the nodes have."""
    return sum(int(node.gpus // width) for node in nodes)


def _memory(config: Config, item: Deployment, memory: Memory, supply: Supply) -> Iterator[str]:
    """Yield where weights, or one sequence beside them, are more than the largest GPU takes."""
    if memory.budget_bytes is None or memory.weights_bytes is None or memory.room_bytes is None:
        return
    assert memory.memory_bytes is not None
    options = config.llms[item.llm].options
    part = f"{options.gpu_memory_utilization:g}" if isinstance(options, VllmOptions) else f"{min(1.0, item.gpus):g}"
    where = f"{gib(memory.budget_bytes)} ({part} of {gib(memory.memory_bytes)}{_largest(item, supply)})"
    adapters = f" and {gib(memory.adapters_bytes)} of adapters" if memory.adapters_bytes else ""
    if memory.room_bytes <= 0:
        ways = "raise tensor_parallel_size and gpus, name a larger kind of GPU" if item.engine == "vllm" else "name a larger GPU"
        yield (
            f"llms.{item.llm}.model: value seen: {item.model!r}, which has {gib(memory.weights_bytes)} of weights{adapters} on "
            f"each of {max(1.0, item.gpus):g} GPU(s); allowed are {where}; {ways}, or a smaller or quantised model"
        )
    elif memory.is_too_long:
        assert memory.least_token_bytes is not None  # it is what makes a sequence too long
        most = memory.room_bytes // memory.least_token_bytes
        windows = " in the layers without a window" if memory.least_token_bytes != memory.token_bytes else ""
        yield (
            f"llms.{item.llm}.engine_kwargs.max_model_len: value seen: {memory.max_model_len}; allowed are at most {most}: "
            f"{gib(memory.weights_bytes)} of weights{adapters} leave {gib(memory.room_bytes)} of {where} for keys and values, "
            f"{memory.least_token_bytes} bytes a token{windows}; lower it, or give the replica more or larger GPUs"
        )


def _growth(plan: Plan, supply: Supply) -> Iterator[str]:
    if plan.min_gpus <= supply.gpus < plan.max_gpus:
        yield (
            f"at max_replicas the pool asks for {plan.max_gpus:g} GPUs, {supply.source} has {supply.gpus:g}: replicas beyond "
            "that wait for a GPU"
        )


def _spread(plan: Plan, supply: Supply) -> Iterator[str]:
    """Yield a note where the GPUs are enough, but not in pieces as large as the stages of pipelines want."""
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
        if is_ambiguous(node) and node.memory_bytes is not None:
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
    rows = [f"{item.name} {item.min_replicas} x {item.gpus:g}" for item in asking]
    shown = ", ".join(rows[:12]) + (f" and {len(rows) - 12} more" if len(rows) > 12 else "")
    return (
        f"{_field(asking, 'gpus')}: value seen: {needed:g} in all at min_replicas ({shown}); allowed are the {has:g} {where}; "
        "lower min_replicas or gpus, set placement to shared, add GPUs, or name a cluster that has them with --address"
    )


def _field(items: Iterable[Deployment], name: str) -> str:
    llms = list(dict.fromkeys(item.llm for item in items))
    return f"llms.{llms[0]}.{name}" + (f" and of {', '.join(llms[1:])}" if len(llms) > 1 else "")


def _nodes(nodes: Iterable[GpuNode]) -> str:
    rows = [f"{node.name} {node.gpus:g}" for node in nodes]
    return ", ".join(rows[:12]) + (f" and {len(rows) - 12} more" if len(rows) > 12 else "") or "no GPU"


def _of(item: Deployment) -> str:
    return f" of kind {item.accelerator_type}" if item.accelerator_type else ""


def _largest(item: Deployment, supply: Supply) -> str:
    """Return whose memory was counted, in words."""
    best = max(hosts_of(item, supply), key=lambda node: node.memory_bytes or 0, default=None)
    if best is None:
        return f" of a {item.accelerator_type} as published"
    return f" of {' '.join(best.kinds) or 'the GPUs'} on {best.name}"
