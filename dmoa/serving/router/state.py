"""What a router keeps beyond its own life, on any Ray file system and in the cluster's memory.

Layout under `router.state_uri`: `versions/VERSION/` (a dmoa checkpoint each), `state.json`, and beside it `state.json.last`, the
same once more. Every file is written whole, then renamed, because the router may die at any moment and restart on another node.
States are numbered, and the cluster's key-value store has the last one with the current gate: a router that comes back where its
place is gone, damaged or older than that takes up the newest of the three, says so, and writes it back as soon as that works.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs as arrow_fs

from dmoa.checkpoint import FILES, MAX_BYTES, Checkpoint, files_of, read_files
from dmoa.core.gate import Gate
from dmoa.errors import CheckpointError
from dmoa.reading import read_json
from dmoa.storage import is_draft, place_of, write_at
from dmoa.validation import redact_text, short

_VERSION = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LAST = ".last"
_SERIAL = "serial"
_LOG = logging.getLogger("dmoa.router")


class Memory(Protocol):
    """Keeps bytes by name where no file system can lose them."""

    def get(self, name: str) -> bytes | None:
        """Return what is kept under a name."""

    def __setitem__(self, name: str, data: bytes) -> None: ...


class RouterState:
    """Reads and writes a router's versions and states."""

    def __init__(self, uri: str, memory: Memory | None = None, *, is_patient: bool = False) -> None:
        """What the app's last router left in `memory` is taken up; while `is_patient`, what cannot be written is so later.

        Raises ConfigError for a URI that no file system serves.
        """
        self._fs, self._root = place_of(uri, "router.state_uri")
        self.place = redact_text(uri)
        self._memory: Memory = {} if memory is None else memory
        self._serials: dict[str, int] = {}
        self._unsaved: dict[str, bytes] = {}
        self.is_patient = is_patient
        self.lost: str | None = None
        """What the place lacks, for as long as it is not written back; None: it is whole."""

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Let what cannot be written be so later, in this block."""
        before, self.is_patient = self.is_patient, True
        try:
            yield
        finally:
            self.is_patient = before

    def save_version(self, gate: Gate, record: Checkpoint) -> None:
        """Keep a version; one that is already there is left alone, because its name is its content."""
        if self._exists(f"versions/{record.version}/gate.json"):
            return
        for name, data in files_of(gate, record).items():
            self._put(f"versions/{record.version}/{name}", data)

    def load_version(self, version: str) -> tuple[Gate, Checkpoint] | None:
        """Return a version's weights and record, None if it was never kept. Raises CheckpointError if damaged."""
        if not isinstance(version, str) or not _VERSION.fullmatch(version):
            what = f"a version is {short(version)}; expected letters, digits, `-` and `_`"
            raise CheckpointError(f"router state {self.place!r}: {what}; remove its folder to begin anew")
        remembered = self._remembered(version)
        try:
            found = self._load_version(version)
        except (CheckpointError, OSError) as error:
            if remembered is None:
                raise
            found, why = None, str(error)
        else:
            why = "its files are gone"
        if found is not None or remembered is None:
            return found
        self._say_lost(f"gate {version}: {why}")
        for name, data in remembered.items():
            self._put(f"versions/{version}/{name}", data, soon=True)
        return read_files(remembered, f"gate {version}")

    def _load_version(self, version: str) -> tuple[Gate, Checkpoint] | None:
        if not self._exists(f"versions/{version}/gate.json"):
            return None
        try:
            found = read_files({name: self._read(f"versions/{version}/{name}") for name in FILES}, f"gate {version}")
            if found[1].version != version:
                raise CheckpointError(f"gate {version}: version in gate.json is {short(found[1].version)}")
            return found
        except CheckpointError as error:
            place = self._path(f"versions/{version}")
            raise CheckpointError(f"router state {place!r} is damaged; remove it to begin anew ({error})") from error

    def read_version(self, version: str) -> dict[str, bytes]:
        """Return the files of a version by name."""
        remembered = self._remembered(version)
        return remembered or {name: self._read(f"versions/{version}/{name}") for name in FILES}

    def remember(self, version: str) -> None:
        """Keep the files of the current version in memory too, in place of the one before."""
        if self._remembered(version) is None:
            try:
                head, *parts = version.encode(), *self.read_version(version).values()
            except OSError as error:  # a copy: what is current hangs on `save` alone
                _LOG.warning("gate %s is not remembered: %s", version, error)
                return
            sizes = " ".join(str(len(part)) for part in parts).encode()
            self._memory["version"] = b"\n".join((head, sizes, b"".join(parts)))

    def _remembered(self, version: str) -> dict[str, bytes] | None:
        head, _, rest = (self._memory.get("version") or b"").partition(b"\n")
        if head != version.encode():
            return None
        sizes, _, data = rest.partition(b"\n")
        first = int(sizes.split()[0])
        return dict(zip(FILES, (data[:first], data[first:]), strict=True))

    def keep_versions(self, wanted: Collection[str]) -> None:
        """Remove the versions that nobody wants any more."""
        for found in self._list("versions"):
            is_ours = found.type == arrow_fs.FileType.Directory and not Path(found.path).is_symlink()
            if is_ours and found.base_name not in wanted:
                self._fs.delete_dir(found.path)

    def take_over(self, before: RouterState, *names: str) -> None:
        """Where nothing is kept here, keep what another place of the same pool does: versions, the state, and those of `names`.

        What cannot be read there is left out, and the log says so. Raises OSError where it cannot be written here.
        """
        if self.load() is not None:
            return
        try:
            states = {name: state for name in (*names, "state.json") if (state := before.load(name)) is not None}
            versions = {one.base_name for one in before._list("versions") if _VERSION.fullmatch(one.base_name)}
        except (CheckpointError, OSError) as error:
            _LOG.warning("%s is not taken over, and %s begins anew: %s", before.place, self.place, error)
            return
        for version in sorted(versions | {str(states.get("state.json", {}).get("current"))}):
            try:
                files = before.read_version(version)
            except OSError as error:
                _LOG.warning("gate %s is not taken over: %s", version, error)
                continue
            for name in FILES:
                self._put(f"versions/{version}/{name}", files[name])
        for name, state in states.items():  # the state last: nothing is taken over by halves
            self.save(state, name)

    def sweep(self) -> None:
        """Remove the drafts of writers that died; call when nobody else writes here. What lies behind a link is not ours."""
        kept = [one.base_name for one in self._list("versions") if one.type == arrow_fs.FileType.Directory]
        folders = ("versions", *(f"versions/{name}" for name in kept))
        real = ["", *(folder for folder in folders if not Path(self._path(folder)).is_symlink())]
        for found in (one for folder in real for one in self._list(folder) if is_draft(one.base_name)):
            if found.type == arrow_fs.FileType.File:
                self._fs.delete_file(found.path)

    def save(self, state: dict[str, Any], name: str = "state.json") -> None:
        """Keep the state: current version, history, fingerprint; under another name that of adaptation.

        Raises OSError: then the one before holds. With the first file it is kept; the copies may come later.
        """
        serial = self._serials.get(name, 0) + 1
        data = json.dumps({**state, _SERIAL: serial}).encode()
        self._put(name, data)
        self._put(name + _LAST, data, soon=True)
        self._serials[name] = serial
        self._memory[name] = data

    def load(self, name: str = "state.json") -> dict[str, Any] | None:
        """Return the newest state that is whole, None before the first save. Raises CheckpointError if none can be read."""
        found: list[tuple[int, bytes, dict[str, Any]]] = []
        damage: str | None = None
        is_whole = False
        for place in (name, name + _LAST, None):
            data = self._memory.get(name)
            try:
                if place is not None:
                    data = self._read(place) if self._exists(place) else None
                if data is not None:
                    state = read_json(data)
                    if not isinstance(state, dict):
                        raise ValueError("it is not a JSON object")
                    found.append((int(state.pop(_SERIAL, 0)), data, state))
            except (OSError, ValueError, TypeError, ArithmeticError) as error:
                hint = "make it readable" if isinstance(error, OSError) else "remove its folder to begin anew"
                damage = damage or f"router state {self._path(place or name)!r}: {error}; {hint}"
            is_whole = is_whole or (place == name and bool(found))
        if not found:
            if damage is not None:
                raise CheckpointError(damage)
            return None
        serial, data, state = max(found, key=lambda one: one[0])
        self._serials[name] = serial
        if not is_whole or found[0][0] < serial:
            state_of = "older than it was" if is_whole else "gone"
            self._say_lost(damage or f"router state {self._path(name)!r}: it is {state_of}")
            for place in (name, name + _LAST):
                self._put(place, data, soon=True)
        self._memory[name] = data
        return state

    def heal(self) -> None:
        """Write back what the place had lost, where that works by now."""
        for name, data in list(self._unsaved.items()):
            self._put(name, data, soon=True)
        if self.lost is not None and not self._unsaved:
            _LOG.warning("%s holds its state again", self.place)
            self.lost = None

    def _say_lost(self, what: str) -> None:
        self.lost = self.lost or what
        _LOG.warning("%s; the last that was kept elsewhere takes its place", what)

    def _put(self, name: str, data: bytes, *, soon: bool = False) -> None:
        """Write a file; where it cannot be written, raise OSError, or while patient, or `soon`, note that it still is to be."""
        try:
            write_at(self._fs, self._path(name), data)
        except OSError as error:
            if not (soon or self.is_patient):
                raise
            if name not in self._unsaved:
                _LOG.warning("cannot write %s: %s; it is tried again", self._path(name), error)
            self._unsaved[name] = data
            self.lost = self.lost or f"cannot write {self._path(name)!r}: {error}"
        else:
            self._unsaved.pop(name, None)

    def _list(self, folder: str) -> list[Any]:
        return list(self._fs.get_file_info(arrow_fs.FileSelector(self._path(folder), allow_not_found=True)))

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name).rstrip("/")

    def _exists(self, name: str) -> bool:
        return self._fs.get_file_info(self._path(name)).type not in (arrow_fs.FileType.NotFound, arrow_fs.FileType.Directory)

    def _read(self, name: str) -> bytes:
        """Return the bytes of a file. Raises OSError, also for a pipe, a device, and what is larger than a gate."""
        info = self._fs.get_file_info(self._path(name))
        if info.type == arrow_fs.FileType.Unknown or (info.size or 0) > MAX_BYTES:
            raise OSError(f"{name}: it is no file of at most {MAX_BYTES >> 20} MiB")
        with self._fs.open_input_stream(info.path) as stream:
            return bytes(stream.read(MAX_BYTES + 1))
