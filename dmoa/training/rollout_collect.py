"""A whole collection of rollouts: prepare or go on, ask what has not been asked, and write the manifest.

The swarm, the queries' sources and Ray are put together in `cli` and come in as a `CollectSession`; progress goes out
through its callbacks. The same command on the same folder goes on where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from filelock import FileLock, Timeout

from dmoa.dataflow import Item, Line, Watch, actor_options, offsets, only_writer, run_pass, shard_rows, stream
from dmoa.errors import ConfigError, DmoaError
from dmoa.training.rollout_records import Counts, Manifest, RolloutQuery, SourceInfo
from dmoa.training.rollout_stage import CollectStage, OpenCollector, RolloutAsking
from dmoa.training.rollout_writer import RolloutWriter
from dmoa.training.rollouts import RolloutFolder, part_paths, read_manifest, read_part, write_whole

_ADVICE = "the same command goes on from here"
_FIXED = ("pool_fingerprint", "gate_version", "preset", "mode", "epsilon", "seed", "round")
"""What a collection that goes on must have in common with its beginning, beside its options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """How the asking is spread."""

    open_collector: OpenCollector
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
class Prepared:
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
    prepare: Callable[[], Prepared]
    """Gathers the queries; called for a new collection alone."""
    asking: RolloutAsking
    workers: Workers
    say: Callable[[str], None]
    watch: Watch
    open_ray: Callable[[], AbstractContextManager[None]]
    """Connects to Ray for as long as agents are asked; bad input is refused before that."""


def collect(session: CollectSession) -> Manifest:
    """Collect rollouts, or go on, and return the manifest, which then lies in the folder.

    Raises ConfigError for bad input, DmoaError where the pipeline stops or every query failed; what was written is kept.
    """
    root = session.folder.root
    lock = FileLock(root / ".lock", timeout=0)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"--out: another collection is writing to {str(root)!r}; wait for it, or use another folder") from None
    except OSError as error:
        raise _unwritable(root, error) from error
    try:
        return _locked(session)
    finally:
        lock.release()


def _locked(session: CollectSession) -> Manifest:
    folder = session.folder
    manifest = _begin(session)
    before = collected_ids(folder, manifest)
    left = len(pending(folder, before))
    if before:
        session.say(f"{len(before)} queries are collected, {left} are left")
    failures = _ask(session, manifest) if left else []
    counts = count(folder, manifest)
    counts = counts.model_copy(update={"failed": len(before) + left - counts.queries})
    manifest = manifest.model_copy(update={"counts": counts, "failures": failures, "ended_unix_s": time.time()})
    _write_manifest(folder, manifest)
    if left and counts.failed == left:
        raise DmoaError(f"rollouts: all {left} queries failed, the last one: {failures[-1]}; mend that, then {_ADVICE}")
    return manifest


def _begin(session: CollectSession) -> Manifest:
    """Write the queries and the manifest of a new collection, or check that one that goes on is the same."""
    folder = session.folder
    if folder.manifest.exists():
        before = read_manifest(folder.root)
        _check_same(session, before)
        if before.engines != session.manifest.engines:
            session.say(f"note: begun with engines {', '.join(before.engines)}, now {', '.join(session.manifest.engines)}")
        return before
    if part_paths(folder.root):
        raise ConfigError(f"--out: {str(folder.root)!r} holds rollouts without rollouts.json; use another folder")
    prepared = session.prepare()
    lines = [query.model_dump_json() + "\n" for query in prepared.queries]
    _write(folder.queries, "".join(lines))
    manifest = session.manifest.model_copy(update={"sources": prepared.sources})
    _write_manifest(folder, manifest)
    session.say(", ".join(f"{source.name}: {source.queries} queries" for source in prepared.sources))
    return manifest


def _check_same(session: CollectSession, before: Manifest) -> None:
    """Raise ConfigError naming what differs between a collection and the call that goes on with it."""
    now = session.manifest
    pairs: dict[str, tuple[Any, Any]] = {name: (getattr(before, name), getattr(now, name)) for name in _FIXED}
    names = dict.fromkeys((*before.options, *now.options))
    pairs |= {name: (before.options.get(name), now.options.get(name)) for name in names if name not in pairs}
    different = [f"{name}: begun with {then}, now {here}" for name, (then, here) in pairs.items() if then != here]
    if different:
        where = str(session.folder.manifest)
        raise ConfigError(f"--out: {'; '.join(different)}; repeat the settings of {where!r}, or collect into another folder")


def collected_ids(folder: RolloutFolder, manifest: Manifest) -> set[str]:
    """Return the queries whose rows are on disk. Raises ConfigError for a damaged or foreign part."""
    found: set[str] = set()
    for path in part_paths(folder.root):
        part = read_part(path, fingerprint=manifest.pool_fingerprint, columns=("query_id",))
        ids = set(part["query_id"].unique().to_pylist())
        if twice := sorted(found & ids):
            raise ConfigError(f"{path}: query_id: value seen: {twice[0]}, which an earlier part has; remove one of the two files")
        found |= ids
    return found


def pending(folder: RolloutFolder, done: set[str]) -> list[Item]:
    """Return the lines of the queries that have no rows."""
    lines = offsets(folder.queries)
    return [(Line(str(folder.queries), at),) for at, line in lines if RolloutQuery.model_validate_json(line).query_id not in done]


def count(folder: RolloutFolder, manifest: Manifest) -> Counts:
    """Count what lies on disk."""
    steps: set[tuple[str, int]] = set()
    rows = 0
    for path in part_paths(folder.root):
        part = read_part(path, fingerprint=manifest.pool_fingerprint, columns=("query_id", "step"))
        rows += part.num_rows
        steps.update(zip(part["query_id"].to_pylist(), part["step"].to_pylist(), strict=True))
    return Counts(queries=len({query for query, _ in steps}), steps=len(steps), rows=rows)


def silent_agents(folder: RolloutFolder, manifest: Manifest) -> list[str]:
    """Return the agents that were asked, and of which no reply lies on disk: every call of them failed."""
    asked: set[str] = set()
    heard: set[str] = set()
    for path in part_paths(folder.root):
        part = read_part(path, fingerprint=manifest.pool_fingerprint, columns=("agent", "status"))
        asked.update(part["agent"].unique().to_pylist())
        heard.update(part.filter(pc.equal(part["status"], "ok"))["agent"].unique().to_pylist())
    return [name for name in manifest.agents if name in asked - heard]


def _ask(session: CollectSession, manifest: Manifest) -> list[str]:
    """Ask the queries that have no rows; returns what the failed ones met."""
    folder, workers = session.folder, session.workers
    with session.open_ray(), only_writer(RolloutWriter, str(folder.root), advice=_ADVICE) as writer:
        import ray

        # Only now no writer of a session that was killed can add to what is there.
        items = pending(folder, collected_ids(folder, manifest))
        in_flight = max(1, workers.places // workers.width)
        per_shard = shard_rows(len(items), 1, num_actors=workers.count, places=in_flight)
        stage = (workers.open_collector, session.asking, writer, workers.places, workers.width)
        actors = actor_options(count=workers.count, num_gpus=workers.num_gpus, env=workers.env)
        dataset = stream(("query",), items, per_shard).map_batches(CollectStage, fn_constructor_args=stage, **actors)
        try:
            run_pass(dataset, writer, "collecting", len(items), session.watch, advice=_ADVICE)
        finally:
            failures: list[str] = ray.get(writer.flush.remote())
    return failures


def _write_manifest(folder: RolloutFolder, manifest: Manifest) -> None:
    _write(folder.manifest, manifest.model_dump_json(indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--out: cannot write {str(path)!r}: {error}; name a folder that can be written")
