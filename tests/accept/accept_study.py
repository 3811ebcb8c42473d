"""The preregistered study of the gate: hours on two cores; stopped, the same command goes on in `out/study`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the study and judge its endpoints: 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="as of the job, such as job.seeds=2")
    arguments = parser.parse_args()
    target = arguments.json.absolute()
    job = [sys.executable, "jobs/study/study.py", "--config", "jobs/study/study.yaml", "--json", str(target)]
    job += [part for override in arguments.set for part in ("--set", override)]
    status = subprocess.run(job, cwd=ROOT, check=False).returncode
    if status != 0:
        return status
    endpoints = json.loads(target.read_text(encoding="utf-8"))["endpoints"]
    return 0 if all(endpoint["passed"] for endpoint in endpoints.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
