"""The preregistered study of the gate: hours on two cores; stopped, the same command goes on in `out/study`."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import ROOT, run_check


def check(options: Namespace) -> dict[str, Any]:
    """Run the study and judge its endpoints."""
    target = options.json.absolute()
    job = [sys.executable, "jobs/study/study.py", "--config", "jobs/study/study.yaml", "--json", str(target)]
    job += [part for override in options.set for part in ("--set", override)]
    if subprocess.run(job, cwd=ROOT, check=False).returncode != 0:
        return {"passed": False, "reason": "the study ended with an error"}
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return found | {"passed": {name: endpoint["passed"] for name, endpoint in found["endpoints"].items()}}


if __name__ == "__main__":
    flags = {"--set": {"action": "append", "default": [], "help": "as of the job, such as job.seeds=2"}}
    raise SystemExit(run_check(check, flags))
