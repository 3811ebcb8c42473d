"""`dmoa compare`: an evaluation in which every policy may spend what the reference does, and the table of what each took."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product

from dmoa.agents.adversaries import Adversaries
from dmoa.config import Config
from dmoa.engines.gpus import pool_gpus
from dmoa.errors import ConfigError
from dmoa.evaluation import figures
from dmoa.evaluation.records import CompareOptions
from dmoa.evaluation.registry import expand_names
from dmoa.evaluation.results import Evaluation, EvaluationRow, read_evaluation
from dmoa.evaluation.run_folder import RunFolder
from dmoa.policies.registry import POLICIES, split_policy
from dmoa.storage import check_local
from dmoa.workflows.console import Common, line, new_table, stdout_console
from dmoa.workflows.evaluate import check_ran, expand_policies, has_recorded, opened_ray, run_evaluation

BASELINES = ("self_moa", "self_consistency", "single")
"""What a claim of being better has to beat at equal budgets."""
MOST_SAMPLES = 16
_SAMPLING = ("self_consistency", "best_of_n")
CACHED = "*"
"""Follows seconds that leave out what came from the call cache."""


def run_comparison(options: CompareOptions, config: Config | None, common: Common, command: str) -> Evaluation:
    """Compare policies and show the result. Raises as `run_evaluation`."""
    options = options.model_copy(update={"policies": with_baselines(options, config)})
    if config is not None:
        Adversaries(count=max(options.curve, default=0), kind=options.kind).of(config.agent_names)  # before hours of work
        if options.match == "price" and config.unpriced:
            lacking = f"llms.{config.unpriced[0]}"
            raise ConfigError(f"--match is price, and {lacking} has no price; set {lacking}.price, or match tokens")
    with opened_ray(options.address, pool_gpus(config) * options.workers) if options.curve and config else nullcontext():
        evaluation = run_evaluation(options, config, common, command)
        evaluation = run_curve(options, config, common, command) if options.curve and config else evaluation
    print_matched(evaluation)
    if options.curve:
        print_curve(evaluation)
    return evaluation


def run_curve(options: CompareOptions, config: Config, common: Common, command: str) -> Evaluation:
    """Run a comparison again with each number of adversaries and each defence; the result of all lies in its folder.

    Raises ConfigError where the pool has fewer agents, or the folder is none of this machine.
    """
    from dmoa.evaluation.run import finish_run

    check_local(options.out, "--out", "with --curve name one and copy it afterwards")
    folder = _folder(options)
    shared = {"call_cache": folder.root / "calls"} if options.has_own_cache else {}
    for count, defence in _curve(options):
        common.say(f"{count} of {len(config.agents)} agents as {options.kind}, defence {defence}")
        changes = {"adversaries": count, "defence": defence, "curve": (), "out": folder.curve(count, defence)} | shared
        run_evaluation(options.model_copy(update=changes), config, common, command, shows_result=False, rows_of=folder)
    return finish_run(folder)


def _folder(options: CompareOptions) -> RunFolder:
    assert options.out is not None
    return RunFolder(options.out.absolute())


def _curve(options: CompareOptions) -> list[tuple[int, str]]:
    """Return how many agents work against the swarm in each run of a curve, and what defends it."""
    return list(product(dict.fromkeys(options.curve), options.curve_defences))


def check_curve(options: CompareOptions) -> None:
    """Raise DmoaError where a run with adversaries did not run, as `check_ran`, naming its folder."""
    folder = _folder(options)
    for part in (folder.curve(*run) for run in _curve(options)):
        check_ran(read_evaluation(part), f"evaluation in {part.relative_to(folder.root)}")


def print_curve(evaluation: Evaluation) -> None:
    """Print accuracy by policy, defence and number of adversaries."""
    counts = sorted({row.adversaries for row in evaluation.robustness})
    table = new_table("benchmark", "policy", "defence", *map(str, counts), words=("benchmark", "policy", "defence"))
    for curve in figures.curves(evaluation):
        table.add_row(curve.benchmark, curve.policy, curve.defence, *(curve.shown.get(count, "-") for count in counts))
    console = stdout_console()
    console.print(table)
    kinds = ", ".join(sorted({row.kind for row in evaluation.robustness}))
    line(console, f"accuracy, %, by number of agents that work against the swarm ({kinds})")


def with_baselines(options: CompareOptions, config: Config | None = None) -> tuple[str, ...]:
    """Return the policies, `all` spelt out, with the baselines that are not among them and that the pool's agents can run.

    Where a budget holds within steps, samplers without a number of their own may take `MOST_SAMPLES`: the budget ends them.
    """
    given = expand_policies(options.policies, config, expand_names(options.benchmarks))
    named = {split_policy(policy)[0] for policy in given}
    fit = [name for name in BASELINES if name in POLICIES and (POLICIES[name].first_step_only or not has_recorded(config))]
    more = [name for name in fit if name not in named] if options.baselines else []
    is_paced = options.match in ("tokens", "calls", "price") and options.url is None
    reference, *others = (*given, *more)
    raised = [f"{x}:k={MOST_SAMPLES}" if is_paced and split_policy(x)[0] in _SAMPLING and ":k=" not in x else x for x in others]
    return tuple(dict.fromkeys((reference, *raised)))


def print_matched(evaluation: Evaluation) -> None:
    """Print what each policy took on a query, and how it differs from the reference."""
    run = evaluation.config
    reference = run.reference or run.policies[0]
    console = stdout_console()
    head = ("accuracy %", f"against {reference}", "p (Holm)", "tokens", "calls", "seconds", "price", "of the budget")
    table = new_table("benchmark", "policy", *head, words=("benchmark", "policy"))
    previous = ""
    for row in evaluation.rows:
        difference, p = against(evaluation, row, reference)
        cells = [figures.accuracy(row), difference, p, *taken(row)]
        name = row.benchmark if row.benchmark != previous else ""
        table.add_row(name, row.policy, *cells, share_of_budget(evaluation, row))
        previous = row.benchmark
    console.print()
    console.print(table)
    matched = "nothing is matched" if run.match == "none" else f"budgets match {run.match}"
    repeats = f", means of {run.repeats} repeats" if run.repeats > 1 else ""
    line(console, f"per query{repeats}; {matched}; over 100 %: calls under way when the budget ran out were finished")
    for remark in remarks(evaluation):
        line(console, remark)


def remarks(evaluation: Evaluation) -> list[str]:
    """Return what the figures hide: whom the deadline did not hold for, whom it cut, and whose seconds are too few."""
    run, found = evaluation.config, list[str]()
    if run.match == "latency":
        cut = [f"{row.policy} on {row.benchmark} {row.late} of {row.asked}" for row in evaluation.rows if row.late]
        free = "" if run.options.get("match_budget") else f"{run.reference} set the deadline and answered without it; "
        found.append(f"{free}rows that it cut: {', '.join(cut) or 'none'}")
    if any(row.memoised_tokens for row in evaluation.rows):
        found.append(f"{CACHED} part of the calls came from the call cache: their tokens count, their seconds do not")
    return found


def against(evaluation: Evaluation, row: EvaluationRow, reference: str) -> tuple[str, str]:
    """Return how a policy differs from the reference in points, and Holm's p; dashes where nothing was compared."""
    for pair in evaluation.paired:
        if pair.benchmark == row.benchmark and {pair.a, pair.b} == {row.policy, reference}:
            sign = 1 if pair.a == row.policy else -1
            return figures.points(sign * pair.difference + 0.0), figures.p_value(pair.p_holm)
    return "-", "-"


def taken(row: EvaluationRow) -> tuple[str, str, str, str]:
    """Return tokens, calls, seconds and price per query; seconds are marked where calls came from the call cache."""
    if not row.n:
        return "-", "-", "-", "-"
    seconds = f"{row.per_query(row.wall_s):.2f}{CACHED if row.memoised_tokens else ''}"
    price = None if row.price is None else row.per_query(row.price)
    return figures.count(row.per_query(row.usage.total)), f"{row.per_query(row.calls):.1f}", seconds, figures.money(price)


def share_of_budget(evaluation: Evaluation, row: EvaluationRow) -> str:
    """Return the share of the budget that a policy took in the mean, in percent; a dash without a budget."""
    budget = next(iter(evaluation.config.budgets.get(row.benchmark, {}).values()), None)
    spent = {"tokens": row.usage.total, "calls": row.calls, "latency": row.wall_s, "price": row.price}.get(
        evaluation.config.match
    )
    return "-" if budget is None or spent is None or not row.n else f"{100 * row.per_query(spent) / budget:.0f} %"
