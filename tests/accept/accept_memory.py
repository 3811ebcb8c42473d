"""Memory of an evaluation: 100,000 generated rows stream through both passes, with *scripted agents*, at a flat resident size.

Resident sizes of the driver (this process) and of every process of its Ray are read all the while, per process what is
its own (RSS less shared pages), and the object store as what raylet has mapped of it. After a warm-up a line is fitted:
bytes per row. The list of where lines begin is made before a pass, as long as the run, and flat by then. Known to grow: the
writer's set of rows seen (a digest of 8 bytes a row, some 90 with its set), and what Ray keeps of every shard in the driver
(some 20 KiB, for a number of shards that does not grow with the rows).
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dmoa.config import loads
from dmoa.dataflow import PassProgress
from dmoa.evaluation.answering import Asking
from dmoa.evaluation.pipeline import AnswerWorkers, answer_all, score_all
from dmoa.evaluation.registry import SUITES, OpenScorers
from dmoa.evaluation.run_folder import RunFolder, write_lines
from dmoa.serving.agent_replica import ENGINE_ENV
from dmoa.serving.launch import start_ray
from dmoa.types import Limits
from dmoa.workflows.backends import OpenPool

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check

TOTAL_BAR = 1024.0
"""Bytes per row that all processes together may grow by."""
DRIVER_BAR = 300.0
"""Bytes per row that the driver may grow by."""
WARM_UP_SHARE = 0.2
"""Part of a pass that is not fitted: pools of memory fill, workers start."""
_SUITE, _DIFFICULTY = "arith", 2
_EVERY_S = 1.0
_POOL = """
name: scripted
llms: {s: {model: "scripted:echo", engine: scripted}}
agents:
  - {name: one, llm: s, profile: Echoes.}
  - {name: two, llm: s, profile: Echoes too.}
  - {name: three, llm: s, profile: Echoes as well.}
limits: {max_steps: 2}
"""


def resident_bytes() -> dict[str, int]:
    """Return the resident size by part: driver, answering, writer, Ray's own processes, object store, other workers."""
    sizes: dict[str, int] = defaultdict(int)
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            memory, title = process.memory_info(), (process.cmdline() or [process.name()])[0]
        except psutil.Error:
            continue
        part = "driver" if process.pid == me.pid else _part(title)
        sizes[part] += memory.rss - memory.shared
        if part == "raylet":
            sizes["object store"] += memory.shared
    sizes["total"] = sum(sizes.values())
    return dict(sizes)


def _part(title: str) -> str:
    if "AnswerStage" in title:
        return "answering"
    if "RunWriter" in title:
        return "writer"
    # Titles such as ray::IDLE, or the path of a program.
    name = Path(title).name.removeprefix("ray::").split("(")[0].split(".")[0]
    return name if title.startswith("ray::_") or name in ("raylet", "gcs_server") else "other workers"


@dataclass(slots=True, kw_only=True)
class Samples:
    """Sizes seen during the passes, taken from the driver's progress reports."""

    taken: dict[str, list[tuple[int, dict[str, int]]]] = field(default_factory=dict)
    """Pass -> (rows done, sizes), in order."""
    last: PassProgress | None = None
    _next_s: float = 0.0

    def watch(self, progress: PassProgress) -> None:
        """Take a sample where one is due."""
        self.last = progress
        if progress.done and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _EVERY_S
            self.taken.setdefault(progress.stage, []).append((progress.done, resident_bytes()))


def slopes(samples: Sequence[tuple[int, dict[str, int]]], total: int) -> dict[str, float]:
    """Return bytes per row by part: the slope of the line through the samples after the warm-up, by least squares.

    Raises ValueError where fewer than five samples lie behind the warm-up.
    """
    late = [sample for sample in samples if sample[0] >= WARM_UP_SHARE * total]
    if len(late) < 5:
        raise ValueError(f"only {len(late)} samples after the warm-up; run more rows")
    parts = sorted({part for _, sizes in late for part in sizes})
    done = np.array([rows for rows, _ in late], dtype=np.float64)
    return {part: float(np.polyfit(done, [sizes.get(part, 0) for _, sizes in late], 1)[0]) for part in parts}


def measure(root: Path, rows: int) -> tuple[Samples, dict[str, float]]:
    """Run both passes over so many rows; return samples and seconds by pass."""
    folder, samples = RunFolder(root), Samples()
    suite = SUITES[_SUITE]
    write_lines(folder.tasks(_SUITE), (row.task for row in suite.generate("test", rows, 0, _DIFFICULTY)))
    write_lines(folder.gold(_SUITE), (row.label for row in suite.generate("test", rows, 0, _DIFFICULTY)))
    workers = AnswerWorkers(
        open_swarm=OpenPool(config_json=loads(_POOL).model_dump_json()), places=48, widths={"dmoa": 3}, env=ENGINE_ENV
    )
    seconds: dict[str, float] = {}
    began = time.monotonic()
    answer_all(folder, [_SUITE], ["dmoa"], Asking(seed=0, limits=Limits(max_steps=2)), workers, samples.watch)
    seconds["answering"] = time.monotonic() - began
    began = time.monotonic()
    score_all(folder, [_SUITE], ["dmoa"], OpenScorers(names=(_SUITE,)), 2, samples.watch)
    seconds["scoring"] = time.monotonic() - began
    answered = sum(row.status == "ok" for row in folder.read_answers(_SUITE, "dmoa"))
    judged = sum(1 for _ in folder.read_scores(_SUITE, "dmoa"))
    if (answered, judged) != (rows, rows):
        raise RuntimeError(f"{rows} rows went in, {answered} were answered, {judged} judged")
    return samples, seconds


FLAGS: dict[str, dict[str, Any]] = {
    "--rows": {
        "type": int,
        "default": 100_000,
        "help": "the bars are meant for 100,000: pools that fill once weigh on fewer",
    }
}


def check(options: Namespace) -> dict[str, Any]:
    """Measure and judge."""
    import ray

    start_ray()
    try:
        samples, seconds = measure(options.scratch, options.rows)
    finally:
        ray.shutdown()
    passes = {}
    for stage, taken in samples.taken.items():
        found = slopes(taken, options.rows)
        passes[stage] = {
            "seconds": round(seconds[stage], 1),
            "rows_per_s": round(options.rows / seconds[stage], 1),
            "bytes_per_row": {part: round(slope, 1) for part, slope in found.items()},
            "mib_first_and_last": {part: [round(taken[i][1].get(part, 0) / 2**20, 1) for i in (0, -1)] for part in found},
            "samples": len(taken),
            "passed": found["total"] <= TOTAL_BAR and found["driver"] <= DRIVER_BAR,
        }
    return {
        "agents": "scripted: they cost nothing, so rows pass faster than any model could answer them",
        "rows": options.rows,
        "suite": f"{_SUITE}, difficulty {_DIFFICULTY}, generated",
        "bars_bytes_per_row": {"total": TOTAL_BAR, "driver": DRIVER_BAR},
        "passes": passes,
        "passed": set(passes) == {"answering", "scoring"} and all(one["passed"] for one in passes.values()),
    }


if __name__ == "__main__":
    raise SystemExit(run_check(check, FLAGS))
