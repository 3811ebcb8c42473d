"""One pass over many rows on Ray Data: bounded in memory, resumable, with progress; rows come from files a shard at a time.

Evaluation and rollouts run their answering on it. The driver keeps only where each line begins, and shards are read on its node,
where the files of a run lie.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO, Generic, TypeVar

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dmoa.errors import DISK_ERRORS, DmoaError

_READERS = 2


@dataclass(frozen=True, slots=True)
class Line:
    """Where a line begins."""

    path: str
    offset: int
    """In bytes."""


Cell = str | Line
"""A value, or the line that holds it."""
Item = tuple[Cell, ...]
"""One row: a cell per column."""


def line_table(columns: Sequence[str], items: Sequence[Item]) -> pa.Table:
    """Return items as `read_lines` takes them: per column the texts, or the paths and the bytes where lines begin."""

    def column(cells: Sequence[Cell]) -> pa.StructArray:
        names = pa.array([cell.path if isinstance(cell, Line) else cell for cell in cells], pa.string()).dictionary_encode()
        starts = pa.array([cell.offset if isinstance(cell, Line) else None for cell in cells], pa.int64())
        return pa.StructArray.from_arrays([names, starts], ["name", "start"])

    return pa.table({name: column([item[number] for item in items]) for number, name in enumerate(columns)})


def read_lines(block: pa.Table) -> pa.Table:
    """Return a block of a `line_table` with the lines in place of where they begin, without their line ends."""
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}

        def text(cell: dict[str, Any]) -> str:
            name, start = cell["name"], cell["start"]
            if start is None:
                return str(name)
            if name not in files:
                files[name] = stack.enter_context(Path(name).open("rb"))
            files[name].seek(start)
            return files[name].readline().decode("utf-8").rstrip("\n")

        return pa.table({name: [text(cell) for cell in block[name].to_pylist()] for name in block.column_names})


def stream(columns: Sequence[str], items: Sequence[Item], shard_rows: int) -> ray.data.Dataset:
    """Return a dataset over the items, a shard of so many rows per block; an empty block where there are none."""
    shards = [line_table(columns, items[i : i + shard_rows]) for i in range(0, max(1, len(items)), shard_rows)]
    return on_this_node(shards, read_lines)


def on_this_node(blocks: Sequence[pa.Table], read: Callable[[pa.Table], pa.Table]) -> ray.data.Dataset:
    """Return what `read` makes of each block, of which there is one at least, on this node, where the files are."""
    # No CPU: a head node of a cluster may have none to give, and reading takes next to nothing.
    # Not `from_arrow`, which asks every block for its size by a task of its own, wherever there is a CPU.
    return ray.data.from_blocks(list(blocks)).map_batches(
        read,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        compute=TaskPoolStrategy(size=min(_READERS, len(blocks))),
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )


OVERCOMMIT = 2
"""Agent calls let in per place of the engines' batches: the early finishers of a step leave places empty until its last
agent ends, and calls that wait fill them."""


class AdmissionControl:
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


T = TypeVar("T")


class BackgroundLoop:
    """An event loop in a thread of its own: Ray Data's would stand still whenever its output queue is full."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="answering", daemon=True).start()

    def run_all(self, work: Iterable[Coroutine[Any, Any, None]]) -> int:
        """Run coroutines side by side to their ends and return how many; raises what one of them raised.

        May be called from several threads at once.
        """
        under_way = [asyncio.run_coroutine_threadsafe(part, self._loop) for part in work]
        for part in under_way:
            part.result()
        return len(under_way)


class BatchedWriter(Generic[T]):
    """Hands items to a writer; those that come while a hand-over is under way go together in the next."""

    def __init__(self, send: Callable[[list[T]], Awaitable[object]]) -> None:
        """`send` returns once the items are safe."""
        self._send = send
        self._waiting: list[tuple[T, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None

    async def put(self, item: T) -> None:
        """Return once the item is safe; raises what the writer met."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting.append((item, done))
        if self._flusher is None:
            self._flusher = loop.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    await self._send([item for item, _ in batch])
                except Exception as error:  # the writer is an actor: what it met belongs to every item of the batch
                    for _, done in batch:
                        done.set_exception(error)
                    continue
                for _, done in batch:
                    done.set_result(None)
        finally:
            self._flusher = None


SHARDS_UNDER_WAY = 4
"""Shards that one answering actor works on at once."""
_CARRIED = ("controller_failure", "cause", "_base_exc")
"""Attributes of Ray's errors with the error that they were made of."""
_MAX_SHARDS = 500
"""Shards of a pass, however many rows it has (unless so many would leave workers idle): Ray keeps some 20 KiB of each, its
task and its statistics, in the driver until the pass ends."""
_POLL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class PassProgress:
    """How far a pass is."""

    stage: str
    """Such as `answering` or `scoring`."""
    done: int
    total: int
    """Rows of this pass, those of earlier sessions not counted."""
    failed: int
    completion_tokens: int
    elapsed_s: float


Watch = Callable[[PassProgress], None]


def shard_rows(num_rows: int, queries_per_row: int, *, num_actors: int, places: int) -> int:
    """Return the rows of a shard: enough that the shards under way fill every place twice, few enough that actors share them."""
    fill = -(-2 * places // (SHARDS_UNDER_WAY * queries_per_row))
    share = -(-num_rows // (num_actors * SHARDS_UNDER_WAY))
    return bounded(min(fill, share), num_rows, num_actors * SHARDS_UNDER_WAY)


def bounded(wanted: int, num_rows: int, hands: int) -> int:
    """Return the wanted rows of a shard, raised as far as it takes for a bounded number of shards; `hands` work at once."""
    return max(1, wanted, -(-num_rows // max(_MAX_SHARDS, 4 * hands)))


def actor_options(*, count: int, num_gpus: float, env: Mapping[str, str]) -> dict[str, Any]:
    """Return what `map_batches` needs to run an answering stage in `count` actors, several shards at once in each."""
    return {
        "batch_size": None,
        "batch_format": "pyarrow",
        "compute": ActorPoolStrategy(
            size=count,
            enable_true_multi_threading=True,
            max_concurrent_calls_per_actor=SHARDS_UNDER_WAY,
            max_tasks_in_flight_per_actor=SHARDS_UNDER_WAY,  # Ray's twice as many all go to the first actor that is up
        ),
        "num_cpus": 1,
        "num_gpus": num_gpus or None,
        "runtime_env": {"env_vars": dict(env)},
    }


@contextmanager
def only_writer(kind: type, *args: Any, advice: str) -> Iterator[Any]:
    """Run a pass's only writer, an actor on this node; `kind` has methods `ready` and `counts`.

    Raises DmoaError, with `advice` on how to go on, where the writer cannot be had or is lost.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # No task events: Ray's control service would keep one for every write.
    options = {"num_cpus": 0, "scheduling_strategy": here, "enable_task_events": False}
    writer = ray.remote(kind).options(**options).remote(*args)
    try:
        ray.get(writer.ready.remote())
        yield writer
    except RayError as error:
        raise stopped_by(error, "the writer of the run is gone", advice) from error
    finally:
        ray.kill(writer)


def run_pass(dataset: ray.data.Dataset, writer: Any, stage: str, total: int, watch: Watch, *, advice: str) -> None:
    """Run a pass to its end, reporting progress by the writer's counts. Raises DmoaError, with `advice`, for what stopped it."""
    quiet()

    def work() -> None:
        try:
            for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                pass  # the writer has everything
        except BaseException as error:
            raise stopped_by(error, f"{stage} stopped", advice) from error

    started = time.monotonic()
    in_background(work, stage, lambda: _report(writer, stage, total, started, watch))


def in_background(work: Callable[[], T], name: str, tick: Callable[[], None] = lambda: None) -> T:
    """Run something of Ray's in a thread and return its result or raise its failure; `tick` is called now and then.

    A signal ends the wait at once, whatever Ray does: in the main thread Ray Data would hold Ctrl-C back, and Ray Train takes
    it over and ends the process with status 0. What the thread still calls then fails, once Ray is shut down.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        tick()
    return outcome.result()


def stopped_by(error: BaseException, words: str, advice: str) -> Exception:
    """Return what to raise for a failure: of a remote task its cause, whose text is no traceback; a full disk as it is."""
    cause = error
    while (inner := _inner(cause)) is not None:
        cause = inner
    if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
        return cause
    return DmoaError(f"{words}: {' '.join(str(cause).split())[-2000:] or type(cause).__name__}; {advice}")


def _inner(error: BaseException) -> BaseException | None:
    """Return what an error of Ray's carries: of a task its cause, of a training its first worker's error."""
    workers = dict(getattr(error, "worker_failures", None) or {})
    for found in (*(workers[rank] for rank in sorted(workers)), *(getattr(error, name, None) for name in _CARRIED)):
        if isinstance(found, BaseException):
            return found
    return None


def _report(writer: Any, stage: str, total: int, started: float, watch: Watch) -> None:
    counts = ray.get(writer.counts.remote())
    watch(
        PassProgress(
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
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what stops a pass is raised, and shown once
