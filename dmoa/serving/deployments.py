"""Agents as Ray Serve deployments: how many replicas, when more or fewer, how many calls may wait, and who gets which call.

`bind_hosts` binds the replicas of `agent_replica` and `vllm_replica` for `app`.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

from ray import serve

from dmoa.config import Config, callable_agents
from dmoa.engine_options import AutoscalingConfig
from dmoa.serving.agent_replica import ENGINE_ENV, AgentReplica, hosted_agents
from dmoa.serving.placement import deployment_name, is_in_ingress
from dmoa.serving.rollover import CALL_DRAIN_S

_QUEUE_FACTOR = 4
"""Batches of an engine that a replica holds where no limit is set: one runs, the others wait where the engine finds them."""
_LONGEST_LOOK_BACK_S = 30.0
_SHORTEST_LOOK_BACK_S = 2.0
_REPORTS = 4
"""Reports of the load that each look back is made of."""
_DRAIN_S = 120.0
"""How long a replica that is taken away may finish its calls; without any it ends at once."""
_AFFINE_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


def has_affinity(scaling: AutoscalingConfig) -> bool:
    """Tell whether calls of one conversation are to reach the same replica: where there may be several."""
    return scaling.max_replicas > 1


def scaling_options(scaling: AutoscalingConfig, *, max_num_seqs: int, num_agents: int = 1) -> dict[str, Any]:
    """Return a deployment's options for replicas and queues: by default two queries may ask all of its agents at once."""
    queued = scaling.max_queued_calls
    options: dict[str, Any] = {
        "max_ongoing_requests": max_num_seqs * _QUEUE_FACTOR if queued is None else max_num_seqs + queued,
        "max_queued_requests": max(max_num_seqs * _QUEUE_FACTOR * 4, 2 * num_agents) if queued is None else queued,
    }
    if has_affinity(scaling):
        options["request_router_config"] = {"request_router_class": _AFFINE_ROUTER}
    if scaling.min_replicas == scaling.max_replicas:
        return options | {"num_replicas": scaling.min_replicas}
    return options | {"autoscaling_config": _autoscaling(scaling), "graceful_shutdown_timeout_s": _DRAIN_S}


def _autoscaling(scaling: AutoscalingConfig) -> dict[str, Any]:
    # Serve judges the mean of the look back, and reports every 10 s unless told otherwise: both would outlast a short delay.
    # Ray 2.60 calls metrics_interval_s deprecated, but does not read the environment variables that it names instead.
    delays = ("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s")
    quickest_s = min(getattr(scaling, name) for name in delays)
    look_back_s = min(_LONGEST_LOOK_BACK_S, max(_SHORTEST_LOOK_BACK_S, quickest_s))
    same = {"min_replicas", "max_replicas", "target_ongoing_requests", *delays}
    return scaling.model_dump(include=same) | {"look_back_period_s": look_back_s, "metrics_interval_s": look_back_s / _REPORTS}


def bind_hosts(config: Config) -> dict[str, Any]:
    """Return the bound Serve deployments that run the pool's agents, by deployment name.

    Those with most GPUs come first, because Serve places them in this order, spread over the nodes: where narrow ones go
    first, no node may be left with room for a wide one.
    """
    text = config.model_dump_json()
    bound: dict[str, Any] = {}
    for agent in sorted(callable_agents(config), key=lambda agent: -config.llms[agent.llm].gpus):
        llm = config.llms[agent.llm]
        name = deployment_name(config, agent)
        if name in bound or is_in_ingress(config, agent):
            continue
        entry, scaling = llm.engine_entry, config.scaling_of(agent)
        only = None if llm.placement == "shared" else agent.name
        hosted = hosted_agents(config, agent.llm, only)
        options = _options(name, gpus=llm.gpus, is_light=entry.is_light)
        options |= scaling_options(scaling, max_num_seqs=llm.max_num_seqs, num_agents=len(hosted))
        if entry.deployment is not None:
            make = resolve_name(entry.deployment)
            deployment = make(config, agent.llm, hosted, options)
        else:
            deployment = serve.deployment(AgentReplica).options(**options)
        bound[name] = deployment.bind(text, agent.llm, only)
    return bound


def _options(name: str, *, gpus: float, is_light: bool) -> dict[str, Any]:
    actor: dict[str, Any] = {"num_cpus": 0} if is_light else {"num_cpus": 1, "runtime_env": {"env_vars": ENGINE_ENV}}
    return {
        "name": name,
        "ray_actor_options": actor | {"num_gpus": gpus},
        "health_check_period_s": 0.5 if is_light else 2.0,  # a light one starts again in a second, a model in many
        "graceful_shutdown_timeout_s": CALL_DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
