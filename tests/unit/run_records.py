"""Small runs made by hand, for the tests of results, report and command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dmoa.evaluation.records import Answered, BenchmarkInfo, PoolInfo, RunInfo, Scored
from dmoa.evaluation.run_folder import RunFolder, write_lines, write_whole
from dmoa.provenance import Machine

MACHINE = Machine(cpu="some CPU", cores=2, memory_gib=8.0, gpus=[], python="3.11.7", versions={"dmoa": "0.1.0", "ray": "2.60.0"})


def run_of(benchmarks: Sequence[BenchmarkInfo], policies: Sequence[str] = ("dmoa", "single"), **changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "dmoa_version": "0.1.0",
        "pool": PoolInfo(
            name="tiny", fingerprint="f" * 64, config={"name": "tiny", "agents": [{"name": "adder"}, {"name": "echo"}]}
        ),
        "benchmarks": list(benchmarks),
        "policies": list(policies),
        "seed": 7,
        "machine": MACHINE,
        "started_unix_s": 1_790_000_000.0,
    }
    return RunInfo(**values | changes)


def answer(benchmark: str, number: int, policy: str, **changes: Any) -> Answered:
    values: dict[str, Any] = {
        "row_id": f"{benchmark}/test/{number:04}",
        "benchmark": benchmark,
        "policy": policy,
        "text": "Answer: 1",
        "stop_reason": "agreement",
        "active": (("adder", "echo"), ("adder",)),
        "prompt_tokens": 100,
        "cached_tokens": 30,
        "completion_tokens": 10,
        "summarizer_tokens": 4,
        "entropy_nats": 0.5,
        "wall_ms": 250.0,
        "gate_version": "abc",
    }
    return Answered(**values | changes)


def lost(benchmark: str, number: int, policy: str, error: str = "DeadlineError: too late") -> Answered:
    return Answered(
        row_id=f"{benchmark}/test/{number:04}", benchmark=benchmark, policy=policy, status="failed", error=error, wall_ms=1000.0
    )


def score(benchmark: str, number: int, policy: str, value: float, **changes: Any) -> Scored:
    values = {"row_id": f"{benchmark}/test/{number:04}", "benchmark": benchmark, "policy": policy, "value": value}
    return Scored(**values | changes)


def write_run(root: Path, run: RunInfo, answered: Iterable[Answered], scored: Iterable[Scored]) -> RunFolder:
    """Write a run's folder as the pipeline does."""
    folder = RunFolder(root)
    write_whole(folder.run, run.model_dump_json(indent=2))
    answers, scores = list(answered), list(scored)
    for info in run.benchmarks:
        for policy in run.policies:
            cell = (info.name, policy)
            write_lines(folder.answers(*cell), [line for line in answers if (line.benchmark, line.policy) == cell])
            write_lines(folder.scores(*cell), [line for line in scores if (line.benchmark, line.policy) == cell])
    return folder


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
