"""The Serve config of a pool, for `serve deploy` and KubeRay's RayService, and the builder of the application in it.

The config holds the pool itself, as the builder's arguments: a changed pool is a changed config, which Serve rolls out.
It holds no key; the builder reads `DMOA_API_KEYS` from the environment of the Ray processes.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import ray
from ray.serve import context

from dmoa.config import Config, from_tree
from dmoa.serving.app import APP, build_app
from dmoa.serving.http.middleware import ADMIN_VARIABLE, ON_THIS_RAY, check_exposure, hash_keys

BUILDER = "dmoa.serving.deploy:build_pool"
"""Import path by which Serve finds `build_pool`."""


def build_pool(args: dict[str, Any]) -> Any:
    """Return the Serve application of a pool's YAML tree. Raises ConfigError for a bad pool, or one exposed without keys."""
    config = from_tree(copy.deepcopy(args), source="args")
    check_exposure(config.server.host, hash_keys(os.environ), insecure=False)
    return build_with_keys(config)


def build_with_keys(config: Config) -> Any:
    """Return the Serve application of a pool, keys from the environment. Raises ConfigError, also for a Serve open to others."""
    key_hashes = hash_keys(os.environ)
    running = context._get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if running is not None:
        check_exposure(str(running.http_config.host), key_hashes, insecure=False, where=ON_THIS_RAY)
    return build_app(config, key_hashes=key_hashes, admin_hashes=hash_keys(os.environ, ADMIN_VARIABLE))


def serve_config(tree: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Return the Serve config that deploys a pool, given as the tree of its YAML file; `source` names the file in errors.

    The proxies listen where the pool's `server` section says, on every node that runs a replica. Paths stay as they are written:
    nodes take relative ones from the folder in which their Ray runs. Raises ConfigError.
    """
    config = from_tree(copy.deepcopy(tree), source=source)  # which makes paths those of this machine
    args = {name: copy.deepcopy(section) for name, section in tree.items() if name != "job"}
    application = {"name": APP, "route_prefix": "/", "import_path": BUILDER, "args": args}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.server.host, "port": config.server.port},
        "applications": [application],
    }
