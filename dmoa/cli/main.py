"""The `dmoa` command: every subcommand by name, and how errors and signals become exit codes.

0 done, 1 failed, 2 bad input, 130 ended by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dmoa import __version__
from dmoa.cli import bench, demo, evaluate, router, run, serve, system, train
from dmoa.workflows.console import OneMessage, run_app


class Commands(OneMessage, TyperGroup):
    """The group of all commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is asked for: `adapt --online` is one of its own, with other flags."""
        if args[:1] == ["adapt"] and "--online" in args:
            args = ["adapt-online", *(arg for arg in args[1:] if arg != "--online")]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="dmoa",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"dmoa {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A swarm of LLM agents behind one model name; a recurrent gate decides, step by step, which of them to ask.

    \b
    dmoa run "What is 12 + 7?"          one question, in this process, every step shown
    dmoa serve                          the same swarm behind an OpenAI-compatible URL
    dmoa run "What is 12 + 7?" --url http://127.0.0.1:8000
    dmoa docs                           guides: configuration, serving, learning, evaluation and more
    """


app.command("run")(run.run)
app.command("chat")(run.chat)
app.command("serve")(serve.serve)
app.add_typer(system.app, name="models")
app.add_typer(router.app, name="router")
app.add_typer(router.outcomes, name="outcomes")
app.command("demo")(demo.demo)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("report")(evaluate.report)
app.command("import-logs")(train.import_logs)
app.command("export")(train.export)
app.command("probe")(train.probe)
app.command("rollouts")(train.rollouts)
app.command("train")(train.train)
app.command("adapt")(train.adapt)
app.command("adapt-online", hidden=True)(train.adapt_online)
app.command("policies")(system.policies)
app.command("schema")(system.schema)
app.command("docs")(system.docs)
app.command("view")(system.view)
app.command("doctor")(system.doctor)
app.command("bench")(bench.bench)


def main() -> None:
    """Run the command line; the console script `dmoa`."""
    run_app(app)


if __name__ == "__main__":
    main()
