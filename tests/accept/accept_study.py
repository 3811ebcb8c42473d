"""The preregistered study of the gate: hours on two cores; stopped, the same command goes on in `out/study`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run `jobs/study_gate.py` and judge its endpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="as of the job, such as job.seeds=2")
    arguments = parser.parse_args()
    overrides = [part for override in arguments.set for part in ("--set", override)]
    job = [sys.executable, "jobs/study_gate.py", "--config", "jobs/study_gate.yaml", *overrides]
    status = subprocess.run([*job, "--json", str(arguments.json.absolute())], cwd=ROOT, check=False).returncode
    if status != 0:
        return status
    result = json.loads(arguments.json.read_text(encoding="utf-8"))
    result["passed"] = all(endpoint["passed"] for endpoint in result["endpoints"].values())
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
