"""The two passes of an evaluation on Ray Data: answer every task with every policy, then judge every answer.

Rows stream from the run's folder through the stages with bounded memory; Ray Data holds back its reading while the
engines are full. Each line is written as soon as it exists, so a run that was killed goes on with what has no line yet,
and the judging can be repeated without asking anyone again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.data import TaskPoolStrategy

from dmoa.dataflow import Item, Line, Watch, actor_options, bounded, offsets, only_writer, run_pass, shard_rows, stream
from dmoa.evaluation.answering import Asking, OpenAnswerer
from dmoa.evaluation.records import Answered, Label, Scored, Task
from dmoa.evaluation.run_files import RunFolder, mend
from dmoa.evaluation.stages import AnswerStage, OpenScorers, RunWriter, score_block

_ADVICE = "the same command with --resume goes on from here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """How the answering is spread."""

    open_answerer: OpenAnswerer
    count: int = 1
    """Actors, each with a swarm of its own."""
    places: int = 16
    """Agent calls that may be under way in one actor: enough to keep its engines full."""
    widths: Mapping[str, int]
    """Policy -> agent calls that one of its queries may have under way."""
    num_gpus: float = 0.0
    """Per actor."""
    env: Mapping[str, str]
    """Environment of the actors."""


def pending_tasks(folder: RunFolder, benchmarks: Sequence[str], policies: Sequence[str]) -> list[Item]:
    """Return (task line, policies still to answer it) for every task that some policy has not answered."""
    items: list[Item] = []
    for benchmark in benchmarks:
        done = {policy: {row.row_id for row in folder.read_answers(benchmark, policy)} for policy in policies}
        path = folder.tasks(benchmark)
        for offset, line in offsets(path):
            row_id = Task.model_validate_json(line).row_id
            missing = [policy for policy in policies if row_id not in done[policy]]
            if missing:
                items.append((Line(str(path), offset), " ".join(missing)))
    return items


def pending_scores(folder: RunFolder, benchmarks: Sequence[str], policies: Sequence[str]) -> list[Item]:
    """Return (answer line, label line) for every answer that has not been judged."""
    items: list[Item] = []
    for benchmark in benchmarks:
        gold = folder.gold(benchmark)
        labels = {Label.model_validate_json(line).row_id: offset for offset, line in offsets(gold)}
        for policy in policies:
            done = {row.row_id for row in folder.read_scores(benchmark, policy)}
            path = folder.answers(benchmark, policy)
            for offset, line in offsets(path):
                row_id = Answered.model_validate_json(line).row_id
                if row_id not in done:
                    items.append((Line(str(path), offset), Line(str(gold), labels[row_id])))
    return items


def answer_all(
    folder: RunFolder,
    benchmarks: Sequence[str],
    policies: Sequence[str],
    asking: Asking,
    workers: Workers,
    watch: Watch,
) -> None:
    """Answer what has no answer yet. Raises DmoaError where the pipeline itself cannot go on; what was answered is kept."""
    with _writer(folder) as writer:
        _mend_all(folder.answers, benchmarks, policies)
        items = pending_tasks(folder, benchmarks, policies)
        if not items:
            return
        total = sum(len(str(item[1]).split()) for item in items)
        per_shard = shard_rows(len(items), len(policies), num_actors=workers.count, places=workers.places)
        stage = (workers.open_answerer, asking, writer, workers.places, dict(workers.widths))
        actors = actor_options(count=workers.count, num_gpus=workers.num_gpus, env=workers.env)
        dataset = stream(("task", "policies"), items, per_shard).map_batches(AnswerStage, fn_constructor_args=stage, **actors)
        run_pass(dataset, writer, "answering", total, watch, advice=_ADVICE)


def score_all(
    folder: RunFolder,
    benchmarks: Sequence[str],
    policies: Sequence[str],
    open_scorers: OpenScorers,
    at_once: int,
    watch: Watch,
) -> None:
    """Judge what has not been judged, `at_once` shards at a time. Raises DmoaError as `answer_all` does."""
    with _writer(folder) as writer:
        _mend_all(folder.scores, benchmarks, policies)
        items = pending_scores(folder, benchmarks, policies)
        if not items:
            return
        per_shard = bounded(min(64, len(items) // (4 * at_once)), len(items), at_once)
        dataset = stream(("answer", "label"), items, per_shard).map_batches(
            score_block,
            fn_kwargs={"open_scorers": open_scorers, "writer": writer},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            compute=TaskPoolStrategy(size=at_once),
        )
        run_pass(dataset, writer, "scoring", len(items), watch, advice=_ADVICE)


def forget_failed(folder: RunFolder, benchmarks: Sequence[str], policies: Sequence[str]) -> int:
    """Drop failed rows from a run's files, so that they are run again; returns how many."""
    from dmoa.evaluation.run_files import write_lines

    dropped = 0
    for benchmark in benchmarks:
        for policy in policies:
            rows = list(folder.read_answers(benchmark, policy))
            lost = {row.row_id for row in rows if row.status == "failed"}
            if lost:
                dropped += len(lost)
                scores: Iterable[Scored] = [s for s in folder.read_scores(benchmark, policy) if s.row_id not in lost]
                write_lines(folder.scores(benchmark, policy), scores)
                write_lines(folder.answers(benchmark, policy), (row for row in rows if row.row_id not in lost))
    return dropped


def _mend_all(place: Callable[[str, str], Path], benchmarks: Sequence[str], policies: Sequence[str]) -> None:
    for benchmark in benchmarks:
        for policy in policies:
            mend(place(benchmark, policy))


def _writer(folder: RunFolder) -> AbstractContextManager[Any]:
    return only_writer(RunWriter, str(folder.root), advice=_ADVICE)
