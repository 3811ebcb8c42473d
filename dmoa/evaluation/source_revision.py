"""Which commit of the code is running, for the record of a run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

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
