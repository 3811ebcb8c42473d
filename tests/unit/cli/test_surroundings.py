"""What surrounds a command: how it is called, standard input, models that are not there, a taken port, proxies."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dmoa.cli.jobs import evaluate_job
from dmoa.errors import DmoaError
from dmoa.workflows.terminal import closed
from tests.unit.cli.conftest import POOL, Invoke

BAD = """
name: bad
llms:
  fake: {model: "scripted:x", engine: scripted}
  real: {model: "path:/nonexistent/model", engine: transformers}
agents:
  - {name: first, llm: fake, profile: Echoes.}
  - {name: second, llm: real, profile: Adds numbers.}
"""


@pytest.mark.contract
@pytest.mark.parametrize("module", ["dmoa", "dmoa.cli.main"])
def test_the_command_runs_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("dmoa ")


@pytest.mark.parametrize("arguments", [("doctor",), ("serve", "--dry-run"), ("run", "What is 12 + 7?")])
def test_a_pool_may_come_from_standard_input(dmoa: Invoke, arguments: tuple[str, ...]) -> None:
    result = dmoa(*arguments, "--config", "-", input=POOL)
    assert result.exit_code == 0, result.output
    assert "tiny" in result.stdout or "The answer is" in result.stdout
    refused = dmoa(*arguments, "--config", "-", input="name: 1:30")
    assert refused.exit_code == 2
    assert "standard input: line 1: YAML 1.1 reads 1:30" in refused.stderr


def test_a_job_may_come_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with (tmp_path / "job.yaml").open("w+", encoding="utf-8") as file:
        file.write("job: {benchmarks: [arith], limit: 010}")
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", file)
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", "--config", "-"])
        with pytest.raises(SystemExit) as ended:
            evaluate_job()
    assert ended.value.code == 2
    assert "standard input: line 1: YAML 1.1 reads 010" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("serve",), ("serve", "--dry-run"), ("run", "What is 12 + 7?"), ("doctor",)])
def test_a_model_that_is_not_there_is_seen_first(dmoa: Invoke, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "pool.yaml").write_text(BAD, encoding="utf-8")
    result = dmoa(*arguments, "--config", tmp_path / "pool.yaml")
    assert result.exit_code == (1 if arguments[0] == "doctor" else 2)
    assert "llms.real.model: 'path:/nonexistent/model' lacks config.json" in result.output
    assert "(agents on it: second)" in result.output
    assert "fits" not in result.stdout
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


@pytest.mark.parametrize("shares", [False, True])
def test_serve_refuses_a_port_that_is_taken_before_it_starts_ray(dmoa: Invoke, pool: Path, shares: bool) -> None:
    with socket.socket() as holder:
        if shares:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        result = dmoa("serve", "--config", pool, "--port", port)
    assert result.exit_code == 2
    assert f"server.port is {port}; another program listens on 127.0.0.1:{port} already" in result.stderr
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_an_own_server_is_asked_without_the_proxies_of_the_environment(
    dmoa: Invoke, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    result = dmoa("run", "What is 12 + 7?", "--url", url)
    assert result.exit_code == 0, result.output
    assert "The answer is" in result.stdout


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_more_is_one_sentence(number: int) -> None:
    def write() -> None:
        raise OSError(number, "", "/runs/gate/gate.json")

    with pytest.raises(DmoaError, match=r"^cannot write '/runs/gate/gate.json': .+; make room or name another place") as found:
        closed(write)
    assert os.strerror(number) in str(found.value)


def test_a_full_disk_is_met_as_a_command_meets_it() -> None:
    def write() -> None:
        with Path("/dev/full").open("w", encoding="utf-8") as file:
            file.write("weights")

    with pytest.raises(DmoaError, match=r"^cannot write: No space left on device; make room"):
        closed(write)


def test_other_errors_of_files_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError):
        closed(lambda: Path("/no/such/place").read_text(encoding="utf-8"))
