"""Runs an evaluation several times over the same rows, and puts the runs together: a row's score is the mean of its repeats.

Each repeat is a whole run in a folder of its own, `repeat-N`; the run above them is begun before, and in the end holds lines of
means, so that reports, tests and everything else read it as any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from dmoa.evaluation.records import Answered, RunInfo, Scored
from dmoa.evaluation.run import begin_run, evaluate, finish_run
from dmoa.evaluation.run_folder import RunFolder, read_record, write_lines, write_whole
from dmoa.flat import flat
from dmoa.storage import only_one
from dmoa.types import TokenUsage

if TYPE_CHECKING:
    from dmoa.evaluation.results import Evaluation
    from dmoa.evaluation.run import Session

Lines = TypeVar("Lines", Answered, Scored)


def evaluate_repeatedly(session: Session, repeats: int) -> Evaluation:
    """Run the evaluation with replies of as many seeds, or go on with it, and return the result of all. Raises as `evaluate`."""
    if repeats == 1:
        return evaluate(session)
    folder = session.folder
    folder.make()
    parts = [RunFolder(folder.root / f"repeat-{number}") for number in range(1, repeats + 1)]
    options = session.options.model_copy(update={"repeats": 1})
    with only_one(folder.root, "evaluation"):
        begin_run(session)
        folder.evaluation.unlink(missing_ok=True)
        with session.open_ray():
            for number, part in enumerate(parts):
                session.say(f"repeat {number + 1} of {repeats}")
                asking = replace(session.asking, seed=session.asking.seed + number)
                evaluate(replace(session, options=options, folder=part, asking=asking, open_ray=nullcontext, rows_of=folder))
        return merge_repeats(folder, parts)


def merge_repeats(folder: RunFolder, parts: Sequence[RunFolder]) -> Evaluation:
    """Write the run of the repeats' means, and return its result. Rows that a repeat lacks are left out."""
    runs = [read_record(part.run, RunInfo) for part in parts]
    budgets = {
        name: {limit: _mean([run.budgets[name][limit] for run in runs]) for limit in found}
        for name, found in runs[0].budgets.items()
    }
    changes = {"budgets": budgets, "repeats": len(parts), "ended_unix_s": runs[-1].ended_unix_s}
    info = runs[0].model_copy(update=changes | {"options": {**runs[0].options, "repeats": len(parts)}})
    for benchmark in (known.name for known in info.benchmarks):
        for policy in info.policies:
            answers = _aligned([part.read_answers(benchmark, policy) for part in parts])
            scores = _aligned([part.read_scores(benchmark, policy) for part in parts])
            write_lines(folder.answers(benchmark, policy), map(mean_answer, answers))
            write_lines(folder.scores(benchmark, policy), map(mean_score, scores))
    write_whole(folder.run, info.model_dump_json(indent=2) + "\n")
    return finish_run(folder)


def _aligned(lines: Sequence[Iterator[Lines]]) -> Iterator[list[Lines]]:
    """Yield the lines of each row, one per repeat."""
    by_row = [{line.row_id: line for line in those} for those in lines]
    return ([rows[row] for rows in by_row] for row in by_row[0] if all(row in rows for rows in by_row))


def mean_answer(lines: Sequence[Answered]) -> Answered:
    """Return the first answer with the mean tokens, calls, time and price of all repeats, and all their bugs.

    It is late where any was. A repeat that failed counts what its calls took.
    """
    first = next((line for line in lines if line.status == "ok"), lines[0])
    usage = sum((line.usage for line in lines), TokenUsage())
    counts: dict[str, Any] = {name: round(count / len(lines)) for name, count in flat(usage).items()}
    for name in ("summarizer_tokens", "memoised_tokens"):
        counts[name] = round(_mean([getattr(line, name) for line in lines]))
    unsaid: list[Any] = [0.0 if line.status == "failed" and not line.usage.total else None for line in lines]
    for name in ("price", "calls"):
        known = [x if (value := getattr(line, name)) is None else value for line, x in zip(lines, unsaid, strict=True)]
        counts[name] = None if None in known else _mean(known)
    counts |= {"stop_reason": "deadline"} if any(line.is_late for line in lines) else {}
    return first.model_copy(
        update=counts | {"wall_ms": _mean([line.wall_ms for line in lines]), "bugs": sum(line.bugs for line in lines)}
    )


def mean_score(lines: Sequence[Scored]) -> Scored:
    """Return the mean score of all repeats; a repeat that failed or could not be judged counts as 0."""
    first = next((line for line in lines if line.is_scored), lines[0])
    return first.model_copy(
        update={
            "value": _mean([line.value if line.is_scored else 0.0 for line in lines]),
            "is_left_out": any(line.is_left_out for line in lines),
            "is_failed": all(line.is_failed for line in lines),
            "metrics": {name: _mean([line.metrics.get(name, 0.0) for line in lines]) for name in first.metrics},
        }
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
