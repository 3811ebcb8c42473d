"""Who may write to the terminal: the program its own words, and libraries nothing, wherever in the process they write."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dmoa
from dmoa.workflows import terminal

COMMAND = """
import ctypes, logging, os, subprocess, sys, threading, warnings
from dmoa.workflows.console import Common, with_common
from dmoa.errors import DmoaError
import typer

@with_common
def noisy(common: Common, ending: str = "", silent: bool = False) -> None:
    common.say("at work")
    if not silent:
        print("NOISE print", file=sys.stderr)
        logging.getLogger("ray").warning("NOISE logging")
        warnings.warn("NOISE warning")
        os.write(2, b"NOISE descriptor\\n")
        libc = ctypes.CDLL(None)
        libc.perror(b"NOISE c")
        subprocess.run([sys.executable, "-c", "import sys; print('NOISE child', file=sys.stderr)"], check=True)
        thread = threading.Thread(target=print, args=("NOISE thread",))
        thread.start()
        thread.join()
        logging.getLogger("dmoa.some").warning("our own log")
    typer.echo("the result")
    if ending == "exit":
        raise typer.Exit(1)
    if ending == "error":
        raise ValueError("what nobody foresaw")

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(noisy)
app()
"""
NOISES = ("print", "logging", "warning", "descriptor", "c:", "child", "thread")


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={"TMPDIR": str(tmp_path), "PATH": "", "PYTHONPATH": str(Path(dmoa.__file__).parents[1])},
    )


def test_libraries_write_to_a_log_that_is_named_at_the_end(tmp_path: Path) -> None:
    ran = run(tmp_path)
    (log,) = tmp_path.glob("dmoa-noisy-*.log")
    assert (ran.returncode, ran.stdout) == (0, "the result\n")
    assert ran.stderr.splitlines() == [
        "dmoa: at work",
        "WARNING dmoa.some: our own log",
        f"dmoa: what Ray and other libraries wrote: {log}",
    ]
    written = log.read_text()
    assert all(f"NOISE {noise}" in written for noise in NOISES)
    assert "our own log" not in written


def test_with_v_all_of_it_is_on_the_terminal_and_there_is_no_log(tmp_path: Path) -> None:
    ran = run(tmp_path, "-v")
    assert all(f"NOISE {noise}" in ran.stderr + ran.stdout for noise in NOISES)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_was_written_there_is_no_log(tmp_path: Path) -> None:
    ran = run(tmp_path, "--silent")
    assert ran.stderr == "dmoa: at work\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ending", "is_named"), [("", False), ("exit", True), ("error", True)])
def test_a_quiet_command_names_the_log_where_it_fails(tmp_path: Path, ending: str, is_named: bool) -> None:
    ran = run(tmp_path, "-q", "--ending", ending)
    assert ("what Ray and other libraries wrote: " in ran.stderr) == is_named
    assert "NOISE" not in ran.stderr
    assert ("what nobody foresaw" in ran.stderr) == (ending == "error"), "what is not caught is on the terminal"


def test_inside_the_process_stderr_comes_back_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr
    with terminal.libraries_apart("test", verbosity=0):
        print("NOISE", file=sys.stderr)
        with terminal.on_terminal():
            print("shown", file=sys.stderr)
        terminal.tell("said")
    assert sys.stderr is before
    first, second, last = capsys.readouterr().err.splitlines()
    assert (first, second) == ("shown", "said")
    log = Path(last.rpartition(" ")[2])
    assert log.read_text() == "NOISE\n"
    log.unlink()


def test_every_command_speaks_by_way_of_the_terminal() -> None:
    """What is written past it ends in the log, and nobody sees it."""
    folder = Path(terminal.__file__).parent
    past = re.compile(r"err=True|stderr=True|file=sys\\.stderr|sys\\.stderr\\.write")
    found = [path.name for path in folder.glob("*.py") if past.search(path.read_text(encoding="utf-8"))]
    assert found == []
