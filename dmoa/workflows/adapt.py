"""Adapts a gate to a benchmark by its own first queries, and shows what that was worth: `dmoa adapt` and `jobs/adapt.py`.

The stream of training/prequential gives the counted answers of the first queries; everything else, the starts kept as they are
and the rows after, is an ordinary evaluation of gates in the same folder, so its tables, report and tracking are those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from dmoa import tracking
from dmoa.agents.pool import fingerprint
from dmoa.config import Config
from dmoa.core.label_model import MIN_ROWS
from dmoa.errors import ConfigError, DmoaError, EmptyAnswerError
from dmoa.evaluation.answering import Asking, answered, failed, query_of_task, unanswered
from dmoa.evaluation.benchmarks.base import BENCHMARKS
from dmoa.evaluation.data import hash_files, prepare_rows
from dmoa.evaluation.records import Answered, EvaluateOptions, Task
from dmoa.evaluation.registry import expand_names
from dmoa.evaluation.run_folder import RunFolder, append, mend, read_lines, read_record
from dmoa.reading import offsets, read_bounded, read_json
from dmoa.storage import display_path, localized, only_one, write_whole
from dmoa.swarm import limits_for
from dmoa.training.options import AdaptOptions, AdaptSettings, share_out
from dmoa.training.outcomes import Outcome, no_outcome_fits, read_outcomes
from dmoa.training.queries import take_turns
from dmoa.training.rollouts import RolloutQuery, part_of, read_part
from dmoa.workflows.backends import build_local_swarm
from dmoa.workflows.console import Bars, Common, line, new_table, stdout_console
from dmoa.workflows.terminal import goes_on

if TYPE_CHECKING:
    from dmoa.evaluation.report import Stream
    from dmoa.evaluation.run import Session
    from dmoa.training.prequential import AdaptingSwarm, Counted, StreamJob, StreamUpdate

ADAPTED = "-ttt"
"""What the name of a start ends with once it has adapted."""
ZERO, FEW = "zero-shot", "few-shot"


class AdaptRow(BaseModel):
    """One gate on one benchmark: a row of the table."""

    benchmark: str
    gate: str
    """zero-shot, few-shot, or either with `-ttt`: adapted by the first queries."""
    first: float | None
    """Accuracy on the first queries; of an adapted gate prequentially, each answer given before the update on it."""
    first_rows: int
    rest: float | None
    """Accuracy on the rows after, the gate frozen; null where there are none."""
    rest_rows: int
    agents: float
    """Agents whose contributions counted, a step, over the rows after (else the first)."""
    tokens: float
    """Prompt and completion tokens of a row there."""


class AdaptReport(BaseModel):
    """`adapt.json`: what adaptation was worth, and every update."""

    command: str
    options: dict[str, Any]
    pool: str
    starts: dict[str, str]
    """Gate -> version."""
    rows: list[AdaptRow]
    updates: dict[str, list[dict[str, Any]]]
    """Start -> its updates, in order."""
    stream: dict[str, list[dict[str, Any]]]
    """Gate -> the first queries in order: row, whether right, entropy, probability of being right, agents, tokens, version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAdaptingPool:
    """Loads a pool in the process that calls it, with a gate that can be replaced."""

    config_json: str
    call_cache: Path

    def __call__(self) -> AdaptingSwarm:
        """Return the swarm; blocks while models load. Raises ConfigError, ModelFetchError."""
        from dmoa.routing import LocalRouter
        from dmoa.training.prequential import AdaptingSwarm

        swarm = build_local_swarm(Config.model_validate_json(self.config_json), lambda text: None, self.call_cache)
        assert isinstance(swarm.router, LocalRouter)
        return AdaptingSwarm(swarm, swarm.router)


@dataclass(frozen=True, slots=True)
class Stage:
    """The folder of the streams: what `keep` writes, and what a session after it reads."""

    root: Path
    tasks: Mapping[str, Task] = field(default_factory=dict)
    """By row id."""

    def updates(self, start: str) -> Path:
        """Every update of a start, a line each."""
        return self.root / "streams" / start / "updates.jsonl"

    def part(self, start: str, query_id: str) -> Path:
        """Rollout of one query of a start."""
        return self.root / "streams" / start / "rollouts" / f"{query_id.replace('/', '_')}.parquet"

    def keep(self, start: str, one: Counted | StreamUpdate) -> None:
        """Write a counted answer or an update; the answer's line comes first, and once.

        Raises ConfigError where the line that is there is of another gate: it was not answered before the update on it.
        """
        from dmoa.training.prequential import StreamUpdate

        if isinstance(one, StreamUpdate):
            if one.number > len(_trees(self.updates(start))):
                append(self.updates(start), [one])
            return
        task, policy = self.tasks[one.query.query_id], f"dmoa:{start}{ADAPTED}"
        path = RunFolder(self.root).answers(task.benchmark, policy)
        told = [line.gate_version for line in read_lines(path, Answered) if line.row_id == task.row_id]
        if not told:
            append(path, [_line(task, policy, one)])
        elif told[0] not in (None, one.version):
            raise ConfigError(f"{path}: {task.row_id!r} was answered by gate {told[0]}, not {one.version}; use another folder")
        if one.table is not None:
            write_whole(self.part(start, task.row_id), part_of([one.table]))

    def kept(self, start: str, queries: Sequence[RolloutQuery]) -> dict[str, Counted]:
        """Return what a session before has kept of these queries, those that failed too: the updates after them went without.

        An answer without its rollout, or a rollout without its answer, is asked for again.
        """
        from dmoa.training.prequential import Counted

        folder, found = RunFolder(self.root), dict[str, Counted]()
        paths = {folder.answers(task.benchmark, f"dmoa:{start}{ADAPTED}") for task in self.tasks.values()}
        for path in (self.updates(start), *paths):
            mend(path)
        lines = {line.row_id: line for path in paths for line in read_lines(path, Answered)}
        for query in queries:
            path, line = self.part(start, query.query_id), lines.get(query.query_id)
            if line is not None and line.error is not None:
                found[query.query_id] = Counted(query=query, version=line.gate_version or "", is_new=False)
            elif line is not None and path.exists():
                table = read_part(path)
                version: str = table["gate_version"][0].as_py()
                found[query.query_id] = Counted(query=query, version=version, table=table, is_new=False)
        return found


def _trees(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, none where it does not exist; a line that is being written is left out."""
    return [json.loads(line) for _, line in offsets(path)]


def _line(task: Task, policy: str, one: Counted) -> Answered:
    if one.answer is not None:
        return answered(task, policy, one.answer)
    assert one.error is not None
    if isinstance(one.error, EmptyAnswerError):
        line = unanswered(task, policy, one.error, one.wall_ms)
    else:
        line = failed(task, policy, one.error, one.wall_ms)
    return line.model_copy(update={"gate_version": one.version})


def run_adapt(options: AdaptOptions, config: Config, checkpoint: Path | None, common: Common, command: str) -> AdaptReport:
    """Adapt, evaluate, print the table and return the report.

    Raises ConfigError, CheckpointError, RequestError for bad input, DmoaError where it stops; what was answered is kept.
    """
    names = expand_names(options.benchmark, "--benchmark")
    starts: dict[str, Path | None] = {ZERO: None} | ({} if checkpoint is None else {FEW: checkpoint.absolute()})
    advice = f"the same command with --out {display_path(options.out)} goes on from here"
    with goes_on(advice), localized(options, common.say, reads=("replay", "outcomes"), writes=("out",)) as here:
        with only_one(here.out, "adaptation", "adapt"), Bars(common.verbosity) as bars:
            check_same(options.model_copy(update={"out": here.out}), config, starts)  # URIs as they were given
            report = _adapted(here, config, names, starts, common, bars, command)
        write_whole(here.out / "adapt.json", report.model_dump_json(indent=2) + "\n")
        print_adaptation(report)
        common.say(f"report: {display_path(here.out / 'report.html')}")
    return report


def check_same(options: AdaptOptions, config: Config, starts: Mapping[str, Path | None]) -> None:
    """Note what a run is, or raise ConfigError where the folder holds answers of another one, naming what differs."""
    now: dict[str, Any] = {"pool": fingerprint(config), "starts": {name: str(folder) for name, folder in starts.items()}}
    now |= options.model_dump(mode="json", exclude={"out", "workers", "address", "track"})
    now |= {"limits": config.limits.model_dump(mode="json")}
    now |= {f"sampling of {agent.name}": agent.sampling.model_dump(mode="json") for agent in config.agents}
    for name in expand_names(options.benchmark, "--benchmark"):
        now |= {f"file {file}": digest for file, digest in hash_files(name, options.data_dir).items()}
        now |= {f"file of {name}": digest for digest in [BENCHMARKS.digest(name)] if digest is not None}
    path = options.out / "settings.json"
    if not path.exists() or not RunFolder(options.out).is_answered:
        options.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(now, indent=2) + "\n")
        return
    before = read_json(read_bounded(path))
    different = [
        f"{name}: begun with {before[name]}, now {value}" for name, value in now.items() if before.get(name, value) != value
    ]
    if different:
        raise ConfigError(f"--out: {'; '.join(different)}; repeat the settings of {str(path)!r}, or use another folder")


def _adapted(
    options: AdaptOptions,
    config: Config,
    names: tuple[str, ...],
    starts: Mapping[str, Path | None],
    common: Common,
    bars: Bars,
    command: str,
) -> AdaptReport:
    from dmoa.evaluation.report import write_report
    from dmoa.evaluation.run import evaluate
    from dmoa.workflows.evaluate import build_evaluation, log_tables

    folder = RunFolder(options.out.absolute())
    folder.make()
    first = run_first(options, config, folder, names, starts, bars, common.say)
    gates = {name: folder.root / "gates" / name for start in starts for name in (start, f"{start}{ADAPTED}")}
    asked = _evaluation(options, names).model_copy(
        update={"policies": tuple(f"dmoa:{name}" for name in gates), "gates": gates, "resume": folder.run.exists()}
    )
    session: Session = build_evaluation(asked, config, names, folder, common, bars, command)
    common.say(f"the rest, by {len(gates)} frozen gates")
    evaluation = evaluate(session)
    report = _report(options, session, first)
    write_report(evaluation, folder.report, drawn(report))
    log_stream(report, folder.root, options)
    log_tables(evaluation, folder, asked)
    return report


def drawn(report: AdaptReport) -> Stream:
    """Return what the HTML report draws of the first queries."""
    return {f"dmoa:{gate}": points for gate, points in report.stream.items()}


def kept_stream(folder: Path) -> Stream | None:
    """Return the same of the adaptation that a folder holds; None where it holds none. Raises ConfigError for a damaged one."""
    path = folder / "adapt.json"
    return drawn(read_record(path, AdaptReport)) if path.exists() else None


def run_first(
    options: AdaptOptions,
    config: Config,
    folder: RunFolder,
    names: Sequence[str],
    starts: Mapping[str, Path | None],
    bars: Bars,
    say: Callable[[str], None],
) -> list[Task]:
    """Let every start answer and learn from the first queries, and return these; the gates then lie in the folder.

    Raises ConfigError, CheckpointError for bad input, DmoaError where it stops, or all queries of a benchmark failed.
    """
    import torch

    from dmoa.training.distributed import SingleWorker
    from dmoa.training.prequential import adapt_on_ray, run_streams
    from dmoa.workflows.evaluate import opened_ray

    first = _prepared(options, folder, names)
    job = _job(options, config, folder, first, starts)
    ways = "Ray Train" if options.workers else "this process"
    say(f"{len(first)} queries of {', '.join(names)}, asked of everybody; an update every {options.every}, in {ways}")
    stage = Stage(folder.root)

    def show() -> None:
        done = sum(len(update["queries"]) for start in starts for update in _trees(stage.updates(start)))
        bars.count("adapting", done, len(first) * len(starts))

    if options.workers:
        with opened_ray(options.address):
            adapt_on_ray(job, options.workers, show)
        show()
    else:
        run_streams(job, SingleWorker(torch.device("cpu")), show)
    tasks = [task for task, _ in first]
    _check_answered(folder, tasks, starts)
    return tasks


def _check_answered(folder: RunFolder, first: Sequence[Task], starts: Iterable[str]) -> None:
    """Raise DmoaError where every first query of a benchmark failed: nothing could be learned, and nothing will be answered."""
    for name in dict.fromkeys(task.benchmark for task in first):
        for start in starts:
            lines = list(folder.read_answers(name, f"dmoa:{start}{ADAPTED}"))
            if lines and all(line.status == "failed" for line in lines):
                raise DmoaError(
                    f"adapt: {start}: all {len(lines)} queries of {name} failed; the first error: "
                    f"{' '.join((lines[0].error or '').split())}; mend what failed, then begin in another folder"
                )


def log_stream(report: AdaptReport, root: Path, options: AdaptOptions) -> None:
    """Log the stream, a step a query, and the table to the tracker: means so far, and every update's drift.

    Nothing where the same is logged already.
    """
    columns = list(AdaptRow.model_fields)
    rows = [list(row.model_dump().values()) for row in report.rows]
    if tracking.is_logged(root, "table", name="adaptation", rows=rows):
        return
    tracker = tracking.open_tracker(options.track, run_dir=root, project="dmoa", name=root.name, config=report.options)
    known: dict[str, list[float]] = {}
    for count in range(1, max(map(len, report.stream.values()), default=0) + 1):
        for gate, points in report.stream.items():
            for name in ("right", "entropy_nats", "right_probability", "agents", "tokens"):
                value = points[count - 1][name]
                known.setdefault(f"{gate}/{name}", []).extend([] if value is None else [float(value)])
        drifts = {f"{start}/drift": float(one[count - 1]["drift"]) for start, one in report.updates.items() if count <= len(one)}
        tracker.log({name: fmean(values) for name, values in known.items() if values} | drifts, step=count)
    tracker.table("adaptation", columns, rows)
    tracker.finish()


def _evaluation(options: AdaptOptions, names: Sequence[str]) -> EvaluateOptions:
    """Return the evaluation that the run is, without its gates."""
    values = {name: getattr(options, name) for name in ("data_dir", "limit", "seed", "difficulty", "out", "address", "track")}
    weak = options.allow_weak_sandbox
    return EvaluateOptions.parse(
        {**values, "benchmarks": names, "allow_weak_sandbox": weak, "call_cache": options.out / "calls", "skip_bad_rows": True}
    )


def _prepared(options: AdaptOptions, folder: RunFolder, names: Sequence[str]) -> list[tuple[Task, RolloutQuery]]:
    """Write the rows of all benchmarks and return the first queries, the benchmarks in turns, without their labels."""
    asked = _evaluation(options, names)
    for name in names:
        prepare_rows(folder, name, asked)
    columns = [list(folder.read_tasks(name)) for name in names]
    shares = share_out(options.queries, [1.0] * len(names), [len(column) for column in columns])
    tasks = take_turns([column[:share] for column, share in zip(columns, shares, strict=True) if share])
    return [
        (task, RolloutQuery(query_id=task.row_id, source=task.benchmark, split="test", text=task.text, stages=task.stages))
        for task in tasks
    ]


def _job(
    options: AdaptOptions,
    config: Config,
    folder: RunFolder,
    first: Sequence[tuple[Task, RolloutQuery]],
    starts: Mapping[str, Path | None],
) -> StreamJob:
    from dmoa.training.prequential import StreamJob

    stage = Stage(folder.root, {task.row_id: task for task, _ in first})
    asking = Asking(seed=options.seed, limits=limits_for(config))
    queries = [query for _, query in first]
    settings = options.model_dump(include=set(AdaptSettings.model_fields))
    return StreamJob(
        config=config,
        open_swarm=OpenAdaptingPool(config_json=config.model_dump_json(), call_cache=folder.root / "calls"),
        queries=tuple((query, query_of_task(task, "adapt", asking)) for task, query in first),
        starts=dict(starts),
        out=folder.root,
        keep=stage.keep,
        kept={start: stage.kept(start, queries) for start in starts},
        settings=AdaptSettings.parse(settings),
        every=options.every,
        replay=tuple(path.absolute() for path in options.replay),
        outcomes=_fitting(options.outcomes, {query.query_id for query in queries}) if options.outcomes else (),
        preset=config.gate.preset,
        fingerprint=fingerprint(config),
    )


def _fitting(path: Path, queries: Collection[str]) -> tuple[Outcome, ...]:
    """Return the outcomes of a file. Raises ConfigError for a file of which nothing is of these queries."""
    found = read_outcomes(path)
    if not any(one.query_id in queries for one in found):
        raise no_outcome_fits(len(found), "the first queries", "take more of them (--queries)")
    return found


def _report(options: AdaptOptions, session: Session, first: Sequence[Task]) -> AdaptReport:
    early = {task.row_id: place for place, task in enumerate(first)}
    folder, rows, stream = session.folder, [], {}
    for gate in session.gates:
        told: list[tuple[int, dict[str, Any]]] = []
        for name in session.benchmarks:
            lines = list(folder.read_answers(name, f"dmoa:{gate}"))
            scores = folder.read_scores(name, f"dmoa:{gate}")
            right = {line.row_id: line.value for line in scores if not line.is_left_out}
            rows.append(_row(name, gate, lines, right, early))
            told += [(early[line.row_id], _point(line, right)) for line in lines if line.row_id in early]
        stream[gate] = [point for _, point in sorted(told, key=lambda one: one[0])]
    starts = [gate for gate in session.gates if not gate.endswith(ADAPTED)]
    return AdaptReport(
        command=session.command,
        options=options.model_dump(mode="json"),
        pool=session.pool.name,
        starts=session.gates,
        rows=rows,
        updates={start: _trees(Stage(folder.root).updates(start)) for start in starts},
        stream=stream,
    )


def _row(name: str, gate: str, lines: Sequence[Answered], right: Mapping[str, float], early: Mapping[str, int]) -> AdaptRow:
    parts = {is_early: [line for line in lines if (line.row_id in early) is is_early] for is_early in (True, False)}
    shown = parts[False] or parts[True]
    steps = [len(active) for line in shown for active in line.active]
    first, rest = ([right[line.row_id] for line in parts[is_early] if line.row_id in right] for is_early in (True, False))
    return AdaptRow(
        benchmark=name,
        gate=gate,
        first=float(np.mean(first)) if first else None,
        first_rows=len(first),
        rest=float(np.mean(rest)) if rest else None,
        rest_rows=len(rest),
        agents=float(np.mean(steps)) if steps else 0.0,
        tokens=float(np.mean([line.usage.total for line in shown])) if shown else 0.0,
    )


def _point(line: Answered, right: Mapping[str, float]) -> dict[str, Any]:
    return {
        "row_id": line.row_id,
        "right": right.get(line.row_id),
        "entropy_nats": line.entropy_nats,
        "right_probability": line.right_probability,
        "agents": sum(map(len, line.active)),
        "tokens": line.usage.total,
        "gate_version": line.gate_version,
    }


def print_adaptation(report: AdaptReport) -> None:
    """Print the table: starts, and what adaptation made of them."""
    console = stdout_console()
    table = new_table("benchmark", "gate", "first queries", "rows after", "agents", "tokens", words=("benchmark", "gate"))
    for row in report.rows:
        parts = ((row.first, row.first_rows), (row.rest, row.rest_rows))
        shares = ["" if share is None else f"{share:.1%} of {count}" for share, count in parts]
        table.add_row(row.benchmark, row.gate, *shares, f"{row.agents:.2f}", f"{row.tokens:.0f}")
    console.print(table)
    line(
        console,
        "first queries: prequential for -ttt, every counted answer given before the update on it, everybody asked beside it; "
        "rows after: the gate frozen",
    )
    for start, updates in report.updates.items():
        if updates and all(update["loss"] is None for update in updates):
            asked = sum(len(update["queries"]) for update in updates)
            line(
                console,
                f"{start}: learned nothing from {asked} queries; untrained weights need {MIN_ROWS} that two agents or more "
                "answered comparably before they learn: raise --queries",
            )
