"""`dmoa policies` and `dmoa schema`: what names a user may give, and the shape of every file that dmoa writes."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Annotated

import typer
from pydantic import BaseModel

from dmoa.cli.options import Common, with_common
from dmoa.errors import ConfigError
from dmoa.validation import did_you_mean

_SCHEMAS = {
    "pool": ("dmoa.config", "Config"),
    "reply": ("dmoa.trace", "ReplyDmoa"),
    "trace": ("dmoa.trace", "Trace"),
    "rollout": ("dmoa.training.rollouts", "RolloutRow"),
    "checkpoint": ("dmoa.checkpoint", "Checkpoint"),
    "bench": ("dmoa.bench.harness", "BenchReport"),
    "evaluation": ("dmoa.evaluation.results", "Evaluation"),
}
"""Name of a contract -> module and record that define it; imported when asked for."""


@with_common
def policies(common: Common) -> None:
    """List the policies: who is asked when.

    \b
    dmoa policies
    dmoa run "What is 12 + 7?" --policy single
    """
    from dmoa.policies.registry import POLICIES

    width = max(map(len, POLICIES))
    for entry in POLICIES.values():
        typer.echo(f"{entry.name:<{width}}  {entry.summary}")
    common.write_json([{"name": entry.name, "summary": entry.summary} for entry in POLICIES.values()])


@with_common
def schema(
    common: Common,
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(_SCHEMAS)}.", show_default=False)],
) -> None:
    """Print the JSON Schema of a file or a reply.

    \b
    dmoa schema pool       the pool file
    dmoa schema reply      the `dmoa` object of a reply
    """
    if name not in _SCHEMAS:
        nearest = did_you_mean(name, _SCHEMAS)
        raise ConfigError(f"NAME: value seen: {name!r}; allowed: {', '.join(_SCHEMAS)}; name one of them{nearest}")
    module, record = _SCHEMAS[name]
    found: type[BaseModel] = getattr(import_module(module), record)
    tree = {"$schema": "https://json-schema.org/draft/2020-12/schema", **found.model_json_schema()}
    typer.echo(json.dumps(tree, indent=2))
    common.write_json(tree)
