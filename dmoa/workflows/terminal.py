"""What a command writes to the terminal, and how signals end it: its own words apart from those of libraries."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import typer

from dmoa.errors import DISK_ERRORS, DmoaError

_STDERR = 2
_own: TextIO | None = None
"""Where the program's own words go while stderr is the log."""
_log: TextIO | None = None
"""The stream that stands for stderr. One for the process: handlers of Python's logging keep it beyond the command."""


def stderr() -> TextIO:
    """Return where progress, notes and errors go: the terminal, or what the caller put in its place."""
    return _own or sys.stderr


def terminal_descriptor() -> int | None:
    """Return the file descriptor of `stderr`, for a child whose words are the user's too; None where it has none."""
    return _descriptor(stderr())


def tell(text: str, *, nl: bool = True) -> None:
    """Write the program's own words to stderr."""
    typer.echo(text, file=stderr(), nl=nl)


def warn(text: str) -> None:
    """Write what must not be overlooked: as `tell`, in red where that is a terminal, also when quiet."""
    tell(typer.style(f"dmoa: {text}", fg=typer.colors.RED))


@contextmanager
def libraries_apart(command: str, *, verbosity: int) -> Iterator[None]:
    """Send what libraries write to a log file, which is named at the end: if it holds anything, and unless quiet.

    A command that fails names it in any case. With `verbosity` above 0 all of it goes to the terminal instead.
    """
    global _own
    if verbosity > 0 or _own is not None:
        yield
        return
    # Read when Ray is imported: what it holds back to count repeats would come out at the end, in this thread.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    results, before, descriptor = sys.stdout, sys.stderr, os.dup(_STDERR)
    is_terminal = _descriptor(before) == _STDERR
    path = _open_log(command)
    _own = os.fdopen(os.dup(descriptor), "w", encoding=before.encoding, errors="replace", buffering=1) if is_terminal else before
    assert _log is not None
    sys.stdout = cast(TextIO, _OfThisThread(results, _log))
    has_failed = True
    try:
        yield
        has_failed = False
    except typer.Exit as ended:
        has_failed = ended.exit_code != 0
        raise
    finally:
        sys.stdout = results
        own, _own = _own, None
        _close_log(before, descriptor)
        _name_log(path, own, is_named=has_failed or verbosity >= 0)
        if is_terminal:
            own.close()


@contextmanager
def on_terminal() -> Iterator[None]:
    """Show what is printed to stderr in this block, as where nothing is set apart."""
    before, sys.stderr = sys.stderr, stderr()
    try:
        yield
    finally:
        sys.stderr = before


class _OfThisThread:
    """A stream to which the thread that made it writes; what others write goes to another one."""

    def __init__(self, own: TextIO, others: TextIO) -> None:
        self._own, self._others, self._thread = own, others, threading.get_ident()

    def write(self, text: str) -> int:
        """Write a text."""
        return (self._own if threading.get_ident() == self._thread else self._others).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None  # a buffer of a test, or closed


def _open_log(command: str) -> Path:
    """Make a log file and put it in the place of stderr."""
    global _log
    descriptor, name = tempfile.mkstemp(prefix=f"dmoa-{command}-", suffix=".log")
    if _log is None:
        _log = open(os.dup(descriptor), "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os.dup2(descriptor, _log.fileno())
    os.dup2(descriptor, _STDERR)
    os.close(descriptor)
    sys.stderr = _log
    return Path(name)


def _close_log(before: TextIO, descriptor: int) -> None:
    """Put stderr back in its place."""
    sys.stderr.flush()
    sys.stderr = before
    os.dup2(descriptor, _STDERR)
    os.close(descriptor)


def _name_log(path: Path, own: TextIO, *, is_named: bool) -> None:
    """Say where the log is, or remove an empty one."""
    with suppress(OSError):
        if not path.stat().st_size:
            path.unlink()
        elif is_named:
            typer.echo(f"dmoa: what Ray and other libraries wrote: {path}", file=own)


_EXIT_BY_SIGNAL = 128
"""Added to the signal's number."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def never_join_by_accident() -> None:
    """Keep Ray from joining a Ray of the host by itself, as a call does that comes after the end; before Ray is imported."""
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"


def end_on_sigterm() -> None:
    """Let SIGTERM end the command; called again after Ray has started, which sets a handler of its own."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


@contextmanager
def goes_on(how: str) -> Iterator[None]:
    """Say, where a signal ends this block, how to go on. Of blocks in each other the outer one says it."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(how)
        raise


def closed(invoke: Callable[[], Any]) -> Any:
    """Run a command, and end it with one line where a signal comes. Raises DmoaError where a disk takes nothing more."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if is_main else None
    end_on_sigterm()
    try:
        return invoke()
    except KeyboardInterrupt as interrupt:
        _close(interrupt)
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise
        _close(Terminated())  # Ray's own handler, which holds while it starts
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = "" if error.filename is None else f" {str(error.filename)!r}"
        raise DmoaError(
            f"cannot write{where}: {os.strerror(error.errno)}; make room or name another place, and run the same command again"
        ) from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _close(interrupt: KeyboardInterrupt) -> NoReturn:
    is_sigterm = isinstance(interrupt, Terminated)
    notes = getattr(interrupt, "__notes__", [])
    tell("; ".join([f"dmoa: {'terminated' if is_sigterm else 'interrupted'}", *notes[-1:]]))
    raise typer.Exit(_EXIT_BY_SIGNAL + (signal.SIGTERM if is_sigterm else signal.SIGINT))
