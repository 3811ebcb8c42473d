"""A child process of a bench, `python -m MODULE`: spoken to in lines of JSON, and ended with all that it has started."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, Self, TextIO

import psutil

from dmoa.errors import DmoaError

_SPOKEN_STDERR = 4000


class Child:
    """The parent's side; use it as a context manager. It starts at once, so that several start side by side."""

    def __init__(self, module: str, *args: str, env: Mapping[str, str], stop_timeout_s: float, python: str | None = None) -> None:
        """`stop_timeout_s`: how long it may take to end by itself. `python`: another one, and `module` the path of a file."""
        self._stop_timeout_s = stop_timeout_s
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115 -- closed when the child ends
            mode="w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *args] if python is None else [python, module, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=dict(env),
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def say(self, message: object) -> None:
        """Send a line."""
        print(json.dumps(message), file=self._input, flush=True)

    def hear(self) -> Any:
        """Return the next line that it answers. Raises DmoaError with its last words if it ends instead."""
        line = self._output.readline()
        if not line:
            self._errors.seek(0)
            raise DmoaError(f"bench: a process of the bench ended too early: {self._errors.read()[-_SPOKEN_STDERR:]}")
        return json.loads(line)

    def processes(self) -> list[psutil.Process]:
        """Return the child and what it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def suspend(self) -> None:
        """Freeze all its processes, for as long as another server is measured; a minute would be too long for a Ray."""
        for process in reversed(self.processes()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        """Undo `suspend`."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def stop(self) -> None:
        """End its input, which is the word to stop, and make sure that no process of its is left."""
        processes = self.processes()  # before it ends: those that outlive it are no children of it then
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._stop_timeout_s)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._output.close()
        self._errors.close()


def to_parent() -> TextIO:
    """Return the child's stream of answers to its parent, by lines; all else that is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers
