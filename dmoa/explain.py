"""Turns pydantic's errors into one line that a person can act on: field, value seen, what is allowed, what to do.

Used wherever something written by a person or another program is read: configuration, checkpoint, trace, reply.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dmoa.redaction import redact, redact_text

_MAX_CHARS = 80
_LIKENESS = 0.6
"""Least `difflib` ratio of a name that is suggested."""


def did_you_mean(seen: Iterable[str] | str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'NAME'?` for unknown names that are near to allowed ones, else nothing.

    It ends a message: a name that is written nearly right gets the right one, whatever its case; of several names each its own.
    """
    by_lower = {name.lower(): name for name in allowed}
    unknown = [seen] if isinstance(seen, str) else list(seen)
    near = [difflib.get_close_matches(name.strip().lower(), by_lower, n=1, cutoff=_LIKENESS) for name in unknown]
    found = dict.fromkeys(repr(by_lower[name]) for names in near for name in names)
    return f"; did you mean {', '.join(found)}?" if found else ""


def describe(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Return every problem of a pydantic error in one line.

    `model` is the record that was being validated: with it an unknown key is answered with the keys that are allowed.
    """
    items = error.errors(include_url=False)
    return "; ".join(_sentence(item, model) for item in items if not _follows_from_others(item, items))


def _sentence(item: ErrorDetails, model: type[BaseModel] | None) -> str:
    where = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{where}: missing; add it"
    if item["type"] == "extra_forbidden":
        keys = list(_keys_beside(item["loc"], model)) if model else []
        allowed = f"; allowed: {', '.join(keys)}" if model else ""
        nearest = did_you_mean(str(item["loc"][-1]), keys)
        return f"{where}: unknown key (value seen: {_seen(item)}){allowed}; remove it or fix its spelling{nearest}"
    if item["type"] == "value_error" and isinstance(item["input"], dict | list | BaseModel):
        # A rule over several fields: its own message names them and their values.
        return f"{where}: {message}" if where else message
    message = message[0].lower() + message[1:]
    return f"{where}: value seen: {_seen(item)}; {message}; change it{_nearest_word(item)}"


def _nearest_word(item: ErrorDetails) -> str:
    """Return the suggestion for a word that is none of the few that a field allows."""
    context = item.get("ctx", {})
    allowed = re.findall(r"'([^']*)'", str(context.get("expected") or context.get("expected_tags") or ""))
    return did_you_mean(item["input"], allowed) if isinstance(item["input"], str) else ""


def _seen(item: ErrorDetails) -> str:
    """Return the value seen, short; without what a field named like a key holds, because people do put keys there."""
    value = item["input"]
    if not isinstance(value, str | int | float | dict | list):
        return redact_text(short(value))
    # Under each name on the way to it: what `auth_tokens` holds is secret whatever its own name is.
    names = [str(part) for part in item["loc"] if part != "[key]"]  # pydantic's word for the name of an entry itself
    for name in names or [""]:
        value = redact(value, name)
    return short(value)


def _follows_from_others(item: ErrorDetails, items: list[ErrorDetails]) -> bool:
    """Whether a list only counts as too short because its entries were refused."""
    depth = len(item["loc"])
    return item["type"] == "too_short" and any(len(o["loc"]) > depth and o["loc"][:depth] == item["loc"] for o in items)


def _keys_beside(loc: tuple[int | str, ...], model: Any) -> Iterable[str]:
    """Return the keys of the record in which the last part of `loc` was found."""
    for part in loc[:-1]:
        model = model.model_fields[str(part)].annotation if _is_record(model) else _record_within(model)
    # What is left may be `Record | None`.
    fields: dict[str, Any] = (model if _is_record(model) else _record_within(model)).model_fields
    return fields


def _is_record(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, BaseModel)


def _record_within(annotation: Any) -> Any:
    return next(arg for arg in get_args(annotation) if _is_record(arg))


def short(value: object) -> str:
    """Return a value as it is shown in a message: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 3] + "..."
