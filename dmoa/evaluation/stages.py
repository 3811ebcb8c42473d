"""The stages of the evaluation pipeline, run by Ray Data: answering, and scoring; and the actor that writes what they make.

Answering holds the swarm and keeps it full: several shards are under way at once, and queries of all of them share one
room, so that the end of a shard leaves no engine idle. A row counts once its line is on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
from filelock import FileLock

from dmoa.evaluation.answering import Answerer, Asking, OpenAnswerer, answered, failed, query_of, split_policy
from dmoa.evaluation.records import Answered, FileRecord, Label, Reply, Scored, Scorer, Task
from dmoa.evaluation.run_files import RunFolder, append

OpenScorers = Callable[[], Mapping[str, Scorer]]
"""Builds the scorers by benchmark where they are to work; it pickles."""

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

    def write_answers(self, lines: list[str]) -> None:
        """Append answers; they are on disk when this returns."""
        records = list(filter(self._is_new, map(Answered.model_validate_json, lines)))
        self._append(records)
        self._counts["failed"] += sum(record.status == "failed" for record in records)
        self._counts["tokens"] += sum(record.completion_tokens for record in records)

    def write_scores(self, lines: list[str]) -> None:
        """Append scores; they are on disk when this returns."""
        self._append(list(filter(self._is_new, map(Scored.model_validate_json, lines))))

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


class Room:
    """Lets in as many queries as the engines have places for, first come first served."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = places
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, width: int) -> int:
        """Wait for `width` places and take them; returns how many were taken, to be given back by `leave`."""
        width = min(width, self._places)
        if self._free >= width and not self._waiting:
            self._free -= width
            return width
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((width, turn))
        await turn
        return width

    def leave(self, width: int) -> None:
        """Give places back."""
        self._free += width
        while self._waiting and self._waiting[0][0] <= self._free:
            needed, turn = self._waiting.popleft()
            self._free -= needed
            turn.set_result(None)


class AnswerStage:
    """Answers the tasks of a shard with every policy that is still to answer them."""

    def __init__(self, open_answerer: OpenAnswerer, asking: Asking, writer: Any, places: int, widths: Mapping[str, int]) -> None:
        """Build the swarm. `places`: agent calls that may be under way; `widths`: how many a query of a policy may take."""
        self._asking = asking
        self._writer = writer
        self._room = Room(places)
        self._widths = dict(widths)
        self._outbox: list[tuple[str, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._answerer: Answerer = open_answerer()
        # A loop of our own: Ray Data's would stand still whenever its output queue is full.
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="answering", daemon=True).start()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answer a shard; returns how many queries that were. Called from several threads at once."""
        under_way: list[Future[None]] = []
        for line, policies in zip(block["task"].to_pylist(), block["policies"].to_pylist(), strict=True):
            task = Task.model_validate_json(line)
            for policy in policies.split():
                under_way.append(asyncio.run_coroutine_threadsafe(self._query(task, policy), self._loop))
        for query in under_way:
            query.result()
        return pa.table({"queries": [len(under_way)]})

    async def _query(self, task: Task, policy: str) -> None:
        name, agent = split_policy(policy)
        taken = await self._room.enter(self._widths[policy])
        started = time.perf_counter()
        try:
            outcome = await self._answerer.answer(query_of(task, policy, self._asking), name, agent)
            record = answered(task, policy, outcome)
        except Exception as error:  # agents are called here: a row that fails is kept with its error, and counted
            record = failed(task, policy, error, (time.perf_counter() - started) * 1e3)
        finally:
            self._room.leave(taken)
        await self._write(record.model_dump_json())

    async def _write(self, line: str) -> None:
        """Hand a line to the writer, together with all that wait, and return once it is on disk."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._outbox.append((line, done))
        if self._flusher is None:
            self._flusher = self._loop.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        try:
            while self._outbox:
                batch, self._outbox = self._outbox, []
                try:
                    await self._writer.write_answers.remote([line for line, _ in batch])
                except Exception as error:  # the writer is an actor: what it met belongs to every row of the batch
                    for _, done in batch:
                        done.set_exception(error)
                    continue
                for _, done in batch:
                    done.set_result(None)
        finally:
            self._flusher = None


def score_block(block: pa.Table, open_scorers: OpenScorers, writer: Any) -> pa.Table:
    """Judge a shard of answers by their labels; returns how many that were."""
    import ray

    scorers = open_scorers()
    lines: list[str] = []
    written_s = time.monotonic()
    for answer, label in zip(block["answer"].to_pylist(), block["label"].to_pylist(), strict=True):
        lines.append(score(Answered.model_validate_json(answer), Label.model_validate_json(label), scorers).model_dump_json())
        if time.monotonic() - written_s > _KEEP_S:
            ray.get(writer.write_scores.remote(lines))
            lines, written_s = [], time.monotonic()
    ray.get(writer.write_scores.remote(lines))
    return pa.table({"answers": [block.num_rows]})


def score(answer: Answered, label: Label, scorers: Mapping[str, Scorer]) -> Scored:
    """Judge one answer; a failed query is worth 0 and is no case for the scorer."""
    common = {"row_id": answer.row_id, "benchmark": answer.benchmark, "policy": answer.policy, "group": answer.group}
    judged = scorers[answer.benchmark](label, Reply(text=answer.text, step_texts=answer.step_texts))
    if answer.status == "failed":
        zero = dict.fromkeys(judged.metrics, 0.0)
        return Scored(**common, value=0.0, is_scored=False, is_failed=True, reason=answer.error or "failed", metrics=zero)
    return Scored(
        **common,
        value=judged.value,
        extracted=judged.extracted,
        reason=judged.reason,
        is_scored=judged.is_scored,
        metrics=judged.metrics,
    )
