"""What every command shares: the common options, how a pool is loaded, how results are written, and how errors end.

First stop of every command. Imports nothing heavy, so that `dmoa --help` is quick.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, NoReturn, ParamSpec

import typer
from typer.exceptions import TyperException

from dmoa.cli.terminal import libraries_apart, tell
from dmoa.errors import CheckpointError, ConfigError, DmoaError, RequestError, TraceError
from dmoa.explain import did_you_mean
from dmoa.redaction import redact_text

if TYPE_CHECKING:
    from dmoa.config import Config

P = ParamSpec("P")
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
_BAD_INPUT = (ConfigError, RequestError, CheckpointError, TraceError)
_TOO_BUSY = 429

PolicyOption = Annotated[
    str | None, typer.Option("--policy", metavar="NAME", help="Who is asked when; `dmoa policies` lists the names.")
]
AgentOption = Annotated[str | None, typer.Option("--agent", metavar="NAME", help="Ask this one agent (policy `single`).")]
CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", metavar="DIR", help="Gate to route with, in place of the pool's own.")
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Ask a running server instead of a swarm in this process; key in DMOA_API_KEY."),
]
MaxStepsOption = Annotated[int | None, typer.Option("--max-steps", min=1, metavar="N", help="At most this many steps.")]
DeadlineOption = Annotated[
    float | None, typer.Option("--deadline", min=0.001, metavar="S", help="Best answer so far after this many seconds.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The options that every command has."""

    config: Path | None = None
    """Pool file; None: the one that DMOA_CONFIG names, else the packaged default pool."""
    overrides: tuple[str, ...] = ()
    """`a.b=c` changes to it."""
    json_path: Path | None = None
    """Where the command's result is written as JSON."""
    verbosity: int = 0
    """-1: results only; 0: progress too; 1: details and logs."""

    def load(self, checkpoint: Path | None = None) -> Config:
        """Return the pool that the options name; `checkpoint` replaces its gate. Raises ConfigError."""
        from dmoa.agents.pool import load_pool

        config = load_pool(self.config or os.environ.get("DMOA_CONFIG") or None, self.overrides)
        if checkpoint is None:
            return config
        gate = config.gate.model_copy(update={"checkpoint": str(checkpoint.absolute())})
        return config.model_copy(update={"gate": gate})

    def say(self, text: str) -> None:
        """Tell progress on stderr, unless quiet."""
        if self.verbosity >= 0:
            tell(f"dmoa: {text}")

    def write_json(self, value: Any) -> None:
        """Write the command's result where `--json` says, if it does. Raises ConfigError if that cannot be written."""
        if self.json_path is None:
            return
        try:
            self.json_path.parent.mkdir(parents=True, exist_ok=True)
            self.json_path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--json: cannot write {str(self.json_path)!r}: {error}; name a file that can be written"
            ) from error


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_COMMON = (
    _option(
        "config",
        Annotated[
            Path | None,
            typer.Option(
                "--config", metavar="FILE", help="Pool file, - for standard input [DMOA_CONFIG, else the default pool]."
            ),
        ],
        None,
    ),
    _option(
        "overrides",
        Annotated[
            list[str] | None,
            typer.Option(
                "--set", metavar="A.B=C", help="Change one field of the pool, such as gate.temperature=0.2; repeatable."
            ),
        ],
        None,
    ),
    _option(
        "json_path",
        Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON too.", dir_okay=False)],
        None,
    ),
    _option("quiet", Annotated[bool, typer.Option("--quiet", "-q", help="Results only, no progress.")], False),
    _option("verbose", Annotated[bool, typer.Option("--verbose", "-v", help="Details, and all logs on stderr.")], False),
)


def with_common(command: Callable[Concatenate[Common, P], None]) -> Callable[..., None]:
    """Give a command the common options; it receives them as its first argument."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [*list(signature.parameters.values())[1:], *_COMMON]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        overrides, quiet, verbose = values.pop("overrides"), values.pop("quiet"), values.pop("verbose")
        common = Common(
            config=values.pop("config"),
            overrides=tuple(overrides or ()),
            json_path=values.pop("json_path"),
            verbosity=int(verbose) - int(quiet),
        )
        _start_logging(common.verbosity)
        with libraries_apart(command.__name__.strip("_"), verbosity=common.verbosity):
            command(common, **values)  # type: ignore[call-arg]

    wrapped.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


class _StderrHandler(logging.Handler):
    """Writes dmoa's own logs where its own words go at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(redact_text(self.format(record)))


def _start_logging(verbosity: int) -> None:
    logger = logging.getLogger("dmoa")
    logger.setLevel({-1: logging.ERROR, 0: logging.WARNING}.get(verbosity, logging.INFO))
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)


def fail(error: DmoaError) -> NoReturn:
    """End the command with one message on stderr: status 2 for bad input, else 1."""
    is_bad_input = isinstance(error, _BAD_INPUT) and getattr(error, "status", 0) != _TOO_BUSY
    tell(f"dmoa: {redact_text(str(error))}")
    raise typer.Exit(EXIT_BAD_INPUT if is_bad_input else EXIT_FAILED)


@contextmanager
def suggesting() -> Iterator[None]:
    """Let an unknown option of a command be answered as every other unknown name is: with the nearest one."""
    try:
        yield
    except TyperException as error:
        found: Any = error
        option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
        if isinstance(option, str) and context is not None and hasattr(error, "possibilities"):
            known = [name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
            found.possibilities = None
            found.message += did_you_mean(option, known)
        raise


def refuse_together(given: Mapping[str, object], because: str) -> None:
    """Raise ConfigError naming the options in `given` that were used although they have no effect here."""
    used = [name for name, value in given.items() if value]
    if used:
        raise ConfigError(f"{', '.join(used)}: no effect {because}; leave it out")
