"""An agent's replicas in Ray Serve's terms: how many, when more or fewer, how many calls may wait, and who gets which call.

Plain values, without Ray: `agents` hands them to Serve.
"""

from __future__ import annotations

from typing import Any

from dmoa.config import AutoscalingConfig

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


def scaling_options(scaling: AutoscalingConfig, *, max_num_seqs: int) -> dict[str, Any]:
    """Return a deployment's options for replicas and queues; `max_num_seqs` is the batch of a replica's engine."""
    queued = scaling.max_queued_calls
    options: dict[str, Any] = {
        "max_ongoing_requests": max_num_seqs * _QUEUE_FACTOR if queued is None else max_num_seqs + queued,
        "max_queued_requests": max_num_seqs * _QUEUE_FACTOR * 4 if queued is None else queued,
    }
    if has_affinity(scaling):
        options["request_router_config"] = {"request_router_class": _AFFINE_ROUTER}
    if scaling.min_replicas == scaling.max_replicas:
        return options | {"num_replicas": scaling.min_replicas}
    return options | {"autoscaling_config": _autoscaling(scaling), "graceful_shutdown_timeout_s": _DRAIN_S}


def _autoscaling(scaling: AutoscalingConfig) -> dict[str, Any]:
    # Serve judges the mean of the look back, and reports every 10 s unless told otherwise: both would outlast a short delay.
    # Ray 2.60 calls metrics_interval_s deprecated, but does not read the environment variables that it names instead.
    quickest_s = min(scaling.upscale_delay_s, scaling.downscale_delay_s, scaling.downscale_to_zero_delay_s)
    look_back_s = min(_LONGEST_LOOK_BACK_S, max(_SHORTEST_LOOK_BACK_S, quickest_s))
    return {
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.max_replicas,
        "target_ongoing_requests": scaling.target_ongoing_requests,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
        "downscale_to_zero_delay_s": scaling.downscale_to_zero_delay_s,
        "look_back_period_s": look_back_s,
        "metrics_interval_s": look_back_s / _REPORTS,
    }
