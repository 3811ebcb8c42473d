"""`dmoa demo`: the whole system in a few minutes: serve, look, collect, learn, install while serving, compare.

Questions come from the generated suites, whose answers are computed, so that right and wrong can be told; the gate learns
from other questions, without their answers. Everything that the demo does is a command of its own, which it prints.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmoa.cli.options import EXIT_FAILED, Common, with_common

if TYPE_CHECKING:
    from dmoa.cli.demo_asking import Outcome, Question
    from dmoa.cli.demo_compare import Compared
    from dmoa.cli.demo_learning import Learned
    from dmoa.config import Config

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
    from dmoa.cli.demo_compare import print_comparison

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
    before: list[Outcome]
    after: list[Outcome]
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
            "comparison": [row.to_json() for row in self.comparison],
        }


def tell(common: Common, config: Config, out: Path, port: int | None, counts: tuple[int, int, int]) -> Told:
    """Run the demo; `counts`: questions shown of each suite, queries to learn from, held-out rows of each suite."""
    from dmoa.cli.demo_asking import generate
    from dmoa.cli.demo_compare import compare
    from dmoa.cli.demo_learning import learn
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
            comparison = compare(common, config, out, learned.checkpoint, counts[2])
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
    common: Common, config: Config, url: str, gate_version: str, questions: list[Question], out: Path
) -> tuple[list[Outcome], bool]:
    """Ask the questions over HTTP, show their routing, and route the traces again; returns whether that was the same."""
    from dmoa.cli.demo_asking import ask_all, replay_demo
    from dmoa.cli.demo_report import Report

    report = Report(common, config, out, num_questions=len(questions))
    report.opening(url, gate_version)
    asked_at = time.monotonic()
    outcomes = asyncio.run(ask_all(url, questions, report))
    report.closing(outcomes, time.monotonic() - asked_at)
    return outcomes, replay_demo(common, config, report, out, outcomes)


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
