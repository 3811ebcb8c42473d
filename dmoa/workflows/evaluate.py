"""Puts an evaluation together for `dmoa evaluate` and `jobs/evaluate.py`: Ray, the swarm, progress, tracking, the table."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from dmoa import tracking
from dmoa.agents.adversaries import Adversaries
from dmoa.agents.call_cache import cache_folder
from dmoa.agents.pool import build_other_gate, build_pool_gate, check_files, fingerprint
from dmoa.config import Config, is_name
from dmoa.dataflow import OVERCOMMIT
from dmoa.engines.gpus import pool_gpus
from dmoa.errors import CheckpointError, ConfigError, DmoaError, RequestError
from dmoa.evaluation.answering import Asking
from dmoa.evaluation.explain import ROW_COLUMNS, table_of_rows
from dmoa.evaluation.pipeline import AnswerWorkers
from dmoa.evaluation.records import CompareOptions, EvaluateOptions, PoolInfo
from dmoa.evaluation.registry import STAGED, expand_names
from dmoa.evaluation.results import Evaluation, not_run
from dmoa.evaluation.run_folder import RunFolder
from dmoa.policies.registry import POLICIES, can_do_stages, check_words, needs_labels, split_policy, width_of
from dmoa.serving.launch import start_ray
from dmoa.storage import display_path, localized
from dmoa.swarm import limits_for
from dmoa.types import Limits
from dmoa.validation import did_you_mean
from dmoa.workflows.backends import OpenPool, OpenServer, carried, fetch_models, open_client
from dmoa.workflows.console import Bars, Common, print_evaluation, stdout_console
from dmoa.workflows.terminal import end_on_sigterm, goes_on, never_join_by_accident

if TYPE_CHECKING:
    from dmoa.evaluation.run import Session


_REMOTE_PLACES = 32
"""Queries under way at a server whose room is not known."""


def run_evaluation(
    options: EvaluateOptions, config: Config | None, common: Common, command: str, *, shows_result: bool = True, **parts: Any
) -> Evaluation:
    """Run an evaluation and show its result; `config` None evaluates the server at `options.url`. `parts`: of the `Session`.

    Raises ConfigError, RequestError for bad input, DmoaError where it stops; what was answered is kept.
    """
    names = expand_names(options.benchmarks)  # unknown ones are refused first
    policies = POLICIES.resolve(expand_policies(options.policies, config, names), "--policies")
    options = options.model_copy(update={"policies": policies})
    check_policies(options.policies, config, tuple(options.gates))
    check_stages(options.policies, names)
    if config is not None and not (options.address or os.environ.get("RAY_ADDRESS")):  # else they lie where the workers are
        check_labels(options.policies, config)
    if config is not None and options.defence is not None:
        config = config.changed("summarizer", defence=options.defence)
    assert options.out is not None
    advice = f"the same command with --out {display_path(options.out)} --resume goes on from here"
    with goes_on(advice), localized(options, common.say, writes=("out",)) as here:
        return _evaluated(here, config, common, command, shows_result=shows_result, **parts)


def _evaluated(
    options: EvaluateOptions, config: Config | None, common: Common, command: str, *, shows_result: bool, **parts: Any
) -> Evaluation:
    from dmoa.evaluation.repeats import evaluate_repeatedly

    assert options.out is not None
    folder, names = RunFolder(options.out.absolute()), expand_names(options.benchmarks)
    if isinstance(options, CompareOptions) and options.has_own_cache:
        options = options.model_copy(update={"call_cache": folder.root / "calls"})
    if options.resume and not folder.run.exists():
        common.say(f"--resume: {display_path(folder.root)!r} holds no run yet; one begins")
    with Bars(common.verbosity) as bars:
        session = replace(build_evaluation(options, config, names, folder, common, bars, command), **parts)
        common.say(f"evaluating {', '.join(options.policies)} on {', '.join(names)}; the run lies in {display_path(folder.root)}")
        evaluation = evaluate_repeatedly(session, options.repeats if isinstance(options, CompareOptions) else 1)
    log_tables(evaluation, folder, options)
    if shows_result:
        print_evaluation(evaluation, stdout_console())
        common.say(f"report: {display_path(folder.report)}")
    return evaluation


def check_ran(evaluation: Evaluation, what: str = "evaluation") -> None:
    """Raise DmoaError where a policy did not run on a benchmark, every query of it failed, or where code is wrong."""
    rows = not_run(evaluation)
    bugs = [f"{row.policy} on {row.benchmark} ({row.bugs})" for row in evaluation.rows if row.bugs]
    if bugs and not rows:
        raise DmoaError(
            f"{what}: code raised what says that it is wrong, a tool's, an engine's or a policy's: {'; '.join(bugs)}; its "
            "traceback is in the log; mend it, then begin in another folder"
        )
    if not rows:
        return
    where = "; ".join(f"{row.policy} on {row.benchmark} ({row.failed} of {row.n} queries failed)" for row in rows)
    cells = {(row.benchmark, row.policy) for row in rows}
    reason = next((found.error for found in evaluation.failures if (found.benchmark, found.policy) in cells), "")
    said = f"; the first error: {' '.join(reason.split())}" if reason else ""
    raise DmoaError(f"{what}: did not run: {where}{said}; mend what failed, then repeat the command with --resume --retry-failed")


@contextmanager
def opened_ray(address: str | None, num_gpus: float = 0.0) -> Iterator[None]:
    """Join the Ray at `address`, or run one of our own for the time being.

    Raises ConfigError where none answers, or where our own has fewer GPUs than the answering asks for.
    """
    # Ray logs as an error that Ray Data keeps its actors' arguments in the object store, which it always does.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    never_join_by_accident()
    is_own = start_ray(address)
    import ray

    try:
        end_on_sigterm()
        found = ray.cluster_resources().get("GPU", 0.0)
        if is_own and found < num_gpus:
            raise ConfigError(
                f"llms: the workers need {num_gpus:g} GPUs and this machine has {found:g}; lower "
                "llms.NAME.gpus or --workers, or name a cluster by --address"
            )
        yield
    finally:
        if is_own:
            ray.shutdown()


def expand_policies(policies: tuple[str, ...], config: Config | None, benchmarks: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the policies with `all` replaced by every one of ours that needs no labels and that the pool's agents can run.

    `benchmarks`: where some have stages, those that can answer such queries.
    """
    known = POLICIES.builtin if "all" in policies else ()
    every = [name for name in known if not needs_labels(name) and (POLICIES[name].first_step_only or not has_recorded(config))]
    if not set(STAGED).isdisjoint(benchmarks):
        every = [name for name in every if can_do_stages(name)]
    return tuple(dict.fromkeys(name for given in policies for name in (every if given == "all" else (given,))))


def has_recorded(config: Config | None) -> bool:
    """Tell whether a pool has agents with recorded replies."""
    return config is not None and any(config.llms[agent.llm].engine_entry.is_recorded for agent in config.agents)


def check_stages(policies: Sequence[str], benchmarks: Sequence[str]) -> None:
    """Raise RequestError for a policy that can answer no query with stages, where a benchmark has such."""
    staged, unfit = [name for name in benchmarks if name in STAGED], [name for name in policies if not can_do_stages(name)]
    if staged and unfit:
        raise RequestError(
            f"--policies: {', '.join(unfit)} cannot answer {', '.join(staged)}, whose stages are each asked as a policy's first "
            "step: there it only names who shall answer; expected policies whose first step answers; leave one of the two out"
        )


def check_policies(policies: tuple[str, ...], config: Config | None, gates: tuple[str, ...] = ()) -> None:
    """Raise RequestError for a policy, an agent or a gate that there is not, and for a gate that no policy asks."""
    idle = [gate for gate in gates if f"dmoa:{gate}" not in policies]
    for policy in policies:
        name, agent = split_policy(policy)
        if policy.split() != [policy]:
            raise RequestError(f"--policies: {policy!r} holds white space; give a path without any")
        if name == "dmoa" and agent is not None:
            if agent not in gates:
                known, nearest = ", ".join(gates) or "none is given", did_you_mean(agent, gates)
                raise RequestError(
                    f"--policies: no gate is named as in {policy!r}; gates given: {known}; add --gates {agent}=DIR{nearest}"
                )
            continue
        if name not in POLICIES and config is None:
            continue  # of a server, which says what it has
        if name not in POLICIES:
            allowed = ", ".join((*POLICIES, "single:AGENT", "dmoa:GATE"))
            is_agent = config is not None and name in config.agent_names
            nearest = f"; did you mean 'single:{name}'?" if is_agent else did_you_mean(name, POLICIES)
            raise RequestError(f"--policies: {policy!r} is not known; name some of {allowed}{nearest}")
        entry = POLICIES[name]
        if config is not None:
            check_words(entry, agent, config)
            if entry.options:
                continue
        is_agent = agent is None or (name == "single" and (is_name(agent) if config is None else agent in config.agent_names))
        if not is_agent:
            agents = ", ".join(config.agent_names) if config else "the server's agents"
            nearest = did_you_mean(agent, config.agent_names) if config and agent else ""
            raise RequestError(f"--policies: {policy!r} names no agent; write single:AGENT with one of {agents}{nearest}")
    if idle:
        raise RequestError(f"--gates: {', '.join(idle)} is in no policy; add dmoa:{idle[0]} to --policies, or leave it out")


def check_labels(policies: Sequence[str], config: Config) -> None:
    """Read the files of judged replies that policies of ours name. Raises RequestError for one that cannot be learnt from."""
    from dmoa.policies.routers import judged_of

    for name, words in map(split_policy, policies):
        found = POLICIES[name].options_of(words, config) if name in POLICIES.builtin and POLICIES[name].options else None
        for field in ("data", "rewards"):
            if found is not None and (file := getattr(found, field, None)) is not None:
                judged_of(file, found.agents, field)


def build_evaluation(
    options: EvaluateOptions,
    config: Config | None,
    names: tuple[str, ...],
    folder: RunFolder,
    common: Common,
    bars: Bars,
    command: str,
) -> Session:
    """Return the session of a pool in Ray, or of a server."""
    from dmoa.evaluation.run import Session

    if config is None:
        pool, workers, pool_limits = _server(options)
        gate_version, gates, engines = None, {}, []
    else:
        check_files(config)
        fetch_models(config, common.say)
        gate_version = build_pool_gate(config)[1].version
        gates = {name: build_other_gate(config, folder)[1].version for name, folder in options.gates.items()}
        pool = PoolInfo(name=config.name, fingerprint=fingerprint(config), config=config.model_dump(mode="json"))
        workers, pool_limits = _workers(options, config), limits_for(config)
        engines = [f"{llm.engine}/{llm.options.model_dump_json()}" for llm in config.llms.values()]
    limits = options.limits(pool_limits)
    return Session(
        options=options,
        folder=folder,
        benchmarks=names,
        asking=Asking(seed=options.seed, limits=limits, ends_schedules=isinstance(options, CompareOptions)),
        workers=workers,
        pool=pool,
        gate_version=gate_version,
        gates=gates,
        engines=engines,
        command=command,
        say=common.say,
        watch=bars.watch,
        score_at_once=max(1, os.cpu_count() or 1),
        open_ray=partial(opened_ray, options.address, workers.count * workers.num_gpus),
    )


def _workers(options: EvaluateOptions, config: Config) -> AnswerWorkers:
    """Return how a pool's answering is spread: every worker has all engines, and as many places as they decode at once."""
    from dmoa.serving.agent_replica import ENGINE_ENV

    adversaries = Adversaries(count=options.adversaries, kind=options.kind) if options.adversaries else None
    if adversaries is not None:
        adversaries.of(config.agent_names)  # more than there are agents are refused here, not in a worker
    used = {agent.llm for agent in config.agents}
    widest = options.limits(limits_for(config)).max_agents or len(config.agents)  # the gate's limit, which no other policy reads
    widths = {policy: width_of(policy, config) for policy in options.policies}
    gates = {name: folder.absolute() for name, folder in options.gates.items()}
    return AnswerWorkers(
        open_swarm=OpenPool(
            config_json=config.model_dump_json(),
            call_cache=cache_folder(options.call_cache),
            gates=gates,
            carried=carried(config, gates),
            policy_files=POLICIES.references(name for name, _ in map(split_policy, options.policies)),
            adversaries=adversaries,
        ),
        count=options.workers,
        places=options.concurrency or OVERCOMMIT * sum(config.llms[name].max_num_seqs for name in used),
        widths={policy: min(width, widest) if split_policy(policy)[0] == "dmoa" else width for policy, width in widths.items()},
        num_gpus=pool_gpus(config),
        env=ENGINE_ENV,
    )


def _server(options: EvaluateOptions) -> tuple[PoolInfo, AnswerWorkers, Limits]:
    """Ask a server for its pool. Raises RequestError for a bad URL, DmoaError where it cannot be reached."""
    url = str(options.url)
    staged = [name for name in expand_names(options.benchmarks) if name in STAGED]
    if staged:
        raise ConfigError(
            f"--benchmarks: the stages of {', '.join(staged)} do not fit in an HTTP request; leave it out with --url"
        )

    async def models() -> list[str]:
        async with open_client(url) as client:
            return await client.models()

    known = asyncio.run(models())
    name = known[0]
    for policy, agent in map(split_policy, options.policies):
        if (agent or f"{name}/{policy}") not in known:
            nearest = did_you_mean(agent or f"{name}/{policy}", known)
            raise RequestError(f"--policies: {url} does not have {agent or policy!r}; name some of {', '.join(known)}{nearest}")
    workers = AnswerWorkers(
        # The key travels with the client: a runtime environment would show it in Ray's own records.
        open_swarm=OpenServer(url=url, pool=name, api_key=os.environ.get("DMOA_API_KEY", "")),
        places=options.concurrency or _REMOTE_PLACES,
        widths=dict.fromkeys(options.policies, 1),
        env={},
    )
    return PoolInfo(name=name, fingerprint="", config={"url": url}), workers, Limits()


_CELL = str | int | float | bool | None
_MAX_ROWS = 2000
"""Rows of the table of rows."""


def log_tables(evaluation: Evaluation, folder: RunFolder, options: EvaluateOptions) -> None:
    """Log the result to the tracker: offline without a key, and never so that a run fails or waits for it.

    Nothing where the same is logged already: the command has found nothing new.
    """
    root = folder.root
    records: dict[str, Sequence[BaseModel]] = {"evaluation": evaluation.rows, "paired": evaluation.paired}
    trees = {name: [row.model_dump(mode="json") for row in rows] for name, rows in records.items() if rows}
    tables = {
        name: [[one if isinstance(one, _CELL) else str(one) for one in row.values()] for row in rows]
        for name, rows in trees.items()
    }
    accuracy = {f"{row.benchmark}/{row.policy}/accuracy": row.accuracy for row in evaluation.rows if row.did_run}
    if tracking.is_logged(root, "log", metrics=accuracy, step=None) and all(
        tracking.is_logged(root, "table", name=name, rows=rows) for name, rows in tables.items()
    ):
        return
    config = evaluation.config.model_dump(mode="json")
    gates = [evaluation.config.pool.config.get("gate", {}).get("checkpoint"), *options.gates.values()]
    tracker = tracking.open_tracker(options.track, run_dir=root, project="dmoa", name=root.name, config=config, after=gates)
    tracker.table("rows", ROW_COLUMNS, list(islice(table_of_rows(evaluation, folder), _MAX_ROWS)))
    for name, rows in tables.items():
        tracker.table(name, list(trees[name][0]), rows)
    tracker.log(accuracy, step=None)
    pool_gate = evaluation.config.pool.config.get("gate", {}).get("checkpoint") if "dmoa" in options.policies else None
    log_gates(tracker, [pool_gate, *options.gates.values()])
    tracker.finish()


def log_gates(tracker: tracking.Tracker, folders: Sequence[str | Path | None]) -> None:
    """Log the checkpoints that a run was made with as its inputs; None and folders that cannot be read any more are left out."""
    from dmoa import checkpoint

    for folder in folders:
        with suppress(CheckpointError):
            if folder is not None:
                name = checkpoint.artifact_name(checkpoint.load(folder)[1].version)
                tracker.artifact(Path(folder), name, "checkpoint", role="input")
