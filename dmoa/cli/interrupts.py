"""Ends a command on Ctrl-C and SIGTERM with one line that says how to go on: status 130 and 143, as shells have it.

A signal is a KeyboardInterrupt wherever the command is, so that what was begun is closed: files, writers, Ray.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from dmoa.cli.terminal import tell

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
    """Run a command, and end it with one line where a signal comes."""
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
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _close(interrupt: KeyboardInterrupt) -> NoReturn:
    is_sigterm = isinstance(interrupt, Terminated)
    notes = getattr(interrupt, "__notes__", [])
    tell("; ".join([f"dmoa: {'terminated' if is_sigterm else 'interrupted'}", *notes[-1:]]))
    raise typer.Exit(_EXIT_BY_SIGNAL + (signal.SIGTERM if is_sigterm else signal.SIGINT))
