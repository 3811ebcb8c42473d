"""Collects rollouts on Ray Data: queries go through a swarm with exploration, and every agent's reply lands in Parquet parts.

A part is written whole and then renamed, so a session that is killed leaves nothing torn, loses only the seconds since the last
part, and goes on where it stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from dmoa.config import Config
from dmoa.core.features import Preset
from dmoa.dataflow import (
    AdmissionControl,
    BackgroundLoop,
    BatchedWriter,
    Item,
    Line,
    Watch,
    actor_options,
    only_writer,
    run_pass,
    shard_rows,
    stream,
)
from dmoa.errors import ConfigError, DmoaError
from dmoa.policies.exploring import ExploringPolicy
from dmoa.policies.registry import PolicyContext, build_policy
from dmoa.protocols import OpenSwarm, final_answer
from dmoa.reading import offsets
from dmoa.storage import is_draft, only_one, unwritable, write_whole
from dmoa.swarm import Swarm
from dmoa.training.outcomes import rollout_trace_id
from dmoa.training.rollouts import (
    Counts,
    Manifest,
    RolloutFolder,
    RolloutQuery,
    SourceInfo,
    part_of,
    part_paths,
    read_manifest,
    read_part,
    table_of,
)
from dmoa.types import Event, Limits, Query
from dmoa.validation import redact_text

PART_BYTES = 64 << 20
"""A part is written as soon as so much waits for it."""
_PAUSE_SHARE = 0.02
"""Longest wait for a part, as a share of the session so far."""
_LOCK_S = 60.0
_MAX_FAILURES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What became of one query."""

    query_id: str
    table: pa.Table | None = None
    """Its rows; None where the query failed."""
    error: str = ""
    """Why it failed."""


class RolloutWriter:
    """An actor on the driver's node; counts what it is given for the progress bar."""

    def __init__(self, root: str, first_pause_s: float = 2.0) -> None:
        """Take the collection's write lock, waiting for the writer of a session that was killed a moment ago.

        `first_pause_s`: shortest wait between two parts.
        """
        self._first_pause_s = first_pause_s
        self._folder = RolloutFolder(Path(root))
        self._folder.parts.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._folder.root / ".writing.lock")
        self._lock.acquire(timeout=_LOCK_S)
        for draft in (path for path in self._folder.parts.glob(".*.draft") if is_draft(path.name)):
            draft.unlink()
        self._number = 1 + max((_number(path) for path in self._folder.parts.glob("part-*.parquet")), default=-1)
        self._counts = {"rows": 0, "failed": 0, "tokens": 0}
        self._failures: deque[str] = deque(maxlen=_MAX_FAILURES)
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        self._seen: set[str] = set()
        self._started_s = self._written_s = time.monotonic()

    def ready(self) -> None:
        """Return once this is the collection's only writer."""

    def take(self, collected: list[Collected]) -> None:
        """Take queries; they are on disk after the next part, at the latest after `flush`."""
        for query in collected:
            if query.query_id in self._seen:  # Ray Data runs a shard again whose worker died half-way
                continue
            self._seen.add(query.query_id)
            self._counts["rows"] += 1
            if query.table is None:
                self._counts["failed"] += 1
                self._failures.append(f"{query.query_id}: {query.error}")
                continue
            self._counts["tokens"] += sum(query.table["completion_tokens"].to_pylist())
            self._waiting.append(query.table)
            self._waiting_bytes += query.table.nbytes
        self._write_if_due()

    def counts(self) -> dict[str, int]:
        """Return queries taken, failed ones among them, and completion tokens; writes a part if it is time."""
        self._write_if_due()
        return dict(self._counts)

    def flush(self) -> list[str]:
        """Write what waits, and return the newest failures, each as `query_id: error`."""
        self._write()
        return list(self._failures)

    def _write_if_due(self) -> None:
        now = time.monotonic()
        pause_s = max(self._first_pause_s, _PAUSE_SHARE * (now - self._started_s))
        if self._waiting_bytes >= PART_BYTES or now - self._written_s >= pause_s:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            write_whole(self._folder.parts / f"part-{self._number:06d}.parquet", part_of(self._waiting))
            self._number += 1
            self._waiting, self._waiting_bytes = [], 0
        self._written_s = time.monotonic()


def _number(path: Path) -> int:
    """Return the number of a part; -1 for a file with another name."""
    digits = path.stem.removeprefix("part-")
    return int(digits) if digits.isdigit() else -1


class ExploringSwarm:
    """A swarm of this process that asks more agents than the gate would; implements `SwarmClient`."""

    def __init__(self, swarm: Swarm, epsilon: float | None) -> None:
        """`epsilon` as in `ExploringPolicy`."""
        self._swarm = swarm
        self._epsilon = epsilon

    def ask(self, query: Query, policy: str = "dmoa", agent: str | None = None) -> AsyncGenerator[Event]:
        """Answer one query as `Swarm.ask`, by a policy and exploration; its steps have decisions and inputs of the gate."""
        swarm = self._swarm
        context = PolicyContext(config=swarm.config, router=swarm.router, encoder=swarm.encoder, agent=agent)
        budget = swarm.config.limits.budget_tokens
        return swarm.follow(query, ExploringPolicy(build_policy(policy, context), epsilon=self._epsilon, budget_tokens=budget))

    async def close(self) -> None:
        """Stop the engines."""
        await self._swarm.close()


def width(config: Config, epsilon: float | None) -> int:
    """Return the agent calls that one query may have under way."""
    everyone = len(config.agents)
    return everyone if epsilon is None else min(config.gate.activation.max_agents + 1, everyone)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutAsking:
    """How every query of a collection is asked."""

    seed: int
    round: int
    limits: Limits
    """Budgets of a query; one with more stages than steps allowed still runs all its stages."""
    preset: Preset
    fingerprint: str
    """Of the pool."""


def query_of_rollout(asked: RolloutQuery, asking: RolloutAsking) -> Query:
    """Return the query to be asked; its id, and with it sampling and exploration, depends on query, seed and round alone."""
    limits = replace(asking.limits, max_steps=max(asking.limits.max_steps, len(asked.stages)))
    return Query(
        trace_id=rollout_trace_id(asked.query_id, asking.seed, asking.round),
        query_id=asked.query_id,
        text=asked.text,
        limits=limits,
        stages=asked.stages,
        is_streamed=False,
    )


class CollectStage:
    """Answers the queries of a shard and hands their rows to the writer."""

    def __init__(self, open_swarm: OpenSwarm, asking: RolloutAsking, writer: Any, places: int, width: int) -> None:
        """Build the swarm. `places`: agent calls that may be under way; `width`: how many one query may take."""
        self._asking = asking
        self._width = width
        self._room = AdmissionControl(places)
        self._outbox: BatchedWriter[Collected] = BatchedWriter(writer.take.remote)
        self._swarm = open_swarm()
        self._loop = BackgroundLoop()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answer a shard; returns how many queries that were. Called from several threads at once."""
        return pa.table({"queries": [self._loop.run_all(self._queries(block))]})

    def _queries(self, block: pa.Table) -> Iterator[Coroutine[Any, Any, None]]:
        for line in block["query"].to_pylist():
            yield self._query(RolloutQuery.model_validate_json(line))

    async def _query(self, asked: RolloutQuery) -> None:
        taken = await self._room.enter(self._width)
        try:
            answer = await final_answer(self._swarm, query_of_rollout(asked, self._asking), "dmoa")
        except Exception as error:  # agents are called here: a query that fails is counted with its error, and asked again later
            collected = Collected(query_id=asked.query_id, error=redact_text(f"{type(error).__name__}: {error}"))
        else:
            asking = self._asking
            table = table_of(asked, answer, preset=asking.preset, seed=asking.seed, fingerprint=asking.fingerprint)
            collected = Collected(query_id=asked.query_id, table=table)
        finally:
            self._room.leave(taken)
        await self._outbox.put(collected)


_ADVICE = "the same command goes on from here"
_FIXED = ("pool_fingerprint", "gate_version", "preset", "mode", "epsilon", "seed", "round")
"""What a collection that goes on must have in common with its beginning, beside its options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectWorkers:
    """How the asking is spread."""

    open_swarm: OpenSwarm
    count: int = 1
    """Actors, each with a swarm of its own."""
    places: int = 16
    """Agent calls that may be under way in one actor: enough to keep its engines full."""
    width: int = 1
    """Agent calls that one query may have under way."""
    num_gpus: float = 0.0
    """Per actor."""
    env: Mapping[str, str]
    """Environment of the actors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedQueries:
    """The queries of a new collection."""

    queries: Iterable[RolloutQuery]
    """In the order in which they are to be asked; every id once."""
    sources: list[SourceInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectSession:
    """One call of a collection, put together."""

    folder: RolloutFolder
    manifest: Manifest
    """As a new collection would begin with it, its sources still empty."""
    prepare: Callable[[], CollectedQueries]
    """Gathers the queries; called for a new collection alone."""
    recheck: Callable[[Manifest], None] = lambda before: None
    """Refuses to go on with a collection whose queries have changed since; called with its manifest."""
    asking: RolloutAsking
    workers: CollectWorkers
    say: Callable[[str], None]
    watch: Watch
    open_ray: Callable[[], AbstractContextManager[None]]
    """Connects to Ray for as long as agents are asked; bad input is refused before that."""


def collect(session: CollectSession) -> Manifest:
    """Collect rollouts, or go on, and return the manifest, which then lies in the folder.

    Raises ConfigError for bad input, DmoaError where the pipeline stops or every query failed; what was written is kept.
    """
    folder = session.folder
    with only_one(folder.root, "collection"):
        manifest = _begin(session)
        before = collected_ids(folder, manifest)
        left = len(pending(folder, before))
        if before:
            session.say(f"{len(before)} queries are collected, {left} are left")
        failures = _ask(session, manifest) if left else []
        counts = count_rows(folder, manifest)
        counts = counts.model_copy(update={"failed": len(before) + left - counts.queries})
        manifest = manifest.model_copy(update={"counts": counts, "failures": failures, "ended_unix_s": time.time()})
        _write(folder.manifest, manifest.model_dump_json(indent=2) + "\n")
        if left and counts.failed == left:
            raise DmoaError(f"rollouts: all {left} queries failed, the last one: {failures[-1]}; mend that, then {_ADVICE}")
        return manifest


def _begin(session: CollectSession) -> Manifest:
    """Write the queries and the manifest of a new collection, or check that one that goes on is the same."""
    folder = session.folder
    if folder.manifest.exists():
        before = read_manifest(folder.root)
        _check_same(session, before)
        session.recheck(before)
        if before.engines != session.manifest.engines:
            session.say(f"note: begun with engines {', '.join(before.engines)}, now {', '.join(session.manifest.engines)}")
        return before
    if part_paths(folder.root):
        raise ConfigError(f"--out: {str(folder.root)!r} holds rollouts without rollouts.json; use another folder")
    prepared = session.prepare()
    lines = [query.model_dump_json() + "\n" for query in prepared.queries]
    _write(folder.queries, "".join(lines))
    manifest = session.manifest.model_copy(update={"sources": prepared.sources})
    _write(folder.manifest, manifest.model_dump_json(indent=2) + "\n")
    session.say(", ".join(f"{source.name}: {source.queries} queries" for source in prepared.sources))
    return manifest


def _check_same(session: CollectSession, before: Manifest) -> None:
    """Raise ConfigError naming what differs between a collection and the call that goes on with it."""
    now = session.manifest
    pairs: dict[str, tuple[Any, Any]] = {name: (getattr(before, name), getattr(now, name)) for name in _FIXED}
    # What the beginning does not name, an earlier dmoa did not write down.
    pairs |= {name: (then, now.options.get(name)) for name, then in before.options.items() if name not in pairs}
    different = [f"{name}: begun with {then}, now {here}" for name, (then, here) in pairs.items() if then != here]
    if different:
        where = str(session.folder.manifest)
        raise ConfigError(f"--out: {'; '.join(different)}; repeat the settings of {where!r}, or collect into another folder")


def _parts(folder: RolloutFolder, manifest: Manifest, *columns: str) -> Iterator[tuple[Path, pa.Table]]:
    return ((path, read_part(path, fingerprint=manifest.pool_fingerprint, columns=columns)) for path in part_paths(folder.root))


def collected_ids(folder: RolloutFolder, manifest: Manifest) -> set[str]:
    """Return the queries whose rows are on disk. Raises ConfigError for a damaged or foreign part."""
    found: set[str] = set()
    for path, part in _parts(folder, manifest, "query_id"):
        ids = set(part["query_id"].unique().to_pylist())
        if twice := sorted(found & ids):
            raise ConfigError(f"{path}: query_id is {twice[0]}, which an earlier part has; remove one of the two files")
        found |= ids
    return found


def pending(folder: RolloutFolder, done: set[str]) -> list[Item]:
    """Return the lines of the queries that have no rows."""
    lines = offsets(folder.queries)
    return [(Line(str(folder.queries), at),) for at, line in lines if RolloutQuery.model_validate_json(line).query_id not in done]


def count_rows(folder: RolloutFolder, manifest: Manifest) -> Counts:
    """Count what lies on disk."""
    steps: set[tuple[str, int]] = set()
    rows = 0
    for _, part in _parts(folder, manifest, "query_id", "step"):
        rows += part.num_rows
        steps.update(zip(part["query_id"].to_pylist(), part["step"].to_pylist(), strict=True))
    return Counts(queries=len({query for query, _ in steps}), steps=len(steps), rows=rows)


def silent_agents(folder: RolloutFolder, manifest: Manifest) -> dict[str, str]:
    """Return the agents that were asked, and of which no reply lies on disk, each with what its last call met."""
    met: dict[str, str] = {}
    heard: set[str] = set()
    for _, part in _parts(folder, manifest, "agent", "status", "error"):
        met.update(zip(part["agent"].to_pylist(), part["error"].to_pylist(), strict=True))
        heard.update(part.filter(pc.equal(part["status"], "ok"))["agent"].unique().to_pylist())
    return {name: met[name] for name in manifest.agents if name in met.keys() - heard}


def _ask(session: CollectSession, manifest: Manifest) -> list[str]:
    """Ask the queries that have no rows; returns what the failed ones met."""
    folder, workers = session.folder, session.workers
    with session.open_ray(), only_writer(RolloutWriter, str(folder.root), advice=_ADVICE) as writer:
        import ray

        # Only now no writer of a session that was killed can add to what is there.
        items = pending(folder, collected_ids(folder, manifest))
        in_flight = max(1, workers.places // workers.width)
        per_shard = shard_rows(len(items), 1, num_actors=workers.count, places=in_flight)
        stage = (workers.open_swarm, session.asking, writer, workers.places, workers.width)
        actors = actor_options(count=workers.count, num_gpus=workers.num_gpus, env=workers.env)
        dataset = stream(("query",), items, per_shard).map_batches(CollectStage, fn_constructor_args=stage, **actors)
        try:
            run_pass(dataset, writer, "collecting", len(items), session.watch, advice=_ADVICE)
        finally:
            failures: list[str] = ray.get(writer.flush.remote())
    return failures


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise unwritable(path, error) from error
