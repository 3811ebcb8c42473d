"""The tests that `make test` leaves out: what kills, scales or restarts, weaker levels of the sandbox, all examples.

Judged: every one of them passes. Those on vLLM run where it is installed (`make test-vllm`). Elsewhere scripted agents, made-up
rollouts and a tiny model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from dmoa.agents.pool import vllm_builds

ROOT = Path(__file__).parents[2]


SUITES = [
    ["tests/cluster"],
    ["-m", "accept", "tests/integration", "tests/contract", "tests/unit"],
    ["-m", "hypothesis", "--hypothesis-profile=accept", "tests/contract", "tests/unit"],
]
"""The arguments of each run of pytest."""
VLLM = ["-m", "accept", "tests/vllm"]


def ran(arguments: Sequence[str]) -> list[ElementTree.Element]:
    """Run pytest, and return what became of each test; none where pytest wrote nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={found}", *arguments]
        subprocess.run(command, cwd=ROOT, check=False)
        return list(ElementTree.parse(found).iter("testcase")) if found.exists() else []


def outcome(case: ElementTree.Element) -> str:
    """Return passed, failed or skipped."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def main() -> int:
    """Run the tests, write the JSON file, and return 1 if one did not pass or there was none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    suites = [ran(arguments) for arguments in [*SUITES, *([VLLM] if len(vllm_builds()) == 1 else [])]]
    cases = [case for suite in suites for case in suite]
    tests = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "outcome": outcome(case), "seconds": float(case.get("time", 0))}
        for case in cases
    ]
    # A level of the sandbox that this host lacks is skipped, as is a row of a benchmark that is not there.
    passed = all(suites) and all(test["outcome"] != "failed" for test in tests)
    result = {"tests": tests, "passed": passed}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
