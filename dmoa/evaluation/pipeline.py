"""The two passes of an evaluation on Ray Data: answer every task with every policy, then judge every answer.

Rows stream from the run's folder through the stages with bounded memory; Ray Data holds back its reading while the
engines are full. Each line is written as soon as it exists, so a run that was killed goes on with what has no line yet,
and the judging can be repeated without asking anyone again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dmoa.errors import DmoaError
from dmoa.evaluation.answering import Asking, OpenAnswerer
from dmoa.evaluation.lines_source import Item, Line, drain, offsets, stream
from dmoa.evaluation.records import Answered, Label, Scored, Task
from dmoa.evaluation.run_files import RunFolder, mend
from dmoa.evaluation.stages import AnswerStage, OpenScorers, RunWriter, score_block

SHARDS_UNDER_WAY = 4
"""Shards that one answering actor works on at once."""
_MAX_SHARDS = 500
"""Shards of a pass, however many rows it has (unless so many would leave workers idle): Ray keeps some 20 KiB of each, its
task and its statistics, in the driver until the pass ends."""
_POLL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a pass is."""

    stage: str
    """`answering` or `scoring`."""
    done: int
    total: int
    """Rows of this pass, those of earlier sessions not counted."""
    failed: int
    completion_tokens: int
    elapsed_s: float


Watch = Callable[[Progress], None]


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
        per_shard = _shard_rows(len(items), len(policies), workers)
        stage = (workers.open_answerer, asking, writer, workers.places, dict(workers.widths))
        dataset = stream(("task", "policies"), items, per_shard).map_batches(
            AnswerStage,
            fn_constructor_args=stage,
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=workers.count, enable_true_multi_threading=True, max_concurrent_calls_per_actor=SHARDS_UNDER_WAY
            ),
            num_cpus=1,
            num_gpus=workers.num_gpus or None,
            runtime_env={"env_vars": dict(workers.env)},
        )
        _run(dataset, writer, "answering", total, watch)


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
        per_shard = _bounded(min(64, len(items) // (4 * at_once)), len(items), at_once)
        dataset = stream(("answer", "label"), items, per_shard).map_batches(
            score_block,
            fn_kwargs={"open_scorers": open_scorers, "writer": writer},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            compute=TaskPoolStrategy(size=at_once),
        )
        _run(dataset, writer, "scoring", len(items), watch)


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


def _shard_rows(num_tasks: int, num_policies: int, workers: Workers) -> int:
    """Rows of a shard: enough that the shards under way fill every place twice, few enough that workers share them."""
    fill = -(-2 * workers.places // (SHARDS_UNDER_WAY * num_policies))
    share = -(-num_tasks // (workers.count * SHARDS_UNDER_WAY))
    return _bounded(min(fill, share), num_tasks, workers.count * SHARDS_UNDER_WAY)


def _bounded(shard_rows: int, num_rows: int, hands: int) -> int:
    """Return shard_rows, raised as far as it takes for a bounded number of shards; `hands`: shards under way at once."""
    return max(1, shard_rows, -(-num_rows // max(_MAX_SHARDS, 4 * hands)))


@contextmanager
def _writer(folder: RunFolder) -> Iterator[Any]:
    """Run the run's only writer, on this node. Raises DmoaError where it cannot be had, or is lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # No task events: Ray's control service would keep one for every write.
    options = {"num_cpus": 0, "scheduling_strategy": here, "enable_task_events": False}
    writer = ray.remote(RunWriter).options(**options).remote(str(folder.root))
    try:
        ray.get(writer.ready.remote())
        yield writer
    except RayError as error:
        reason = " ".join(str(error).split())[-2000:]
        raise DmoaError(f"the writer of the run is gone: {reason}; the same command with --resume goes on from here") from error
    finally:
        ray.kill(writer)


def _run(dataset: ray.data.Dataset, writer: Any, stage: str, total: int, watch: Watch) -> None:
    """Run a pass to its end, reporting progress. Raises DmoaError for what stopped it."""
    quiet()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            for _ in drain(dataset):
                pass
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name=stage, daemon=True)
    started = time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        _report(writer, stage, total, started, watch)
    _report(writer, stage, total, started, watch)
    if failure:
        reason = " ".join(str(failure[0]).split())[-2000:]
        raise DmoaError(f"{stage} stopped: {reason}; the same command with --resume goes on from here") from failure[0]


def _report(writer: Any, stage: str, total: int, started: float, watch: Watch) -> None:
    counts = ray.get(writer.counts.remote())
    watch(
        Progress(
            stage=stage,
            done=counts["rows"],
            total=total,
            failed=counts["failed"],
            completion_tokens=counts["tokens"],
            elapsed_s=time.monotonic() - started,
        )
    )


def quiet() -> None:
    """Leave the terminal to our own progress bar."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what stops a pass is raised, and shown once
