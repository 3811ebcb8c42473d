"""Tells which agents have a running replica, which are cold, which are gone, from Serve's status.

The router acts on it: it names the cold in its decisions and leaves them in peace, and it masks and probes the gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from dmoa.config import Config, callable_agents
from dmoa.serving.agent_client import REPLICA_LOST_ERRORS
from dmoa.serving.placement import deployment_name, is_in_ingress
from dmoa.types import RouterStatus

UP = "up"
COLD = "cold"
_BROKEN = ("UNHEALTHY", "DEPLOY_FAILED")
_SERVING = ("RUNNING", "PENDING_MIGRATION", "RECOVERING")
"""States of replicas that Serve sends calls to. The second is on a node that is being drained; the third ran when Serve's
controller was lost, and a new one has not asked it yet."""
_FINISHING = ("STOPPING", "UPDATING")
"""States of replicas that get no calls now, and may still answer those that they have."""

_NAMESPACE = "serve"
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
"""Ray names no actor that is dead, and goes on naming one that it restarts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """The agents of an app that have no running replica."""

    cold: frozenset[str]
    """Agents scaled to zero, or on their way up from there: nothing is wrong with them."""
    gone: frozenset[str]
    """Agents that should have a replica, or whose replicas fail to start."""
    deserted: frozenset[str]
    """Those of the gone that no replica can still be answering calls to."""
    is_settled: bool
    """Whether all is as it will stay until a replica comes or goes."""


def sleepers(config: Config) -> frozenset[str]:
    """Return the agents (and the summarizer) that may be without a replica while nobody asks them."""
    return frozenset(agent.name for agent in callable_agents(config) if config.scaling_of(agent).min_replicas == 0)


def presence(config: Config, deployments: Mapping[str, Any]) -> Presence:
    """Return who has no running replica; `deployments` are those of the app in `serve.status()`, unknown ones count as up."""
    cold, gone, deserted, is_settled = set(), set(), set(), True
    may_sleep = sleepers(config)
    for agent in callable_agents(config):
        found = deployments.get(deployment_name(config, agent))
        if found is None or is_in_ingress(config, agent) or _has(found.replica_states, _SERVING):
            continue
        if agent.name in may_sleep and found.status not in _BROKEN:
            cold.add(agent.name)
            is_settled = is_settled and not any(found.replica_states.values())
        else:
            gone.add(agent.name)
            is_settled = False
            if not _has(found.replica_states, _FINISHING):
                deserted.add(agent.name)
    return Presence(cold=frozenset(cold), gone=frozenset(gone), deserted=frozenset(deserted), is_settled=is_settled)


def _has(replica_states: Mapping[str, int], states: tuple[str, ...]) -> bool:
    return any(replica_states.get(state) for state in states)


def state_of(agent: str, status: RouterStatus | None) -> str:
    """Return how /readyz tells of an agent that may sleep, by the router's status; None while the router is away."""
    if status is None:
        return "unknown: the router is away"
    if agent in status.masked:
        return "it does not answer; the router tries it again"
    return COLD if agent in status.cold else UP


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSnapshot:
    """Serve at one moment."""

    actors: frozenset[str]
    """Names of Serve's actors."""
    deployments: Mapping[str, Any] | None
    """The app's, as `serve.status` tells them; None where Serve runs without the app, or no longer."""


def read_status(app: str, seen: frozenset[str] | None) -> ServeSnapshot | None:
    """Return what is seen of an app; None where no actor came or went since `seen`, or where nobody can be asked now. Blocks.

    Only changes are looked at: `serve.status` costs a tenth of a second of CPU per dozen deployments (Ray 2.60).
    """
    try:
        named = ray.util.list_named_actors(all_namespaces=True)
        actors = frozenset(actor["name"] for actor in named if actor["namespace"] == _NAMESPACE)
        if actors == seen:
            return None
        found = serve.status().applications.get(app) if _CONTROLLER in actors else None
    except REPLICA_LOST_ERRORS:
        return None
    return ServeSnapshot(actors=actors, deployments=None if found is None else found.deployments)
