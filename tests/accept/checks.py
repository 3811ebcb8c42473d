"""A check run as a script: its flags, a folder to work in, its JSON file, its exit status.

A check is a function of its flags that returns what it found, as a dict. It passed where `passed` is true or, if that is a dict
of bars, where all of them are.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dmoa.agents.pool import vllm_builds
from tests.integration.server import Served

ROOT = Path(__file__).parents[2]
DMOA = str(Path(sys.executable).with_name("dmoa"))
INGRESS = "ray::ServeReplica:dmoa:ingress"
"""Title of an ingress's process."""
ROWS = Path(os.environ.get("DMOA_BENCHMARK_ROWS", ROOT.parent / "shared" / "benchmarks"))


def run_check(check: Callable[..., Any], flags: Mapping[str, Mapping[str, Any]] | None = None) -> int:
    """Run `check(options)`, which may be asynchronous: 0 where it passed, else 1.

    Beside its own flags, `options` has `json`, the file that the result is written to, and `scratch`, a folder that is deleted at
    the end. `flags` are the words of `ArgumentParser.add_argument` by name.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    name = Path(sys.argv[0]).with_suffix(".json").name
    parser.add_argument("--json", type=Path, default=Path("out/accept") / name, help="where the result is written [%(default)s]")
    for flag, words in (flags or {}).items():
        parser.add_argument(flag, **words)
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        options.scratch = Path(folder)
        found = check(options)
        if inspect.isawaitable(found):
            found = asyncio.run(found)  # type: ignore[arg-type]
    text = json.dumps(found, indent=2)
    options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    passed = found["passed"]
    return 0 if (all(passed.values()) if isinstance(passed, dict) else passed) else 1


def bench(options: argparse.Namespace, names: str, *more: str) -> dict[str, Any]:
    """Run benches of `dmoa bench`. Returns what they write, beside whether all passed."""
    status = subprocess.run([DMOA, "bench", "--only", names, "--json", str(options.json), *more], check=False).returncode
    found = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    return {**found, "passed": status == 0}


def need_vllm() -> None:
    """End with status 3 where vLLM is not installed."""
    if len(vllm_builds()) != 1:
        print("vLLM is not installed; run `make test-vllm` first", file=sys.stderr)
        raise SystemExit(3)


def wait_ready(served: Served, patience_s: float = 60.0) -> None:
    """Return once the ingress could decide by itself: to import what that takes slows what it does meanwhile."""
    (ingress,) = served.processes(INGRESS)
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        is_loaded = any("libtorch_python" in one.path for one in ingress.memory_maps())
        if ingress.cpu_percent(interval=0.5) < 20.0 and is_loaded:
            return
