"""Run every acceptance check of this folder, one process each, and write one JSON file per check and a summary.

`make accept` calls it. These checks take longer than CI allows, or judge figures that a busy machine disturbs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def run_one(script: Path, out: Path) -> dict[str, object]:
    """Run one check; its JSON lies beside the summary."""
    target = out / f"{script.stem}.json"
    started = time.monotonic()
    print(f"== {script.stem}", flush=True)
    status = subprocess.run([sys.executable, str(script), "--json", str(target)], check=False).returncode
    return {"check": script.stem, "passed": status == 0, "seconds": round(time.monotonic() - started, 1), "json": target.name}


def main() -> int:
    """Run the checks named on the command line, or all of them. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("only", nargs="*", help="names of checks, such as accept_engine")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    scripts = [script for script in sorted(HERE.glob("accept_*.py")) if not options.only or script.stem in options.only]
    results = [run_one(script, options.out) for script in scripts]
    (options.out / "summary.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for result in results:
        print(f"{'passed' if result['passed'] else 'FAILED'}  {result['check']}  {result['seconds']} s")
    return 0 if results and all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
