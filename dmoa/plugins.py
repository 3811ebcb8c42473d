"""Policies, engines and benchmarks by name: dmoa's own, those of installed packages, and those of a file that the operator names.

All three kinds are found the same way, and nothing is imported before somebody asks for it. A name never leads to a file:
only `Registry.load` runs one, and only commands and pool files call it, so no request of a client does.
"""

from __future__ import annotations

import hashlib
import logging
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
from dmoa.validation import did_you_mean

_LOG = logging.getLogger("dmoa.plugins")
_REFERENCE = re.compile(r"[^:]+\.py|.+\.py:[^:/=]*")
_WITH_OPTIONS = re.compile(r"([^=]+?\.py:[^:/=]+):(.+)")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ENTRY = "__dmoa_entry__"
"""Attribute by which a decorated class or function leads to its entry."""
_DIGEST = "__dmoa_digest__"
"""Attribute of a file's module: the SHA-256 of its bytes."""


class Entry(Protocol):
    """What every kind of entry has."""

    @property
    def name(self) -> str:
        """The name that users write."""
        ...


T = TypeVar("T", bound=Entry)
F = TypeVar("F", bound=Callable[..., Any])


def is_name(text: str) -> bool:
    """Tell whether a text can be the name of a pool, an LLM, an agent, or an entry."""
    return _NAME.fullmatch(text) is not None


def is_reference(text: str) -> bool:
    """Tell whether a text names a thing in a file, as `FILE.py:NAME` does, or is meant to."""
    return _REFERENCE.fullmatch(text) is not None


def names_file(text: str) -> bool:
    """Tell whether a text is such a reference, alone or with a policy's parameters behind it."""
    return is_reference(text) or _WITH_OPTIONS.fullmatch(text) is not None


def absolute_reference(text: str, folder: Path | None = None) -> str:
    """Return `FILE.py:NAME` with an absolute path: from `folder` where the file is there, else from the working directory."""
    path, name = _parts(text)
    beside = (folder or Path()) / path
    return f"{(beside if beside.is_file() else Path(path)).absolute()}:{name}"


def missing_file(text: str, folder: Path) -> str | None:
    """Return what to say where the file of `FILE.py:NAME` is neither in `folder` nor in the working directory, else None."""
    path = _parts(text)[0]
    places = dict.fromkeys(str(place.absolute()) for place in (folder, Path()))
    if Path(path).is_absolute() or any((Path(place) / path).is_file() for place in places):
        return None
    return f"cannot load {text!r}: FileNotFoundError: there is no {path!r} in {' nor in '.join(map(repr, places))}; name another"


def home_of(thing: Callable[..., Any]) -> str:
    """Return the file of a class or function, for a message."""
    return str(getattr(sys.modules.get(thing.__module__), "__file__", None) or thing.__module__)


def _parts(reference: str) -> tuple[str, str]:
    """Return path and name of `FILE.py:NAME`; the name is empty where it is missing."""
    path, _, name = (f"{reference}:" if reference.endswith(".py") else reference).rpartition(":")
    return path, name


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
        self._digests: dict[str, str] = {}

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
        if name in self._files:
            sys.modules.pop(_module_name(_parts(self._files.pop(name))[0]), None)
            del self._digests[name]

    def add(self, entry: T, owner: F) -> F:
        """Enter what a decorator stands on, and return it. Raises ConfigError for a bad name and for one that is taken."""
        if not is_name(entry.name):
            raise ConfigError(
                f"@{self._what}({entry.name!r}): a name has 1-64 lower case letters, digits, '-', '_' and '.', and begins with a "
                "letter or digit; choose such a name"
            )
        mine = (owner.__module__, owner.__qualname__)
        home = self._builtin[entry.name].partition(":")[0] if entry.name in self._builtin else owner.__module__
        if home != owner.__module__ or self._owners.get(entry.name, mine) != mine:
            raise ConfigError(f"@{self._what}({entry.name!r}) in {home_of(owner)}: the name is taken; choose another")
        setattr(owner, _ENTRY, entry)
        self._found[entry.name] = entry
        self._owners[entry.name] = mine
        return owner

    def load(self, reference: str, where: str) -> T:
        """Run the file of `FILE.py:NAME`, once, and return the entry of NAME in it, which its own name leads to from now on.

        `where` names in errors the option or field that holds the reference. Raises ConfigError.
        """
        reference = absolute_reference(reference)
        path, name = _parts(reference)
        try:
            module = _run_file(Path(path))
        except (Exception, SystemExit) as error:
            _LOG.info("%s failed", reference, exc_info=error)
            raise ConfigError(f"{where}: cannot load {reference!r}: {_said(error)}; mend the file, or name another") from error
        if not hasattr(module, name):
            names = [name for name, found in vars(module).items() if isinstance(_entered(found), self._kind)]
            seen = f"{path!r} has no {name}" if name else f"{path!r} lacks a name; it is written FILE.py:NAME"
            there = f"in it {', '.join(names) or 'nothing'} stands under @{self._what}"
            way = f"name it {path}:{names[0]}" if len(names) == 1 else "name one such thing"
            raise ConfigError(f"{where}: {seen}; {there}; {way}{did_you_mean(name, names)}")
        entry = self._entry_of(getattr(module, name), f"{where}: {reference!r}")
        if entry.name in self and self._found.get(entry.name) is not entry:
            raise ConfigError(f"{where}: {reference!r} is named {entry.name!r}, and that name is taken; choose another")
        self._found[entry.name] = entry
        self._files[entry.name] = reference
        self._digests[entry.name] = vars(module)[_DIGEST]
        return entry

    def resolve(self, names: Iterable[str], where: str) -> tuple[str, ...]:
        """Return names with each `FILE.py:NAME` loaded and replaced by the name of its entry, what follows it kept.

        Raises ConfigError as `load`.
        """
        found = []
        for name in names:
            parts = _WITH_OPTIONS.fullmatch(name)
            reference, words = parts.groups() if parts else (name, "")
            found.append(":".join(filter(None, (self.load(reference, where).name, words))) if names_file(name) else name)
        return tuple(found)

    def references(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the absolute `FILE.py:NAME` of those names that came from a file: what another process has to load."""
        return tuple(self._files[name] for name in names if name in self._files)

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of the file that an entry came from, as it was run; None for one that is not from a file."""
        return self._digests.get(name)

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
        entry = found if isinstance(found, self._kind) else _entered(found)
        if not isinstance(entry, self._kind):
            raise ConfigError(f"{where}: does not stand under @{self._what}; decorate it so")
        return entry


def _entered(found: object) -> object:
    return getattr(found, "__dict__", {}).get(_ENTRY)


def _module_name(path: str) -> str:
    return f"dmoa_file_{hashlib.sha256(path.encode()).hexdigest()[:12]}"


def _run_file(path: Path) -> Any:
    """Return the module of a Python file, run once in a process; its folder is not on the import path."""
    name = _module_name(str(path))
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = module_from_spec(spec)
    vars(module)[_DIGEST] = hashlib.sha256(path.read_bytes()).hexdigest()
    sys.modules[name] = module  # dataclasses and pydantic look their module up while it is run
    with ExitStack() as undo:
        undo.callback(sys.modules.pop, name, None)
        spec.loader.exec_module(module)
        undo.pop_all()
    return module


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
