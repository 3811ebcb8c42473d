"""`dmoa demo`: serves small specialists, asks, collects, trains, installs, replays and compares, as the commands do it."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import psutil
import typer

from dmoa.agents.pool import build_pool_gate
from dmoa.cli.run import ask_once, replay_traces
from dmoa.cli.serve import announce
from dmoa.config import Config
from dmoa.errors import ConfigError, DmoaError
from dmoa.evaluation.records import EvaluateOptions, Reply, Row
from dmoa.evaluation.registry import SKILLS, SUITES
from dmoa.protocols import Encoder
from dmoa.storage import unwritable, write_whole
from dmoa.trace import read_traces
from dmoa.training.options import RolloutOptions, TrainOptions
from dmoa.types import FloatArray
from dmoa.workflows.console import EXIT_FAILED, Common, print_overall, print_routing, stdout_console, with_common
from dmoa.workflows.train import run_train

if TYPE_CHECKING:
    from dmoa.core.gate import Gate
    from dmoa.evaluation.answer_matrix import AnswerMatrix
    from dmoa.evaluation.figures import Overall
    from dmoa.evaluation.results import Evaluation
    from dmoa.evaluation.run_folder import RunFolder
    from dmoa.training.probe import ProbeReport
    from dmoa.training.trainer import TrainResult

POOL = "specialists"
APP = "dmoa-demo"
DEMO_SUITES = tuple(suite.name for suite in SKILLS)
SEED = 0
TRAINED = "dmoa:trained"
NUM_UNTRAINED = 20
"""Untrained gates whose mean is told."""
UNTRAINED = f"untrained gates, first step (mean of {NUM_UNTRAINED})"
_MAX_STEPS = 3
_MAX_TOKENS = 64
_OWN = ("before", "after", "rollouts", "gate", "evaluation", "adaptation", "calls", "router")
"""Folders that a demo makes anew in --out."""
_OUT = Path("out/demo")
_MARK = ".demo"
"""File that says of another --out that a demo made it."""


@with_common
def demo(
    common: Common,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port to serve on [a free one].")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where traces, rollouts, gate and report go.")] = _OUT,
    questions: Annotated[int, typer.Option("--questions", min=1, max=20, metavar="N", help="Shown, before and after.")] = 1,
    queries: Annotated[int, typer.Option("--queries", min=12, max=1000, metavar="N", help="To learn from, without labels.")] = 48,
    held_out: Annotated[int, typer.Option("--held-out", min=1, max=1000, metavar="N", help="To compare on, of each suite.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of questions, queries and rows [0].")] = SEED,
) -> None:
    """Serve a swarm, train its gate without labels, and compare. What it learned is installed while it serves.

    \b
    dmoa demo
    dmoa demo --queries 30 --held-out 8 --out out/quick
    dmoa demo --config pool.yaml --questions 2
    """
    if common.config is None and not os.environ.get("DMOA_CONFIG"):
        common = replace(common, config=Path(POOL))
    if keys := os.environ.get("DMOA_API_KEYS"):
        os.environ["DMOA_API_KEY"] = keys.partition(",")[0].strip()
    config = common.load()
    begin_anew(out)
    # A router takes up what was installed before: the demo begins with an untrained gate every time.
    config = config.changed("router", state_uri=(out / "router").absolute().as_uri())
    started = time.monotonic()
    record, commands = tell(common, config, out, port, (questions, queries, held_out, seed))
    seconds = time.monotonic() - started
    if common.verbosity >= 0:
        typer.echo("\n  ".join(["the same by hand:", *commands]))
        serve = _command("serve", common, checkpoint=out / "gate" / "checkpoint")
        typer.echo(f"next: {serve}; the report: {out / 'evaluation' / 'report.html'}")
        typer.echo(f"{seconds:.0f} s in all")
    common.write_json({"pool": config.name, "seconds": seconds, **record})
    is_answered = all(asked["reply"] is not None for asked in (*record["before"], *record["after"]))
    if not (record["replay_identical"] and is_answered and record["pays"]):
        raise typer.Exit(EXIT_FAILED)


def begin_anew(out: Path) -> None:
    """Remove what an earlier demo left in a folder. Raises ConfigError where something else made what lies there."""
    found = [name for name in _OWN if (out / name).exists()]
    if found and out != _OUT and not (out / _MARK).exists():
        raise ConfigError(
            f"--out is {str(out)!r}; it holds {', '.join(found)}, which a demo makes anew, and no demo is known to have made "
            "what lies there; name another folder, or remove it yourself"
        )
    try:
        write_whole(out / _MARK, "")
    except OSError as error:
        raise unwritable(out, error) from error
    for name in found:
        shutil.rmtree(out / name, ignore_errors=True)


def tell(
    common: Common, config: Config, out: Path, port: int | None, counts: tuple[int, int, int, int]
) -> tuple[dict[str, Any], list[str]]:
    """Run the demo and return its record, as `--json` has it, and the commands that do the same by hand.

    `counts`: questions shown, queries to learn from, held-out rows of each suite; and the seed of all three.
    """
    from dmoa.serving.encoder import ServeEncoder
    from dmoa.serving.ending import Ending
    from dmoa.serving.handles import reach
    from dmoa.serving.launch import free_port, launch, stop

    rows = generate(counts[0], counts[3])
    common.say(f"1 of 7: starting pool {config.name} ({len(config.agents)} agents) on Ray Serve; this takes a minute or so")
    is_up = False
    with Ending(common.say) as ending:
        try:
            launched = launch(config, host="127.0.0.1", port=port or free_port(), app=APP)
            is_up = True
            ending.ready(EXIT_FAILED)
            announce(replace(common, json_path=None), launched)
            common.say(f"2 of 7: asking over HTTP, gate {launched.gate_version}")
            before, is_same = ask_and_replay(common, config, launched.url, rows, out / "before")
            # Learning and comparing take one step a question, for everybody: agents that disagree are else asked all over again.
            once = replace(common, overrides=(*common.overrides, "limits.max_steps=1"))
            briefly = config.changed("limits", max_steps=1)
            probe, result, commands = learn(once, briefly, out, counts[1], counts[3])
            common.say(f"5 of 7: the same again, gate {result.record.version}")
            trained = replace(common, overrides=(*common.overrides, f"gate.checkpoint={result.checkpoint}"))
            after, is_same_after = ask_and_replay(trained, trained.load(), launched.url, rows, out / "after")
            common.say(f"6 of 7: comparing on {counts[2]} held-out rows of each suite; every agent answers alone as well")
            encoder = ServeEncoder(reach("encoder", APP))
            comparison = compare(once, briefly, out, result.checkpoint, encoder, (counts[2], counts[3]))
            adaptation = show_adaptation(common, briefly, out, encoder, counts[3])
        finally:
            if is_up:
                common.say("stopping the swarm")
                stop(APP, end_ray=True)
    record = {
        "gate_versions": [launched.gate_version, result.record.version],
        "replay_identical": is_same and is_same_after,
        "before": before,
        "after": after,
        "probe": probe.model_dump(mode="json"),
        "training": result.report.model_dump(mode="json"),
        "comparison": comparison,
        "adaptation": adaptation,
        "pays": pays(comparison),
        "missed": missed(comparison),
    }
    return record, commands


def show_adaptation(common: Common, config: Config, out: Path, encoder: Encoder, seed: int) -> list[dict[str, Any]]:
    """Show how a gate that was trained without one suite learns it from that suite's queries; returns what `--json` says."""
    from dmoa.evaluation.run_folder import RunFolder
    from dmoa.workflows.unseen import show_unseen, told

    suite = DEMO_SUITES[-1]
    common.say(f"7 of 7: a gate trained without {suite} meets its queries, one by one, and learns whom to ask")
    folder = RunFolder((out / "evaluation").absolute())
    found = show_unseen(out / "rollouts", folder, config, encoder, DEMO_SUITES, out / "adaptation", seed)
    typer.echo("\n".join([f"\na skill that the gate was not trained on ({suite}), by held-out rows:", *told(found, suite)]))
    return [asdict(one) for one in found]


def pays(comparison: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the trained gate is above the untrained ones and above the best agent alone, where all of them ran."""
    accuracy = {row["name"].partition(" (")[0]: row["accuracy"] for row in comparison}
    if any(value is None for value in accuracy.values()):
        return False
    rivals = ("untrained gate", "untrained gates, first step", "best single agent")
    return all(accuracy["trained gate"] > accuracy[name] for name in rivals)


def missed(comparison: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the bars of the pool `specialists` that this run missed, in words; its bars mean nothing for other pools."""
    rows = {row["name"].partition(" (")[0]: row for row in comparison}
    own, dense, single = rows["trained gate"], rows["everybody once"], rows["best single agent"]
    if any(row["accuracy"] is None for row in (own, dense, single)):
        return ["a method did not run"]
    gain, lead = (own["accuracy"] - other["accuracy"] for other in (single, dense))
    share = own["tokens_total"] / dense["tokens_total"]
    bars = {
        f"accuracy >= 93 %: {own['accuracy']:.1%}": own["accuracy"] >= 0.93,
        f"60 points above the best single agent: {100 * gain:+.1f}": gain >= 0.6,
        f"at most one point below everybody: {100 * lead:+.1f}": lead >= -0.01,
        f"at most 1.3 agents a step: {own['active']}": float(own["active"]) <= 1.3,
        f"at most 20 % of everybody's tokens: {share:.1%}": share <= 0.2,
    }
    return [words for words, is_met in bars.items() if not is_met]


def generate(count: int, seed: int = SEED) -> list[Row]:
    """Return `count` held-out rows, suite by suite in turns: deterministic in the seed, all different."""
    columns = [SUITES[name].generate("test", count, seed) for name in DEMO_SUITES]
    return [row for together in zip(*columns, strict=True) for row in together][:count]


def ask_and_replay(common: Common, config: Config, url: str, rows: Sequence[Row], out: Path) -> tuple[list[dict[str, Any]], bool]:
    """Ask over HTTP as `dmoa run` does, keep the traces, and route them again.

    Returns what `--json` says of every question, and whether every routing decision was repeated.
    """
    is_small = any(llm.model == "embedded:smollm2-135m" for llm in config.llms.values())
    if is_small and not any(agent.adapter for agent in config.agents):
        typer.echo(
            "agents that differ by role prompt alone hardly differ on a 135M model: this shows the machinery, not its worth"
        )
    path = out / "traces.jsonl"
    shown = [_ask(common, url, row, path, f"{number} of {len(rows)}") for number, row in enumerate(rows, 1)]
    if not path.exists():
        return shown, True
    typer.echo(f"the routing again, from its trace (`{_command('run', common, replay=path)}`):")
    return shown, all(not result.differences for result in replay_traces(config, read_traces(path)))


def _ask(common: Common, url: str, row: Row, trace: Path, place: str) -> dict[str, Any]:
    """Ask one question, show how it is answered, and judge the answer by the suite's own scorer."""
    from dmoa.workflows.backends import AskOptions, Backend, open_client

    options = AskOptions(max_steps=_MAX_STEPS, max_tokens=_MAX_TOKENS, keeps_trace=True)
    label, expected = row.label, str(row.label.gold["answer"])
    found = {"question": row.task.text, "suite": label.benchmark, "expected": expected}
    typer.echo(f"\nquestion {place}: {row.task.text}")
    try:
        asked = asyncio.run(ask_once(Backend(open_client(url)), row.task.text, options, common, trace))
    except DmoaError as error:
        typer.echo(f"failed: {error}")
        return {**found, "right": False, "error": str(error), "reply": None, "wall_s": None}
    is_right = SUITES[label.benchmark].score(label, Reply(text=asked.answer.text)).value == 1.0
    typer.echo(f"expected {expected}: {'right' if is_right else 'wrong'}")
    return {**found, "right": is_right, "error": None, "reply": asked.to_json(), "wall_s": round(asked.answer.wall_ms / 1e3, 3)}


def _command(name: str, common: Common, **options: Any) -> str:
    """Return the command that does the same by hand, on the same pool."""
    words = ["dmoa", *name.split()]
    words += ["--config", str(common.config)] if common.config else []
    words += [part for override in common.overrides for part in ("--set", override)]
    words += [part for option, value in options.items() for part in (f"--{option.replace('_', '-')}", str(value))]
    return shlex.join(words)


def workers() -> int:
    """Return how many engines answer side by side: two where there are the cores and 10 GB of free memory; each takes some 2."""
    return 2 if (os.cpu_count() or 1) > 1 and psutil.virtual_memory().available > 10e9 else 1


def learn(common: Common, config: Config, out: Path, queries: int, seed: int) -> tuple[ProbeReport, TrainResult, list[str]]:
    """Collect dense rollouts, look at them, train, and install; the commands do the same by hand.

    Raises DmoaError where a part fails.
    """
    from dmoa.serving.router.admin import RouterAdmin, checkpoint_files
    from dmoa.workflows.collect import run_rollouts
    from dmoa.workflows.probe import probe_rollouts

    rollouts, gate = out / "rollouts", out / "gate"
    sources = {"benchmarks": ",".join(DEMO_SUITES), "limit": queries, "seed": seed + 1, "out": rollouts, "workers": workers()}
    training = {"rollouts": rollouts, "out": gate}
    collecting, learning = _command("rollouts", common, **sources), _command("train", common, **training)
    common.say(f"3 of 7: {queries} generated queries, without labels, asked of every agent")
    run_rollouts(RolloutOptions.parse({**sources, "track": "none", "call_cache": out / "calls"}), config, common, collecting)
    probe = probe_rollouts(rollouts, config)
    common.say("4 of 7: training the gate on Ray Train, without labels")
    result = run_train(TrainOptions.parse(training), config, common, learning)
    change = RouterAdmin(APP).install(checkpoint_files(result.checkpoint), "dmoa demo")
    common.say(f"installed in the running swarm: {change['previous']} -> {change['version']}")
    install = shlex.join(["dmoa", "router", "install", str(gate / "checkpoint")])
    return probe, result, [collecting, _command("probe", common, rollouts=rollouts), learning, install]


def compare(
    common: Common, config: Config, out: Path, checkpoint: Path, encoder: Encoder, held: tuple[int, int]
) -> list[dict[str, Any]]:
    """Evaluate every method on held-out rows, print them and what was gained; returns what `--json` says of each method.

    `held`: rows of each suite, and their seed.

    Accuracy is None where a method did not run on some suite. Raises DmoaError where the evaluation stops.
    """
    from dmoa.evaluation.answer_matrix import add_oracle, matrix_policies
    from dmoa.evaluation.figures import overall
    from dmoa.evaluation.run_folder import RunFolder
    from dmoa.workflows.evaluate import run_evaluation

    held_out, seed = held
    values = {
        "benchmarks": ",".join(DEMO_SUITES),
        "policies": ",".join(["dmoa", TRAINED, *matrix_policies(config.agent_names), "dense"]),
        "gates": f"trained={checkpoint}",
        "limit": held_out,
        "seed": seed,
        "workers": workers(),
        "out": out / "evaluation",
        "call_cache": out / "calls",
    }
    derive = partial(add_oracle, benchmarks=DEMO_SUITES, agents=config.agent_names)
    command = _command("evaluate", common, **values)
    evaluation = run_evaluation(EvaluateOptions.parse(values), config, common, command, shows_result=False, derive=derive)
    folder = RunFolder((out / "evaluation").absolute())
    methods, first = name_methods(evaluation, config.agent_names), first_steps(config, folder, checkpoint, encoder)
    typer.echo(f"\n{config.name}: {len(DEMO_SUITES) * held_out} held-out questions, {held_out} of each suite")
    print_overall(evaluation, methods)
    tokens: Counter[str] = Counter()
    for cell in evaluation.rows:
        tokens[cell.policy] += cell.usage.total
    rows = {methods[row.policy]: row for row in overall(evaluation) if row.policy in methods}
    typer.echo(gained(rows, float(first[UNTRAINED].mean()), tokens[TRAINED] / max(1, tokens["dense"])))
    print_routing(evaluation, stdout_console())
    told = [
        {"name": name, **asdict(row), "tokens_total": tokens[policy]} for policy, name in methods.items() for row in [rows[name]]
    ]
    return [*told, *({"name": name, "accuracy": float(accuracy_G.mean())} for name, accuracy_G in first.items())]


def gained(rows: Mapping[str, Overall], untrained: float, token_share: float) -> str:
    """Return in one sentence what training gained; `untrained`: mean accuracy of untrained gates, as a share.

    `rows` are those of the closing table, by name; `token_share` is the trained gate's, of what asking everybody costs.
    """
    shares = {name: row.accuracy for name, row in rows.items()}
    own, dense, best = shares["trained gate"], shares["everybody once"], next(name for name in rows if name.startswith("best"))
    single = shares[best]
    if own is None or dense is None or single is None:
        return "some methods did not run on every suite: see the report"
    return (
        f"without one label the gate learned whom to ask: {own:.1%} of the answers are right, with {rows['trained gate'].active} "
        f"agents a step; that is {100 * (own - untrained):+.0f} points against {NUM_UNTRAINED} untrained gates on average, "
        f"{100 * (own - single):+.0f} against the {best}, and {100 * (own - dense):+.0f} against asking everybody, at "
        f"{token_share:.0%} of the tokens"
    )


def name_methods(evaluation: Evaluation, agents: Sequence[str]) -> dict[str, str]:
    """Return the policies of the closing table and what they are called there; of the agents alone the best."""
    from dmoa.evaluation.answer_matrix import matrix_policies
    from dmoa.evaluation.figures import overall

    accuracy = {row.policy: -1.0 if row.accuracy is None else row.accuracy for row in overall(evaluation)}
    best = max(matrix_policies(agents), key=lambda policy: accuracy[policy])
    names = {TRAINED: "trained gate", "dmoa": "untrained gate", best: f"best single agent ({best.partition(':')[2]})"}
    return {**names, "dense": "everybody once"}


def first_steps(config: Config, folder: RunFolder, checkpoint: Path, encoder: Encoder) -> dict[str, FloatArray]:
    """Return the accuracy [G] of many untrained gates, and of the trained one, with one step a question: nobody is asked again.

    Raises ConfigError where an agent has not answered every row.
    """
    from dmoa import checkpoint as checkpoints
    from dmoa.evaluation.answer_matrix import read_matrix

    matrices = [read_matrix(folder, suite, config.agent_names) for suite in DEMO_SUITES]
    embedded = [np.stack(asyncio.run(encoder.embed([task.text for task in matrix.tasks]))) for matrix in matrices]
    untrained = [build_pool_gate(config.changed("gate", seed=seed, checkpoint=None))[0] for seed in range(NUM_UNTRAINED)]
    return {
        UNTRAINED: replay_first(untrained, matrices, embedded),
        "trained gate, first step": replay_first([checkpoints.load(checkpoint)[0]], matrices, embedded),
    }


def replay_first(gates: Sequence[Gate], matrices: Sequence[AnswerMatrix], embedded: Sequence[FloatArray]) -> FloatArray:
    """Return each gate's accuracy [G] over all rows of all matrices; `embedded`: the rows' embeddings [R, D], a matrix each."""
    from dmoa.evaluation.answer_matrix import gate_choices, replay_choices

    pairs = list(zip(matrices, embedded, strict=True))
    values = [[replay_choices(matrix, gate_choices(gate, rows_RD)).value_R for matrix, rows_RD in pairs] for gate in gates]
    return np.array([np.concatenate(parts).mean() for parts in values])
