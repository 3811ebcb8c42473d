"""The Serve config of a pool, for `serve deploy` and KubeRay's RayService, and the builder of the application in it.

The config holds the pool itself, as the builder's arguments: a changed pool is a changed config, which Serve rolls out.
It holds no key; the builder reads `DMOA_API_KEYS` from the environment of the Ray processes.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from dmoa.config import from_tree
from dmoa.serving.app import APP, build_app
from dmoa.serving.http.middleware import ADMIN_VARIABLE, check_exposure, hash_keys

BUILDER = "dmoa.serving.deploy:build_pool"
"""Import path by which Serve finds `build_pool`."""


def build_pool(args: dict[str, Any]) -> Any:
    """Return the bound Serve application of a pool, given as the tree of its YAML file; Serve calls this.

    Raises ConfigError for a bad pool, and for one whose server others can reach where no API keys are set.
    """
    config = from_tree(copy.deepcopy(args), source="args")
    key_hashes = hash_keys(os.environ)
    check_exposure(config.server.host, key_hashes, insecure=False)
    return build_app(config, key_hashes=key_hashes, admin_hashes=hash_keys(os.environ, ADMIN_VARIABLE))


def serve_config(tree: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Return the Serve config that deploys a pool, given as the tree of its YAML file; `source` names the file in errors.

    The proxies listen where the pool's `server` section says, on every node that runs a replica. Raises ConfigError.
    """
    tree = copy.deepcopy(tree)
    config = from_tree(tree, source=source)
    application = {"name": APP, "route_prefix": "/", "import_path": BUILDER, "args": tree}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.server.host, "port": config.server.port},
        "applications": [application],
    }
