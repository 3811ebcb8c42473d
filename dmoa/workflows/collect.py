"""Runs a collection of rollouts: queries from benchmarks, suites and files, the swarm that answers them, and progress.

Training never imports evaluation, so the two are put together here. Labels go to a folder of their own, or nowhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dmoa import __version__, tracking
from dmoa.agents.call_cache import cache_folder
from dmoa.agents.pool import build_pool_gate, check_files, fingerprint
from dmoa.config import Config
from dmoa.dataflow import OVERCOMMIT
from dmoa.engines.gpus import pool_gpus
from dmoa.engines.recorded import replies_files
from dmoa.errors import ConfigError
from dmoa.evaluation.data import SUITE_ROWS, load_disjoint
from dmoa.evaluation.records import SPLITS, Label, Row
from dmoa.evaluation.registry import SUITES, expand_names
from dmoa.evaluation.suites.suite import fine_split
from dmoa.provenance import code_revision
from dmoa.reading import hash_file, read_json, regular
from dmoa.storage import check_local, display_path, localized, write_whole, writing
from dmoa.swarm import limits_for
from dmoa.training.collect import CollectedQueries, CollectSession, CollectWorkers, RolloutAsking, collect, silent_agents, width
from dmoa.training.options import RolloutOptions, Weighted, share_out
from dmoa.training.queries import names_two_texts, read_queries, sample_queries, take_turns
from dmoa.training.rollouts import Manifest, RolloutFolder, RolloutQuery, SourceInfo, part_paths
from dmoa.validation import did_you_mean, redact_text
from dmoa.workflows.backends import OpenCollectingPool, OpenCollectingServer, OpenPool, carried, fetch_models, open_client
from dmoa.workflows.console import Bars, Common
from dmoa.workflows.evaluate import log_gates, opened_ray
from dmoa.workflows.terminal import goes_on, warn
from dmoa.workflows.traffic import read_traffic, rollouts_of_traffic

Asked = tuple[RolloutQuery, Label | None]
"""A query, and its label where it has one."""
LABELS = "labels.jsonl"
_QUERY_ID, _ROW_ID = attrgetter("query_id"), attrgetter("task.row_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """One source before it is known how much it is to give."""

    name: str
    weight: float
    origin: dict[str, str]
    size: int | None
    """None: without end."""
    take: Callable[[int | None], list[Asked]]
    """Gives so many queries; None: all, or a suite's usual number."""


def check_names(options: RolloutOptions) -> None:
    """Raise ConfigError for a benchmark or a split that there is not, or labels where there can be none."""
    names = list(_expanded(options.benchmarks))
    files = [name for name in names if name not in SUITES]
    if files and options.split not in SPLITS:
        raise ConfigError(
            f"--split: {', '.join(files)} has no split {options.split!r}; expected one of {', '.join(SPLITS)}"
            f"{did_you_mean(options.split, SPLITS)}"
        )
    if len(files) < len(names):
        fine_split(options.split)
    if options.labels is not None and not names:
        raise ConfigError("--labels: no effect without --benchmarks: queries of your own have none; leave it out")
    check_local(options.labels, "--labels")


def prepare_queries(options: RolloutOptions, say: Callable[[str], None]) -> CollectedQueries:
    """Gather the queries of all sources, and write the labels of benchmark rows where they are asked for.

    Raises ConfigError as the loaders and the generators do.
    """
    if options.benchmarks and options.split == "test":
        say("note: these are rows of the test split; a gate that learns from them must not be judged on them")
    found = [_own(source, options, say) for source in options.queries]
    found += [_benchmark(name, weight, options, say) for name, weight in _expanded(options.benchmarks).items()]
    quotas: list[int | None] = [None] * len(found)
    if options.limit is not None:
        shared = share_out(options.limit, [source.weight for source in found], [source.size for source in found])
        quotas = [*shared]
        if sum(shared) < options.limit:
            say(f"note: the sources hold {sum(shared)} queries, fewer than the {options.limit} of --limit")
    taken = _distinct((source.name, source.take(quota)) for source, quota in zip(found, quotas, strict=True))
    if options.labels is not None:
        _write_labels(options.labels, taken)
    sources = [
        SourceInfo(name=source.name, weight=source.weight, queries=len(those), origin=source.origin)
        for source, those in zip(found, taken, strict=True)
    ]
    return CollectedQueries(queries=[query for query, _ in take_turns(taken)], sources=sources)


def _distinct(sources: Iterable[tuple[str, list[Asked]]]) -> list[list[Asked]]:
    """Return what each source gives that none before it gave. Raises ConfigError for an id that names two texts."""
    text_of: dict[str, str] = {}
    taken = []
    for name, given in sources:
        for query, _ in given:
            if text_of.get(query.query_id, query.text) != query.text:
                raise names_two_texts(query.query_id, f"{name}, and a source before it")
        taken.append([asked for asked in given if asked[0].query_id not in text_of])
        text_of.update((query.query_id, query.text) for query, _ in given)
    return taken


def _expanded(sources: tuple[Weighted, ...]) -> dict[str, float]:
    """Return weights by benchmark; `all` and `suites` give theirs to every name they stand for."""
    weights: dict[str, float] = {}
    for source in sources:
        for name in expand_names([source.name]):
            weights.setdefault(name, source.weight)
    return weights


def _own(source: Weighted, options: RolloutOptions, say: Callable[[str], None]) -> _Source:
    path = Path(source.name)
    # No source gives more than the limit: of a longer file the rest is not kept.
    found = read_queries(path, skip_bad_rows=options.skip_bad_rows, limit=options.limit, seed=options.seed, field=options.field)
    if found.num_bad:
        say(f"{source.name}: {found.num_bad} lines that are not queries are left out")
    return _Source(
        name=path.name,
        weight=source.weight,
        origin=_origin(path),
        size=len(found.queries),
        take=lambda limit: [(query, None) for query in sample_queries(found.queries, limit, options.seed, _QUERY_ID)],
    )


def _origin(path: Path) -> dict[str, str]:
    return {str(file): hash_file(file) for file in (replies_files(path) if path.is_dir() else [path])}


def check_unchanged(options: RolloutOptions, before: Manifest) -> None:
    """Raise ConfigError for a file of queries that is no longer what a collection was begun with; one that is gone is not missed.

    The collection has its queries in a file of its own, so that those of a changed file would never be asked. Labels are written
    with it: those that are asked for later are refused too.
    """
    if options.labels is not None and not (options.labels / LABELS).exists():
        raise ConfigError(
            f"--labels: {str(options.labels)!r} holds none, and those of the collection in {display_path(options.out)!r} were to "
            "be kept when it was begun; leave it out, or collect into another folder"
        )
    for source, begun in zip(options.queries, before.sources, strict=False):
        path = Path(source.name)
        changed = sorted(set(_origin(path).items()) ^ set(begun.origin.items())) if path.exists() else []
        if changed:
            raise ConfigError(
                f"--queries: {changed[0][0]!r} has changed since the collection in {display_path(options.out)!r} was begun; "
                "restore it, or collect into another folder"
            )


def _benchmark(name: str, weight: float, options: RolloutOptions, say: Callable[[str], None]) -> _Source:
    if name in SUITES:
        return _suite(name, weight, options)
    split = next(split for split in SPLITS if split == options.split)
    loaded = load_disjoint(name, data_dir=options.data_dir, skip_bad_rows=options.skip_bad_rows, required=(split,))
    part = loaded.splits[split]
    if part.bad:
        say(f"{name}: {len(part.bad)} rows that do not parse are left out")
    return _Source(
        name=name,
        weight=weight,
        origin=part.sources,
        size=len(part.rows),
        take=lambda limit: [_asked(row, split) for row in sample_queries(part.rows, limit, options.seed, _ROW_ID)],
    )


def _suite(name: str, weight: float, options: RolloutOptions) -> _Source:
    def take(limit: int | None) -> list[Asked]:
        wanted = SUITE_ROWS if limit is None else limit
        rows: Iterator[Row] = (
            SUITES[name].generate(options.split, wanted, options.seed, options.difficulty) if wanted else iter(())
        )
        return [_asked(row, options.split) for row in rows]

    origin = {f"generated:{name}": f"split {options.split}, difficulty {options.difficulty}, seed {options.seed}"}
    return _Source(name=name, weight=weight, origin=origin, size=None, take=take)


def _asked(row: Row, split: str) -> Asked:
    task = row.task
    query = RolloutQuery(query_id=task.row_id, source=task.benchmark, split=split, text=task.text, stages=task.stages)
    return query, row.label


def _write_labels(folder: Path, taken: list[list[Asked]]) -> None:
    """Write a line per label, keyed by query_id. Raises ConfigError where that cannot be done."""
    labels = [label for source in taken for _, label in source if label is not None]
    lines = [json.dumps({"query_id": label.row_id, "benchmark": label.benchmark, "gold": label.gold}) for label in labels]
    with writing(folder, "--labels", "folder"):
        write_whole(folder / LABELS, "".join(f"{line}\n" for line in lines))


def read_labels(folder: Path) -> Iterator[Label]:
    """Yield the labels of a collection from the folder that `--labels` named. Raises ConfigError where there are none."""
    path = folder / LABELS
    try:
        with open(path, encoding="utf-8", opener=regular) as file:
            lines = list(file)  # not splitlines: texts may hold other line separators, which JSON does not escape
        for tree in map(read_json, lines):
            yield Label(row_id=tree["query_id"], benchmark=tree["benchmark"], gold=tree["gold"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--labels: {str(path)!r} holds no labels: {error}; name a folder that `dmoa rollouts` wrote"
        ) from error


def run_rollouts(options: RolloutOptions, config: Config, common: Common, command: str) -> Manifest:
    """Collect rollouts of a pool, or go on, and return the manifest.

    Raises ConfigError, RequestError for bad input, DmoaError where it stops; what was written is kept.
    """
    if options.from_traffic is not None:
        with localized(options, common.say, writes=("out",)) as here:
            return _taken_from_traffic(here, config, common, command)
    mode = "dense" if options.epsilon is None else "epsilon"
    common.say(f"collecting {mode} rollouts of {config.name} into {display_path(options.out)}")
    advice = f"the same command with --out {display_path(options.out)} goes on from here"
    with goes_on(advice), localized(options, common.say, writes=("out",)) as here:
        return _collected(here, config, common, command)


def _collected(options: RolloutOptions, config: Config, common: Common, command: str) -> Manifest:
    with Bars(common.verbosity) as bars:
        session = build_collection(options, config, common, bars, command)
        manifest = collect(session)
    track(manifest, session.folder, options)
    counts = manifest.counts
    common.say(f"{counts.queries} queries, {counts.steps} steps, {counts.rows} rows in {display_path(session.folder.root)}")
    for name, met in silent_agents(session.folder, manifest).items():
        warn(f"{name} never answered{met and f' ({met})'}: no gate can learn about it from these rollouts")
    if counts.failed:
        common.say(f"{counts.failed} queries failed and are asked again by the same command; the last: {manifest.failures[-1]}")
    return manifest


def build_collection(options: RolloutOptions, config: Config, common: Common, bars: Bars, command: str) -> CollectSession:
    """Return the session of a collection. Raises ConfigError, CheckpointError, ModelFetchError."""
    check_names(options)
    check_files(config)
    if options.url is None:
        fetch_models(config, common.say)
    workers = _workers(options, config) if options.url is None else _remote_workers(options, config)
    gate_version = build_pool_gate(config)[1].version if options.url is None else redact_text(f"of {options.url}")
    limits = options.limits(limits_for(config))
    preset = config.gate.preset
    manifest = new_manifest(options, config, gate_version, command)
    return CollectSession(
        folder=RolloutFolder(options.out.absolute()),
        manifest=manifest,
        prepare=partial(_prepared, options, workers, common.say),
        recheck=partial(check_unchanged, options),
        asking=RolloutAsking(
            seed=options.seed, round=options.round, limits=limits, preset=preset, fingerprint=manifest.pool_fingerprint
        ),
        workers=workers,
        say=common.say,
        watch=bars.watch,
        open_ray=partial(opened_ray, options.address, workers.count * workers.num_gpus),
    )


def _prepared(options: RolloutOptions, workers: CollectWorkers, say: Callable[[str], None]) -> CollectedQueries:
    if isinstance(workers.open_swarm, OpenCollectingServer):
        asyncio.run(workers.open_swarm.check())
    return prepare_queries(options, say)


def new_manifest(options: RolloutOptions, config: Config, gate_version: str, command: str) -> Manifest:
    """Return the manifest that a collection of a pool begins with."""
    return Manifest(
        pool=config.name,
        pool_fingerprint=fingerprint(config),
        agents=list(config.agent_names),
        gate_version=gate_version,
        preset=config.gate.preset,
        engines=[f"{name}: {llm.engine}/{llm.options.model_dump_json()}" for name, llm in config.llms.items()],
        sources=[],
        mode="dense" if options.epsilon is None else "epsilon",
        epsilon=options.epsilon,
        seed=options.seed,
        round=options.round,
        options=options.sample(),
        config=config.model_dump(mode="json"),
        dmoa_version=__version__,
        code_revision=code_revision(),
        command=command,
        started_unix_s=time.time(),
    )


def _taken_from_traffic(options: RolloutOptions, config: Config, common: Common, command: str) -> Manifest:
    state = None if options.from_traffic == "running" else options.from_traffic
    traffic = read_traffic(common, options.app, options.address, state)
    manifest = rollouts_of_traffic(traffic, new_manifest(options, config, "", command), options.out)
    track(manifest, RolloutFolder(options.out.absolute()), options)
    counts, left_out = manifest.counts, manifest.options["other_pools"]
    common.say(
        f"{counts.queries} queries, {counts.steps} steps, {counts.rows} rows and {len(traffic.outcomes)} outcomes in "
        f"{display_path(options.out)}" + (f"; {left_out} queries of other pools are left out" if left_out else "")
    )
    return manifest


def _workers(options: RolloutOptions, config: Config) -> CollectWorkers:
    """Return how the asking is spread: every worker has all engines, and as many places as they decode at once."""
    from dmoa.serving.agent_replica import ENGINE_ENV

    used = {agent.llm for agent in config.agents}
    pool = OpenPool(config_json=config.model_dump_json(), call_cache=cache_folder(options.call_cache), carried=carried(config))
    return CollectWorkers(
        open_swarm=OpenCollectingPool(pool=pool, epsilon=options.epsilon),
        count=options.workers,
        places=options.concurrency or OVERCOMMIT * sum(config.llms[name].max_num_seqs for name in used),
        width=width(config, options.epsilon),
        num_gpus=pool_gpus(config),
        env=ENGINE_ENV,
    )


def _remote_workers(options: RolloutOptions, config: Config) -> CollectWorkers:
    """Return how a running server is asked: one client, and at most `share` of the calls that its replicas run at once.

    Of replicas those are counted that are there in any case.
    """
    url = str(options.url)
    open_client(url)  # a URL that is none is refused before Ray starts
    hosts = {agent.name if config.llms[agent.llm].placement == "dedicated" else agent.llm: agent for agent in config.agents}
    room = sum(max(1, config.scaling_of(one).min_replicas) * config.llms[one.llm].max_num_seqs for one in hosts.values())
    wide = width(config, options.epsilon)
    return CollectWorkers(
        open_swarm=OpenCollectingServer(
            url=url,
            pool=config.name,
            fingerprint=fingerprint(config),
            epsilon=options.epsilon,
            api_key=os.environ.get("DMOA_API_KEY", ""),  # it travels with the client: Ray would show an environment
        ),
        places=options.concurrency or max(wide, int(options.share * room)),
        width=wide,
        env={},
    )


_SAMPLES = ("query_id", "step", "agent", "is_selected", "probability", "text", "entropy_sum_nats", "entropy_tokens", "status")
_MAX_SAMPLES = 500
_BINS, _MAX_NATS = 30, 3.0


def _log_samples(tracker: tracking.Tracker, folder: RolloutFolder) -> None:
    """Log a table of the first rows, and how the replies of each agent are spread over mean entropy in nats per token.

    Part by part: texts are read of the first rows alone.
    """
    rows: list[dict[str, Any]] = []
    counts: dict[str, Any] = {}
    edges = np.linspace(0.0, _MAX_NATS, _BINS + 1)
    for path in part_paths(folder.root):
        with pq.ParquetFile(path) as file:
            for batch in islice(file.iter_batches(_MAX_SAMPLES, columns=list(_SAMPLES)), len(rows) < _MAX_SAMPLES):
                rows += batch.slice(0, _MAX_SAMPLES - len(rows)).to_pylist()
            part = file.read(columns=["agent", "entropy_sum_nats", "entropy_tokens"])
        for agent in part["agent"].unique().to_pylist():
            own = part.filter(pc.and_(pc.equal(part["agent"], agent), pc.greater(part["entropy_tokens"], 0)))
            means = own["entropy_sum_nats"].to_numpy() / own["entropy_tokens"].to_numpy()
            known = np.clip(means[np.isfinite(means)], 0.0, _MAX_NATS)  # NaN where it is not known
            counts[agent] = counts.get(agent, 0) + np.histogram(known, edges)[0]
    tracker.table("samples", _SAMPLES, [[row[name] for name in _SAMPLES] for row in rows])
    for agent in sorted(counts):
        tracker.histogram(f"entropy/{agent}", counts[agent].tolist(), edges.tolist())


def track(manifest: Manifest, folder: RolloutFolder, options: RolloutOptions) -> None:
    """Log the collection to the tracker, its files as an artifact: offline without a key, and never so that it fails.

    Nothing where the same is logged already: the command has collected no more.
    """
    if options.track == "none":
        return
    name = folder.root.name
    counts = {f"rollouts/{key}": float(value) for key, value in manifest.counts.model_dump().items()}
    if tracking.is_logged(folder.root, "log", metrics=counts, step=manifest.round):
        return
    config, after = manifest.model_dump(mode="json"), [manifest.config.get("gate", {}).get("checkpoint")]
    tracker = tracking.open_tracker(options.track, run_dir=folder.root, project="dmoa", name=name, config=config, after=after)
    tracker.log(counts, step=manifest.round)
    _log_samples(tracker, folder)
    tracker.artifact(folder.parts, folder.artifact, "rollouts")
    log_gates(tracker, [manifest.config.get("gate", {}).get("checkpoint")])
    tracker.finish()
