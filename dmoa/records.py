"""Makes records cross processes quickly.

What `dataclasses` gives frozen classes with slots to be pickled by looks every field up anew, in Python, for every record: some 8
microseconds for each of the dozen records of an agent's call, there and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any


def quicken(module: Mapping[str, Any], name: str) -> None:
    """Let the frozen dataclasses with slots that a module of this name defines be pickled as their values in order."""
    for cls in tuple(module.values()):
        if isinstance(cls, type) and is_dataclass(cls) and cls.__module__ == name and "__setstate__" in vars(cls):
            _quicken(cls)


def _quicken(cls: Any) -> None:
    names = [field.name for field in fields(cls)]
    setters = [getattr(cls, name).__set__ for name in names]
    get = attrgetter(*names)

    def restore(self: Any, state: tuple[Any, ...]) -> None:
        for set_value, value in zip(setters, state, strict=True):
            set_value(self, value)

    cls.__getstate__ = (lambda self: get(self)) if len(names) > 1 else (lambda self: (get(self),))
    cls.__setstate__ = restore
