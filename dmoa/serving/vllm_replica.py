"""The `vllm` engine on Ray Serve: a replica is an `LLMServer` of ray.serve.llm that answers for agents.

Placement groups, accelerators, parallelism, model sources, metrics and health are Ray's; ours are the prompts, the entropies
and the agents. The home of ray.serve.llm, which imports only where vLLM is installed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.llm import LLMConfig, LLMServer

from dmoa.config import AgentConfig, Config, LlmConfig
from dmoa.engine_options import VllmOptions
from dmoa.engines.vllm.start import (
    check_adapters,
    check_parser,
    cpu_environment,
    engine_args,
    engine_over,
    keep_usage_private,
    local_source,
    remote_source,
    vllm_options,
)
from dmoa.serving.agent_replica import AgentCalls, hosted_agents


class VllmReplica(AgentCalls, LLMServer):
    """A replica with one vLLM for some or all agents of one LLM."""

    async def __init__(self, config_json: str, llm: str, agent: str | None = None) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start vLLM. `agent` names the one agent of a dedicated deployment, None hosts all of the LLM's."""
        keep_usage_private()
        config = Config.model_validate_json(config_json)
        hosted = hosted_agents(config, llm, agent)
        part = config.llms[llm]
        given = vllm_options(part, llm)
        source = await asyncio.to_thread(local_source, part.model)
        await asyncio.to_thread(check_adapters, part, given, _adapters(hosted))
        await asyncio.to_thread(check_parser, given, llm)
        await super().__init__(llm_config(config, llm, hosted, source=source))
        engine: Any = self.engine
        built = await asyncio.to_thread(engine_over, engine._engine_client, part, given, _adapters(hosted))
        self._host(config, llm, hosted, built)


def vllm_deployment(config: Config, llm: str, hosted: Sequence[AgentConfig], options: dict[str, Any]) -> Any:
    """Return the deployment of a vLLM for some agents; `options` are Serve's, without what ray.serve.llm works out itself."""
    found = llm_config(config, llm, hosted, options=options)
    return serve.deployment(VllmReplica).options(**VllmReplica.get_deployment_options(found))


def llm_config(
    config: Config, llm: str, hosted: Sequence[AgentConfig], *, source: str | None = None, options: dict[str, Any] | None = None
) -> LLMConfig:
    """Return ray.serve.llm's configuration of an LLM, its weights from `source` or by name. Raises ConfigError (other engine)."""
    part = config.llms[llm]
    given = vllm_options(part, llm)
    on_cpu = part.gpus == 0
    remote: Any = remote_source(part.model)
    if part.model.startswith("s3:"):
        remote = {"bucket_uri": remote}
    loading: dict[str, Any] = {"model_id": llm, "model_source": source or remote}
    deployment = {name: value for name, value in (options or {}).items() if name != "ray_actor_options"}
    return LLMConfig(
        model_loading_config=loading,
        engine_kwargs=engine_args(part, given, _adapters(hosted)),
        accelerator_type=given.accelerator_type,
        placement_group_config=_placement_group(part, given),
        runtime_env={"env_vars": cpu_environment(given)} if on_cpu else None,
        deployment_config={**deployment, "ray_actor_options": {"num_cpus": 0}},
    )


def _placement_group(part: LlmConfig, given: VllmOptions) -> dict[str, Any] | None:
    """Return how a replica's devices are placed, None for ray.serve.llm's own way: one bundle a GPU, packed where it can be.

    A tensor-parallel group computes every layer together: its GPUs are on one node, or the replica waits for them. Stages of a
    pipeline may be on several nodes, and vLLM takes no bundle of more than one GPU: there Ray packs and promises nothing.
    """
    if part.gpus == 0:
        return {"bundles": [{"CPU": 1}] * given.num_workers}
    if given.tensor_parallel_size > 1 and given.pipeline_parallel_size == 1:
        return {"bundle_per_worker": {"GPU": 1}, "strategy": "STRICT_PACK"}
    return None


def _adapters(hosted: Sequence[AgentConfig]) -> list[str]:
    return sorted({item.adapter for item in hosted if item.adapter})
