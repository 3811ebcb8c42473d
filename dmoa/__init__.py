"""dmoa: Differentiable Mixture-of-Agents (arXiv 2605.15706) as a system to train and serve.

Importing the package loads nothing heavy: torch, ray, transformers and the rest are loaded where they are used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_HOMES = {
    "Answer": "dmoa.types",
    "Query": "dmoa.types",
    "Swarm": "dmoa.swarm",
    "benchmark": "dmoa.evaluation.benchmarks.base",
    "engine": "dmoa.engines",
    "load_pool": "dmoa.agents.pool",
    "policy": "dmoa.policies.registry",
}

try:
    __version__ = version("dmoa")
except PackageNotFoundError:
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
