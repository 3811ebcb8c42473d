"""`dmoa serve --dry-run` without its screen: plan, model sizes, GPUs and the judgement, as one record. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dmoa.agents.pool import check_corpus, check_files
from dmoa.config import Config, TransformersOptions, VllmOptions, callable_agents
from dmoa.engines.models import resolve_adapter
from dmoa.engines.size import ModelSize, measure_models
from dmoa.errors import ConfigError
from dmoa.serving.feasibility import judge, memory_of
from dmoa.serving.gpu_memory import Memory, estimate
from dmoa.serving.gpu_supply import Supply, joined_supply, local_supply
from dmoa.serving.placement import Plan, plan_of


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """All that is known of a pool before it starts."""

    plan: Plan
    supply: Supply
    memories: Mapping[str, Memory]
    """By deployment, for the largest GPUs that it may get."""
    faults: tuple[str, ...]
    """Why it cannot start; empty: it fits."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` writes; bytes are per GPU, and of the whole replica where it has none."""
        nodes = [asdict(node) | {"memory_bytes": node.memory_bytes} for node in self.supply.nodes]
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
                asdict(item)
                | {"min_gpus": item.min_gpus, "max_gpus": item.max_gpus, "memory": _memory_json(self.memories[item.name])}
                for item in self.plan.deployments
            ],
            "parts": [asdict(part) for part in self.plan.parts],
            "faults": list(self.faults),
            "notes": list(self.notes),
        }


def dry_run(config: Config, address: str | None = None) -> DryRun:
    """Return what starting a pool would come to, on the Ray at `address` or else on this machine.

    Reads configuration files of models, never weights. Raises ConfigError where no Ray answers at the address.
    """
    supply = joined_supply(address) if address else local_supply()
    used = [config.llms[agent.llm] for agent in callable_agents(config)]
    loaded = [llm.model for llm in used if isinstance(llm.options, VllmOptions | TransformersOptions)]
    return assemble(config, supply, measure_models(loaded), is_here=not address)


def assemble(config: Config, supply: Supply, sizes: Mapping[str, ModelSize | str], *, is_here: bool = False) -> DryRun:
    """Return the same for GPUs and model sizes that are known already; sizes are by the `model` field.

    `is_here`: the agents are to run on this machine.
    """
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
    found = judge(config, plan, supply, memories)
    faults = list(found.faults)
    for check in (check_files, check_corpus) if is_here else (check_files,):
        try:
            check(config)
        except ConfigError as error:
            faults.append(str(error))
    return DryRun(
        plan=plan, supply=supply, memories=memories, faults=tuple(faults), notes=(*found.notes, *config.unused_scaling())
    )


def _adapter_bytes(config: Config) -> dict[str, int]:
    """Return the sizes of the adapters' files by name; those that are not there are `check_files`' to report."""
    found: dict[str, int] = {}
    for agent in callable_agents(config):
        if agent.adapter and agent.adapter not in found:
            try:
                found[agent.adapter] = (resolve_adapter(agent.adapter) / "adapter_model.safetensors").stat().st_size
            except ConfigError:
                continue
    return found


def _memory_json(memory: Memory) -> dict[str, Any]:
    tree = asdict(memory)
    del tree["deployment"]
    return tree | {"room_tokens": memory.room_tokens, "num_sequences": memory.num_sequences}
