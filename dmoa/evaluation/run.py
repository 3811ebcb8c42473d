"""Runs a whole evaluation: prepare or go on, answer, judge, and write the result.

`workflows/evaluate` puts the swarm together and hands it in as a `Session`; progress goes out through its callbacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

from dmoa import __version__, sandbox
from dmoa.dataflow import Watch
from dmoa.engine_options import ENGINES
from dmoa.errors import ConfigError
from dmoa.evaluation import report, results
from dmoa.evaluation.answering import Asking
from dmoa.evaluation.benchmarks.base import BENCHMARKS
from dmoa.evaluation.benchmarks.programs import require_sandbox
from dmoa.evaluation.data import hash_files, prepare_rows
from dmoa.evaluation.pipeline import AnswerWorkers, answer_all, forget, score_all
from dmoa.evaluation.records import BenchmarkInfo, EvaluateOptions, PoolInfo, RunInfo, pool_differences
from dmoa.evaluation.registry import OpenScorers, judging
from dmoa.evaluation.results import Evaluation
from dmoa.evaluation.run_folder import RunFolder, read_record, write_lines, write_whole
from dmoa.plugins import Registry
from dmoa.policies.registry import POLICIES, split_policy
from dmoa.provenance import code_revision, machine
from dmoa.storage import only_one

_FIXED = ("policies", "split", "limit", "seed", "limits", "match", "reference", "repeats", "gate_version", "gates")
"""What a run that goes on must have in common with its beginning, beside its benchmarks, its pool and the difficulty."""
_VERSIONS = ("transformers", "datasets", "math-verify", "pyarrow", "wandb")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One call of an evaluation, put together."""

    options: EvaluateOptions
    folder: RunFolder
    benchmarks: tuple[str, ...]
    asking: Asking
    workers: AnswerWorkers
    pool: PoolInfo
    gate_version: str | None
    gates: dict[str, str]
    """Version of each gate of the policies `dmoa:NAME`, by name."""
    engines: list[str]
    command: str
    say: Callable[[str], None]
    watch: Watch
    score_at_once: int
    """Programs and texts that are judged at the same time."""
    open_ray: Callable[[], AbstractContextManager[None]]
    """Connects to Ray for as long as the passes run; bad input is refused before that."""
    rows_of: RunFolder | None = None
    """The run whose rows a new one takes, whatever has become of their files; None: it prepares its own."""
    derive: Callable[[RunFolder], None] = lambda folder: None
    """Adds lines of policies that ask nobody, once all others are judged."""


def evaluate(session: Session) -> Evaluation:
    """Run an evaluation, or go on with one, and return its result, which then lies in its folder as JSON and HTML.

    Raises ConfigError for bad input, SandboxError where programs would have to run uncontained, DmoaError where the
    pipeline stops; what was answered is kept in every case.
    """
    folder = session.folder
    folder.make()
    with only_one(folder.root, "evaluation"):
        return _locked(session)


def _locked(session: Session) -> Evaluation:
    options, folder, names = session.options, session.folder, session.benchmarks
    info = begin_run(session)
    # A session that is killed leaves lines that are newer than this; `dmoa report` then reads the lines.
    folder.evaluation.unlink(missing_ok=True)
    dropped = forget(folder, names, info.policies, failed=options.retry_failed)
    if options.retry_failed:
        session.say(f"{dropped} failed rows are run again")
    scorers = OpenScorers(names=names, allow_weak_sandbox=options.allow_weak_sandbox, files=BENCHMARKS.references(names))
    with session.open_ray():
        info = _answer(session, info)
        score_all(folder, names, info.policies, scorers, session.score_at_once, session.watch)
    write_whole(folder.run, _json(info.model_copy(update={"ended_unix_s": time.time()})))
    session.derive(folder)
    return finish_run(folder)


def _answer(session: Session, info: RunInfo) -> RunInfo:
    """Answer what has no answer yet; with a budget to match, the policy that sets it first, and note the budget."""
    folder, names, matching = session.folder, session.benchmarks, session.options.matching
    ask = partial(answer_all, folder, names, workers=session.workers, watch=session.watch)
    if matching is None:
        ask(policies=info.policies, asking=session.asking)
        return info
    free = [] if matching.amount is not None else [matching.reference]
    if free:
        ask(policies=free, asking=session.asking)
    if not info.budgets:
        budgets = {name: matching.budget(name, folder.read_answers(name, matching.reference)) for name in names}
        info = info.model_copy(update={"budgets": budgets})
        write_whole(folder.run, _json(info))
    matched = [policy for policy in info.policies if policy not in free]
    ask(policies=matched, asking=replace(session.asking, budgets=info.budgets))
    return info


def finish_run(folder: RunFolder) -> Evaluation:
    """Build the result of a run from its lines and write it as JSON and HTML."""
    evaluation = results.rebuild_evaluation(folder.root)
    write_whole(folder.evaluation, _json(evaluation))
    report.write_report(evaluation, folder.report)
    return evaluation


def begin_run(session: Session) -> RunInfo:
    """Prepare the rows of a new run, or check that a run that goes on is the same one. Raises ConfigError."""
    folder, options = session.folder, session.options
    if _runs_programs(session.benchmarks):
        require_sandbox(allow_weak=options.allow_weak_sandbox)
    if folder.run.exists() and (options.resume or folder.is_answered):
        if not options.resume:
            raise ConfigError(f"--out: {str(folder.root)!r} holds a run; go on with it by --resume, or name another folder")
        info = read_record(folder.run, RunInfo)
        _check_same(session, info)
        session.say(f"going on with the run in {folder.root}")
        return _went_on(session, info)
    above = session.rows_of
    benchmarks = _rows_above(session, above) if above else [_benchmark_info(session, name) for name in session.benchmarks]
    info = _run_info(session, benchmarks)
    write_whole(folder.run, _json(info))
    return info


def _rows_above(session: Session, above: RunFolder) -> list[BenchmarkInfo]:
    for name in session.benchmarks:
        write_lines(session.folder.tasks(name), above.read_tasks(name))
        write_lines(session.folder.gold(name), above.read_gold(name))
    return read_record(above.run, RunInfo).benchmarks


def _benchmark_info(session: Session, name: str) -> BenchmarkInfo:
    options = session.options
    judge = judging(name, difficulty=options.difficulty, allow_weak_sandbox=options.allow_weak_sandbox)
    prepared = prepare_rows(session.folder, name, options)
    left_out = f", {prepared.bad_rows} bad ones left out" if prepared.bad_rows else ""
    session.say(f"{name}: {prepared.rows} rows{left_out}" + (f"; {judge.summary}" if judge.summary else ""))
    return prepared.model_copy(
        update={
            "title": judge.title,
            "is_generated": judge.is_generated,
            "deviation": judge.deviation,
            "primary": judge.primary,
            "chance": judge.chance(tuple(session.folder.read_gold(name))),
        }
    )


def _run_info(session: Session, benchmarks: Sequence[BenchmarkInfo]) -> RunInfo:
    options, matching = session.options, session.options.matching
    return RunInfo(
        command=session.command,
        options=options.model_dump(mode="json"),
        dmoa_version=__version__,
        code_revision=code_revision(),
        pool=session.pool,
        benchmarks=list(benchmarks),
        policies=list(options.policies),
        split=options.split,
        limit=options.limit,
        seed=options.seed,
        limits=_limits(session.asking),
        match=matching.by if matching else "none",
        reference=matching.reference if matching else None,
        repeats=getattr(options, "repeats", 1),
        gate_version=session.gate_version,
        gates=session.gates,
        engines=session.engines,
        plugins=_plugins(session),
        isolation=sandbox.level() if _runs_programs(session.benchmarks) else "",
        machine=machine(),
        versions={name: metadata.version(name) for name in _VERSIONS},
        started_unix_s=time.time(),
    )


def _plugins(session: Session) -> dict[str, str]:
    """Return the SHA-256 of the files that policies, benchmarks and engines came from."""
    engines = [str(llm["engine"]) for llm in session.pool.config.get("llms", {}).values()]
    kinds: tuple[tuple[str, Registry[Any], Sequence[str]], ...] = (
        ("policy", POLICIES, [split_policy(policy)[0] for policy in session.options.policies]),
        ("benchmark", BENCHMARKS, session.benchmarks),
        ("engine", ENGINES, ENGINES.resolve(engines, "llms")),
    )
    found = {f"{kind} {name}": registry.digest(name) for kind, registry, names in kinds for name in names}
    return {name: digest for name, digest in found.items() if digest is not None}


def _runs_programs(benchmarks: Sequence[str]) -> bool:
    return any(judging(name).runs_programs for name in benchmarks)


def _limits(asking: Asking) -> dict[str, Any]:
    names = ("max_steps", "max_agents", "budget_tokens", "budget_price", "deadline_s", "max_tokens")
    more = [name for name in ("quorum", "hedge_after_ms") if getattr(asking.limits, name) is not None]
    return {name: getattr(asking.limits, name) for name in (*names, *more)}


def _check_same(session: Session, before: RunInfo) -> None:
    """Raise ConfigError naming what differs between a run and the call that goes on with it."""
    now = _run_info(session, before.benchmarks)
    pairs: dict[str, tuple[Any, Any]] = {name: (getattr(before, name), getattr(now, name)) for name in _FIXED}
    pairs["benchmarks"] = ([info.name for info in before.benchmarks], list(session.benchmarks))
    pairs["pool"] = (f"{before.pool.name} {before.pool.fingerprint}", f"{now.pool.name} {now.pool.fingerprint}")
    pairs |= pool_differences(before.pool, now.pool)
    for name, default in (("difficulty", None), ("adversaries", 0), ("kind", "liar"), ("match_budget", None)):
        pairs[name] = (before.options.get(name, default), now.options.get(name, default))
    pairs |= plugin_pairs(before.plugins, now.plugins or {})
    check_level(before.isolation, now.isolation)
    different = [f"{name}: begun with {then}, now {here}" for name, (then, here) in pairs.items() if then != here]
    if different:
        raise ConfigError(
            f"--resume: {'; '.join(different)}; repeat the settings of {str(session.folder.run)!r}, or begin in another folder"
        )


def plugin_pairs(before: dict[str, str] | None, now: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return what is to be equal of the files of plug-ins; nothing of a run whose beginning did not note them."""

    def said(found: dict[str, str], name: str) -> str:
        return f"a file of SHA-256 {found[name][:12]}" if name in found else "no file"

    return {} if before is None else {name: (said(before, name), said(now, name)) for name in {**before, **now}}


def check_level(begun: str, now: str) -> None:
    """Raise ConfigError where programs would run in a weaker sandbox level than a run recorded; empty: it runs none."""
    levels = (*sandbox.LEVELS, "")
    if levels.index(now) > levels.index(begun):
        raise ConfigError(
            f"--resume: programs ran in sandbox level {begun!r} when the run began, this host has {now!r}; "
            "go on where the level is as strong, or begin in another folder"
        )


def _went_on(session: Session, before: RunInfo) -> RunInfo:
    """Note the code that a run goes on with, where it is not what it ran with last, and tell of files that have changed."""
    changed = [
        file
        for one in before.benchmarks
        for file, digest in sorted(hash_files(one.name, session.options.data_dir).items())
        if one.sources.get(file, digest) != digest
    ]
    if changed:
        session.say(f"note: not the file that the run began with: {', '.join(changed)}; it goes on with the rows that it keeps")
    now, last = code_revision(), [before.code_revision, *before.later_revisions][-1]
    if now == last:
        return before
    session.say(f"note: the run ran with code {last or 'unknown'}, this is {now or 'unknown'}")
    info = before.model_copy(update={"later_revisions": [*before.later_revisions, now]})
    write_whole(session.folder.run, _json(info))
    return info


def _json(record: RunInfo | Evaluation) -> str:
    return record.model_dump_json(indent=2) + "\n"
