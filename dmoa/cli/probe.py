"""`dmoa probe`: asks every agent about thirty queries, without labels, and says whether entropy can route the pool."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmoa.cli.evaluate import CacheOption, DataDirOption, DifficultyOption, SeedOption
from dmoa.cli.serve import AddressOption
from dmoa.errors import ConfigError
from dmoa.validation import redact_command
from dmoa.workflows.console import Common, with_common

if TYPE_CHECKING:
    from dmoa.config import Config
    from dmoa.training.probe import ProbeReport

DEFAULT_SUITES = "arith,words,calendar"
KNOWN_ROWS = 60


@with_common
def probe(
    common: Common,
    queries: Annotated[
        str | None, typer.Option("--queries", metavar="FILE.jsonl", help='Your own queries: a text, or {"query": TEXT}, a line.')
    ] = None,
    benchmarks: Annotated[
        str | None, typer.Option("--benchmarks", metavar="A,B", help=f"Benchmarks and suites [{DEFAULT_SUITES}].")
    ] = None,
    rollouts: Annotated[
        Path | None, typer.Option("--rollouts", metavar="DIR", help="Look at dense rollouts that are there; ask nobody.")
    ] = None,
    known_answers: Annotated[
        str | None,
        typer.Option("--known-answers", metavar="SUITE,...", help="Generated rows with computed answers, to find who is wrong."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=4, metavar="N", help="Queries without labels.")] = 30,
    known_limit: Annotated[
        int, typer.Option("--known-limit", min=4, metavar="N", help="Rows with known answers, all suites together.")
    ] = KNOWN_ROWS,
    data_dir: DataDirOption = None,
    difficulty: DifficultyOption = 1,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the rollouts [out/probe-TIME].")] = None,
    call_cache: CacheOption = None,
    address: AddressOption = None,
) -> None:
    """Find out, before anything is trained, whether predictive entropy can route a pool.

    Entropy routes where agents differ in which queries they are sure of. The verdict is in words: it can, it cannot, or
    audit some rows first, because an agent ignores its input or is sure and wrong.

    \b
    dmoa probe --config specialists
    dmoa probe --queries mine.jsonl --limit 30
    dmoa probe --config specialists-liar-wrong --known-answers arith
    dmoa probe --config specialists --rollouts out/rollouts
    """
    if rollouts is not None and (queries or benchmarks):
        raise ConfigError("--rollouts: they have their queries already; leave --queries and --benchmarks out")
    from dmoa.workflows.probe import ProbeSettings, collect_probe, probe_queries

    config = common.load()
    asked = ProbeSettings(
        data_dir=data_dir,
        difficulty=difficulty,
        seed=seed,
        out=out or Path("out") / time.strftime("probe-%Y%m%d-%H%M%S"),
        call_cache=call_cache,
        address=address,
        command=redact_command(["dmoa", *sys.argv[1:]]),
    )
    known = (tuple(filter(None, known_answers.split(","))), known_limit) if known_answers else None
    if rollouts is not None:
        report = collect_probe(rollouts, config, common, asked, known)
    else:
        sources = {"queries": queries or (), "benchmarks": benchmarks or ("" if queries else DEFAULT_SUITES)}
        report = probe_queries(sources, limit, config, common, asked, known)
    print_probe(report, config)
    common.write_json(report.model_dump(mode="json"))


def print_probe(report: ProbeReport, config: Config) -> None:
    """Print a report: the verdict, then what it rests on."""
    from rich.table import Table

    from dmoa.training.probe import gains_nothing
    from dmoa.workflows.console import stdout_console

    console = stdout_console()
    words = {
        "can": "entropy can route this pool",
        "cannot": "entropy cannot route this pool",
        "audit": f"audit first: look at some {report.audit_rows} rows with known answers per agent named below",
    }
    console.print(f"{config.name}: {words[report.verdict]}", soft_wrap=True)
    for reason in report.reasons:
        console.print(f"  {reason}", soft_wrap=True)
    console.print(
        f"{report.rows} queries, log PE varies by row {report.row_share:.0%}, by agent {report.agent_share:.0%}, by their "
        f"interaction {report.interaction_share:.0%} (95 %: {report.interaction_low:.0%} to {report.interaction_high:.0%})",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for name in ("agent", "entropy (nats)", "surest on", "clusters choose", "same reply", "accuracy", "AUROC", "note"):
        table.add_column(name, justify="left" if name in ("agent", "note") else "right")
    for found in report.agents:
        notes = ["ignores its input"] if found.ignores_input else []
        notes += [f"sure and wrong on {', '.join(found.sure_and_wrong)}"] if found.sure_and_wrong else []
        table.add_row(
            found.agent,
            f"{found.entropy_nats:.3f}",
            f"{found.surest:.0%}",
            f"{report.cluster_choices[found.agent]:.0%}",
            f"{found.same_text:.0%}",
            "" if found.accuracy is None else f"{found.accuracy:.0%}",
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
