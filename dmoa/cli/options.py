"""Flags made from records of options: a field is a flag, its default the flag's, its docstring the help."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from dmoa.config import Flag, Options
from dmoa.validation import redact_command

Record = TypeVar("Record", bound=Options)
_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "DIR", str: "NAME"}


def takes_options(
    record: type[Record],
    *,
    leave_out: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    unset: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per field of `record`; it receives the record after `common`. Raises ConfigError when called.

    Fields in `leave_out` have no flag; `defaults` are the command's own where it needs others than the record. What is `unset`
    reaches the record only if it was given: its value here is what the help shows as the default.
    """
    unset = unset or {}
    fields = {name: field for name, field in record.model_fields.items() if name not in leave_out}
    flags = [_flag(record, name, field, unset.get(name)) for name, field in fields.items()]
    flags = [flag.replace(default=(defaults or {}).get(flag.name, flag.default)) for flag in flags]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        common, _, *others = inspect.signature(command, eval_str=True).parameters.values()

        @functools.wraps(command)
        def wrapped(common: Any, **values: Any) -> None:
            given = {name: value for name in fields if (value := values.pop(name)) is not None and value != []}
            command(common, record.parse(given), **values)

        others = [other.replace(kind=inspect.Parameter.KEYWORD_ONLY) for other in others]
        wrapped.__signature__ = inspect.Signature([common, *flags, *others])  # type: ignore[attr-defined]
        return wrapped

    return decorate


def _flag(record: type[Options], name: str, field: FieldInfo, shown: str | None) -> inspect.Parameter:
    """Return the parameter that typer makes a flag of."""
    marks = next((mark for mark in field.metadata if isinstance(mark, Flag)), Flag())
    kinds = _kinds(field.annotation)
    kind = kinds[0] if len(kinds) == 1 and kinds[0] in (bool, *_METAVARS) else str
    if marks.is_repeated:
        kind = Path if Path in get_args(kinds[0]) else str
    choices = [word for one in kinds for word in get_args(one)] if {get_origin(one) for one in kinds} == {Literal} else []
    default = ... if field.is_required() else None if shown else _word(field.default, kind, marks)
    option = typer.Option(
        f"--{name.replace('_', '-')}" + (f"/{marks.negation}" if marks.negation else ""),
        metavar=marks.metavar or ("|".join(choices) or _METAVARS.get(kind)),
        help=_help(field.description or "", record.model_fields, shown),
        envvar=marks.envvar,
        show_envvar=False,
        min=next((mark.ge for mark in field.metadata if hasattr(mark, "ge")), None),
    )
    annotation: Any = list[kind] if marks.is_repeated else kind  # type: ignore[valid-type]
    annotation = Annotated[annotation | None if default is None else annotation, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kinds(annotation: Any) -> list[Any]:
    """Return what a field may be beside None."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [part for part in parts if part is not NoneType]


def _word(default: Any, kind: Any, marks: Flag) -> Any:
    """Return a default as it is written on the command line."""
    if isinstance(default, tuple):
        return None if marks.is_repeated else ",".join(default)
    return default if isinstance(default, kind) else None


def _help(text: str, names: Collection[str], shown: str | None) -> str:
    """Return a docstring as help: fields named as flags, and what None means, or `shown`, in brackets."""
    text = re.sub(r"`(\w+)`", lambda name: f"--{name[1].replace('_', '-')}" if name[1] in names else name[0], text)
    text = re.sub(r"[;,.] None: ([^;]*?)\.?$", r" [\1].", " ".join(text.split()))
    return text if shown is None else f"{text.removesuffix('.')} [{shown}]."


def this_command() -> str:
    """Return the command line of this process; secrets are taken out."""
    return redact_command(["dmoa", *sys.argv[1:]])
