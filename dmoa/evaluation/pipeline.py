"""The answer pass and the score pass of an evaluation on Ray Data, and the actor that writes what they make.

Answering keeps the swarm full: several shards are under way at once and share one bound on queries, so that the end of a shard
leaves no engine idle. A row counts once its line is on disk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock
from ray.data import TaskPoolStrategy

from dmoa.dataflow import (
    AdmissionControl,
    BackgroundLoop,
    BatchedWriter,
    Item,
    Line,
    Watch,
    actor_options,
    bounded,
    only_writer,
    run_pass,
    shard_rows,
    stream,
)
from dmoa.errors import ConfigError, EmptyAnswerError
from dmoa.evaluation.answering import Asking, answered, failed, query_of_task, score_answer, unanswered
from dmoa.evaluation.records import Answered, FileRecord, Label, Scored, Scorer, Task
from dmoa.evaluation.run_folder import RunFolder, append, mend, write_lines
from dmoa.policies.registry import split_policy
from dmoa.protocols import OpenSwarm, final_answer
from dmoa.reading import offsets

OpenScorers = Callable[[], Mapping[str, Scorer]]
"""Builds the scorers by benchmark where they are to work; must be picklable."""

_LOCK_S = 60.0
_KEEP_S = 0.5
"""How long scores may wait to be written together; judging text takes microseconds, a write milliseconds."""


class RunWriter:
    """An actor on the driver's node: appends the lines of a run and counts them for the progress bar."""

    def __init__(self, root: str) -> None:
        """Take the run's write lock, waiting for the writer of a session that was killed a moment ago."""
        self._folder = RunFolder(Path(root))
        self._lock = FileLock(self._folder.root / ".writing.lock")
        self._lock.acquire(timeout=_LOCK_S)
        self._counts = {"rows": 0, "failed": 0, "tokens": 0}
        self._seen: set[bytes] = set()

    def write_answers(self, answers: list[Answered]) -> None:
        """Append answers; they are on disk when this returns."""
        records = list(filter(self._is_new, answers))
        self._append(records)
        self._counts["failed"] += sum(record.status == "failed" for record in records)
        self._counts["tokens"] += sum(record.completion_tokens for record in records)

    def write_scores(self, scores: list[Scored]) -> None:
        """Append scores; they are on disk when this returns."""
        self._append(list(filter(self._is_new, scores)))

    def ready(self) -> None:
        """Return once this is the run's only writer."""

    def counts(self) -> dict[str, int]:
        """Return rows written, failed ones among them, and completion tokens."""
        return dict(self._counts)

    def _is_new(self, record: Answered | Scored) -> bool:
        """Tell whether a row comes for the first time; Ray Data runs a shard again whose worker died half-way."""
        key = hashlib.sha256(f"{record.row_id}\0{record.policy}".encode()).digest()[:8]
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new

    def _append(self, records: list[Answered] | list[Scored]) -> None:
        by_path: dict[Path, list[FileRecord]] = {}
        for record in records:
            place = self._folder.answers if isinstance(record, Answered) else self._folder.scores
            by_path.setdefault(place(record.benchmark, record.policy), []).append(record)
        for path, those in by_path.items():
            append(path, those)
        self._counts["rows"] += len(records)


class AnswerStage:
    """Answers the tasks of a shard with every policy that is still to answer them."""

    def __init__(self, open_swarm: OpenSwarm, asking: Asking, writer: Any, places: int, widths: Mapping[str, int]) -> None:
        """Build the swarm. `places`: agent calls that may be under way; `widths`: how many a query of a policy may take."""
        self._asking = asking
        self._room = AdmissionControl(places)
        self._widths = dict(widths)
        self._outbox: BatchedWriter[Answered] = BatchedWriter(writer.write_answers.remote)
        self._swarm = open_swarm()
        self._loop = BackgroundLoop()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answer a shard; returns how many queries that were. Called from several threads at once."""
        return pa.table({"queries": [self._loop.run_all(self._queries(block))]})

    def _queries(self, block: pa.Table) -> Iterator[Coroutine[Any, Any, None]]:
        for line, policies in zip(block["task"].to_pylist(), block["policies"].to_pylist(), strict=True):
            task = Task.model_validate_json(line)
            for policy in policies.split():
                yield self._query(task, policy)

    async def _query(self, task: Task, policy: str) -> None:
        name, agent = split_policy(policy)
        taken = await self._room.enter(self._widths[policy])
        started = time.perf_counter()
        try:
            answer = await final_answer(self._swarm, query_of_task(task, policy, self._asking), name, agent)
            record = answered(task, policy, answer)
        except EmptyAnswerError as error:  # they were asked, and said nothing: no failure, but a reply without an answer
            record = unanswered(task, policy, error, (time.perf_counter() - started) * 1e3)
        except Exception as error:  # agents are called here: a row that fails is kept with its error, and counted
            record = failed(task, policy, error, (time.perf_counter() - started) * 1e3)
        finally:
            self._room.leave(taken)
        await self._outbox.put(record)


def score_block(block: pa.Table, open_scorers: OpenScorers, writer: Any) -> pa.Table:
    """Judge a shard of answers by their labels; returns how many that were."""
    import ray

    scorers = open_scorers()
    scores: list[Scored] = []
    written_s = time.monotonic()
    for answer, label in zip(block["answer"].to_pylist(), block["label"].to_pylist(), strict=True):
        scores.append(score_answer(Answered.model_validate_json(answer), Label.model_validate_json(label), scorers))
        if time.monotonic() - written_s > _KEEP_S:
            ray.get(writer.write_scores.remote(scores))
            scores, written_s = [], time.monotonic()
    ray.get(writer.write_scores.remote(scores))
    return pa.table({"answers": [block.num_rows]})


_ADVICE = "the same command with --resume goes on from here"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerWorkers:
    """How the answering is spread."""

    open_swarm: OpenSwarm
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
    """Return (answer line, label line) for every answer that has not been judged. Raises ConfigError where a label is missing."""
    items: list[Item] = []
    for benchmark in benchmarks:
        gold = folder.gold(benchmark)
        labels = {Label.model_validate_json(line).row_id: offset for offset, line in offsets(gold)}
        for policy in policies:
            done = {row.row_id for row in folder.read_scores(benchmark, policy)}
            path = folder.answers(benchmark, policy)
            for offset, line in offsets(path):
                row_id = Answered.model_validate_json(line).row_id
                if row_id not in labels:
                    raise ConfigError(
                        f"{gold}: has no label of {row_id!r}, which {policy} answered; copy the whole folder of the run"
                    )
                if row_id not in done:
                    items.append((Line(str(path), offset), Line(str(gold), labels[row_id])))
    return items


def answer_all(
    folder: RunFolder, benchmarks: Sequence[str], policies: Sequence[str], asking: Asking, workers: AnswerWorkers, watch: Watch
) -> None:
    """Answer what has no answer yet. Raises DmoaError where the pipeline itself cannot go on; what was answered is kept."""
    with _writer(folder) as writer:
        _mend_all(folder.answers, benchmarks, policies)
        items = pending_tasks(folder, benchmarks, policies)
        if not items:
            return
        total = sum(len(str(item[1]).split()) for item in items)
        per_shard = shard_rows(len(items), len(policies), num_actors=workers.count, places=workers.places)
        stage = (workers.open_swarm, asking, writer, workers.places, dict(workers.widths))
        actors = actor_options(count=workers.count, num_gpus=workers.num_gpus, env=workers.env)
        dataset = stream(("task", "policies"), items, per_shard).map_batches(AnswerStage, fn_constructor_args=stage, **actors)
        run_pass(dataset, writer, "answering", total, watch, advice=_ADVICE)


def score_all(
    folder: RunFolder, benchmarks: Sequence[str], policies: Sequence[str], open_scorers: OpenScorers, at_once: int, watch: Watch
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


def forget(folder: RunFolder, benchmarks: Sequence[str], policies: Sequence[str], *, failed: bool) -> int:
    """Drop scores whose answer's line was taken out, and `failed` rows, so that they are run again; returns how many failed."""
    dropped = 0
    for benchmark, policy in product(benchmarks, policies):
        rows = list(folder.read_answers(benchmark, policy))
        kept = [row for row in rows if not failed or row.status != "failed"]
        left = {row.row_id for row in kept}
        scores = list(folder.read_scores(benchmark, policy))
        judged = [score for score in scores if score.row_id in left]
        if len(judged) < len(scores):
            write_lines(folder.scores(benchmark, policy), judged)
        if len(kept) < len(rows):
            dropped += len(rows) - len(kept)
            write_lines(folder.answers(benchmark, policy), kept)
    return dropped


def _mend_all(place: Callable[[str, str], Path], benchmarks: Sequence[str], policies: Sequence[str]) -> None:
    for cell in product(benchmarks, policies):
        mend(place(*cell))


def _writer(folder: RunFolder) -> AbstractContextManager[Any]:
    return only_writer(RunWriter, str(folder.root), advice=_ADVICE)
