"""Starts a sandbox: pipes, scratch folder, throw-away uid, and the job that the `guard` inside is given."""

from __future__ import annotations

import contextlib
import marshal
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any, Literal

from dmoa.sandbox import host
from dmoa.sandbox.guard import CANDIDATE_GONE

Level = Literal["namespaces", "seccomp", "weak", "none"]
_GIVE_UP_AFTER_S = 5.0
_TOKEN_BYTES = 32
_LIBRARY_BYTES = 8 << 30  # address space for the read-only maps of libraries; GPU builds of torch map several GiB
_STACK_BYTES = 8 << 20
_MOST_FILES, _FEWEST_FILES = 256, 64
_SOCKET_BYTES = "/proc/sys/net/core/wmem_default"
"""What the kernel buffers for a socket: no process is charged with it, so that the number of descriptors has to bound it."""
_BOOTSTRAP = "import marshal,os,sys;j=marshal.load(os.fdopen({fd},'rb'));w={{'__name__':'guard'}};exec(j['guard'],w);w['main'](j)"


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What a program may use."""

    wall_s: float = 10.0
    """Time from start to end."""
    cpu_s: int = 10
    """CPU time of each process."""
    memory_bytes: int = 2 << 30
    """Private memory of each process, and of all together."""
    processes: int = 32
    """Processes and threads."""
    output_bytes: int = 64 << 10
    """Each of standard output and error; the program is stopped when it writes more."""
    file_bytes: int = 64 << 20
    """Size of one file."""
    scratch_bytes: int = 128 << 20
    """All files together; at most one file in 8 KiB."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"SandboxLimits.{name} is {getattr(self, name)}, must be above 0; give a positive number")


class Pipes:
    """The pipes of one run: the program's ends are handed over, ours stay; all close with the stack."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._theirs: list[int] = []
        self._stack = stack
        self.stdout, self.theirs_out = self._pipe()
        self.stderr, self.theirs_err = self._pipe()
        self.report, report = self._pipe()
        self.claim, claim = self._pipe()
        token_read, token_write = os.pipe()
        self._theirs.append(token_read)
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        os.write(token_write, self.token)
        os.close(token_write)
        self.ends = {"report_fd": report, "claim_fd": claim, "token_fd": token_read}
        stack.callback(self.close_theirs)

    def _pipe(self) -> tuple[int, int]:
        ours, theirs = os.pipe()
        self._stack.callback(os.close, ours)
        self._theirs.append(theirs)
        return ours, theirs

    def close_theirs(self) -> None:
        """Close the program's ends on our side, so that its end shows."""
        while self._theirs:
            os.close(self._theirs.pop())


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A sandbox that runs."""

    process: subprocess.Popen[bytes]
    scratch: str | None
    """Scratch folder of the host; None: a tmpfs inside the namespaces."""
    pipes: Pipes


def start(job: dict[str, Any], stdin: str, limits: SandboxLimits, at: Level, stack: contextlib.ExitStack) -> Started:
    """Start a job (`source`, `checker`, `names`, ...); what it needs is freed with the stack. Raises OSError.

    A checker apart (`names` is not None) goes through a descriptor of its own: it is never in the candidate's memory.
    """
    uid = _throw_away_uid() if os.geteuid() == 0 else None
    scratch = host.SCRATCH if at == "namespaces" else _scratch(uid, stack)
    pipes = Pipes(stack)
    more: dict[str, Any] = {}
    if job["names"] is not None:
        more = {"checker": None, "checker_fd": _memory_file(job["checker"].encode("utf-8", "surrogatepass"), stack)}
    settings = _settings(limits, at, scratch, uid, is_apart=bool(more))
    payload = _memory_file(marshal.dumps(job | settings | pipes.ends | more), stack)
    typed = _memory_file(stdin.encode("utf-8", "surrogatepass"), stack)
    environment = _environment(scratch)
    python = [os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", "-c", _BOOTSTRAP.format(fd=payload)]
    prefix = host.bubblewrap_command(limits.scratch_bytes, environment) if at == "namespaces" else []
    process = subprocess.Popen(  # noqa: S603 a fixed command; the program goes through a descriptor
        [*prefix, *python],
        stdin=typed,
        stdout=pipes.theirs_out,
        stderr=pipes.theirs_err,
        pass_fds=(payload, *pipes.ends.values(), *([more["checker_fd"]] if more else [])),
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    pipes.close_theirs()
    return Started(process=process, scratch=None if at == "namespaces" else scratch, pipes=pipes)


def _memory_file(content: bytes, stack: contextlib.ExitStack) -> int:
    """Return a read-only descriptor of a file that exists in memory alone."""
    written = os.memfd_create("program", os.MFD_CLOEXEC)
    try:
        os.fchmod(written, 0o444)  # nobody writes it through /proc/self/fd
        with open(written, "wb", closefd=False) as file:
            file.write(content)
        fd = os.open(f"/proc/self/fd/{written}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(written)
    stack.callback(os.close, fd)
    return fd


@cache
def _code(name: str) -> CodeType:
    """Return the compiled module that is sent into the sandbox."""
    path = Path(__file__).with_name(f"{name}.py")
    return compile(path.read_text(encoding="utf-8"), f"<dmoa {name}>", "exec", dont_inherit=True)


def _environment(scratch: str) -> dict[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": scratch,
        "TMPDIR": scratch,
        "MPLCONFIGDIR": scratch,
        "USER": "sandbox",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "PYTHONNOUSERSITE": "1",
        "MPLBACKEND": "Agg",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    }


def _settings(limits: SandboxLimits, at: Level, scratch: str, uid: int | None, *, is_apart: bool) -> dict[str, Any]:
    """Return what the guard applies, beside the program itself."""
    has_namespaces = at == "namespaces"
    memory = limits.memory_bytes
    files = _open_files(memory, limits.processes if has_namespaces else 1)
    rlimits = {
        "RLIMIT_CPU": (limits.cpu_s, limits.cpu_s + 1),
        "RLIMIT_DATA": (memory, memory),
        "RLIMIT_AS": (memory + _LIBRARY_BYTES, memory + _LIBRARY_BYTES),
        "RLIMIT_FSIZE": (limits.file_bytes, limits.file_bytes),
        "RLIMIT_NOFILE": (files, files),
        "RLIMIT_STACK": (_STACK_BYTES, _STACK_BYTES),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
        "RLIMIT_MEMLOCK": (1 << 16, 1 << 16),
    }
    if has_namespaces or uid is not None:  # elsewhere the limit would count all processes of the caller's user
        count = limits.processes + (uid is None) + is_apart
        rlimits["RLIMIT_NPROC"] = (count, count)
    return {
        "guard": _code("guard"),
        "proof": _code("verdict"),
        "gone": CANDIDATE_GONE,
        "rlimits": rlimits,
        "uid": uid,
        "scratch": scratch,
        "packages": list(host.package_folders()),
        "executable": host.interpreter(),
        "trusted": host.trusted_code(),
        "filter": host.syscall_filter(has_namespaces=has_namespaces),
        "landlock": None if has_namespaces else host.landlock_rules(),
        "is_strict": at != "weak",
        "is_interpreter_hidden": not has_namespaces and uid is not None and host.is_interpreter_hidden(),
        "give_up_s": limits.wall_s + _GIVE_UP_AFTER_S,
    }


@cache
def _open_files(memory_bytes: int, processes: int) -> int:
    """Return how many descriptors a process may have, so that full socket buffers of all stay below the memory limit."""
    try:
        buffer_bytes = int(Path(_SOCKET_BYTES).read_text(encoding="ascii"))
    except (OSError, ValueError):
        buffer_bytes = 212992  # the kernel's own default
    most = memory_bytes // (2 * processes * buffer_bytes)  # with the kernel's own headers, twice
    return max(_FEWEST_FILES, min(_MOST_FILES, most))


def _throw_away_uid() -> int:
    """Return an even uid that nobody has, in the range that this user namespace knows; the next one is the guard's."""
    known = max(int(line.split()[0]) + int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines())
    first, count = (2_000_000_000, 500_000) if known > 2_001_000_000 else (61_184, 2_000)
    return first + 2 * secrets.randbelow(count)


def _scratch(uid: int | None, stack: contextlib.ExitStack) -> str:
    """Make a scratch folder of the host, removed with the stack whatever a program did to it."""
    path = os.path.realpath(tempfile.mkdtemp(prefix="dmoa-sandbox-"))
    stack.callback(_remove, path)
    if uid is not None:
        os.chown(path, uid, uid)
    return path


def _remove(path: str) -> None:
    """Remove a folder however deep and closed it is; Python's own functions end at some depth. Raises OSError."""
    with contextlib.suppress(OSError):
        Path(path).rmdir()
        return
    for command in (["chmod", "-R", "u+rwx", path], ["rm", "-rf", "--one-file-system", path]):
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 fixed commands on our own folder
    if done.returncode != 0:
        raise OSError(f"the scratch folder {path} cannot be removed: {done.stderr.decode(errors='replace')[:200]}")
