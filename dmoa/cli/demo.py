"""`dmoa demo`: serves small specialists, asks, collects, trains, installs, replays and compares, and tells it as it goes."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from dmoa.config import Config
from dmoa.errors import DmoaError
from dmoa.evaluation.records import Label, Reply
from dmoa.evaluation.registry import SUITES
from dmoa.workflows.console import EXIT_FAILED, Common, Screen, printable, untrained_note, with_common

if TYPE_CHECKING:
    from dmoa.core.gate import Gate
    from dmoa.evaluation.answer_matrix import AnswerMatrix
    from dmoa.evaluation.results import Evaluation
    from dmoa.evaluation.run_folder import RunFolder
    from dmoa.training.probe import ProbeReport
    from dmoa.types import FloatArray
    from dmoa.workflows.backends import Backend
    from dmoa.workflows.console import QueryResult


class DemoReport:
    """Prints what is asked in a demo as it goes."""

    def __init__(self, common: Common, config: Config, *, num_questions: int) -> None:
        self._screen = Screen(common.verbosity)
        self._verbosity = common.verbosity
        self._config = config
        self._num_questions = num_questions

    def opening(self, url: str, gate_version: str) -> None:
        """Print what is served and what to expect of it."""
        self._print(f"dmoa: ready at {url} (pool {self._config.name}, gate {gate_version})")
        if note := untrained_note(gate_version):
            self._print(note)
        is_small = any(llm.model == "embedded:smollm2-135m" for llm in self._config.llms.values())
        if is_small and not any(agent.adapter for agent in self._config.agents):
            self._print(
                "agents that differ by role prompt alone hardly differ on a 135M model: this shows the machinery, not its worth"
            )

    def query(self, number: int, outcome: DemoOutcome) -> None:
        """Print a finished query: its steps, its answer, and whether that is right."""
        if self._verbosity < 0:
            return
        self._print(f"\n=== question {number} of {self._num_questions}: {outcome.question.text}")
        if outcome.asked is None:
            self._print(f"failed: {outcome.error}")
            return
        for step in outcome.asked.answer.steps:
            self._screen.step(step)
        self._screen.answer(outcome.asked, has_note=False)
        self._print(f"expected {outcome.question.expected}: {'right' if outcome.is_right else 'wrong'}")

    def closing(self, outcomes: Sequence[DemoOutcome], wall_s: float) -> None:
        """Print how many were right and what all took; `wall_s` is how long all queries took together."""
        answers = [outcome.asked.answer for outcome in outcomes if outcome.asked is not None]
        active = [len(step.active) for answer in answers for step in answer.steps]
        right = f"right: {sum(outcome.is_right for outcome in outcomes)} of {len(outcomes)}"
        width = f", {fmean(active):.1f} agents a step" if active else ""
        tokens = sum(answer.usage.total for answer in answers)
        self._print(f"\n{right}; {len(active)} steps{width}, {tokens} tokens, {wall_s:.1f} s side by side")

    def _print(self, text: str) -> None:
        self._screen.out.print(Text(printable(text)), soft_wrap=True)


DEMO_SUITES = ("arith", "words", "calendar")
SEED = 0
_CONCURRENCY = 3
"""Queries in flight: enough for the engine to batch them, few enough to follow."""
_MAX_STEPS = 3
_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoQuestion:
    """One question of the demo."""

    text: str
    label: Label
    """Its suite and computed answer."""

    @property
    def expected(self) -> str:
        """The right answer."""
        return str(self.label.gold["answer"])


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOutcome:
    """What became of a question."""

    question: DemoQuestion
    asked: QueryResult | None
    """None where the query failed."""
    error: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the answer is the computed one, by the suite's own scorer."""
        if self.asked is None:
            return False
        return SUITES[self.question.label.benchmark].score(self.question.label, Reply(text=self.asked.answer.text)).value == 1.0

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` says of it."""
        return {
            "question": self.question.text,
            "suite": self.question.label.benchmark,
            "expected": self.question.expected,
            "right": self.is_right,
            "error": self.error or None,
            "reply": self.asked.to_json() if self.asked else None,
            "wall_s": round(self.asked.answer.wall_ms / 1e3, 3) if self.asked else None,
        }


def generate(count: int, seed: int = SEED) -> list[DemoQuestion]:
    """Return `count` held-out questions of each suite, in turns: deterministic in the seed, all different."""
    columns = [
        [DemoQuestion(text=row.task.text, label=row.label) for row in SUITES[name].generate("test", count, seed)]
        for name in DEMO_SUITES
    ]
    return [question for together in zip(*columns, strict=True) for question in together]


async def ask_all(url: str, questions: list[DemoQuestion], report: DemoReport) -> list[DemoOutcome]:
    """Ask every question over HTTP, a few at a time; each is reported when it is done. Returned in the order given."""
    from dmoa.workflows.backends import Backend, open_client

    places = asyncio.Semaphore(_CONCURRENCY)
    backend = Backend(open_client(url, os.environ.get("DMOA_API_KEYS", "").partition(",")[0].strip()))
    try:
        tasks = [_ask(backend, places, number, question, report) for number, question in enumerate(questions, 1)]
        return await asyncio.gather(*tasks)
    finally:
        await backend.close()


async def _ask(
    backend: Backend, places: asyncio.Semaphore, number: int, question: DemoQuestion, report: DemoReport
) -> DemoOutcome:
    from dmoa.workflows.backends import AskOptions
    from dmoa.workflows.console import Screen

    wish = AskOptions(max_steps=_MAX_STEPS, max_tokens=_MAX_TOKENS, keeps_trace=True)
    async with places:
        try:
            # Nothing is shown before the query is done: a few of them are under way at once.
            asked = await backend.ask(question.text, (), wish, Screen(shows_steps=False))
        except DmoaError as error:
            outcome = DemoOutcome(question=question, asked=None, error=str(error))
        else:
            outcome = DemoOutcome(question=question, asked=asked)
    report.query(number, outcome)
    return outcome


def replay_demo(common: Common, config: Config, out: Path, outcomes: list[DemoOutcome]) -> bool:
    """Keep the traces, route them again, and tell how to do the same; return whether every decision was repeated."""
    from dmoa.cli.run import replay_traces
    from dmoa.trace import read_traces, write_traces

    traces = [
        (number, o.asked.trace) for number, o in enumerate(outcomes, 1) if o.asked is not None and o.asked.trace is not None
    ]
    for number, trace in traces:
        write_traces(out / f"query-{number:02d}.jsonl", [trace])
    path = write_traces(out / "traces.jsonl", [trace for _, trace in traces])
    typer.echo(f"traces of {len(traces)} queries in {out}; replay them with:")
    typer.echo(f"  {_command('run', common, replay=path)}")
    return all(not result.differences for result in replay_traces(config, read_traces(path)))


def _command(name: str, common: Common, **options: Any) -> str:
    """Return the command that does the same by hand, on the same pool."""
    words = ["dmoa", *name.split()]
    words += ["--config", str(common.config)] if common.config else []
    words += [part for override in common.overrides for part in ("--set", override)]
    words += [part for option, value in options.items() for part in (f"--{option.replace('_', '-')}", str(value))]
    return shlex.join(words)


LEARNING_SEED = 1
"""Of the queries that the gate learns from: other rows than those it is shown or compared on, in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What came of the learning."""

    probe: ProbeReport
    checkpoint: Path
    version: str
    training: dict[str, Any]
    """`train.json`."""
    warnings: tuple[str, ...]
    """What is to be said of the gate's worth, label-free."""
    commands: list[str]
    """The same by hand."""


def learn(common: Common, config: Config, out: Path, app: str, queries: int) -> Learned:
    """Collect dense rollouts, look at them, train, and install. Raises DmoaError where a part fails."""
    from dmoa.cli.train import print_probe
    from dmoa.serving.router.admin import RouterAdmin, checkpoint_files
    from dmoa.training.options import RolloutOptions, TrainOptions
    from dmoa.workflows.collect import run_rollouts
    from dmoa.workflows.probe import probe_rollouts
    from dmoa.workflows.train import ranking_warning, run_train

    rollouts, gate = out / "rollouts", out / "gate"
    sources = {"benchmarks": ",".join(DEMO_SUITES), "limit": queries, "seed": LEARNING_SEED, "out": rollouts}
    training = {"rollouts": rollouts, "out": gate}
    collecting, learning = _command("rollouts", common, **sources), _command("train", common, **training)
    common.say(f"3 of 6: {queries} generated queries, without labels, asked of every agent: can entropy route this pool?")
    run_rollouts(RolloutOptions.parse({**sources, "track": "none", "call_cache": out / "calls"}), config, common, collecting)
    probe = probe_rollouts(rollouts, config)
    if common.verbosity >= 0:
        print_probe(probe, config)
    common.say("4 of 6: training the gate on Ray Train, by predictive entropy alone")
    result = run_train(TrainOptions.parse(training), config, common, learning)
    change = RouterAdmin(app).install(checkpoint_files(result.checkpoint), "dmoa demo")
    common.say(f"installed in the running swarm: {change['previous']} -> {change['version']}")
    install = shlex.join(["dmoa", "router", "install", str(gate / "checkpoint")])
    return Learned(
        probe=probe,
        checkpoint=result.checkpoint,
        version=result.record.version,
        training=result.report.model_dump(mode="json"),
        warnings=(*result.report.silent, *ranking_warning(result.report)),
        commands=[collecting, _command("probe", common, rollouts=rollouts), learning, install],
    )


TRAINED = "dmoa:trained"
GENERALIST = "generalist"
NUM_UNTRAINED = 20
"""Untrained gates whose mean is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One method on all held-out rows."""

    name: str
    policy: str
    accuracy: float
    low: float
    high: float
    """Wilson's 95 % interval; of several gates, what the middle 95 % of them reach."""
    by_suite: dict[str, float]
    active: float
    """Agents asked per step."""
    tokens: float
    """Per question: prompt and completion, summarizer included."""
    not_run: tuple[str, ...] = ()
    """Suites of which every query failed: they count in no figure."""

    @property
    def did_run(self) -> bool:
        """Whether it ran on any suite."""
        return len(self.not_run) < len(self.by_suite)


def compare_methods(common: Common, config: Config, out: Path, checkpoint: Path, held_out: int) -> list[Compared]:
    """Evaluate everything on held-out rows, add the oracle, and return the methods of the closing table.

    Raises DmoaError where the evaluation stops.
    """
    from dmoa.evaluation.answer_matrix import add_oracle, matrix_policies
    from dmoa.evaluation.records import EvaluateOptions
    from dmoa.evaluation.run import finish_run
    from dmoa.evaluation.run_folder import RunFolder
    from dmoa.workflows.evaluate import run_evaluation

    policies = ["dmoa", TRAINED, *matrix_policies(config.agent_names), "dense", "random"]
    values = {
        "benchmarks": ",".join(DEMO_SUITES),
        "policies": ",".join(policies),
        "gates": f"trained={checkpoint}",
        "limit": held_out,
        "seed": SEED,
        "out": out / "evaluation",
        "call_cache": out / "calls",
    }
    run_evaluation(EvaluateOptions.parse(values), config, common, _command("evaluate", common, **values), shows_result=False)
    folder = RunFolder((out / "evaluation").absolute())
    add_oracle(folder, DEMO_SUITES, config.agent_names)
    found = summarise(finish_run(folder), config.agent_names)
    return [*found[:2], *first_steps(config, folder, checkpoint), *found[2:]]


def first_steps(config: Config, folder: RunFolder, checkpoint: Path) -> list[Compared]:
    """Return what many untrained gates, and the trained one, get with one step a question: replayed, nobody is asked.

    Blocks while the encoder loads. Raises ConfigError where an agent has not answered every row.
    """
    from dmoa import checkpoint as checkpoints
    from dmoa.agents.pool import build_encoder, build_pool_gate
    from dmoa.evaluation.answer_matrix import read_matrix

    matrices = [read_matrix(folder, suite, config.agent_names) for suite in DEMO_SUITES]
    encoder = build_encoder(config)
    embedded = [np.stack(asyncio.run(encoder.embed([task.text for task in matrix.tasks]))) for matrix in matrices]
    seeds = (config.gate.model_copy(update={"seed": seed, "checkpoint": None}) for seed in range(NUM_UNTRAINED))
    untrained = [build_pool_gate(config.model_copy(update={"gate": gate}))[0] for gate in seeds]
    trained = checkpoints.load(checkpoint)[0]
    return [
        _replayed(f"untrained gates, first step (mean of {NUM_UNTRAINED})", "dmoa", untrained, matrices, embedded),
        _replayed("trained gate, first step", TRAINED, [trained], matrices, embedded),
    ]


def _replayed(
    name: str, policy: str, gates: Sequence[Gate], matrices: Sequence[AnswerMatrix], embedded: Sequence[FloatArray]
) -> Compared:
    """Return the mean of some gates over all rows; for a single one the interval is Wilson's."""
    from dmoa.evaluation.answer_matrix import gate_choices, replay_choices
    from dmoa.evaluation.statistics import wilson

    pairs = list(zip(matrices, embedded, strict=True))
    parts = [[replay_choices(matrix, gate_choices(gate, rows_RD)) for matrix, rows_RD in pairs] for gate in gates]
    value_GR = np.stack([np.concatenate([part.value_R for part in those]) for those in parts])
    low, high = np.quantile(value_GR.mean(axis=1), (0.025, 0.975))
    if len(gates) == 1:
        share = wilson(round(float(value_GR.sum())), value_GR.shape[1])
        low, high = share.low, share.high
    return Compared(
        name=name,
        policy=policy,
        accuracy=float(value_GR.mean()),
        low=float(low),
        high=float(high),
        by_suite={
            matrix.benchmark: float(np.mean([those[place].value_R for those in parts])) for place, matrix in enumerate(matrices)
        },
        active=float(np.mean([part.k_R for those in parts for part in those])),
        tokens=float(np.mean([part.tokens_R for those in parts for part in those])),
    )


def summarise(evaluation: Evaluation, agents: Sequence[str]) -> list[Compared]:
    """Return the methods of the closing table, all suites together."""
    from dmoa.evaluation.answer_matrix import ORACLE, matrix_policies

    singles = [_method(evaluation, policy, policy.partition(":")[2]) for policy in matrix_policies(agents)]
    best = max(singles, key=lambda method: (not method.not_run, method.did_run, method.accuracy))
    found = [_method(evaluation, "dmoa", "untrained gate"), _method(evaluation, TRAINED, "trained gate")]
    found.append(_method(evaluation, best.policy, f"best single agent ({best.name})"))
    found += [method for method in singles if method.name == GENERALIST and method.policy != best.policy]
    found += [_method(evaluation, "dense", "dense (every agent)"), _method(evaluation, "random", "random agent")]
    return [*found, _method(evaluation, ORACLE, "oracle (knows the labels)")]


def _method(evaluation: Evaluation, policy: str, name: str) -> Compared:
    from dmoa.evaluation.statistics import wilson

    rows = [row for row in evaluation.rows if row.policy == policy]
    ran = [row for row in rows if row.did_run]
    count, correct = sum(row.n for row in ran), sum(row.correct for row in ran)
    share = wilson(correct, count)
    return Compared(
        name=name,
        policy=policy,
        accuracy=share.value,
        low=share.low,
        high=share.high,
        by_suite={row.benchmark: row.accuracy for row in rows},
        active=sum((row.active_mean or 0.0) * row.n for row in ran) / max(count, 1),
        tokens=sum(row.usage.total for row in ran) / max(count, 1),
        not_run=tuple(row.benchmark for row in rows if not row.did_run),
    )


def _figures(method: Compared) -> list[str]:
    """Return the cells of a method; a mean over other suites than the others' is none."""
    suites = ["did not run" if suite in method.not_run else f"{method.by_suite[suite]:.0%}" for suite in DEMO_SUITES]
    if not method.did_run:
        return ["did not run", "", *suites, "", ""]
    overall = ["", ""] if method.not_run else [f"{method.accuracy:.1%}", f"{method.low:.0%} to {method.high:.0%}"]
    return [*overall, *suites, f"{method.active:.2f}", f"{method.tokens:.0f}"]


def print_comparison(methods: Sequence[Compared], config: Config, probe: ProbeReport) -> None:
    """Print the closing table."""

    from dmoa.workflows.console import stdout_console

    console = stdout_console()
    table = Table(box=None, pad_edge=False, title=f"{config.name}: held-out rows, all suites together", title_justify="left")
    for name in ("method", "accuracy", "95 %", *DEMO_SUITES, "agents a step", "tokens a question"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in methods:
        table.add_row(method.name, *_figures(method))
    console.print()
    console.print(table)
    if probe.verdict != "can":
        console.print(f"the probe said: {probe.verdict}; {'; '.join(probe.reasons)}", soft_wrap=True)


POOL = "specialists"
APP = "dmoa-demo"
_OWN = ("before", "after", "rollouts", "gate", "evaluation", "calls", "router")
"""Folders that a demo makes anew in --out."""


@with_common
def demo(
    common: Common,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port to serve on [a free one].")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where traces, rollouts, gate and report go.")] = Path(
        "out/demo"
    ),
    questions: Annotated[int, typer.Option("--questions", min=1, max=20, metavar="N", help="Shown, of each suite.")] = 1,
    queries: Annotated[int, typer.Option("--queries", min=12, max=1000, metavar="N", help="To learn from, without labels.")] = 45,
    held_out: Annotated[int, typer.Option("--held-out", min=1, max=1000, metavar="N", help="To compare on, of each suite.")] = 16,
) -> None:
    """Serve a swarm, let its gate learn without labels, install what it learned while serving, and compare.

    \b
    dmoa demo
    dmoa demo --queries 30 --held-out 8 --out out/quick
    dmoa demo --config pool.yaml --questions 2
    """

    if common.config is None and not os.environ.get("DMOA_CONFIG"):
        common = replace(common, config=Path(POOL))
    config = common.load()
    for name in _OWN:
        shutil.rmtree(out / name, ignore_errors=True)
    # A router takes up what was installed before: the demo begins with an untrained gate every time.
    place = config.router.model_copy(update={"state_uri": (out / "router").absolute().as_uri()})
    config = config.model_copy(update={"router": place})
    started = time.monotonic()
    told = tell(common, config, out, port, (questions, queries, held_out))
    seconds = time.monotonic() - started
    print_comparison(told.comparison, config, told.learned.probe)
    _closing(common, told.learned, out, seconds)
    common.write_json({"pool": config.name, "seconds": seconds, **told.to_json()})
    if not told.is_whole:
        raise typer.Exit(EXIT_FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the demo showed."""

    gate_version: str
    """Before the learning."""
    before: list[DemoOutcome]
    after: list[DemoOutcome]
    is_replayed: bool
    """Whether every routing decision was repeated from its trace."""
    learned: Learned
    comparison: list[Compared]

    @property
    def is_whole(self) -> bool:
        """Whether every question was answered, every decision repeated, and every method compared that was to be."""
        has_run = all(not method.not_run for method in self.comparison)
        return self.is_replayed and has_run and all(outcome.asked is not None for outcome in (*self.before, *self.after))

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {
            "gate_versions": [self.gate_version, self.learned.version],
            "replay_identical": self.is_replayed,
            "before": [outcome.to_json() for outcome in self.before],
            "after": [outcome.to_json() for outcome in self.after],
            "probe": self.learned.probe.model_dump(mode="json"),
            "training": self.learned.training,
            "comparison": [asdict(row) for row in self.comparison],
        }


def tell(common: Common, config: Config, out: Path, port: int | None, counts: tuple[int, int, int]) -> Told:
    """Run the demo; `counts`: questions shown of each suite, queries to learn from, held-out rows of each suite."""
    from dmoa.serving.ending import Ending
    from dmoa.serving.launch import launch, stop

    asking = generate(counts[0])
    common.say(f"1 of 6: starting pool {config.name} ({len(config.agents)} agents) on Ray Serve; this takes a minute or so")
    is_up = False
    with Ending(common.say) as ending:
        try:
            launched = launch(config, host="127.0.0.1", port=port or free_port(), app=APP)
            is_up = True
            ending.ready(EXIT_FAILED)
            common.say(f"2 of 6: {len(asking)} questions over HTTP, gate {launched.gate_version}")
            before, is_same = ask_and_replay(common, config, launched.url, launched.gate_version, asking, out / "before")
            learned = learn(common, config, out, APP, counts[1])
            common.say(f"5 of 6: the same questions, gate {learned.version}, installed in the running swarm")
            trained = replace(common, overrides=(*common.overrides, f"gate.checkpoint={learned.checkpoint}"))
            after, is_same_after = ask_and_replay(trained, trained.load(), launched.url, learned.version, asking, out / "after")
            common.say(f"6 of 6: comparing on {counts[2]} held-out rows of each suite; every agent answers alone as well")
            comparison = compare_methods(common, config, out, learned.checkpoint, counts[2])
        finally:
            if is_up:
                common.say("stopping the swarm")
                stop(APP, end_ray=True)
    return Told(
        gate_version=launched.gate_version,
        before=before,
        after=after,
        is_replayed=is_same and is_same_after,
        learned=learned,
        comparison=comparison,
    )


def free_port() -> int:
    """Return a loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask_and_replay(
    common: Common, config: Config, url: str, gate_version: str, questions: list[DemoQuestion], out: Path
) -> tuple[list[DemoOutcome], bool]:
    """Ask the questions over HTTP, show their routing, and route the traces again; returns whether that was the same."""
    report = DemoReport(common, config, num_questions=len(questions))
    report.opening(url, gate_version)
    asked_at = time.monotonic()
    outcomes = asyncio.run(ask_all(url, questions, report))
    report.closing(outcomes, time.monotonic() - asked_at)
    return outcomes, replay_demo(common, config, out, outcomes)


def _closing(common: Common, learned: Learned, out: Path, seconds: float) -> None:
    """Say where everything lies and how to do the same by hand."""
    lines = [
        f"report: {out / 'evaluation' / 'report.html'}; W&B runs (offline without a key) in {out / 'gate' / 'wandb'}",
        "the same by hand:",
        *(f"  {command}" for command in learned.commands),
        f"{seconds:.0f} s in all",
    ]
    for warning in learned.warnings:
        typer.secho(warning, fg=typer.colors.RED)
    if common.verbosity >= 0:
        for line in lines:
            typer.echo(line)
