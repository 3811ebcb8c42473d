"""What the router sees of its app on Serve, and whether it can see at all.

While a head restarts, Ray's control store and Serve's controller are away for a minute, and agents on other nodes go on: that
nobody tells of them says nothing about them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from dmoa.serving.losses import CALL_ERRORS

_NAMESPACE = "serve"
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
"""Ray names no actor that is dead, and goes on naming one that it restarts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """Serve at one moment."""

    actors: frozenset[str]
    """Names of Serve's actors."""
    deployments: Mapping[str, Any] | None
    """The app's, as `serve.status` tells them; None where Serve runs without the app, or no longer."""


def look(app: str, seen: frozenset[str] | None) -> Sight | None:
    """Return what is seen of an app; None where no actor came or went since `seen`, or where nobody can be asked now. Blocks.

    Only changes are looked at: `serve.status` costs a tenth of a second of CPU per dozen deployments (Ray 2.60).
    """
    try:
        named = ray.util.list_named_actors(all_namespaces=True)
        actors = frozenset(actor["name"] for actor in named if actor["namespace"] == _NAMESPACE)
        if actors == seen:
            return None
        found = serve.status().applications.get(app) if _CONTROLLER in actors else None
    except CALL_ERRORS:
        return None
    return Sight(actors=actors, deployments=None if found is None else found.deployments)
