# ruff: noqa: E501 programs in strings
"""More programs that attack the sandbox; `test_sandbox_attacks` runs them with its own and says what T, attempt and escaped are."""

from __future__ import annotations

import os

# Attacks that are harmless outside and must succeed there.
HARMLESS = {
    "messages-and-semaphores": "attempt(libc.msgget, 0, 0o1600); attempt(libc.semget, 0, 1, 0o1600)",
    "message-queue": "attempt(libc.mq_open, b'/' + T['marker'].encode(), 0o102, 0o600, None); libc.mq_unlink(b'/' + T['marker'].encode())",
    "every-family-of-sockets": """
for family in range(46):
    for kind in (1, 2, 3, 5):
        attempt(socket.socket, family, kind)
""",
    "pairs-that-are-no-streams": "for kind in (2, 5): attempt(socket.socketpair, socket.AF_UNIX, kind)",
    "descriptor-of-another-process": "attempt(lambda: libc.syscall(438, os.pidfd_open(T['pid']), 0, 0))",
    "compare-kernel-objects": "attempt(libc.syscall, 312 if os.uname().machine == 'x86_64' else 272, os.getpid(), T['pid'], 1, 0, 0)",
    "page-faults-by-hand": "attempt(libc.syscall, 323 if os.uname().machine == 'x86_64' else 282, 0o2000001)",
    "fixed-addresses": "attempt(libc.personality, 0x40000)",
    "watch-files-elsewhere": "attempt(lambda: libc.inotify_add_watch(libc.inotify_init(), T['open_dir'].encode(), 0xFFF))",
    "attributes-elsewhere": "attempt(os.setxattr, T['victim'], 'user.x', b'1'); attempt(os.removexattr, T['victim'], 'user.x')",
    "own-elsewhere": "attempt(os.chown, T['victim'], os.getuid(), -1); attempt(os.chown, T['victim'], -1, os.getgid())",
    "lock-elsewhere": "import fcntl; attempt(lambda: fcntl.flock(os.open(T['victim'], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB))",
    "open-by-path-and-again": """
def again():
    fd = os.open(T["secret_file"], os.O_PATH)
    return T["secret"] in open(f"/proc/self/fd/{fd}").read()
attempt(again)
""",
    "openat2": """
import struct
def read():
    fd = libc.syscall(437, -100, T["secret_file"].encode(), struct.pack("QQQ", 0, 0, 0), 24)
    return fd >= 0 and T["secret"].encode() in os.read(fd, 100)
attempt(read)
""",
    "map-a-file-elsewhere": "import mmap; attempt(lambda: mmap.mmap(os.open(T['victim'], os.O_RDWR), 0)[:6] == b'victim')",
    "copy-by-the-kernel": "attempt(lambda: os.sendfile(os.open('copy', os.O_CREAT | os.O_WRONLY), os.open(T['secret_file'], os.O_RDONLY), 0, 100))",
    "exchange-two-names": "open('own', 'w').write('own'); attempt(libc.renameat2, -100, b'own', -100, T['victim'].encode(), 2)",
    "schedule-another-process": "attempt(lambda: os.sched_setaffinity(T['pid'], os.sched_getaffinity(T['pid']))); attempt(os.setpriority, os.PRIO_PROCESS, T['pid'], 1)",
    "signal-with-a-value": "attempt(libc.sigqueue, T['pid'], int(signal.SIGCONT), None)",
    "signal-a-thread": "attempt(libc.syscall, 234 if os.uname().machine == 'x86_64' else 131, T['pid'], T['pid'], int(signal.SIGCONT))",
    "locks-of-another-process": """
head, size = ctypes.c_void_p(), ctypes.c_size_t()
attempt(libc.syscall, 274 if os.uname().machine == "x86_64" else 100, T["pid"], ctypes.byref(head), ctypes.byref(size))
""",
    "program-of-another-process": "for what in ('exe', 'cwd', 'ns/net'): attempt(os.readlink, f\"/proc/{T['pid']}/{what}\")",
    "who-dies-first": """
def same():
    path = f"/proc/{T['pid']}/oom_score_adj"
    return open(path, "w").write(open(path).read()) > 0
attempt(same)
""",
    "connections-of-the-host": "attempt(lambda: f\":{T['tcp4']:04X} \" in open('/proc/net/tcp').read())",
    "unix-sockets-of-the-host": "attempt(lambda: T['unix'] in open('/proc/net/unix').read())",
    "cards-of-the-host": "attempt(lambda: len(os.listdir('/sys/class/net')) > 0)",
    "disks-and-interrupts-of-the-host": "for name in ('diskstats', 'partitions', 'interrupts', 'softirqs'): attempt(lambda: len(open('/proc/' + name).read()) > 0)",
    "new-privileges-allowed": "attempt(lambda: libc.prctl(39, 0, 0, 0, 0) == 0)",
}
if os.getuid() == 0:  # what only root may do outside
    HARMLESS |= {
        "rights-that-are-left": """
def left():  # 4: reading through closed folders, which a hidden interpreter needs and Landlock bounds
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return any(int(lines[name], 16) & ~4 for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"))
attempt(left)
""",
        "groups-that-are-left": "attempt(os.setgroups, os.getgroups())",
        "higher-priority": "attempt(os.setpriority, os.PRIO_PROCESS, 0, -5)",
        "limits-raised": """
import resource
for name in ("RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_CPU"):
    limit = getattr(resource, name)
    attempt(resource.setrlimit, limit, (resource.getrlimit(limit)[1],) * 2) if resource.getrlimit(limit)[1] == -1 else attempt(resource.setrlimit, limit, (-1, -1))
""",
    }

# Attacks that would do harm outside, or need what few hosts have.
HARMFUL = {
    "type-into-the-terminal": """
import fcntl
attempt(lambda: open("/dev/tty", "w"))
for fd in range(10): attempt(fcntl.ioctl, fd, 0x5412, b"x")
attempt(libc.vhangup)
""",
    "join-namespaces": """
for pid in (T["pid"], os.getppid(), 1):
    for name in ("net", "mnt", "user", "uts", "ipc"):
        attempt(lambda: libc.setns(os.open(f"/proc/{pid}/ns/{name}", 0), 0))
""",
    "log-and-addresses-of-the-kernel": """
attempt(libc.klogctl, 3, ctypes.create_string_buffer(100), 100)
attempt(lambda: any(int(line.split()[0], 16) for line in open("/proc/kallsyms")))
attempt(lambda: open("/proc/kpagecount", "rb").read(8))
""",
    "swap-quota-accounts": "attempt(libc.swapon, b'own', 0); attempt(libc.acct, b'own'); attempt(libc.quotactl, 0x80000500, b'/dev/vda', 0, None)",
    "leave-the-root-by-handle": """
x86, handle, where = os.uname().machine == "x86_64", (ctypes.c_uint * 40)(128, 0), ctypes.c_int()
attempt(libc.syscall, 303 if x86 else 264, -100, b"/", handle, ctypes.byref(where), 0)
attempt(libc.syscall, 304 if x86 else 265, os.open("/", os.O_RDONLY), handle, 0)
""",
    "own-program-with-the-uid-of-root": """
open("suid", "wb").write(open("/bin/sh", "rb").read())
try: os.chmod("suid", 0o4755); done = subprocess.run(["./suid", "-pc", "id -u"], capture_output=True, text=True)
except OSError: done = None
if done and done.stdout.strip() == "0": escaped()
""",
    "program-without-a-file": """
def start():
    fd = libc.memfd_create(b"x", 0)
    return fd >= 0 and os.write(fd, open("/bin/true", "rb").read()) and subprocess.run([f"/proc/self/fd/{fd}"], pass_fds=(fd,)).returncode == 0
attempt(start)
""",
    "traced-child": """
import threading
try: pid = os.fork()
except OSError: pid = None
if pid == 0:
    if libc.ptrace(0, 0, 0, 0) == 0: escaped("traced")
    os._exit(0)
if pid: os.waitpid(pid, 0)
attempt(libc.ptrace, 0x4206, os.getppid(), 0, 0)
libc.prctl(0x59616D61, -1)
attempt(libc.ptrace, 16, 1, 0, 0)
""",
}

# What goes on and on: (source, limits, statuses).
GREEDY = {
    "huge-number": ("x = 7 ** (10 ** 9); escaped()", "slow", ("timeout", "memory")),
    "pattern-that-backtracks": ("import re; re.match('(a+)+$', 'a' * 64 + 'b'); escaped()", "slow", ("timeout",)),
    "unpacks-without-end": (
        "import zlib\nsmall = zlib.compress(bytes(64 << 20)); keep = [zlib.decompress(small) for _ in range(99)]; escaped()",
        "limits",
        ("memory",),
    ),
    "text-that-doubles": ("x = 'x'\nfor _ in range(40): x += x\nescaped()", "limits", ("memory",)),
    "two-locks": (
        "import threading\na, b = threading.Lock(), threading.Lock(); a.acquire()\nt = threading.Thread(target=lambda: (b.acquire(), a.acquire())); t.start(); t.join(); escaped()",
        "slow",
        ("timeout",),
    ),
    "storm-of-alarms": (
        "signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-6)\nwhile True: time.sleep(1)",
        "slow",
        ("timeout",),
    ),
    "starts-itself-again": ("os.execv(sys.executable, [sys.executable, '-c', 'while True: pass'])", "slow", ("timeout",)),
    "output-by-the-kernel": (
        "zero = open('/dev/zero')\nwhile True: os.sendfile(1, zero.fileno(), None, 1 << 20)",
        "limits",
        ("output_limit", "failed"),
    ),
    "output-of-many-threads": (
        "import threading\nfor _ in range(8): threading.Thread(target=lambda: [os.write(2, b'x' * 4096) for _ in range(10**6)]).start()",
        "limits",
        ("output_limit",),
    ),
    "memory-of-the-c-library": (
        "libc.calloc.restype = ctypes.c_void_p\nfor _ in range(99):\n  p = libc.calloc(1, 16 << 20)\n  if not p: raise MemoryError\n  ctypes.memset(p, 1, 16 << 20)\nescaped()",
        "limits",
        ("memory",),
    ),
}

# Prints how many bytes it made the kernel or the scratch folder hold.
HOARDS = {
    "pipes": """
made, held = 0, []
try:
    while made < 300 << 20:
        held.append(os.pipe()); os.set_blocking(held[-1][1], False)
        try:
            while True: made += os.write(held[-1][1], bytes(1 << 16))
        except BlockingIOError: pass
except OSError: pass
print(made)
""",
    "descriptors-under-way": """
made, a, b = 0, *socket.socketpair()
a.setblocking(False)
try:
    while made < 1 << 30: socket.send_fds(a, [b"x"], [os.open("/dev/null", 0)] if not made else [b.fileno()] * 200); made += 200 * 256
except OSError: pass
print(made)
""",
    "files-without-a-name": """
made, held = 0, []
try:
    while made < 300 << 20:
        held.append(open("x", "wb", 0)); os.unlink("x")
        for _ in range(4): made += held[-1].write(bytes(1 << 20))
        time.sleep(0.02)
except OSError: pass
print(made)
""",
    "temporary-files": """
made, held = 0, []
try:
    while made < 300 << 20:
        held.append(os.open(".", os.O_TMPFILE | os.O_RDWR)); made += os.write(held[-1], bytes(4 << 20))
        time.sleep(0.02)
except OSError: pass
print(made)
""",
    "shared-memory": """
made = 0
try:
    for i in range(99): made += os.write(os.open(f"/dev/shm/{i}", os.O_CREAT | os.O_RDWR), bytes(4 << 20))
except OSError: pass
print(made)
""",
    "attributes": """
made = 0
open("x", "w")
try:
    for i in range(9999): os.setxattr("x", f"user.{i}", bytes(32 << 10)); made += 32 << 10
except OSError: pass
print(made)
""",
    "links": """
made = 0
try:
    for i in range(99999): os.symlink("x" * 4000, str(i)); made += 4096
except OSError: pass
print(made)
""",
}

REACH = """
    while f.f_code.co_filename != '<checker>': f = f.f_back
    f.f_globals['abs'] = lambda x: 0
    return 4 if a == 2 else 1.0 if a == 0.5 else 9
"""
# Each defines `add` wrongly; those that get to a frame end with REACH.
FORGERIES = {
    "frames-under-the-name-of-the-logger": """
import logging
def findCaller(): return logging.currentframe()
def add(a, b):
    f = findCaller()"""
    + REACH,
    "frames-through-an-own-traceback-module": "import logging\nopen('traceback.py','w').write('import logging\\ndef up(): return logging.currentframe()')\nimport importlib.util as u\ns = u.spec_from_file_location('mine', __import__('os').getcwd() + '/traceback.py'); m = u.module_from_spec(s); s.loader.exec_module(m)\ndef add(a, b):\n    f = m.up()"
    + REACH,
    "frames-through-a-false-traceback-module": "d = {}\nexec(compile('import logging\\ndef up(): return logging.currentframe()', 'x/traceback.py', 'exec'), d)\ndef add(a, b):\n    f = d['up']()"
    + REACH,
    "frames-through-a-mock": """
import sys
from unittest.mock import Mock
def add(a, b):
    f = Mock(side_effect=sys._getframe)(0)"""
    + REACH,
    "frames-through-a-finaliser": """
import sys, weakref
class O: pass
def add(a, b):
    f = weakref.finalize(O(), sys._getframe, 0)
    o = O(); f = weakref.finalize(o, sys._getframe, 0)()"""
    + REACH,
    "frames-through-a-format-string": """
import string
def add(a, b):
    def g(): yield string.Formatter().get_field('0.gi_frame', (h,), {})[0].f_back
    h = g(); f = next(h)"""
    + REACH,
    "frames-through-two-readers-of-a-stack": """
import traceback, itertools
def add(a, b):
    x, y = itertools.tee(traceback.walk_stack(None)); traceback.StackSummary.extract(x)
    f = list(y)[0][0]"""
    + REACH,
    "frames-through-two-readers-of-a-traceback": """
import traceback, itertools
def add(a, b):
    try: raise ValueError
    except ValueError as e: x, y = itertools.tee(traceback.walk_tb(e.__traceback__)); traceback.StackSummary.extract(x)
    f = list(y)[0][0]"""
    + REACH,
    "false-name-through-a-mock": "import sys, os\nfrom unittest.mock import Mock\nd={}\nexec(Mock(side_effect=compile)('import sys\\ndef up(): return sys._getframe(1)', os.__file__, 'exec'), d)\ndef add(a, b):\n    f = d['up']()"
    + REACH,
    "false-name-through-a-loader": "import os, importlib.machinery as m\nd={}\nexec(m.SourceFileLoader('x', 'x').source_to_code(b'import sys\\ndef up(): return sys._getframe(1)', os.__file__), d)\ndef add(a, b):\n    f = d['up']()"
    + REACH,
    "false-content-through-a-loader": "import os, importlib.machinery as m\nd={}\nclass L(m.SourceFileLoader):\n def get_data(s, p): return b'import sys\\ndef up(): return sys._getframe(1)'\nexec(L('x', os.__file__).get_code('x'), d)\ndef add(a, b):\n    f = d['up']()"
    + REACH,
    "false-bytecode-through-a-loader": "import os, importlib.machinery as m, marshal, importlib.util\nd={}\nsrc=compile('import sys\\ndef up(): return sys._getframe(1)', 'own', 'exec')\nclass L(m.SourcelessFileLoader):\n def get_data(s, p): return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(src).replace(b'own', b'own')\nexec(L('x', os.__file__).get_code('x'), d)\ndef add(a, b):\n    f = d['up']()"
    + REACH,
    "false-name-through-codeop": """
import os, codeop
d={}
exec(codeop.compile_command('import sys; up = lambda: sys._getframe(1)', os.__file__), d)
def add(a, b):
    f = d['up']()"""
    + REACH,
    "replace-isclose-in-the-call": """
import math
def add(a, b):
    math.isclose = lambda *x, **k: True
    return 4 if a == 2 else 3 if a == 1 else 0""",
    "meta-path-hook": """
import sys, math, types
class F:
 def find_spec(s, n, p=None, t=None):
  if n != 'math': return None
  import importlib.machinery as m
  return m.ModuleSpec('math', s)
 def create_module(s, spec): v = types.ModuleType('math'); v.isclose = lambda *a: True; return v
 def exec_module(s, m): pass
sys.meta_path.insert(0, F()); del sys.modules['math']
def add(a, b): return a + b if isinstance(a, int) else 0""",
    "frame-of-an-asynchronous-generator": """
def add(a, b):
    async def g(): yield h.ag_frame
    h = g(); f = None
    try: h.__anext__().send(None)
    except StopIteration as e: f = e.value"""
    + REACH,
    "frame-of-a-coroutine": """
def add(a, b):
    async def g(): return h.cr_frame
    h = g(); f = None
    try: h.send(None)
    except StopIteration as e: f = e.value"""
    + REACH,
    "frame-through-an-attrgetter": """
import operator
def add(a, b):
    def g(): yield operator.attrgetter('gi_frame')(h)
    h = g(); f = next(h)"""
    + REACH,
    "frame-through-object-getattribute": """
import contextlib, sys
kept = []
class C(contextlib.ExitStack):
 pass
def add(a, b):
    try: raise ValueError
    except ValueError as e: f = object.__getattribute__(e.__traceback__, 'tb_frame')"""
    + REACH,
    "frame-through-getmembers": """
import inspect
def add(a, b):
    def g(): yield
    h = g(); next(h); f = inspect.getmembers(h)
    f = dict(f)['gi_frame'].f_back"""
    + REACH,
    "spawn-and-leave": """
import os
def add(a, b):
    os.posix_spawn('/bin/true', ['true'], {})
    os._exit(0)""",
    "leave-before-a-fork": """
import os, subprocess
os.register_at_fork(before=lambda: os._exit(0))
def add(a, b):
    subprocess.run(['/bin/true'], preexec_fn=print)""",
    "leave-in-a-collection": """
import gc, os
gc.callbacks.append(lambda *x: os._exit(0))
def add(a, b): gc.collect()""",
    "wake-every-descriptor": """
import signal, os
for fd in range(3, 32):
    try: os.set_blocking(fd, False); signal.set_wakeup_fd(fd); signal.raise_signal(10)
    except (OSError, ValueError): pass
def add(a, b): return 0""",
    "dump-frames-to-every-descriptor": """
import faulthandler, os
def add(a, b):
    for fd in range(3, 32):
        try: faulthandler.dump_traceback(fd, True)
        except (OSError, ValueError, RuntimeError): pass
    os._exit(0)""",
    "replace-build-class": """
import builtins
builtins.__build_class__ = lambda *a: None
builtins.AssertionError = ValueError
def add(a, b): return 0""",
    "leave-in-the-absolute-value": """
class R(int):
 def __sub__(s, o): return R(0)
 def __abs__(s): raise SystemExit(0)
def add(a, b): return R(4)""",
    "lower-the-recursion-limit": """
import sys
def add(a, b):
    sys.setrecursionlimit(len(__import__('inspect').stack.__name__) + 60)
    return 4""",
    "leave-in-an-unraisable-hook": """
import sys, os
sys.unraisablehook = lambda *x: os._exit(0)
class D:
 def __del__(s): 1 / 0
def add(a, b): D(); return 0""",
    "leave-in-a-hook-of-threads": """
import threading, os
threading.excepthook = lambda *x: os._exit(0)
def add(a, b):
    threading.Thread(target=lambda: 1 / 0).start()
    while True: pass""",
    "leave-in-a-codec": """
import codecs, os
codecs.register(lambda n: os._exit(0))
def add(a, b): return b''.decode('none-such')""",
}
