"""A gate swapped a hundred times under eight concurrent streams over HTTP, on scripted agents whose figures mean nothing else.

Judged: no query fails, and every trace names exactly one gate version, in every step. Told beside it: how many queries were
under way while a version changed, and how long a swap took.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check
from tests.cluster.swaps import crossed, mixed, swap_under_load, version_of, write_checkpoint, write_pool
from tests.integration.server import serve

SWAPS = 100
STREAMS = 8


def check(folder: Path, swaps: int) -> dict[str, Any]:
    """Serve the pool, swap two checkpoints under load, and return what came of it."""
    pool = write_pool(folder)
    folders = [write_checkpoint(folder / name, pool, seed) for seed, name in ((1, "one"), (2, "two"))]
    told = folder / "serve.json"
    served = serve(pool, "--json", str(told))
    try:
        address = json.loads(told.read_text())["ray_address"]
        found, swapped = asyncio.run(swap_under_load(served.url, address, folders, swaps=swaps, streams=STREAMS))
    finally:
        served.stop()
    versions = Counter(one.reported for one in found.seen)
    is_mixed = mixed(found)
    return {
        "swaps": len(swapped.seconds),
        "streams": STREAMS,
        "queries": len(found.seen),
        "decisions": sum(one.num_decisions for one in found.seen),
        "failed": len(found.failures),
        "failures": found.failures[:10],
        "traces_with_other_than_one_version": len(is_mixed),
        "examples": [one.trace_id for one in is_mixed[:10]],
        "queries_under_way_during_a_swap": crossed(found, swapped),
        "queries_by_version": dict(versions),
        "routed_by_ingress": sum(one.routed_by == "ingress" for one in found.seen),
        "swap_seconds": {"median": statistics.median(swapped.seconds), "longest": max(swapped.seconds)},
        "passed": len(swapped.seconds) == swaps
        and not found.failures
        and not is_mixed
        and crossed(found, swapped) > 0
        and all(versions[version_of(one)] > 0 for one in folders),
    }


FLAGS = {"--swaps": {"type": int, "default": SWAPS}}

if __name__ == "__main__":
    raise SystemExit(run_check(lambda options: check(options.scratch, options.swaps), FLAGS))
