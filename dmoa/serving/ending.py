"""Ends a command that serves on SIGTERM or SIGINT, whatever its Ray is doing at that moment: soon, and without noise.

A signal may reach Ray's processes as well: `timeout` sends it to the process group, systemd to every process of the service.
Ray of a terminal's group is started in groups of its own; where it dies nevertheless, nothing is left to wait for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import psutil

STOP_LIMIT_S = 8.0
"""How long a server that is stopped may take; what is left of its Ray is killed then."""
FAILED = 1
KILL_LIMIT_S = 2.0
"""How long the processes below this one are looked for and killed."""
_PR_SET_CHILD_SUBREAPER = 36
_SAME_S = 1.0
"""Within it a second signal is the first one once more: `timeout` sends it to its child and then to the group."""
_PAUSE_S = 0.05
_CORE = ("gcs_server", "raylet")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_in_own_group = False
# Python's own calls for the handlers in C: `signal.signal` is for the main thread alone, which is in Ray at that time.
_GET_HANDLER, _SET_HANDLER = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
_GET_HANDLER.argtypes, _GET_HANDLER.restype = (ctypes.c_int,), ctypes.c_void_p
_SET_HANDLER.argtypes, _SET_HANDLER.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p


class Ending:
    """While it is open, a signal ends the process: at once until `ready`, and then as KeyboardInterrupt, within a limit.

    Use it as a context manager in the main thread. The signals are heard by a thread, because the main one may be in Ray's
    C++, where Python's handlers do not run and an exception aborts the process.
    """

    def __init__(self, say: Callable[[str], None], limit_s: float = STOP_LIMIT_S) -> None:
        """`say` tells a person; `limit_s`: how long the command may take to end once it is ready."""
        self._say = say
        self._limit_s = limit_s
        self._is_ready = False
        self._status = 0
        self._core: list[psutil.Process] = []
        self._is_interrupted = False
        self._leaving = threading.Lock()

    def __enter__(self) -> Ending:
        _adopt_orphans(True)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._before = self._listen()
        threading.Thread(target=self._watch, name="dmoa-signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writer.close()  # ends the thread
        _adopt_orphans(False)

    def ready(self, status: int = 0) -> None:
        """Say that the server answers: a signal lets it finish its queries; `status`: the exit status where it is cut short."""
        self._status = status
        self._core = [child for child in psutil.Process().children() if child.name() in _CORE]
        self._listen()  # again: `ray.init` sets a handler of its own
        _adopt_orphans(False)  # while it serves, nobody here would reap them
        self._is_ready = True

    def leave(self, status: int) -> NoReturn:
        """End this process and those that it started, without a word from any of them."""
        self._leaving.acquire()  # the other thread, if it comes here too, waits for the end
        sys.stdout.flush()
        _mute()
        _adopt_orphans(True)
        # Again until none is left: what is killed may have started another one meanwhile, as Ray's node manager its agents.
        until = time.monotonic() + KILL_LIMIT_S
        while time.monotonic() < until:
            left = [child for child in psutil.Process().children(recursive=True) if not _is_dead(child)]
            if not left:
                break
            for child in left:
                with contextlib.suppress(psutil.Error):
                    child.kill()
            time.sleep(_PAUSE_S / 5)
        os._exit(status)

    def _listen(self) -> int:
        """Take the signals, also a SIGINT that a shell has ignored; return the file descriptor that was told of them before."""
        for number in _SIGNALS:
            signal.signal(number, self._interrupt)
        return signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def _interrupt(self, number: int, frame: object) -> None:
        if self._is_ready and not self._is_interrupted:
            self._is_interrupted = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        own: dict[int, int | None] = {number: _GET_HANDLER(number) for number in _SIGNALS}
        self._reader.settimeout(_PAUSE_S)
        while True:
            try:
                heard = self._reader.recv(1)
            except TimeoutError:
                if not self._is_ready:
                    _reinstall(own)
                continue
            if not heard:
                break
            if heard[0] in _SIGNALS:
                self._end()
        self._reader.close()

    def _end(self) -> None:
        """End the process after a first signal: in time, or as soon as its Ray is gone, or at another signal."""
        if not self._is_ready:
            self._say("interrupted before it was ready")
            self.leave(FAILED)
        _mute()  # Ray's C++ writes of every process that it loses
        started = time.monotonic()
        while time.monotonic() < started + self._limit_s and not any(map(_is_dead, self._core)):
            try:
                heard = self._reader.recv(1)
            except TimeoutError:
                continue
            if not heard:
                return  # the command has ended
            if heard[0] in _SIGNALS and time.monotonic() > started + _SAME_S:
                break
        self.leave(self._status)


def _reinstall(handlers: Mapping[int, int | None]) -> None:
    """Put Python's handlers back where `ray.init` has put one of C++ in their place, which prints its stack first."""
    for number, handler in handlers.items():
        if _GET_HANDLER(number) != handler:
            _SET_HANDLER(number, handler)


def _adopt_orphans(is_on: bool) -> None:
    """Be the parent of what the processes below this one leave behind when they die, or no longer; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(is_on), 0, 0, 0)


def _is_dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _mute() -> None:
    """Send what is written to the file of standard error into nothing, but for what Python prints from now on."""
    sys.stderr.flush()
    try:
        kept = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
    except OSError:
        return  # closed
    sys.stderr = kept


@contextlib.contextmanager
def own_process_groups() -> Iterator[None]:
    """Let every process that is forked meanwhile lead a group of its own: a signal to this one's group does not reach it."""
    global _in_own_group
    _in_own_group = True
    try:
        yield
    finally:
        _in_own_group = False


def _lead() -> None:
    if _in_own_group:
        os.setpgid(0, 0)


# Ray has no option for it, and after its exec a child cannot be moved. subprocess calls this where Ray gives it a preexec_fn.
os.register_at_fork(after_in_child=_lead)
