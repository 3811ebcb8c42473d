"""Opens and reads what others wrote: regular files alone, and as many bytes, lines and JSON values as a file of its kind has.

Every reader of files begins here, because a pipe, a device, a line without end or a megabyte of `[[],[],...` would stall or fill
the process that reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import select
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr

from dmoa.errors import ConfigError
from dmoa.validation import is_finite

MAX_BYTES = 4 << 20
"""Of a file of settings: a pool of a thousand agents is a tenth of it, and PyYAML takes seconds for as much."""
MAX_LINE_BYTES = 64 << 20
"""Longest line that is read: a reply with twenty log-probabilities for each of its tokens is well below."""
MAX_OWN_BYTES = 1 << 30
"""Longest line of what dmoa wrote: all replies of a query."""
MAX_PARTS = 2_000_000
"""Lists and objects of one JSON text; as many as log-probabilities of a reply of 45,000 tokens. Empty ones take two bytes each
in the text, and some hundred in memory."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""What some editors begin a file with."""
_PIPE_S = 10.0
"""How long a pipe may take to deliver a file."""
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""A text within JSON, also one without an end."""


def regular(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file for `open(..., opener=regular)`. Raises OSError for what could be waited for without end: a pipe, a device.

    A pipe without a name, as shells make of `<(command)`, is somebody's file and is let through.
    """
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    is_of_a_shell = stat.S_ISFIFO(mode) and str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("pipe:")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or is_of_a_shell):
        os.close(fd)
        raise OSError(f"{os.fspath(path)!r} is no regular file")
    os.set_blocking(fd, True)
    return fd


def read_bounded(path: Path, *, most: int = MAX_BYTES, pipe_s: float = _PIPE_S) -> bytes:
    """Return the bytes of a file. Raises OSError, also for one of too many bytes or parts, no file, or a silent pipe."""
    deadline, found = time.monotonic() + pipe_s, bytearray()
    with open(path, "rb", buffering=0, opener=regular) as file:
        is_pipe = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
        while True:
            if is_pipe and not select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise OSError(f"it is a pipe, and did not end within {pipe_s:g} s")
            piece = file.read(1 << 20)
            found += piece
            check_bytes(found, most)
            if not piece:
                if problem := _too_many_parts(found):
                    raise OSError(f"it holds {problem}")
                return bytes(found)


def check_bytes(found: bytes | bytearray, most: int = MAX_BYTES) -> None:
    """Raise OSError for more bytes than a file of its kind has."""
    if len(found) > most:
        raise OSError(f"it is larger than {most >> 20} MiB, which no file of its kind is")


def home_path(text: str) -> Path:
    """Return a path with the home folder in place of `~`; as it is written where no such folder is known."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # an unknown user, or one without a home: a path that is not there, like any other
        return Path(text)


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as hex. Raises OSError."""
    with open(path, "rb", opener=regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines_of(file: IO[AnyStr], path: str | Path, most: int = MAX_LINE_BYTES) -> Iterator[AnyStr]:
    """Yield the lines of a file. Raises ConfigError for one longer than `most`, which may be endless, or of too many parts."""
    for number, line in enumerate(iter(lambda: file.readline(most + 1), file.read(0)), 1):
        if problem := f"longer than {most >> 20} MiB; is it JSON Lines?" if len(line) > most else _too_many_parts(line):
            raise ConfigError(f"{path}, line {number}: {problem}")
        yield line


def offsets(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield where each whole line of a file begins, and the line; nothing where there is no file. Raises ConfigError."""
    if not path.exists():
        return
    position = 0
    try:
        with open(path, "rb", opener=regular) as file:
            for line in lines_of(file, path, MAX_OWN_BYTES):
                if line.endswith(b"\n"):
                    yield position, line
                position += len(line)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}; copy it again, or use another folder") from error


def num_parts(data: bytes | bytearray | str, signs: str, most: int) -> int:
    """Return how many objects (`{`) or lists (`[`) JSON holds; exact where it is more than `most`.

    Counted before JSON is read, because an object of some bytes takes up to a hundred times as much once it is.
    """
    if len(data) <= most:
        return 0
    raw, marks = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data, [sign.encode() for sign in signs]
    count = sum(map(raw.count, marks))
    return sum(map(without_texts(raw).count, marks)) if count > most else count


def without_texts(data: bytes | bytearray) -> bytes:
    """Return JSON without its texts, so that its signs can be counted."""
    return _TEXT.sub(b"", data)


def _too_many_parts(data: bytes | bytearray | str) -> str:
    count = num_parts(data, "[{", MAX_PARTS)
    return f"{count} JSON lists and objects; expected at most {MAX_PARTS}" if count > MAX_PARTS else ""


def read_json(data: bytes | str, *, nan_is_null: bool = False) -> Any:
    """Return what JSON holds. Raises ValueError, also for what is nested too deeply, and for more than `MAX_PARTS`.

    A number that no float holds is refused too; with `nan_is_null` it becomes null.
    """
    if problem := _too_many_parts(data):
        raise ValueError(problem)
    number = _number_or_none if nan_is_null else _number
    try:
        return json.loads(data, parse_constant=number, parse_float=number)
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply ({error})") from None


def _number(text: str) -> float:
    if not is_finite(value := float(text)):
        raise ValueError(f"{text[:80]} is not JSON; expected a finite number")
    return value


def _number_or_none(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None
