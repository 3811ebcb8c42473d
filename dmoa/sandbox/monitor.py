"""Watches a sandboxed program from outside: reads its pipes, adds up what it uses, and ends it at its limits.

The counterpart of `guard` in the caller's process; `sandbox` turns the `Ending` into a result.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dmoa.sandbox.launch import SandboxLimits, Started

Stop = Literal["timeout", "memory", "output_limit", "scratch_limit"]
_TICK_S = 0.05
_DEATH_S = 10.0
_PIECE_BYTES = 1 << 16
_MAX_REPORT_BYTES = 1 << 14
_BYTES_PER_FILE = 8 << 10
_MAX_DEPTH = 50


@dataclass(slots=True, kw_only=True)
class Ending:
    """How it ended, as seen from outside."""

    stdout: bytes = b""
    stderr: bytes = b""
    report: bytes = b""
    claim: bytes = b""
    stop: Stop | None = None
    """Which limit ended it, None: it ended by itself."""
    reason: str = ""
    failure: str = ""
    """What went wrong with the sandbox itself."""


def watch(sandbox: Started, limits: SandboxLimits) -> Ending:
    """Wait until everything in the sandbox is gone, and return how it ended; whoever passes a limit is killed."""
    ending = Ending()
    pipes = sandbox.pipes
    texts = {fd: bytearray() for fd in (pipes.stdout, pipes.stderr, pipes.report, pipes.claim)}
    try:
        _read(sandbox, ending, texts, limits)
    finally:
        _kill(sandbox.process)
        try:
            sandbox.process.wait(_DEATH_S)
        except subprocess.TimeoutExpired:
            ending.failure = f"its processes were killed and still live after {_DEATH_S:g} s"
    ending.stdout, ending.stderr, ending.report, ending.claim = map(bytes, texts.values())
    if ending.stop == "timeout":
        ending.reason = f"it ran for more than {limits.wall_s:g} s"
    return ending


def _read(sandbox: Started, ending: Ending, texts: dict[int, bytearray], limits: SandboxLimits) -> None:
    """Read the pipes to their ends, looking at clock, memory and scratch in between."""
    pipes = sandbox.pipes
    outputs = (pipes.stdout, pipes.stderr)
    deadline = time.monotonic() + limits.wall_s
    with selectors.DefaultSelector() as selector:
        for fd in texts:
            selector.register(fd, selectors.EVENT_READ)
        next_look = time.monotonic() + _TICK_S
        while selector.get_map():
            for key, _ in selector.select(_TICK_S):
                text, most = texts[key.fd], limits.output_bytes if key.fd in outputs else _MAX_REPORT_BYTES
                piece = os.read(key.fd, _PIECE_BYTES)
                if not piece:
                    selector.unregister(key.fd)
                    if key.fd == pipes.report:
                        _kill(sandbox.process)  # whatever it left behind
                    continue
                text += piece[: most + 1 - len(text)]
                if len(text) > most and ending.stop is None and key.fd in outputs:
                    _stop(sandbox, ending, "output_limit", f"it wrote more than {most} bytes of output")
            now = time.monotonic()
            if ending.stop is None and now > deadline:
                _stop(sandbox, ending, "timeout", "")
            elif ending.stop is None and now > next_look:
                _look(sandbox, ending, limits)
                next_look = time.monotonic() + _TICK_S
            if now > deadline + _DEATH_S:
                ending.failure = f"its processes were killed and still live after {_DEATH_S:g} s"
                return


def _look(sandbox: Started, ending: Ending, limits: SandboxLimits) -> None:
    """Stop the sandbox if its processes hold too much memory, or its scratch folder too many or too large files."""
    pids = list(_tree(sandbox.process.pid))
    if _memory(pids, "status", ("RssAnon:", "RssShmem:")) > limits.memory_bytes and (
        len(pids) < 4 or _memory(pids, "smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")) > limits.memory_bytes
    ):
        _stop(sandbox, ending, "memory", f"its processes held more than {limits.memory_bytes >> 20} MiB")
        return
    most_files = max(16, limits.scratch_bytes // _BYTES_PER_FILE)
    if sandbox.scratch is not None:
        num_files, size = _folder_use(sandbox.scratch, most_files)
        size += _nameless(pids, Path(sandbox.scratch).stat().st_dev)
    else:
        num_files, size = _tmpfs_files(pids), 0
    if num_files > most_files or size > limits.scratch_bytes:
        _stop(sandbox, ending, "scratch_limit", f"its files passed {limits.scratch_bytes >> 20} MiB or {most_files} in number")


def _stop(sandbox: Started, ending: Ending, stop: Stop, reason: str) -> None:
    ending.stop, ending.reason = stop, reason
    _kill(sandbox.process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the sandbox: its first process, that one's children (the guard, whose end ends the rest), its group."""
    if process.returncode is not None:
        return
    guards = list(_children(process.pid))  # not yet waited for by their parent, so their numbers are theirs
    for pid in (process.pid, *guards):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for child in _children(pid):
        yield from _tree(child)


def _children(pid: int) -> Iterator[int]:
    """Yield the children of a process; none if it is gone."""
    with contextlib.suppress(OSError):
        for task in list(Path(f"/proc/{pid}/task").iterdir()):
            with contextlib.suppress(OSError):
                yield from map(int, (task / "children").read_text().split())


def _memory(pids: list[int], file: str, fields: tuple[str, ...]) -> int:
    """Return the sum of the named fields over processes, in bytes."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
                if line.startswith(fields):
                    total += int(line.split()[1]) << 10
    return total


def _folder_use(folder: str, most_files: int) -> tuple[int, int]:
    """Return the number of entries below a folder, up to just over `most_files`, and their bytes on disk."""
    num_files = size = 0
    open_folders = [(folder, 0)]
    while open_folders and num_files <= most_files:
        path, depth = open_folders.pop()
        if depth > _MAX_DEPTH:  # where paths grow too long to look
            return most_files + 1, size
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                num_files += 1
                size += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    open_folders.append((entry.path, depth + 1))
                if num_files > most_files:
                    break
    return num_files, size


def _nameless(pids: list[int], device: int) -> int:
    """Return the bytes on disk of open files of a file system that have no name (any more)."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in list(Path(f"/proc/{pid}/fd").iterdir()):
                with contextlib.suppress(OSError):
                    one = link.stat()
                    if one.st_nlink == 0 and one.st_dev == device:
                        found[one.st_ino] = one.st_blocks * 512
    return sum(found.values())


def _tmpfs_files(pids: list[int]) -> int:
    """Return the number of files in the private scratch, 0 where no process of the namespaces can be asked."""
    ours = Path("/tmp").stat().st_dev  # noqa: S108
    for pid in reversed(pids):
        scratch = Path("/proc", str(pid), "root", "tmp")
        with contextlib.suppress(OSError):
            if scratch.stat().st_dev != ours:  # the mounts may not have been made yet
                found = os.statvfs(scratch)
                return found.f_files - found.f_ffree
    return 0
