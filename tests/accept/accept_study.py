"""The preregistered study of the gate, three tests: hours on two cores; stopped, the same command goes on in `out/study`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TESTS = {"first": "study_gate.py", "second": "study_second.py", "third": "study_third.py"}
"""In this order: the later ones go on in the folder of the first."""


def main() -> int:
    """Run the tests and judge their endpoints: 0 where every bar of every test is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="as of the job, such as job.seeds=2")
    arguments = parser.parse_args()
    overrides = [part for override in arguments.set for part in ("--set", override)]
    target, result = arguments.json.absolute(), dict[str, Any]()
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, script in TESTS.items():
        job = [sys.executable, f"jobs/{script}", "--config", "jobs/study_gate.yaml", *overrides]
        part = target.with_name(f"{target.stem}-{name}.json")
        status = subprocess.run([*job, "--json", str(part)], cwd=ROOT, check=False).returncode
        if status != 0:
            return status
        result[name] = json.loads(part.read_text(encoding="utf-8"))
    result["passed"] = all(endpoint["passed"] for name in TESTS for endpoint in result[name]["endpoints"].values())
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
