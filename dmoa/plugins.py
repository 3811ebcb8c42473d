"""Policies, engines and benchmarks by name: dmoa's own, those of installed packages, and those of a file that the operator names.

All three kinds are found the same way, and nothing is imported before somebody asks for it. A name never leads to a file:
only `Registry.load` runs one, and only commands and pool files call it, so no request of a client does.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dmoa.errors import ConfigError

_REFERENCE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_][A-Za-z0-9_]*)")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ENTRY = "__dmoa_entry__"
"""Attribute by which a decorated class or function leads to its entry."""


class Entry(Protocol):
    """What every kind of entry has."""

    @property
    def name(self) -> str:
        """The name that users write."""
        ...


T = TypeVar("T", bound=Entry)
F = TypeVar("F", bound=Callable[..., Any])


def is_reference(text: str) -> bool:
    """Tell whether a text names a thing in a file, as `FILE.py:NAME` does."""
    return _REFERENCE.fullmatch(text) is not None


def absolute_reference(text: str, folder: Path | None = None) -> str:
    """Return `FILE.py:NAME` with an absolute path: from `folder` where the file is there, else from the working directory."""
    path, _, name = text.rpartition(":")
    beside = (folder or Path()) / path
    return f"{(beside if beside.is_file() else Path(path)).absolute()}:{name}"


class Registry(MutableMapping[str, T]):
    """Entries of one kind by name, in the order of dmoa's own, then what was added, then the installed packages'.

    Iterating and `in` import nothing. `registry[name]` does, and raises ConfigError naming the entry point that is broken.
    """

    def __init__(self, kind: type[T], *, what: str, group: str, builtin: Mapping[str, str]) -> None:
        """`what`: the decorator's name; `group`: of the entry points; `builtin`: name -> `module:attribute`."""
        self._kind = kind
        self._what = what
        self._group = group
        self._builtin = builtin
        self._found: dict[str, T] = {}
        self._owners: dict[str, tuple[str, str]] = {}
        self._files: dict[str, str] = {}

    @property
    def builtin(self) -> tuple[str, ...]:
        """The names of dmoa's own."""
        return tuple(self._builtin)

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self._group) if point.name not in self._builtin}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._builtin, *self._found, *self._installed)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._found or name in self._installed

    def __getitem__(self, name: str) -> T:
        if name not in self._found:
            if name in self._builtin:
                module, _, attribute = self._builtin[name].partition(":")
                self._found[name] = self._entry_of(getattr(import_module(module), attribute), self._builtin[name])
            elif name in self._installed:
                self._found[name] = self._from_package(self._installed[name])
        return self._found[name]

    def __setitem__(self, name: str, entry: T) -> None:
        self._found[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._found[name]
        self._owners.pop(name, None)
        self._files.pop(name, None)

    def add(self, entry: T, owner: F) -> F:
        """Enter what a decorator stands on, and return it. Raises ConfigError for a bad name and for one that is taken."""
        if not _NAME.fullmatch(entry.name):
            raise ConfigError(
                f"@{self._what}({entry.name!r}): a name has 1-64 lower case letters, digits, '-', '_' and '.', and begins with a "
                "letter or digit; choose such a name"
            )
        mine = (owner.__module__, owner.__qualname__)
        home = self._builtin[entry.name].partition(":")[0] if entry.name in self._builtin else owner.__module__
        if home != owner.__module__ or self._owners.get(entry.name, mine) != mine:
            raise ConfigError(f"@{self._what}({entry.name!r}) in {_home(owner.__module__)}: the name is taken; choose another")
        setattr(owner, _ENTRY, entry)
        self._found[entry.name] = entry
        self._owners[entry.name] = mine
        return owner

    def load(self, reference: str, where: str) -> T:
        """Run the file of `FILE.py:NAME`, once, and return the entry of NAME in it, which its own name leads to from now on.

        `where` names in errors the option or field that holds the reference. Raises ConfigError.
        """
        reference = absolute_reference(reference)
        path, _, name = reference.rpartition(":")
        try:
            module = _run_file(Path(path))
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{where}: cannot load {reference!r}: {_said(error)}; mend the file, or name another") from error
        if not hasattr(module, name):
            raise ConfigError(f"{where}: {path!r} has no {name}; name something in it that stands under @{self._what}")
        entry = self._entry_of(getattr(module, name), f"{where}: {reference!r}")
        if entry.name in self and self._found.get(entry.name) is not entry:
            raise ConfigError(f"{where}: {reference!r} is named {entry.name!r}, and that name is taken; choose another")
        self._found[entry.name] = entry
        self._files[entry.name] = reference
        return entry

    def resolve(self, names: Iterable[str], where: str) -> tuple[str, ...]:
        """Return names with each `FILE.py:NAME` loaded and replaced by the name of its entry. Raises ConfigError as `load`."""
        return tuple(self.load(name, where).name if is_reference(name) else name for name in names)

    def references(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the absolute `FILE.py:NAME` of those names that came from a file: what another process has to load."""
        return tuple(self._files[name] for name in names if name in self._files)

    def _from_package(self, point: EntryPoint) -> T:
        where = f"entry point {point.name!r} of group {self._group!r} ({point.value})"
        try:
            entry = self._entry_of(point.load(), where)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            package = f" {point.dist.name!r}" if point.dist else ""
            raise ConfigError(f"{where}: cannot be loaded: {_said(error)}; mend or uninstall the package{package}") from error
        if entry.name != point.name:
            raise ConfigError(f"{where}: leads to {entry.name!r}; the two names must agree")
        return entry

    def _entry_of(self, found: object, where: str) -> T:
        entry = found if isinstance(found, self._kind) else getattr(found, "__dict__", {}).get(_ENTRY)
        if not isinstance(entry, self._kind):
            raise ConfigError(f"{where}: does not stand under @{self._what}; decorate it so")
        return entry


def _run_file(path: Path) -> Any:
    """Return the module of a Python file, run once in a process; its folder is not on the import path."""
    name = f"dmoa_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look their module up while it is run
    with ExitStack() as undo:
        undo.callback(sys.modules.pop, name, None)
        spec.loader.exec_module(module)
        undo.pop_all()
    return module


def _home(module: str) -> str:
    return str(getattr(sys.modules.get(module), "__file__", None) or module)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
