"""Puts a collection together for `dmoa rollouts` and `jobs/collect_rollouts.py`: queries, the swarm, Ray, progress, tracking."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from dmoa import __version__
from dmoa.cli.evaluation_screen import Bars
from dmoa.cli.evaluation_session import log_gates, opened_ray
from dmoa.cli.interrupts import goes_on
from dmoa.cli.local import fetch_models
from dmoa.cli.rollout_queries import check_names, prepare
from dmoa.cli.terminal import warn
from dmoa.config import Config
from dmoa.dataflow import OVERCOMMIT
from dmoa.provenance import code_revision
from dmoa.swarm import limits_for
from dmoa.training.options import RolloutOptions
from dmoa.training.rollouts import Manifest, RolloutFolder

if TYPE_CHECKING:
    from dmoa.cli.options import Common
    from dmoa.training.collect import CollectSession, CollectWorkers


def run_rollouts(options: RolloutOptions, config: Config, common: Common, command: str) -> Manifest:
    """Collect rollouts of a pool, or go on, and return the manifest.

    Raises ConfigError, RequestError for bad input, DmoaError where it stops; what was written is kept.
    """
    from dmoa.storage import display_path, localized

    mode = "dense" if options.epsilon is None else "epsilon"
    common.say(f"collecting {mode} rollouts of {config.name} into {display_path(options.out)}")
    advice = f"the same command with --out {display_path(options.out)} goes on from here"
    with goes_on(advice), localized(options, common.say, writes=("out",)) as here:
        return _collected(here, config, common, command)


def _collected(options: RolloutOptions, config: Config, common: Common, command: str) -> Manifest:
    from dmoa.storage import display_path
    from dmoa.training.collect import collect, silent_agents

    with Bars(common.verbosity) as bars:
        session = build_session(options, config, common, bars, command)
        manifest = collect(session)
    track(manifest, session.folder, options)
    counts = manifest.counts
    common.say(f"{counts.queries} queries, {counts.steps} steps, {counts.rows} rows in {display_path(session.folder.root)}")
    for name in silent_agents(session.folder, manifest):
        warn(f"{name} never answered: no gate can learn about it from these rollouts")
    if counts.failed:
        common.say(f"{counts.failed} queries failed and are asked again by the same command; the last: {manifest.failures[-1]}")
    return manifest


def build_session(options: RolloutOptions, config: Config, common: Common, bars: Bars, command: str) -> CollectSession:
    """Return the session of a collection. Raises ConfigError, CheckpointError, ModelFetchError."""
    from dmoa.agents.pool import build_pool_gate, check_files, fingerprint
    from dmoa.training.collect import CollectSession, RolloutAsking

    check_names(options)
    check_files(config)
    fetch_models(config, common.say)
    workers = _workers(options, config)
    gate_version = build_pool_gate(config)[1].version
    limits = options.limits(limits_for(config))
    preset = config.gate.preset
    manifest = Manifest(
        pool=config.name,
        pool_fingerprint=fingerprint(config),
        agents=list(config.agent_names),
        gate_version=gate_version,
        preset=preset,
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
    return CollectSession(
        folder=RolloutFolder(options.out.absolute()),
        manifest=manifest,
        prepare=partial(prepare, options, common.say),
        asking=RolloutAsking(
            seed=options.seed, round=options.round, limits=limits, preset=preset, fingerprint=manifest.pool_fingerprint
        ),
        workers=workers,
        say=common.say,
        watch=bars.watch,
        open_ray=partial(opened_ray, options.address, workers.count * workers.num_gpus),
    )


def _workers(options: RolloutOptions, config: Config) -> CollectWorkers:
    """Return how the asking is spread: every worker has all engines, and as many places as they decode at once."""
    from dmoa.agents.call_cache import CallStore
    from dmoa.cli.answerers import OpenCollectingPool
    from dmoa.engines.gpus import pool_gpus
    from dmoa.serving.agent_replica import ENGINE_ENV
    from dmoa.training.collect import CollectWorkers, width

    call_cache = options.call_cache.absolute() if options.call_cache else None
    if call_cache is not None:
        CallStore(call_cache).close()  # a folder that cannot be written is refused here, not in a worker
    used = {agent.llm for agent in config.agents}
    return CollectWorkers(
        open_collector=OpenCollectingPool(config_json=config.model_dump_json(), epsilon=options.epsilon, call_cache=call_cache),
        count=options.workers,
        places=options.concurrency or OVERCOMMIT * sum(config.llms[name].max_num_seqs for name in used),
        width=width(config, options.epsilon),
        num_gpus=pool_gpus(config),
        env=ENGINE_ENV,
    )


def track(manifest: Manifest, folder: RolloutFolder, options: RolloutOptions) -> None:
    """Log the collection to the tracker, its files as an artifact: offline without a key, and never so that it fails.

    Nothing where the same is logged already: the command has collected no more.
    """
    from dmoa import tracking

    name = folder.root.name
    counts = {f"rollouts/{key}": float(value) for key, value in manifest.counts.model_dump().items()}
    if tracking.is_logged(folder.root, "log", metrics=counts, step=manifest.round):
        return
    config = manifest.model_dump(mode="json")
    tracker = tracking.open_tracker(options.track, run_dir=folder.root, project="dmoa", name=name, config=config)
    tracker.log(counts, step=manifest.round)
    tracker.artifact(folder.parts, folder.artifact, "rollouts")
    log_gates(tracker, [manifest.config.get("gate", {}).get("checkpoint")])
    tracker.finish()
