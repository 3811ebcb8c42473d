"""The figures of serving: P3 (orchestration), P4 (hops), P17 (memory of a role), growth (with the number of agents)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dmoa.bench import hops_bench, memory_bench, orchestration_bench
from dmoa.bench.measure import BenchResult

_BENCHES: dict[str, tuple[Callable[[int], list[BenchResult]], int]] = {
    "P3": (orchestration_bench.run, 1),
    "P4": (hops_bench.run_p4, 8),
    "P17": (memory_bench.run, 3),
    "growth": (hops_bench.run_growth, 5),
}
"""Metric -> how it is measured, and its rounds unless told otherwise."""


def run(ids: Iterable[str], rounds: int | None = None) -> list[BenchResult]:
    """Measure some of P3, P4, P17 and growth, one after another."""
    wanted = set(ids)
    return [result for id_, (bench, usual) in _BENCHES.items() if id_ in wanted for result in bench(rounds or usual)]
