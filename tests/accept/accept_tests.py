"""The tests that `make test` leaves out: what kills, scales or restarts, weaker levels of the sandbox, all examples.

Judged: every one of them passes. Those on vLLM run where it is installed (`make test-vllm`). Elsewhere scripted agents, made-up
rollouts and a tiny model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dmoa.agents.pool import vllm_builds

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import ROOT, run_check

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


def check(options: Namespace) -> dict[str, Any]:
    """Run the tests; it fails if one did not pass or there was none."""
    suites = [ran(arguments) for arguments in [*SUITES, *([VLLM] if len(vllm_builds()) == 1 else [])]]
    tests = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "outcome": outcome(case), "seconds": float(case.get("time", 0))}
        for suite in suites
        for case in suite
    ]
    # A level of the sandbox that this host lacks is skipped, as is a row of a benchmark that is not there.
    return {"tests": tests, "passed": all(suites) and all(test["outcome"] != "failed" for test in tests)}


if __name__ == "__main__":
    raise SystemExit(run_check(check))
