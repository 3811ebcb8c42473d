"""`dmoa probe`, `dmoa rollouts` and `dmoa train`: whether entropy can route a pool, what is learned from, and the gate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dmoa.cli.options import takes_options, this_command
from dmoa.config import Config
from dmoa.errors import ConfigError
from dmoa.storage import display_path
from dmoa.training.options import (
    ADAPT_JOB_ONLY,
    JOB_ONLY,
    PRESETS,
    AdaptOptions,
    ExportOptions,
    ImportOptions,
    OnlineOptions,
    ProbeOptions,
    RolloutOptions,
    TrainOptions,
)
from dmoa.workflows.console import CheckpointOption, Common, new_table, stdout_console, with_common
from dmoa.workflows.train import run_train

if TYPE_CHECKING:
    from dmoa.training.probe import ProbeReport

_BY_PRESET = {name: f"{value:g}; preset full: {PRESETS['full'][name]:g}" for name, value in PRESETS["few-shot"].items()}


@with_common
@takes_options(RolloutOptions)
def rollouts(common: Common, options: RolloutOptions, checkpoint: CheckpointOption = None) -> None:
    """Collect rollouts for training the gate, without labels. Who was how sure, step by step.

    \b
    dmoa rollouts --config specialists --benchmarks arith:2,words --limit 60 --out out/rollouts
    dmoa rollouts --queries prompts.jsonl --out out/rollouts
    dmoa rollouts --queries prompts.jsonl --url http://127.0.0.1:8000 --out out/rollouts
    dmoa rollouts --from-traffic running --out out/traffic
    dmoa rollouts --queries prompts.jsonl --epsilon 0.2 --checkpoint out/gate/checkpoint --round 1 --out out/rollouts-1
    """
    if options.from_traffic == "running":
        from dmoa.serving.launch import AUTO, ray_address

        ray_address(options.address or AUTO)  # before Ray is imported: it reads the environment then
    from dmoa.workflows.collect import run_rollouts

    manifest = run_rollouts(options, common.load(checkpoint), common, this_command())
    typer.echo(display_path(options.out))
    common.write_json(manifest.model_dump(mode="json"))


@with_common
@takes_options(TrainOptions, leave_out=JOB_ONLY, unset=_BY_PRESET)
def train(common: Common, options: TrainOptions) -> None:
    """Train the gate on rollouts, label-free, on Ray Train. The checkpoint lies in --out/checkpoint.

    \b
    dmoa train --rollouts out/rollouts --out out/gate
    dmoa train --rollouts out/rollouts --rollouts out/rollouts-1 --start-from out/gate/checkpoint --out out/gate-1
    dmoa serve --checkpoint out/gate/checkpoint
    """
    result = run_train(options, common.load(), common, this_command())
    common.write_json(result.report.model_dump(mode="json"))


@with_common
@takes_options(AdaptOptions, leave_out=ADAPT_JOB_ONLY)
def adapt(common: Common, options: AdaptOptions, checkpoint: CheckpointOption = None) -> None:
    """Adapt a gate to a benchmark by its own first test queries. No labels are used; the table shows what it was worth.

    Every query is answered and counted first, then the gate learns who was how sure of it (prequential); after --queries the gate
    is frozen. The table has untrained weights (zero-shot), the checkpoint (few-shot), and both adapted (-ttt).

    \b
    dmoa adapt --config specialists --benchmark dyes --queries 30 --out out/adapt
    dmoa adapt --benchmark dyes,signals --checkpoint out/gate/checkpoint --replay out/rollouts --out out/adapt
    dmoa adapt --benchmark gsm8k --data-dir benchmarks --limit 20 --queries 10 --workers 0 --out out/adapt
    dmoa serve --checkpoint out/adapt/gates/few-shot-ttt
    dmoa adapt --online --help                              learn from the traffic of a running swarm instead
    """
    from dmoa.workflows.adapt import run_adapt

    config = common.load()
    given = checkpoint or (Path(config.gate.checkpoint) if config.gate.checkpoint else None)
    report = run_adapt(options, config, None if options.zero_shot else given, common, this_command())
    common.write_json(report.model_dump(mode="json"))


@partial(with_common, has_pool=False)
@takes_options(OnlineOptions, leave_out=ADAPT_JOB_ONLY)
def adapt_online(common: Common, options: OnlineOptions) -> None:
    """Learn from the traffic of a running swarm, and offer what is learned to its router, until a signal comes.

    Nothing is installed that the router's guards refuse, and no query waits; router.adaptation of the pool says how far it goes.

    \b
    dmoa adapt --online
    dmoa adapt --online --address 10.0.0.5:6379 --app dmoa --replay out/rollouts
    """
    from dmoa.workflows.adapt_online import run_online_adaptation

    run_online_adaptation(options, common, this_command())


@partial(with_common, has_pool=False)
@takes_options(ExportOptions)
def export(common: Common, options: ExportOptions) -> None:
    """Write what a swarm said as data to train a single model with. JSON Lines of answers (sft), or of pairs of replies (dpo).

    \b
    dmoa export --format sft --traces traces.jsonl --out sft.jsonl
    dmoa export --format dpo --run out/first --out pairs.jsonl
    """
    from dmoa.workflows.export import NEEDED
    from dmoa.workflows.export import export as run

    count = run(options)
    common.say(f"{count} lines of {options.format}" + ("" if count else f": {NEEDED[options.format, options.run is None]}"))
    typer.echo(options.out)
    common.write_json({"lines": count, "out": str(options.out)})


@partial(with_common, has_pool=False)
@takes_options(ImportOptions)
def import_logs(common: Common, options: ImportOptions) -> None:
    """Turn logs of model calls into a pool of recorded replies. It is probed, trained, evaluated and served without calls.

    OpenAI-style {request, response} lines, batch files, W&B tables and LiteLLM spend logs are known by their shape. Keys, headers
    and users are not copied.

    \b
    dmoa import-logs --logs calls.jsonl --out replies.jsonl --pool pool.yaml
    dmoa import-logs --logs batch_input.jsonl --logs batch_output.jsonl --out replies.jsonl
    dmoa import-logs --logs predictions.table.json --columns query=prompt,text=output --agent my-model --out replies.jsonl
    dmoa probe --config pool.yaml
    """
    from dmoa.workflows.import_logs import import_logs as run

    report = run(options, common.say)
    left_out = [f"{count}: {reason}" for reason, count in report.skipped.items()]
    common.say(f"{report.read} records, {report.written} replies of {len(report.agents)} agents to {report.queries} queries")
    common.say(f"every agent replied to {report.complete} of them" + (f"; left out {'; '.join(left_out)}" if left_out else ""))
    typer.echo(options.out)
    common.write_json(report.model_dump(mode="json"))


@with_common
@takes_options(ProbeOptions, unset={"out": "out/probe-TIME"})
def probe(common: Common, options: ProbeOptions) -> None:
    """Find out before training whether entropy can route a pool.

    Entropy routes where agents differ in which queries they are sure of. The verdict is in words: it can, it cannot, or
    audit some rows first, because an agent ignores its input or is sure and wrong.

    \b
    dmoa probe --config specialists
    dmoa probe --queries mine.jsonl --limit 30
    dmoa probe --config specialists-liar-wrong --known-answers calendar
    dmoa probe --config specialists --rollouts out/rollouts
    dmoa probe --config specialists --rollouts out/rollouts --outcomes outcomes.jsonl
    """
    if options.rollouts is not None and (options.queries or options.benchmarks):
        raise ConfigError("--rollouts: they have their queries already; leave --queries and --benchmarks out")
    from dmoa.workflows.probe import run_probe

    config = common.load()
    report = run_probe(options, config, common, this_command())
    print_probe(report, config)
    common.write_json(report.model_dump(mode="json"))


def print_probe(report: ProbeReport, config: Config) -> None:
    """Print a report: the verdict, then what it rests on."""
    from dmoa.evaluation.figures import money
    from dmoa.training.probe import gains_nothing
    from dmoa.training.probe_answers import is_guess

    console = stdout_console()
    words = {
        "can": "entropy can route this pool",
        "cannot": "entropy cannot route this pool",
        "audit": f"audit first: look at some {report.audit_rows} rows with known answers per agent named below",
    }
    for line in report.answers.summary if report.answers else ():
        console.print(f"{config.name}: {line}", soft_wrap=True)
    console.print(f"{config.name}: {words[report.verdict]}", soft_wrap=True)
    for reason in report.reasons:
        console.print(f"  {reason}", soft_wrap=True)
    if report.pairs:
        console.print(
            f"{report.rows} queries, log PE varies by row {report.row_share:.0%}, by agent {report.agent_share:.0%}, by their "
            f"interaction {report.interaction_share:.0%} (95 %: {report.interaction_low:.0%} to {report.interaction_high:.0%})",
            soft_wrap=True,
        )
    answers = report.answers if report.answers and not is_guess(report.answers) else None
    if answers:
        ways = new_table("way", "right", "calls", "tokens", "price", words=("way",))
        for one in answers.expected:
            way, tokens = f"{one.agent} alone" if one.agent else one.way, "" if one.tokens is None else f"{one.tokens:.0f}"
            ways.add_row(way, f"{one.accuracy:.0%}", f"{one.calls:.1f}", tokens, money(one.price))
        console.print(ways)
    columns = ("agent", "right", "entropy (nats)", "surest on", "clusters choose", "same reply", "accuracy", "AUROC", "note")
    table = new_table(*columns, words=("agent", "note"))
    for found in report.agents:
        notes = ["ignores its input"] if found.ignores_input else []
        notes += [f"sure and wrong on {', '.join(found.sure_and_wrong)}"] if found.sure_and_wrong else []
        table.add_row(
            found.agent,
            _share(answers.competence[found.agent] if answers else None),
            "" if found.entropy_nats is None else f"{found.entropy_nats:.3f}",
            _share(found.surest),
            _share(report.cluster_choices.get(found.agent)),
            f"{found.same_text:.0%}",
            _share(found.accuracy),
            "" if found.auroc is None else f"{found.auroc:.2f}",
            "; ".join(notes),
        )
    console.print(table)
    if report.cluster_gain is not None:
        gain = "nothing" if gains_nothing(report.cluster_gain) else f"{report.cluster_gain:.0%}"
        console.print(
            f"clusters + surest agent, without training, reach {gain} of the sureness that choosing per query could gain over "
            "the best single agent",
            soft_wrap=True,
        )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
