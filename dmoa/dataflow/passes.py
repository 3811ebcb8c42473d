"""A pass over rows on Ray Data: how it is cut into shards, its actors, its only writer, and its run to the end with progress.

Ray Data holds back its reading while the engines are full, so memory stays bounded; whatever is written is written by one
actor on the driver's node as soon as it exists, so a pass that was killed goes on with what has not been written.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dmoa.dataflow.lines_source import drain
from dmoa.errors import DmoaError

T = TypeVar("T")
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
    """Such as `answering` or `scoring`."""
    done: int
    total: int
    """Rows of this pass, those of earlier sessions not counted."""
    failed: int
    completion_tokens: int
    elapsed_s: float


Watch = Callable[[Progress], None]


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
            size=count, enable_true_multi_threading=True, max_concurrent_calls_per_actor=SHARDS_UNDER_WAY
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
        raise DmoaError(f"the writer of the run is gone: {_reason(error)}; {advice}") from error
    finally:
        ray.kill(writer)


def run_pass(dataset: ray.data.Dataset, writer: Any, stage: str, total: int, watch: Watch, *, advice: str) -> None:
    """Run a pass to its end, reporting progress by the writer's counts. Raises DmoaError, with `advice`, for what stopped it."""
    quiet()

    def work() -> BaseException | None:
        try:
            for _ in drain(dataset):
                pass
        except BaseException as error:
            return error
        return None

    started = time.monotonic()
    failure = in_background(work, stage, lambda: _report(writer, stage, total, started, watch))
    if failure is not None:
        raise DmoaError(f"{stage} stopped: {_reason(failure)}; {advice}") from failure


def in_background(work: Callable[[], T], name: str, tick: Callable[[], None] = lambda: None) -> T:
    """Run something of Ray's in a thread and return its result or raise its failure; `tick` is called now and then.

    A signal ends the wait at once, whatever Ray does: in the main thread Ray Data would hold Ctrl-C back, and Ray Train takes
    it over and ends the process with status 0. What the thread still calls then fails, once Ray is shut down.
    """
    found: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        tick()
    if failures:
        raise failures[0]
    return found[0]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[-2000:]


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
