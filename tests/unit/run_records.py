"""Small runs made by hand, for the tests of results, report and command."""

from __future__ import annotations

from dmoa.evaluation.records import Answered, BenchmarkInfo, RunInfo, Scored
from dmoa.testing import answered as answer
from dmoa.testing import failed as lost
from dmoa.testing import run_info as run_of
from dmoa.testing import scored as score


def small_run() -> tuple[RunInfo, list[Answered], list[Scored]]:
    """Return a public benchmark with groups, a failed and an unscored row, and a generated one with fractional scores."""
    run = run_of(
        [
            BenchmarkInfo(
                name="mmlu",
                title="MMLU",
                deviation="a generated letter instead of 5-shot scoring",
                chance=0.25,
                rows=4,
                sources={"mmlu/test.jsonl": "a" * 64},
            ),
            BenchmarkInfo(
                name="relay", is_generated=True, primary="share of right cards", rows=3, sources={"generated:relay": "seed 7"}
            ),
        ],
        command="dmoa evaluate --benchmarks mmlu,relay --seed 7 --out DIR",
        limits={"max_steps": 3},
        gate_version="abc",
    )
    answered = [
        *(answer("mmlu", number, "dmoa", group="law" if number % 2 else "art") for number in range(3)),
        lost("mmlu", 3, "dmoa", "DeadlineError: <script>alert('x')</script> & so on"),
        *(answer("mmlu", n, "single", active=(("adder",),), stop_reason="single", gate_version=None) for n in range(4)),
        *(answer("relay", number, policy) for number in range(3) for policy in ("dmoa", "single")),
    ]
    scored = [
        score("mmlu", 0, "dmoa", 1.0, group="art"),
        score("mmlu", 1, "dmoa", 1.0, group="law"),
        score("mmlu", 2, "dmoa", 0.0, group="art", is_scored=False),
        score("mmlu", 3, "dmoa", 0.0, group="law", is_scored=False, is_failed=True),
        *(score("mmlu", number, "single", float(number == 0), group="law" if number % 2 else "art") for number in range(4)),
        *(score("relay", number, "dmoa", value, metrics={"f1": value / 2}) for number, value in enumerate((1.0, 0.5, 0.25))),
        *(score("relay", number, "single", value, metrics={"f1": 0.0}) for number, value in enumerate((0.0, 0.5, 0.25))),
    ]
    return run, answered, scored
