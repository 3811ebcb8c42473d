"""Runs inside the sandbox, before and beside the program: sets the limits, drops every privilege, watches it end.

Standard library only: `sandbox` sends this module's compiled code to a bare interpreter. `main` forks. The child gives
up its rights and runs the program in this same interpreter, which saves a second start; the parent, the guard, waits,
and says on a pipe that the program cannot reach how it ended. As process 1 of its own process namespace the guard is
beyond the program's signals, and everything dies with it.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import resource
import signal
import struct
import sys
import time
import types
from typing import Any, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_PR_SET_SECCOMP, _SECCOMP_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38
_CAPSET_NR = {"x86_64": 126, "aarch64": 91}
_CAP_VERSION_3, _CAP_DAC_READ_SEARCH = 0x20080522, 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
OWN_PID = 0x5EEDF1D0
"""Stands in a filter for the process id of the program, known only when it runs."""
CANDIDATE_GONE = 233
"""Exit status of a checker whose candidate ended."""
_LOOKS, _LOOK_S = 50, 0.01
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def main(job: dict[str, Any]) -> None:
    """Run one job: fork the program, wait for it, report `started`, then `ended STATUS CPU_S PEAK_KIB`, or `error TEXT`.

    With a checker apart there are two: the program's process, and the checker's, which decides.
    """
    _prctl(_PR_SET_DUMPABLE, 0)
    ready, tell = os.pipe()
    (asked, ask), (told, answer) = (os.pipe(), os.pipe()) if job["names"] is not None else ((-1, -1), (-1, -1))
    roles = {"candidate": (asked, answer), "judge": (ask, told)} if job["names"] is not None else {"program": ()}
    pids = {}
    for role, ends in roles.items():
        pids[role] = os.fork()
        if pids[role] == 0:
            os.close(ready)
            os.close(job["report_fd"])
            _become_the_program(job, tell, role, ends)
            return
    for fd in (tell, asked, ask, told, answer):
        if fd >= 0:
            os.close(fd)
    try:
        _supervise(job, pids, ready)
    except BaseException as error:
        os.write(job["report_fd"], f"error {error!r}\n".encode())
    os._exit(0)


def _supervise(job: dict[str, Any], pids: dict[str, int], ready: int) -> None:
    """Wait for the program, reaping whatever it leaves behind."""
    report: int = job["report_fd"]
    for fd in (0, 1, 2, job["claim_fd"], job["token_fd"], *([] if job["names"] is None else [job["checker_fd"]])):
        os.close(fd)
    if job["uid"] is not None:
        _drop_uid(job["uid"] + 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(3))  # process 1 must handle it: the default is to ignore it
    signal.setitimer(signal.ITIMER_REAL, job["give_up_s"])
    told = b""
    while piece := os.read(ready, 4096):
        told += piece
    if told != b"ok" * len(pids):
        told = told.replace(b"ok", b"")
        os.write(report, b"error " + (told or b"the program's process died while it was set up") + b"\n")
        return
    os.write(report, b"started\n")
    ended: dict[int, tuple[int, float]] = {}
    peak_kib, looks_left = 0, _LOOKS
    first, deciding = next(iter(pids.values())), list(pids.values())[-1]
    while deciding not in ended or (_is_gone(ended[deciding]) and first not in ended and looks_left):
        pid, status, usage = os.wait4(-1, os.WNOHANG if deciding in ended else 0)
        if pid == 0:  # it is about to end, or it closed what the checker reads and lives
            looks_left -= 1
            time.sleep(_LOOK_S)
        elif pid in pids.values():
            ended[pid] = status, usage.ru_utime + usage.ru_stime
            peak_kib = max(peak_kib, usage.ru_maxrss)
    status = ended[first if _is_gone(ended[deciding]) and first in ended else deciding][0]
    os.write(report, f"ended {status} {sum(cpu_s for _, cpu_s in ended.values()):.3f} {peak_kib}\n".encode())


def _is_gone(ended: tuple[int, float]) -> bool:
    """Tell whether a checker ended because its candidate had, so that the candidate's own end is what counts."""
    return os.waitstatus_to_exitcode(ended[0]) == CANDIDATE_GONE


def _become_the_program(job: dict[str, Any], tell: int, role: str, ends: tuple[int, ...]) -> None:
    """Give up every right, then run the program; what fails before it is told to the guard."""
    try:
        _give_up_rights(job)
        os.chdir(job["scratch"])
        if role != "judge":
            _write_files(job["files"])
        sys.argv = ["program.py", *job["argv"]]
        sys.executable = job["executable"]  # what it starts finds the packages too
        sys.path[:0] = [job["scratch"]]
        sys.path.extend(job["packages"])
        os.environ["PYTHONPATH"] = ":".join(job["packages"])  # for what it starts
        _add_quitters()
    except BaseException as error:
        os.write(tell, f"{type(error).__name__}: {error}".encode()[:2000])
        os._exit(1)
    keep = {0, 1, 2, tell, *ends}
    if role == "judge":
        keep |= {job["claim_fd"], job["token_fd"], job["checker_fd"]}
    elif job["checker"] is not None:
        keep |= {job["claim_fd"], job["token_fd"]}
    low = 0
    for fd in [*sorted(keep), 65536]:
        if low < fd:  # Python 3.11 closes everything for (0, 0)
            os.closerange(low, fd)
        low = fd + 1
    os.write(tell, b"ok")
    os.close(tell)
    if role == "program" and job["checker"] is None:
        run_plain(job["source"])
        return
    proof: dict[str, Any] = {"__name__": "dmoa.proof"}
    exec(job["proof"], proof)  # noqa: S102 our own module, compiled by the parent
    if role == "program":
        proof["run_checked"](job)
    elif role == "candidate":
        proof["serve_candidate"](job, *ends)
    else:
        proof["judge_apart"](job, *ends)


def _give_up_rights(job: dict[str, Any]) -> None:
    is_strict: bool = job["is_strict"]
    rules = None
    if job["landlock"] is not None:
        try:
            rules = _landlock_rules(job["landlock"], job["scratch"])
        except OSError:
            if is_strict:
                raise
    _set_limits(job["rlimits"])
    if job["uid"] is not None:
        if job["is_interpreter_hidden"] and rules is None:
            raise OSError("the interpreter lies in a folder that only root may enter; install Python and the packages elsewhere")
        _drop_uid(job["uid"], keeps_reading=job["is_interpreter_hidden"])
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if rules is not None:
        _syscall(_LANDLOCK_RESTRICT, rules, 0)
        os.close(rules)
    try:
        _install_filter(job["filter"])
    except OSError:
        if is_strict:
            raise


def _set_limits(limits: dict[str, tuple[int, int]]) -> None:
    for name, (soft, hard) in limits.items():
        number = getattr(resource, name, None)
        if number is None:
            continue
        ceiling = resource.getrlimit(number)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(number, (soft, hard))


def _drop_uid(uid: int, *, keeps_reading: bool = False) -> None:
    """Become an unprivileged user for good; `keeps_reading`: may pass folders closed to others (Landlock bounds where)."""
    if keeps_reading:
        _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if keeps_reading or os.uname().machine in _CAPSET_NR:  # the inheritable ones outlive the change of user
        header = ctypes.create_string_buffer(struct.pack("Ii", _CAP_VERSION_3, 0))
        bit = int(keeps_reading) << _CAP_DAC_READ_SEARCH
        data = ctypes.create_string_buffer(struct.pack("6I", bit, bit, 0, 0, 0, 0))
        _syscall(_CAPSET_NR[os.uname().machine], header, data)


def _landlock_rules(rules: list[tuple[str, int]], scratch: str) -> int:
    """Return a Landlock ruleset that grants the listed access bits under the listed paths, all of them in scratch."""
    version = _syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 3:
        raise OSError("this kernel's Landlock cannot forbid truncating files; Linux 6.2 or later can")
    fs = (1 << 15) - 1  # third version: execute .. make symlink, refer, truncate
    if version >= 5:
        fs |= 1 << 15  # ioctl on devices
    net = 3 if version >= 4 else 0
    scoped = 3 if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = ctypes.create_string_buffer(struct.pack("QQQ", fs, net, scoped)[:size], size)
    ruleset = _syscall(_LANDLOCK_CREATE, attributes, size, 0)
    no_nodes = ~((1 << 6) | (1 << 9) | (1 << 11) | (1 << 15))  # no devices, no sockets, no device control
    for path, bits in [*rules, (scratch, fs & no_nodes)]:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rule = ctypes.create_string_buffer(struct.pack("=Qi", bits & fs, fd))
        _syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(fd)
    return ruleset


def _install_filter(program: bytes) -> None:
    """Install a seccomp filter. Raises OSError."""
    if not program:
        raise OSError("no system call filter is known for this processor")
    code = ctypes.create_string_buffer(program.replace(struct.pack("=I", OWN_PID), struct.pack("=I", os.getpid())))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.addressof(filter_))


def _write_files(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        folder = os.path.dirname(name)  # noqa: PTH120 pathlib would cost a third of the start
        if folder:
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103 see above
        with open(name, "wb") as file:  # noqa: PTH123 see above
            file.write(content)


def _add_quitters() -> None:
    """Give programs `exit` and `quit`, which `site` makes in a usual start."""
    from _sitebuiltins import Quitter

    for name in ("exit", "quit"):
        setattr(builtins, name, Quitter(name, "Ctrl-D (i.e. EOF)"))


def run_plain(source: str) -> None:
    """Run a program as `python program.py` would; the interpreter then ends as usual."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)  # noqa: S102 what we are for
    except SystemExit:
        raise
    except BaseException as error:
        fail(error, {"program.py": source})


def fail(error: BaseException, sources: dict[str, str]) -> NoReturn:
    """Print the traceback of a program's error without our own frames, and end with status 1."""
    import linecache
    import traceback

    for name, source in sources.items():
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename not in sources:
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)
    sys.exit(1)


def _prctl(option: int, value: int, more: int = 0) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(more), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def _syscall(number: int, *arguments: Any) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"system call {number}: {os.strerror(code)}")
    return result
