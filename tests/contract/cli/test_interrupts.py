"""Commands that a signal ends: one line that says how to go on, and the status that shells know."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dmoa

COMMAND = """
import signal, sys, time
import typer
from dmoa.workflows.terminal import goes_on
from dmoa.cli.main import Commands
from dmoa.workflows.console import Common, with_common

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it

@with_common
def waiting(common: Common) -> None:
    try:
        with goes_on("the same command goes on from here"), goes_on("an inner one"):
            typer.echo("begun")
            time.sleep(300)
    finally:
        typer.echo("closed")

app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
app.command("waiting")(waiting)
app.callback()(lambda: None)
app()
"""


@pytest.mark.parametrize(("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_ends_a_command_with_one_line(number: signal.Signals, status: int, word: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "waiting"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "closed\n")
    assert err == f"dmoa: {word}; the same command goes on from here\n"


def test_what_calls_ray_after_its_end_joins_no_ray_of_the_host() -> None:
    code = """
from dmoa.workflows.terminal import never_join_by_accident
never_join_by_accident()
import ray
for call in (lambda: ray.put(1), lambda: ray.get_actor("anyone"), ray.cluster_resources, ray.remote(lambda: 1).remote):
    try:
        call()
    except Exception:
        pass
    assert not ray.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={"PYTHONPATH": str(Path(dmoa.__file__).parents[1])})
