"""The demo, as a newcomer runs it: it must end well within six minutes, with traces that replay."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_S = 360.0


def main() -> int:
    """Run `dmoa demo` and then `dmoa run --replay` on what it left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    dmoa = str(Path(sys.executable).with_name("dmoa"))
    with tempfile.TemporaryDirectory() as out:
        started = time.monotonic()
        demo = subprocess.run([dmoa, "demo", "--out", out], check=False, capture_output=True, text=True)
        seconds = time.monotonic() - started
        replay = subprocess.run([dmoa, "run", "--replay", f"{out}/traces.jsonl"], check=False, capture_output=True, text=True)
        traces = len((Path(out) / "traces.jsonl").read_text(encoding="utf-8").splitlines()) if demo.returncode == 0 else 0
    passed = demo.returncode == 0 and replay.returncode == 0 and seconds <= LIMIT_S and traces == 10
    result = {
        "seconds": seconds,
        "limit_s": LIMIT_S,
        "traces": traces,
        "replay": replay.stdout.strip().splitlines()[-1:],
        "passed": passed,
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not passed:
        print(demo.stdout[-3000:], demo.stderr[-3000:], replay.stdout[-1000:], replay.stderr[-1000:], sep="\n")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
