"""Where a result was made: the commit of the code and the machine, for the records of runs and benches."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import dmoa

_TIMEOUT_S = 10.0


def code_revision() -> str:
    """Return the commit of the checkout that dmoa runs from, with `+changes` where files differ; empty outside of one."""
    root = Path(dmoa.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    commit = _git(root, "rev-parse", "HEAD")
    return f"{commit}+changes" if commit and _git(root, "status", "--porcelain", "--untracked-files=no") else commit


def _git(root: Path, *arguments: str) -> str:
    git = shutil.which("git")
    if git is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 -- fixed arguments
            [git, "-C", str(root), *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Machine(BaseModel):
    """Where figures were measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    cpu: str
    """Model name as the system gives it."""
    cores: int
    """Logical ones."""
    memory_gib: float
    gpus: list[str]
    """Names of the GPUs that torch sees."""
    python: str
    versions: dict[str, str]
    """Package -> version of dmoa, torch, ray, transformers."""


def machine() -> Machine:
    """Return a description of this machine."""
    import psutil
    import torch

    return Machine(
        cpu=_cpu_model(),
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        python=platform.python_version(),
        versions={name: metadata.version(name) for name in ("dmoa", "torch", "ray", "transformers")},
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
