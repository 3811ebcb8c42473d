"""Writes files whole, and keeps local copies of folders at a URI (`s3://`, `gs://`, `hdfs://`) in step with it.

What lies at a URI is fetched first, changes are written back every few seconds and at the end, so a process that is killed loses
the last seconds at most. Drafts, and folders of them, whose names begin with a dot, stay local.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock, Timeout
from pyarrow import fs as arrow_fs
from pyarrow.lib import ArrowException
from pydantic import BaseModel

from dmoa.errors import ConfigError, DmoaError
from dmoa.validation import redact_text

PERIOD_S = 5.0
"""How often what has changed is written back."""
_URI = re.compile(r"(s3|gs|gcs|abfs|abfss|hdfs|file):/+(.+)", re.DOTALL)
"""With one slash too: what becomes of a URI that was taken for a path."""
_WHOLE_AT_ONCE = ("s3", "gcs", "abfs")
"""File systems on which a file is there when it is whole."""
_FAILURES = (OSError, ArrowException)
_log = logging.getLogger(__name__)
_Options = TypeVar("_Options", bound=BaseModel)
_uris: dict[Path, str] = {}
"""Local copy -> what it is a copy of, for messages."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path`, on disk and whole, when the block ends; nothing is left of it if that fails.

    Makes the folder, but none of a URI's name. Pipes and devices, such as /dev/stdout, stay what they are and are written to.
    Raises OSError.
    """
    if uri := uri_of(path):
        raise OSError(f"{uri} is a URI; expected a file of this machine")
    if path.exists() and not (path.is_file() or path.is_dir()):
        with path.open("wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file by way of `replacing`, text as UTF-8. Raises OSError."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def place_of(uri: str, field: str) -> tuple[arrow_fs.FileSystem, str]:
    """Return the file system that serves a URI, and the path on it. Raises ConfigError naming the field where none does."""
    try:
        system, root = arrow_fs.FileSystem.from_uri(uri)
    except (*_FAILURES, ValueError) as error:
        what = f"{field} is {uri!r}; expected file:///DIR, s3://..., gs://... ({error})"
        raise ConfigError(redact_text(what)) from error
    return system, root.rstrip("/")


def json_line(tree: Any) -> bytes:
    """Return plain values as a line of JSON; what UTF-8 cannot carry becomes `?`."""
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


def write_at(system: arrow_fs.FileSystem, path: str, data: bytes) -> None:
    """Write a file of a file system so that a reader sees the one before or this one, whole; makes the folder. Raises OSError."""
    parent, _, name = path.rpartition("/")
    system.create_dir(parent, recursive=True)
    is_whole = system.type_name in _WHOLE_AT_ONCE
    draft = path if is_whole else f"{parent}/.{name}.{secrets.token_hex(4)}.draft"
    try:
        with system.open_output_stream(draft) as stream:
            stream.write(data)
        if not is_whole:
            system.move(draft, path)
    except BaseException:
        if not is_whole:
            with suppress(*_FAILURES):
                system.delete_file(draft)
        raise


def unwritable(path: Path, reason: OSError | str) -> ConfigError:
    """Return the error for a folder of results that cannot be written to."""
    return ConfigError(f"--out: cannot write {str(path)!r}: {reason}; name a folder that can be written")


@contextmanager
def writing(path: Path, option: str = "--out", what: str = "file") -> Iterator[None]:
    """Raise ConfigError naming the option where what this block writes cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {str(path)!r}: {error}; name a {what} that can be written") from error


def is_draft(name: str) -> bool:
    """Tell a file that `write_at` or `replacing` had not finished, by its name."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.draft", name, re.DOTALL) is not None


@contextmanager
def only_one(folder: Path, doing: str, name: str = "") -> Iterator[None]:
    """Hold a folder that a command writes, made if it is not there, for as long as the block runs.

    `doing` says what, `name` tells kinds apart that may share a folder. The lock ends with the process, however that ends; of a
    folder at a URI it holds the local copy alone. Raises ConfigError where another process holds it, or it cannot be written.
    """
    lock = FileLock(folder / f".{name}.lock" if name else folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"--out: another {doing} is writing to {str(folder)!r}; wait for it, or use another folder") from None
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path, name: str) -> bool:
    """Tell whether a process holds a folder now, as `only_one` does, or its lock is somebody else's."""
    path = folder / f".{name}.lock"
    try:
        with FileLock(path, timeout=0) if path.exists() else nullcontext():
            return False
    except OSError:  # a Timeout is one
        return True


def uri_of(place: Path | str) -> str | None:
    """Return the URI that a place was given as, also where it has become a path; None for a folder of this machine."""
    found = _URI.fullmatch(str(place))
    if found is None:
        return None
    scheme, rest = found.groups()
    place, mark, options = rest.partition("?")
    rest = place + mark + re.sub(r"(https?):/+", r"\1://", options)  # a path has lost one of the two there as well
    return f"file:///{rest}" if scheme == "file" else f"{scheme}://{rest}"


def check_local(place: Path | None, option: str, then: str = "name one") -> None:
    """Raise ConfigError for a URI where a place of this machine is wanted: a folder would be made of its name."""
    if place is not None and (uri := uri_of(place)):
        raise ConfigError(f"{option} is {uri!r}; expected a place of this machine; {then}")


def under(uri: str, name: str) -> str:
    """Return the URI of what lies under a URI, whose options (`?endpoint_override=...`) go on standing at the end."""
    place, mark, options = uri.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def display_path(path: Path) -> str:
    """Return what a user knows a place by: the URI of a local copy and of what lies in it, else the path as it is."""
    for folder in (path, *path.parents):
        if folder in _uris:
            return under(_uris[folder], path.relative_to(folder).as_posix()) if path != folder else _uris[folder]
    return uri_of(path) or str(path)


class Mirror:
    """A folder at a URI and its local copy."""

    def __init__(self, uri: str, local: Path, apart: Collection[str] = ()) -> None:
        """`apart`: names at the top of the folder that are not in the copy. Raises ConfigError for a URI that none serves."""
        self._system, self._root = place_of(uri, "the place")
        self._local, self._apart = local, frozenset(apart)
        self._marks: dict[str, tuple[int, int]] = {}
        """File -> its time and size when it was copied last."""

    def fetch(self) -> int:
        """Copy what lies at the URI, and return how many files that was. Raises OSError."""
        found = self._system.get_file_info(arrow_fs.FileSelector(self._root, allow_not_found=True, recursive=True))
        for info in found:
            name = info.path[len(self._root) + 1 :]
            if info.type == arrow_fs.FileType.File and self._is_copied(name):
                target = self._local / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._system.open_input_stream(info.path) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
                self._marks[name] = _mark(target)
        return len(self._marks)

    def push(self) -> int:
        """Copy what has changed here since, and return how many files that was; what is gone here goes there. Raises OSError."""
        here = {str(path.relative_to(self._local)): path for path in self._local.rglob("*") if path.is_file()}
        here = {name: path for name, path in sorted(here.items()) if self._is_copied(name)}
        pushed = 0
        for name, path in here.items():
            try:
                mark = _mark(path)
                data = path.read_bytes() if self._marks.get(name) != mark else None
            except FileNotFoundError:
                continue  # replaced or removed just now
            if data is not None:
                write_at(self._system, f"{self._root}/{name}", data)
                self._marks[name] = mark
                pushed += 1
        for name in self._marks.keys() - here.keys():
            self._system.delete_file(f"{self._root}/{name}")
            del self._marks[name]
        return pushed

    def _is_copied(self, name: str) -> bool:
        parts = name.split("/")
        return parts[0] not in self._apart and not any(part.startswith(".") for part in parts)


def _mark(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@contextmanager
def localized(
    options: _Options,
    say: Callable[[str], None],
    *,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    apart: Collection[str] = (),
    period_s: float = PERIOD_S,
) -> Iterator[_Options]:
    """Yield the options with a local copy in place of every URI in the fields named; those in `writes` are written back.

    What has changed is written back every `period_s`, and at the end. Raises ConfigError for a URI that cannot be read, or a
    folder to read that is not there; DmoaError where the last writing back fails, with the place of the local copy, which is
    kept then.
    """
    with ExitStack() as stack:
        changes: dict[str, Any] = {}
        for name in (*reads, *writes):
            value = getattr(options, name)
            places = value if isinstance(value, tuple) else (value,)
            if any(place is not None and uri_of(place) for place in places):
                copy = partial(local_copy, field=name, say=say, is_written=name in writes, apart=apart, period_s=period_s)
                local = tuple(stack.enter_context(copy(place)) for place in places)
                changes[name] = local if isinstance(value, tuple) else local[0]
        yield options.model_copy(update=changes)


@contextmanager
def local_copy(
    place: Path,
    field: str,
    *,
    say: Callable[[str], None] = lambda text: None,
    is_written: bool = False,
    apart: Collection[str] = (),
    period_s: float = PERIOD_S,
) -> Iterator[Path]:
    """Yield a local copy of a folder at a URI, or the folder itself; as `localized`, which asks for one that is written back."""
    uri = uri_of(place)
    if uri is None:
        yield place
        return
    local = Path(tempfile.mkdtemp(prefix="dmoa-")) / Path(uri.partition("?")[0]).name
    local.mkdir()
    try:
        mirror = Mirror(uri, local, apart)
        found = mirror.fetch()
    except (*_FAILURES, ConfigError) as error:
        shutil.rmtree(local.parent)
        raise ConfigError(f"{field}: cannot read {uri!r}: {' '.join(str(error).split())[:300]}") from error
    if not found and not is_written:
        shutil.rmtree(local.parent)
        raise ConfigError(f"{field} is {uri!r}; nothing lies there; name a folder that an earlier run wrote")
    _uris[local] = uri.rstrip("/")
    if is_written:
        say(f"{uri} holds {found} files; it is kept in step with {local}")
        with _kept_in_step(mirror, uri, local, period_s):
            yield local
        return
    try:
        yield local
    finally:
        shutil.rmtree(local.parent, ignore_errors=True)


@contextmanager
def _kept_in_step(mirror: Mirror, uri: str, local: Path, period_s: float) -> Iterator[None]:
    """Write back now and then, and at the end whatever happened. Raises DmoaError where that last one fails."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(period_s):
            try:
                mirror.push()
            except _FAILURES as error:
                _log.warning("cannot write %s: %s; it is tried again", uri, error)

    keeper = threading.Thread(target=keep, name="dmoa-mirror", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        try:
            mirror.push()
        except _FAILURES as error:
            raise DmoaError(f"cannot write {uri!r}: {error}; what was made lies in {str(local)!r}: copy it there") from error
        shutil.rmtree(local.parent, ignore_errors=True)
