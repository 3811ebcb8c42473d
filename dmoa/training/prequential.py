"""A stream of queries that teaches the gate which answers it, prequentially: the counted answer comes before what it teaches.

`Stream` is the only way from a query to an update here: it asks a batch of queries by one version of the gate, has their answers
kept, and makes the lesson of those answers alone. `run_streams` is what one worker does, in process or under Ray Train: the first
one asks, all of them learn. Queries have no labels, and nothing here could read any. Source: paper (test-time adaptation by the
first queries); prequential order ours, after Dawid 1984.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from dmoa import checkpoint
from dmoa.agents.pool import build_other_gate, build_pool_gate
from dmoa.checkpoint import Checkpoint
from dmoa.config import Config
from dmoa.core.features import Preset
from dmoa.core.gate import Gate
from dmoa.errors import ConfigError, DmoaError
from dmoa.protocols import final_answer
from dmoa.routing import LocalRouter
from dmoa.swarm import Swarm
from dmoa.training.adapt import Adapter, episodes_of_table, with_credit
from dmoa.training.collect import ExploringSwarm
from dmoa.training.dataset import Episodes, read_episodes, read_manifests
from dmoa.training.distributed import WorkerGroup
from dmoa.training.options import AdaptSettings
from dmoa.training.outcomes import Outcome, credit_replies
from dmoa.training.rollouts import FileRecord, RolloutQuery, table_of
from dmoa.types import Answer, Query


class AdaptingSwarm:
    """A swarm of this process whose gate can be replaced between two queries."""

    def __init__(self, swarm: Swarm, router: LocalRouter) -> None:
        """`router`: the swarm's own."""
        self._swarm, self.install = ExploringSwarm(swarm, epsilon=None), router.install

    async def ask(self, query: Query) -> Answer:
        """Answer by the gate's own choice, and ask everybody else beside it, to learn from. Raises DmoaError."""
        return await final_answer(self._swarm, query, "dmoa")

    async def close(self) -> None:
        """Stop the engines."""
        await self._swarm.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A query that was answered for the record, or failed, by the gate as it was before it learnt of it."""

    query: RolloutQuery
    version: str
    """The gate's, when it was asked; empty where an older session did not keep it."""
    answer: Answer | None = None
    error: DmoaError | None = None
    table: pa.Table | None = None
    """The rows of its rollout; None where it failed."""
    wall_ms: float = 0.0
    is_new: bool = True
    """Whether it was asked just now, or kept by a session before."""


class StreamUpdate(FileRecord):
    """One update of a stream, and the queries before it: a line of `updates.jsonl`."""

    number: int
    """Counts batches, from 1."""
    queries: list[str]
    answered_by: str
    """Version that gave the counted answers."""
    version: str
    """Version after the update."""
    loss: float | None
    used: int
    skipped: dict[str, int]
    replayed: int
    drift: float
    """KL(start's routing || this one) over replayed steps, nats."""
    distance: float
    refitted: bool
    outcomes: int
    """Queries of the batch with a known outcome."""


Keep = Callable[[str, Counted | StreamUpdate], None]
"""Keeps what a stream, by name, has come to: a counted answer, always before the update that learns of it; then the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamJob:
    """Streams of the same queries from several starts; pickles."""

    config: Config
    open_swarm: Callable[[], AdaptingSwarm]
    queries: tuple[tuple[RolloutQuery, Query], ...]
    """In the order in which they are asked."""
    starts: Mapping[str, Path | None]
    """Name -> checkpoint to begin with; None: untrained weights."""
    out: Path
    """The adapted gate of a start is written to `gates/NAME-ttt`, the start itself to `gates/NAME`."""
    keep: Keep
    kept: Mapping[str, Mapping[str, Counted]] = field(default_factory=dict)
    """By start and query: what a session before has kept."""
    settings: AdaptSettings
    every: int = 1
    """Queries of an update."""
    replay: tuple[Path, ...] = ()
    """Rollouts of old domains, for starts that were trained."""
    outcomes: tuple[Outcome, ...] = ()
    preset: Preset
    fingerprint: str


class Stream:
    """Asks, keeps, learns: in this order, and there is no other way in."""

    def __init__(self, name: str, job: StreamJob, swarm: AdaptingSwarm, adapter: Adapter, world: WorkerGroup) -> None:
        """`adapter`: of the start called `name`; the other workers of `world` follow it."""
        self._name, self._job, self._swarm, self._adapter, self._world = name, job, swarm, adapter, world
        self._batches = 0
        self._install()

    def _install(self) -> None:
        gate, record = self._adapter.candidate()
        self.version = record.version
        self._swarm.install(record.version, gate)

    async def run(self, tick: Callable[[], None] = lambda: None) -> None:
        """Go through all queries; `tick` is called after every update.

        Raises ConfigError where a kept answer is not one that this stream would have given.
        """
        queries, every = self._job.queries, self._job.every
        for first in range(0, len(queries), every):
            counted = await asyncio.gather(*(self._counted(*pair) for pair in queries[first : first + every]))
            for one in counted:
                if one.is_new:
                    self._job.keep(self._name, one)
            self._learn(counted)
            tick()

    async def _counted(self, asked: RolloutQuery, query: Query) -> Counted:
        """Answer one query by the gate as it is."""
        version = self.version
        kept = self._job.kept.get(self._name, {}).get(asked.query_id)
        if kept is not None:
            if kept.version not in ("", version):
                raise ConfigError(
                    f"--out: {asked.query_id!r} was answered by gate {kept.version}, and the same stream comes to {version} now; "
                    "its options, replay or code have changed; use another folder"
                )
            return kept
        started = time.perf_counter()
        try:
            answer = await self._swarm.ask(query)
        except DmoaError as error:
            return Counted(query=asked, version=version, error=error, wall_ms=(time.perf_counter() - started) * 1e3)
        if answer.gate_version != version:
            raise DmoaError(f"adapt: {asked.query_id!r} was answered by gate {answer.gate_version}; expected {version}")
        job = self._job
        table = table_of(asked, answer, preset=job.preset, seed=0, fingerprint=job.fingerprint)
        return Counted(query=asked, version=version, answer=answer, table=table)

    def _learn(self, counted: Sequence[Counted]) -> None:
        """Update by what was counted, with all workers, and install what comes of it."""
        before, self._batches = self.version, self._batches + 1
        lessons = [self._lesson(one) for one in counted if one.table is not None]
        found = self._adapter.learn(self._world.share(lessons))
        self._install()
        update = {name: getattr(found, name) for name in StreamUpdate.model_fields if hasattr(found, name)}
        told = sum(bool(np.isfinite(one.outcome_NA).any()) for one in lessons)
        update |= {"number": self._batches, "queries": [one.query.query_id for one in counted], "outcomes": told}
        update |= {"answered_by": before, "version": self.version}
        self._job.keep(self._name, StreamUpdate.model_validate(update))

    def _lesson(self, one: Counted) -> Episodes:
        assert one.table is not None
        episode = episodes_of_table(one.table, one.query, self._adapter.spec)
        mine = [outcome for outcome in self._job.outcomes if outcome.query_id == one.query.query_id]
        credited = credit_replies(mine, one.table, seed=0, round_=0).credit if mine else {}
        return with_credit(episode, {agent: reward for (_, agent), reward in credited.items()})


def run_streams(job: StreamJob, world: WorkerGroup, tick: Callable[[], None] = lambda: None) -> None:
    """Run all streams, as one worker of some. The first writes the gates; all hold the same weights at the end.

    `tick` is called after every update.
    """
    swarm = job.open_swarm() if world.rank == 0 else None
    for name, folder in job.starts.items():
        gate, record = start_gate(job.config, folder)
        replay = None
        if folder and job.replay:
            read_manifests(job.replay, gate.spec, job.fingerprint)
            replay = read_episodes(job.replay, gate.spec, job.fingerprint, on_ray=False)
        adapter = Adapter(gate, record, replay, job.settings, world)
        if swarm is None:
            while (lessons := world.share(None)) is not None:
                adapter.learn(lessons)
            continue
        asyncio.run(_led(name, job, swarm, adapter, world, (gate, record), tick))
        world.share(None)


async def _led(
    name: str,
    job: StreamJob,
    swarm: AdaptingSwarm,
    adapter: Adapter,
    world: WorkerGroup,
    start: tuple[Gate, Checkpoint],
    tick: Callable[[], None],
) -> None:
    try:
        await Stream(name, job, swarm, adapter, world).run(tick)
    finally:
        if name == list(job.starts)[-1]:
            await swarm.close()
    checkpoint.save(job.out / "gates" / name, *start)
    checkpoint.save(job.out / "gates" / f"{name}-ttt", *adapter.candidate())


def adapt_on_ray(job: StreamJob, num_workers: int, tick: Callable[[], None]) -> None:
    """Run streams with Ray Train's workers; `tick` is called now and then. Raises DmoaError where they stop."""
    from dmoa.training.ray_train import fit_on_ray

    fit_on_ray(_worker, {"job": job}, str(job.out.absolute() / "state"), num_workers, tick=tick)


def _worker(config: dict[str, StreamJob]) -> str | None:
    """Be one Ray Train worker of streams."""
    from dmoa.training.ray_train import world_of_worker

    run_streams(config["job"], world_of_worker())
    return None


def start_gate(config: Config, folder: Path | None) -> tuple[Gate, Checkpoint]:
    """Return the gate of a start. Raises CheckpointError for one of another pool."""
    if folder is not None:
        return build_other_gate(config, folder)
    return build_pool_gate(config.model_copy(update={"gate": config.gate.model_copy(update={"checkpoint": None})}))
