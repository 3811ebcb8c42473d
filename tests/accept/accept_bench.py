"""The judged numbers: `dmoa bench --only P1,P3,P4,P6,P7,P8,P14,P15,P15.real,P17,P18,growth,otlp,prefill`, as a user runs it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import bench, run_check

IDS = "P1,P3,P4,P6,P7,P8,P14,P15,P15.real,P17,P18,growth,otlp,prefill"


if __name__ == "__main__":
    raise SystemExit(run_check(lambda options: bench(options, IDS)))
