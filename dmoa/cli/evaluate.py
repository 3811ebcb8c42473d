"""`dmoa evaluate`, `compare` and `report`: policies over benchmarks, ablations, the self-check, and a run's report."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from dmoa.cli.options import takes_options, this_command
from dmoa.evaluation.records import CompareOptions, EvaluateOptions
from dmoa.evaluation.registry import expand_names
from dmoa.workflows.console import (
    EXIT_FAILED,
    Bars,
    CheckpointOption,
    Common,
    print_evaluation,
    print_explanation,
    print_selfcheck,
    refuse_together,
    stdout_console,
    with_common,
)

Options = TypeVar("Options", bound=EvaluateOptions)
SelfcheckOption = Annotated[
    bool, typer.Option("--selfcheck", help="Ask no agent: check that scorers, rows and sandbox agree; exit 1 if not.")
]
ExplainOption = Annotated[
    str | None, typer.Option("--explain", metavar="ROW", help="Ask no agent: show how replies to one row are read and judged.")
]
ReplyOption = Annotated[str | None, typer.Option("--reply", metavar="TEXT", help="With --explain: the reply, or a file with it.")]
AblationsOption = Annotated[
    bool, typer.Option("--ablations", help="Train gates with one thing changed each on --rollouts, and compare them.")
]
AblationRolloutsOption = Annotated[
    Path | None, typer.Option("--rollouts", metavar="DIR", help="With --ablations: dense rollouts to train on.")
]


@with_common
@takes_options(EvaluateOptions, defaults={"benchmarks": "all"}, unset={"out": "out/evaluate-TIME"})
def evaluate(
    common: Common,
    options: EvaluateOptions,
    checkpoint: CheckpointOption = None,
    selfcheck: SelfcheckOption = False,
    ablations: AblationsOption = False,
    rollouts: AblationRolloutsOption = None,
    explain: ExplainOption = None,
    reply: ReplyOption = None,
) -> None:
    """Measure policies on benchmarks: accuracy, tokens, steps. Accuracy with intervals, and paired comparisons.

    \b
    dmoa evaluate --config specialists --benchmarks arith,words --policies dmoa,single:arith --limit 50
    dmoa evaluate --benchmarks all --policies dmoa,single --data-dir DIR --limit 100 --out out/first
    dmoa evaluate --benchmarks all --policies dmoa,single --data-dir DIR --limit 100 --out out/first --resume
    dmoa evaluate --selfcheck --data-dir DIR --json out/selfcheck.json
    dmoa evaluate --explain gsm8k/test/0123456789abcdef --data-dir DIR --reply "The answer is 18."
    dmoa evaluate --ablations --rollouts out/rollouts --benchmarks arith,words,dyes --config specialists
    dmoa evaluate --benchmarks arith --policies dmoa:old,dmoa:new --gates old=out/a/checkpoint,new=out/b/checkpoint
    dmoa evaluate --benchmarks mine.py:Rows --policies dmoa,mine.py:Mine --data-dir DIR     see `dmoa docs extending`
    dmoa report out/first
    """
    if explain is not None or reply is not None:
        refuse_together({"--checkpoint": checkpoint, "--rollouts": rollouts}, "with --explain, which asks no agent")
        _explain(common, options, explain, reply, is_mixed=selfcheck or ablations)
        return
    if selfcheck:
        refuse_together({"--ablations": ablations, "--rollouts": rollouts}, "with --selfcheck, which trains nothing")
        _selfcheck(common, options, checkpoint)
        return
    if ablations or rollouts is not None:
        _ablations(common, options, rollouts, checkpoint, is_asked=ablations)
        return
    from dmoa.workflows.evaluate import check_ran, run_evaluation

    config = common.load_without(options.url, checkpoint, workers=options.workers > 1)
    evaluation = run_evaluation(_with_folder(options), config, common, this_command())
    common.write_json(evaluation.model_dump(mode="json"))
    check_ran(evaluation)


def _with_folder(options: Options, command: str = "evaluate") -> Options:
    if options.out is not None:
        return options
    return options.model_copy(update={"out": Path("out") / time.strftime(f"{command}-%Y%m%d-%H%M%S")})


def _changed(options: EvaluateOptions, without: Collection[str]) -> dict[str, object]:
    """Return the flags that were given other values than they have by themselves; `without` those of some fields."""
    fields = type(options).model_fields
    names = [name for name in fields if name not in without and getattr(options, name) != fields[name].default]
    return {f"--{name.replace('_', '-')}": True for name in names}


def _ablations(
    common: Common, options: EvaluateOptions, rollouts: Path | None, checkpoint: Path | None, *, is_asked: bool
) -> None:
    """Train and compare the ablations."""
    if not is_asked:
        refuse_together({"--rollouts": rollouts}, "without --ablations")
    unused = _changed(options, EvaluateOptions.model_fields.keys() - {"url", "gates", "policies"})
    refuse_together(unused | {"--checkpoint": checkpoint}, "with --ablations, which trains and compares gates of its own")
    from dmoa.workflows.ablate import run_ablations
    from dmoa.workflows.evaluate import check_ran

    evaluation = run_ablations(_with_folder(options), rollouts, common.load(), common, this_command())
    common.write_json(evaluation.model_dump(mode="json"))
    check_ran(evaluation)


def _explain(common: Common, options: EvaluateOptions, row_id: str | None, reply: str | None, *, is_mixed: bool) -> None:
    """Show how replies to a row are judged."""
    if row_id is None:
        refuse_together({"--reply": reply}, "without --explain ROW")
    unused = _changed(options, ("benchmarks", "address", "out", "data_dir", "allow_weak_sandbox"))
    unused |= {"--selfcheck or --ablations": is_mixed, "--config": common.config, "--set": common.overrides}
    refuse_together(unused, "with --explain, which asks no agent")
    from dmoa.evaluation.explain import explain

    expand_names(options.benchmarks)  # those of files are known from here on
    found = explain(
        row_id or "", reply=reply, out=options.out, data_dir=options.data_dir, allow_weak_sandbox=options.allow_weak_sandbox
    )
    for each in found:
        print_explanation(each)
    common.write_json([each.model_dump(mode="json") for each in found])


def _selfcheck(common: Common, options: EvaluateOptions, checkpoint: Path | None) -> None:
    """Check scorers, rows and sandbox against each other; exit 1 where a check fails."""
    unused = _changed(options, ("benchmarks", "address", "data_dir", "skip_bad_rows", "allow_weak_sandbox", "limit"))
    unused |= {"--checkpoint": checkpoint, "--config": common.config, "--set": common.overrides}
    refuse_together(unused, "with --selfcheck, which asks no agent")
    from dmoa.evaluation import selfcheck

    with Bars(common.verbosity) as bars:
        found = selfcheck.run_selfcheck(
            expand_names(options.benchmarks),
            data_dir=options.data_dir,
            skip_bad_rows=options.skip_bad_rows,
            allow_weak_sandbox=options.allow_weak_sandbox,
            limit=options.limit,
            progress=bars.count,
        )
    print_selfcheck(found)
    common.write_json(found.model_dump(mode="json"))
    if not found.passed:
        raise typer.Exit(EXIT_FAILED)


@with_common
@takes_options(CompareOptions, unset={"out": "out/compare-TIME"})
def compare(common: Common, options: CompareOptions, checkpoint: CheckpointOption = None) -> None:
    """Compare policies on the same rows, at equal budgets. Each has the tokens, calls, time or price that the first takes.

    \b
    dmoa compare --config specialists --benchmarks arith,words --policies dmoa,dense --limit 50
    dmoa compare --benchmarks all --data-dir DIR --policies dmoa,dense,single --match calls --limit 100 --out out/equal --resume
    dmoa compare --benchmarks arith --policies dmoa,dense --match tokens --match-budget 600 --repeats 3
    dmoa report out/equal
    """
    from dmoa.workflows.compare import check_curve, run_comparison
    from dmoa.workflows.evaluate import check_ran

    options = _with_folder(options, "compare")
    evaluation = run_comparison(options, common.load_without(options.url, checkpoint), common, this_command())
    common.write_json(evaluation.model_dump(mode="json"))
    check_ran(evaluation)
    check_curve(options)


@with_common
def report(
    common: Common,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, as `dmoa evaluate --out` wrote it.")],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Where the report is written [DIR/report.html].", dir_okay=False)
    ] = None,
) -> None:
    """Show the result of an evaluation; write it as an HTML file. A run that is not finished is shown as far as it is.

    \b
    dmoa report out/run1
    dmoa report out/run1 --html report.html
    """
    refuse_together({"--config": common.config, "--set": common.overrides}, "on a run, which keeps its own settings")
    from dmoa.evaluation.report import write_report
    from dmoa.evaluation.results import read_evaluation
    from dmoa.evaluation.run_folder import RunFolder
    from dmoa.workflows.adapt import kept_stream

    evaluation = read_evaluation(directory)
    print_evaluation(evaluation, stdout_console())
    path = html or RunFolder(directory).report
    write_report(evaluation, path, kept_stream(directory))
    common.say(f"report: {path}")
    common.write_json(evaluation.model_dump(mode="json"))
