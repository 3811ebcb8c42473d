# ruff: noqa: E501 programs in strings
"""Programs that attack the sandbox, each a test of its own, at every level this host has.

An attack prints ESCAPED where it got through. Those that may run outside without harm do so too, as this process: there
they must get through, or the test of the sandbox would prove nothing. All are bounded, in case the sandbox fails.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from dmoa.sandbox import Program, SandboxResult, probe_levels, run
from dmoa.sandbox.launch import Level, SandboxLimits
from tests.contract import sandbox_programs as more

SECRET = "s3cret-4711"
LIMITS = SandboxLimits(wall_s=20.0, cpu_s=10, memory_bytes=256 << 20, processes=16, scratch_bytes=8 << 20, file_bytes=4 << 20)
AVAILABLE = run(Program(source=""), at="namespaces").status == "ok", run(Program(source=""), at="seccomp").status == "ok"
# The strongest level that this host has, or the first one, which is skipped then; the other one is for `make accept`.
LEVELS = [
    pytest.param(
        level,
        marks=[
            pytest.mark.skipif(not has, reason=f"this host has no level {level!r}: {probe_levels().detail}"),
            *([] if is_strongest else [pytest.mark.accept]),
        ],
    )
    for level, has, is_strongest in zip(
        ("namespaces", "seccomp"), AVAILABLE, (AVAILABLE[0] or not any(AVAILABLE), AVAILABLE == (False, True)), strict=True
    )
]
PRELUDE = """
import ctypes, json, os, signal, socket, stat, subprocess, sys, time
T = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def escaped(what=""):
    print("ESCAPED", what, flush=True)
def attempt(action, *arguments):
    try:
        result = action(*arguments)
    except (OSError, ValueError):
        return
    if result is not False and result != -1:
        escaped(arguments)
"""


@dataclass(frozen=True, slots=True)
class Targets:
    """What the attacks aim at, all ours and outside of the sandbox."""

    tcp4: int
    tcp6: int
    udp: int
    unix: str
    datagram: str
    abstract: str
    secret_file: str
    open_dir: str
    victim: str
    pid: int
    parent: int
    secret: str
    marker: str
    home: str
    repository: str
    environment: str


def echo(server: socket.socket) -> None:
    while True:
        try:
            data, sender = server.recvfrom(100)
        except OSError:
            return
        if data == b"end":
            return
        server.sendto(data, sender)


@pytest.fixture(scope="module")
def targets() -> Iterator[Targets]:
    folder = Path(tempfile.mkdtemp(prefix="dmoa-targets-"))
    folder.chmod(0o755)
    open_dir = folder / "open"
    open_dir.mkdir()
    open_dir.chmod(0o777)
    (folder / "secret.txt").write_text(SECRET)
    (open_dir / "victim.txt").write_text("victim")
    (open_dir / "victim.txt").chmod(0o666)
    families = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0)), (socket.AF_UNIX, str(folder / "s"))]
    servers = [socket.create_server(address, family=family) for family, address in families[:2]]
    for address in (families[2][1], "\0dmoa-abstract-target"):
        servers.append(socket.socket(socket.AF_UNIX))
        servers[-1].bind(address)
        servers[-1].listen()
    (folder / "s").chmod(0o777)
    servers.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    servers[-1].bind(str(folder / "d"))
    (folder / "d").chmod(0o777)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    threading.Thread(target=echo, args=(udp,), daemon=True).start()
    bystander = subprocess.Popen(["/bin/sleep", "600"], env={"BYSTANDER": SECRET})
    old = os.environ.get("DMOA_TEST_SECRET")
    os.environ["DMOA_TEST_SECRET"] = SECRET
    yield Targets(
        tcp4=servers[0].getsockname()[1],
        tcp6=servers[1].getsockname()[1],
        udp=udp.getsockname()[1],
        unix=str(folder / "s"),
        datagram=str(folder / "d"),
        abstract="dmoa-abstract-target",
        secret_file=str(folder / "secret.txt"),
        open_dir=str(open_dir),
        victim=str(open_dir / "victim.txt"),
        pid=bystander.pid,
        parent=os.getpid(),
        secret=SECRET,
        marker=f"dmoa-marker-{os.getpid()}",
        home=str(Path.home()),
        repository=str(Path(__file__).resolve()),
        environment=sys.prefix,
    )
    if old is None:
        del os.environ["DMOA_TEST_SECRET"]
    assert bystander.poll() is None, "an attack killed the bystander"
    bystander.kill()
    bystander.wait()
    udp.sendto(b"end", udp.getsockname())
    for server in [*servers, udp]:
        server.close()


def attack(source: str, targets: Targets, level: Level, limits: SandboxLimits = LIMITS) -> SandboxResult:
    return run(Program(source=PRELUDE + source, argv=(json.dumps(asdict(targets)),)), limits, at=level)


# Attacks that are harmless outside and must succeed there.
HARMLESS = {
    "tcp4-connect": "attempt(socket.create_connection, ('127.0.0.1', T['tcp4']), 2)",
    "tcp6-connect": "attempt(socket.create_connection, ('::1', T['tcp6']), 2)",
    "tcp4-listen": "attempt(lambda: socket.create_server(('127.0.0.1', 0)))",
    "udp-and-dns": """
def ask():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2)
    s.sendto(b"q", ("127.0.0.1", T["udp"])); return s.recv(10) == b"q"
attempt(ask)
""",
    "unix-path-connect": "attempt(lambda: socket.socket(socket.AF_UNIX).connect(T['unix']))",
    "unix-abstract-connect": "attempt(lambda: socket.socket(socket.AF_UNIX).connect(chr(0) + T['abstract']))",
    "unix-datagram-from-a-pair": "attempt(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', T['datagram']))",
    "signals-through-files": """
import fcntl, struct
end, one = os.pipe()[0], socket.socketpair()[0]
attempt(fcntl.fcntl, end, fcntl.F_SETOWN, os.getpid())
attempt(fcntl.fcntl, end, 10, signal.SIGURG)
attempt(fcntl.fcntl, end, 15, struct.pack("ii", 1, os.getpid()))
attempt(fcntl.fcntl, end, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
for request in (0x8901, 0x8902, 0x5452):
    attempt(fcntl.ioctl, one, request, struct.pack("i", os.getpid()))
""",
    "larger-buffers": """
import fcntl
attempt(lambda: socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20))
attempt(fcntl.fcntl, os.pipe()[0], 1031, 1 << 20)
""",
    "kernel-command-line": "attempt(lambda: open('/proc/cmdline').read())",
    "netlink-socket": "attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))",
    "read-a-file-elsewhere": "attempt(lambda: T['secret'] in open(T['secret_file']).read())",
    "read-the-repository": "attempt(lambda: open(T['repository']).read())",
    "read-the-home-directory": """
inside = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(sys.executable)), *sys.path[2:])
seen = 0
for folder, names, files in os.walk(T["home"]):
    names[:] = [n for n in names if not any(p.startswith(os.path.join(folder, n)) or os.path.join(folder, n).startswith(p)
                for p in inside if p)]
    for name in files:
        seen += 1
        attempt(lambda: open(os.path.join(folder, name), "rb").read(1) is not None)
    if seen >= 2000:
        break
""",
    "environment": "attempt(lambda: any(T['secret'] in v for v in os.environ.values()))",
    "environ-of-other-processes": """
for pid in [T["pid"], T["parent"], os.getppid(), 1, *(n for n in (os.listdir("/proc") if os.access("/proc", 4) else []) if n.isdigit())]:
    attempt(lambda: T["secret"].encode() in open(f"/proc/{pid}/environ", "rb").read())
""",
    "command-lines-of-other-processes": """
for pid in {str(T["pid"]), str(T["parent"])}:
    attempt(lambda: b"sleep" in open(f"/proc/{pid}/cmdline", "rb").read())
""",
    "memory-of-the-processes-above": """
for pid in (os.getppid(), T["parent"]):
    for name in ("mem", "environ", "maps"):
        attempt(lambda: open(f"/proc/{pid}/{name}", "rb"))
    attempt(lambda: len(os.listdir(f"/proc/{pid}/fd")) > 0)
""",
    "proc-root-detour": """
for pid in ("self", "1", str(os.getppid()), str(T["pid"])):
    for way in ("root", "cwd/../../../../..", f"task/{pid}/root"):
        attempt(lambda: T["secret"] in open(f"/proc/{pid}/{way}{T['secret_file']}").read())
""",
    "inherited-descriptors": """
for fd in range(3, 1024):
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode): continue
    except OSError: continue
    attempt(lambda: T["secret"].encode() in os.pread(fd, 100, 0))
    attempt(lambda: T["secret"].encode() in open(f"/proc/self/fd/{fd}", "rb").read())
""",
    "write-elsewhere": "attempt(lambda: open(os.path.join(T['open_dir'], 'x'), 'w').write('x'))",
    "symlink-to-read": "os.symlink(T['secret_file'], 'l1'); attempt(lambda: T['secret'] in open('l1').read())",
    "symlink-to-write": "os.symlink(T['open_dir'], 'l2'); attempt(lambda: open('l2/y', 'w').write('y'))",
    "hard-link": "attempt(lambda: os.link(T['secret_file'], 'h1')); attempt(lambda: open('h1').read())",
    "rename-into-scratch": "attempt(lambda: os.rename(T['victim'], T['victim'] + '2')); attempt(os.rename, T['victim'] + '2', T['victim'])",
    "change-modes-and-times": "attempt(os.chmod, T['victim'], 0o600); attempt(os.utime, T['victim'], (1, 1))",
    "truncate-elsewhere": "attempt(os.truncate, T['victim'], 0)",
    "delete-elsewhere": "open(os.path.join(T['open_dir'], 'd'), 'w') if os.getuid() == 0 else 0; attempt(os.unlink, T['victim'] + '3')",
    "ptrace": "attempt(libc.ptrace, 16, T['pid'], 0, 0)",
    "process-vm-readv": """
class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(8)
line = next((l for l in (open(f"/proc/{T['pid']}/maps") if os.access(f"/proc/{T['pid']}/maps", 4) else []) if "[stack]" in l), "7f0000000000-")
for pid in (T["pid"], os.getppid()):
    ours = Piece(ctypes.addressof(buffer), 8); theirs = Piece(int(line.split("-")[0], 16), 8)
    attempt(libc.process_vm_readv, pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
""",
    "signal-another-process": "attempt(os.kill, T['pid'], signal.SIGCONT)",
    "signal-through-a-pidfd": "attempt(lambda: signal.pidfd_send_signal(os.pidfd_open(T['pid']), 0))",
    "unshare-a-user-namespace": "attempt(libc.unshare, 0x10000000)",
    "clone-a-user-namespace": """
pid = libc.syscall(56 if os.uname().machine == "x86_64" else 220, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
if pid == 0:
    os._exit(0)
attempt(lambda: pid)
""",
    "io-uring": "b = ctypes.create_string_buffer(120); attempt(libc.syscall, 425, 4, b)",
    "memory-outside-the-count": "attempt(libc.shmget, 0, 4096, 0o1600); attempt(os.memfd_create, 'x')",
    "raise-own-limits": """
import resource
attempt(lambda: resource.setrlimit(resource.RLIMIT_CORE, (-1, -1)))
""",
    "limits-of-another-process": "import resource; attempt(lambda: resource.prlimit(T['pid'], resource.RLIMIT_NOFILE))",
}
if not sys.prefix.startswith("/usr"):  # that is there whole
    HARMLESS["beside-the-libraries"] = """
for name in (os.listdir(T["environment"]) if os.access(T["environment"], 4) else []):
    if name not in ("bin", "lib", "lib64", "share", "pyvenv.cfg"): escaped(name)
for name in (os.listdir(os.path.join(T["environment"], "bin")) if os.access(T["environment"], 4) else []):
    if not name.startswith("python"): escaped(name)
"""
if os.getuid() == 0:  # what only root may do outside
    HARMLESS |= {
        "read-etc-shadow": "attempt(lambda: open('/etc/shadow').read())",
        "become-root": "attempt(lambda: os.setuid(0)); attempt(lambda: os.setresuid(0, 0, 0)); attempt(os.setgid, 0)",
        "chroot": "attempt(os.chroot, '.')",
        "device-node": "attempt(lambda: os.mknod('disk', 0o600 | stat.S_IFCHR, os.makedev(1, 3)))",
        "bpf-and-perf": "import struct; b = ctypes.create_string_buffer(struct.pack('IIQ', 1, 112, 0), 128); attempt(libc.syscall, 298 if os.uname().machine == 'x86_64' else 241, b, 0, -1, -1, 0)",
    }
HARMLESS |= more.HARMLESS

# Attacks that would do harm outside.
HARMFUL = more.HARMFUL | {
    "kill-the-processes-above": """
for pid in (os.getppid(), T["parent"], 1, -1):
    for number in (signal.SIGSTOP, signal.SIGKILL):
        try: os.kill(pid, number)
        except OSError: continue
        if pid != 1: escaped(pid)  # process 1 of a namespace survives it, or nothing would be reported
        try: os.killpg(os.getpgid(T["parent"]), number); escaped("group")
        except OSError: pass
""",
    "write-into-the-interpreter": """
import json.decoder
for path in (os.__file__, json.decoder.__file__, os.path.join(os.path.dirname(os.__file__), T["marker"]), sys.executable):
    attempt(lambda: open(path, "ab").write(b""))
for folder in sys.path[1:]:
    attempt(lambda: open(os.path.join(folder, T["marker"] + ".pth"), "w").write("x"))
""",
    "write-into-system-folders": """
for folder in ("/", "/usr", "/usr/lib", "/etc", "/var/tmp", "/root", "/home", "/work", "/dev", "/proc", "/sys", "/run", os.path.dirname(T["open_dir"])):
    attempt(lambda: open(os.path.join(folder, T["marker"]), "w").write("x"))
""",
    "mount": """
attempt(libc.mount, b"none", b".", b"tmpfs", 0, None)
attempt(libc.mount, b"/", b".", None, 4096, None)
attempt(libc.umount2, b"/tmp", 2)
attempt(libc.syscall, 430, b"tmpfs", 0)
""",
    "kernel-switches": """
for path in ("/proc/sysrq-trigger", "/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/sys/power/state"):
    attempt(lambda: open(path, "w"))
attempt(libc.sethostname, b"owned", 5)
attempt(time.clock_settime, time.CLOCK_REALTIME, 0.0)
attempt(libc.reboot, 0)
""",
    "devices": """
for path in ("/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/port", "/proc/kcore", "/dev/fuse", "/dev/kvm"):
    attempt(lambda: open(path, "rb").read(1))
""",
    "keys-and-faults": """
x86 = os.uname().machine == "x86_64"
attempt(libc.syscall, 250 if x86 else 219, 0, -4, 1, 0, 0)
attempt(libc.syscall, 248 if x86 else 217, b"user", b"n", b"p", 1, -4)
attempt(libc.syscall, 323 if x86 else 282, 1)
attempt(libc.syscall, 321 if x86 else 280, 0, ctypes.create_string_buffer(128), 128)
attempt(libc.syscall, 317, 1, 8, ctypes.create_string_buffer(64)) if not x86 else None
""",
    "setuid-programs": """
for name in ("su", "mount", "passwd", "sudo", "newgrp"):
    try: done = subprocess.run([name, "--help"], capture_output=True, timeout=5)
    except (OSError, subprocess.SubprocessError): continue
if os.path.exists("/proc/self/status") and os.access("/proc/self/status", 4):
    assert "NoNewPrivs:\\t1" in open("/proc/self/status").read() or escaped("new privileges")
""",
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", [*HARMLESS, *HARMFUL])
def test_an_attack_stays_inside(name: str, level: Level, targets: Targets, tmp_path: Path) -> None:
    with Path(targets.secret_file).open("rb") as secret:
        os.set_inheritable(secret.fileno(), True)
        result = attack((HARMLESS | HARMFUL)[name], targets, level)
    assert result.status in ("ok", "failed"), result
    assert "ESCAPED" not in result.stdout, result.stdout
    assert Path(targets.victim).read_text() == "victim"
    assert list(Path(targets.open_dir).iterdir()) == [Path(targets.victim)]
    assert Path(targets.victim).stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("name", HARMLESS)
def test_outside_the_same_attack_succeeds(name: str, targets: Targets, tmp_path: Path) -> None:
    arguments = asdict(targets)
    for key in ("open_dir", "victim"):  # its own, so that the real ones stay as they are
        arguments[key] = str(tmp_path / "victim.txt") if key == "victim" else str(tmp_path)
    for copy in ("victim.txt", "victim.txt3"):
        (tmp_path / copy).write_text("victim")
    (tmp_path / "scratch").mkdir()
    with Path(targets.secret_file).open("rb") as secret:
        os.set_inheritable(secret.fileno(), True)
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + HARMLESS[name], json.dumps(arguments)],
            cwd=tmp_path / "scratch",
            close_fds=False,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    if (
        name in ("clone-a-user-namespace", "unshare-a-user-namespace", "io-uring", "tcp6-connect")
        and "ESCAPED" not in done.stdout
    ):
        pytest.skip("this host itself forbids it")
    assert "ESCAPED" in done.stdout, done.stderr


def running(marker: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes() and str(os.getpid()) != path.parent.name:
                return True
        except OSError:
            continue
    return False


def is_gone(marker: str) -> bool:
    deadline = time.monotonic() + 10
    while running(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


SLOW = SandboxLimits(wall_s=1.0, cpu_s=10, memory_bytes=256 << 20, processes=16, scratch_bytes=8 << 20, file_bytes=4 << 20)
CPU = SandboxLimits(wall_s=30.0, cpu_s=1, memory_bytes=256 << 20, processes=16, scratch_bytes=8 << 20, file_bytes=4 << 20)
# What goes on and on: (source, limits, statuses).
GREEDY: dict[str, tuple[str, SandboxLimits, tuple[str, ...]]] = {
    "infinite-loop": ("while True: pass", SLOW, ("timeout",)),
    "infinite-loop-of-cpu": ("while True: pass", CPU, ("timeout",)),
    "infinite-loop-that-ignores-the-cpu-signal": (
        "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        CPU,
        ("timeout",),
    ),
    "infinite-loop-with-output": ("while True: print('x' * 100)", LIMITS, ("output_limit",)),
    "flood-of-errors": ("while True: sys.stderr.write('x' * 100)", LIMITS, ("output_limit",)),
    "one-huge-line": ("os.write(1, b'x' * (64 << 20))", LIMITS, ("output_limit",)),
    "sleep-through-signals": (
        "for n in range(1, 32):\n  if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)",
        SLOW,
        ("timeout",),
    ),
    "close-everything-and-sleep": ("os.closerange(0, 1024); time.sleep(60)", SLOW, ("timeout",)),
    "stop-itself": ("os.kill(os.getpid(), signal.SIGSTOP)", SLOW, ("timeout",)),
    "wait-for-input": ("sys.stdin.read(); time.sleep(60)", SLOW, ("timeout",)),
    "memory-bomb": ("b = bytearray()\nfor _ in range(128): b += bytes(64 << 20)\nescaped()", LIMITS, ("memory",)),
    "memory-bomb-at-once": ("b = bytes(8 << 30); escaped()", LIMITS, ("memory",)),
    "memory-bomb-in-shared-maps": (
        "import mmap\nkeep = []\nfor _ in range(128):\n  m = mmap.mmap(-1, 16 << 20); m.write(b'x' * (16 << 20)); keep.append(m)\nescaped()",
        LIMITS,
        ("memory",),
    ),
    "memory-bomb-by-children": (
        """
def eat():
    keep = b"x" * (64 << 20); time.sleep(20)
for _ in range(10):
    if os.fork() == 0: eat()
time.sleep(20); escaped()
""",
        LIMITS,
        ("memory", "failed"),
    ),
    "recursion": ("def f(): return f()\nf(); escaped()", LIMITS, ("failed",)),
    "recursion-of-the-c-stack": (
        "libc.memset.argtypes = None\nsys.setrecursionlimit(10**7)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x); escaped()",
        LIMITS,
        ("killed", "failed"),
    ),
    "segmentation-fault": ("ctypes.string_at(0); escaped()", LIMITS, ("killed",)),
    "abort": ("os.abort()", LIMITS, ("killed",)),
}
GREEDY |= {name: (source, {"slow": SLOW, "limits": LIMITS}[limits], ends) for name, (source, limits, ends) in more.GREEDY.items()}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_program_is_stopped(name: str, level: Level, targets: Targets) -> None:
    source, limits, statuses = GREEDY[name]
    result = attack(source, targets, level, limits)
    assert result.status in statuses, result
    assert "ESCAPED" not in result.stdout
    assert max(len(result.stdout), len(result.stderr)) <= limits.output_bytes
    assert result.reason


@pytest.mark.parametrize("level", LEVELS)
def test_buffers_that_the_kernel_holds_are_bounded(level: Level, targets: Targets) -> None:
    source = """
made, held, most = 0, [], 300 << 20
try:
    while made < most:
        held.append(socket.socketpair())
        for end in held[-1]:
            end.setblocking(False)
            try: end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 20)
            except OSError: pass
            try:
                while made < most: made += end.send(bytes(1 << 16))
            except BlockingIOError: pass
except OSError: pass
print(made)
"""
    result = attack(source, targets, level)
    assert result.status == "ok", result
    assert 0 < int(result.stdout) * (LIMITS.processes if level == "namespaces" else 1) <= LIMITS.memory_bytes


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", more.HOARDS)
def test_a_hoard_is_bounded(name: str, level: Level, targets: Targets) -> None:
    result = attack(more.HOARDS[name], targets, level)
    assert result.status in ("ok", "scratch_limit", "memory"), result
    assert result.status != "ok" or int(result.stdout) <= LIMITS.memory_bytes >> 2, result


@pytest.mark.parametrize("level", LEVELS)
class TestProcesses:
    def test_fork_bomb(self, level: Level, targets: Targets) -> None:
        source = """
made = 0
for _ in range(300):
    try: pid = os.fork()
    except OSError: break
    if pid == 0: time.sleep(30); os._exit(0)
    made += 1
print(made)
"""
        result = attack(source, targets, level)
        assert result.status == "ok", result
        assert int(result.stdout) <= LIMITS.processes

    def test_fork_bomb_of_forks(self, level: Level, targets: Targets) -> None:
        source = """
for _ in range(9):  # 512 processes at most
    try: os.fork()
    except OSError: pass
try: os.execv("/bin/sleep", [T["marker"] + "-bomb", "30"])
except OSError: time.sleep(30)
"""
        result = attack(source, targets, level, SLOW)
        assert result.status == "timeout", result
        assert is_gone(targets.marker + "-bomb")

    def test_thread_bomb(self, level: Level, targets: Targets) -> None:
        source = """
import threading
threading.stack_size(64 << 10)
made = 0
try:
    for _ in range(300):
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start(); made += 1
except RuntimeError: pass
print(made, flush=True); os._exit(0)
"""
        result = attack(source, targets, level)
        assert result.status == "ok", result
        if level == "namespaces" or os.getuid() == 0:
            assert int(result.stdout) <= LIMITS.processes

    def test_zombie_flood(self, level: Level, targets: Targets) -> None:
        source = """
made = 0
for _ in range(300):
    try:
        if os.fork() == 0: os._exit(0)
        made += 1
    except OSError: break
print(made)
"""
        result = attack(source, targets, level)
        assert result.status == "ok", result
        assert int(result.stdout) <= LIMITS.processes

    @pytest.mark.parametrize("ending", ["", "time.sleep(60)"], ids=["then-ends", "then-stays"])
    def test_daemon(self, level: Level, ending: str, targets: Targets) -> None:
        source = f"""
try: pid = os.fork()
except OSError: pid = None
if pid == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/bin/sleep", [T["marker"] + "-daemon", "60"])
    os._exit(0)
try: os.setsid()
except OSError: pass
print("left", flush=True)
{ending}
"""
        result = attack(source, targets, level, SLOW)
        assert result.status == ("timeout" if ending else "ok"), result
        assert is_gone(targets.marker + "-daemon")

    def test_a_daemon_that_holds_the_output_open_delays_nothing(self, level: Level, targets: Targets) -> None:
        source = """
try:
    if os.fork() == 0: time.sleep(60)
except OSError: pass
print("done")
"""
        result = attack(source, targets, level)
        assert (result.status, result.stdout) == ("ok", "done\n")
        assert result.wall_s < 15

    def test_huge_arguments_and_environment(self, level: Level, targets: Targets) -> None:
        source = """
for size in (1 << 16, 1 << 20, 1 << 23):
    try: subprocess.run(["/bin/true", *["x" * 1000] * (size // 1000)], env={"A" + str(i): "x" * 1000 for i in range(size // 1000)})
    except (OSError, MemoryError): pass
"""
        assert attack(source, targets, level).status == "ok"


@pytest.mark.parametrize("level", LEVELS)
class TestScratch:
    def test_a_file_of_ten_gigabytes(self, level: Level, targets: Targets) -> None:
        source = """
f = open("big", "wb")
for action in (lambda: f.truncate(10 << 30), lambda: os.posix_fallocate(f.fileno(), 0, 10 << 30), lambda: (f.seek(10 << 30), f.write(b"x"), f.flush())):
    attempt(action)
print(os.path.getsize("big"), flush=True)
os._exit(0)
"""
        result = attack(source, targets, level)
        assert result.status == "ok", result
        assert int(result.stdout.split()[-1]) <= LIMITS.file_bytes

    def test_many_files_of_one_megabyte(self, level: Level, targets: Targets) -> None:
        source = """
for i in range(200):
    try: open(str(i), "wb").write(b"x" * (1 << 20))
    except OSError: print(i, flush=True); break
else: time.sleep(2); escaped()
"""
        result = attack(source, targets, level)
        assert "ESCAPED" not in result.stdout
        assert result.status == "scratch_limit" or int(result.stdout) <= LIMITS.scratch_bytes >> 20, result

    def test_many_empty_files(self, level: Level, targets: Targets) -> None:
        source = """
for i in range(100000):
    try: open(str(i), "w").close()
    except OSError: break
time.sleep(5)
"""
        result = attack(source, targets, level)
        assert result.status == "scratch_limit", result

    def test_folders_in_folders(self, level: Level, targets: Targets) -> None:
        source = """
for i in range(3000):
    try: os.mkdir("d" * 100); os.chdir("d" * 100)
    except OSError: break
os.chmod(".", 0) if os.getuid() else None
"""
        assert attack(source, targets, level).status in ("ok", "failed", "scratch_limit")

    def test_nothing_is_left(self, level: Level, targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Path] = []
        make = tempfile.mkdtemp

        def note(*args: Any, **options: Any) -> str:
            made.append(Path(make(*args, **options)))
            return str(made[-1])

        monkeypatch.setattr(tempfile, "mkdtemp", note)
        source = """
os.makedirs("a/b"); open("a/b/" + T["marker"], "w").write("x")
for folder in ("/tmp", "/dev/shm", "/var/tmp", os.getcwd()):
    attempt(lambda: open(os.path.join(folder, T["marker"]), "w").write("x"))
os.chmod("a/b", 0) if os.path.exists("/proc/self/status") else None
"""
        attack(source, targets, level)
        look = """
for folder in ("/tmp", "/dev/shm", "/var/tmp", "."):
    attempt(lambda: any(T["marker"] in name for name in os.listdir(folder)))
print("looked")
"""
        assert attack(look, targets, level).stdout == "looked\n"
        scratch = [folder for folder in made if folder.name.startswith("dmoa-sandbox-")]
        assert level == "namespaces" or len(scratch) == 2, "without a file system of its own each program has a folder"
        assert not any(folder.exists() for folder in scratch)
        for folder in ("/tmp", "/dev/shm", "/var/tmp"):
            assert not Path(folder, targets.marker).exists()
