"""`dmoa serve` as a process among others: its port, its signals, the proxies of its environment, a replica that cannot start.

This file has servers of its own; nothing else may use them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from safetensors.torch import save_file

from dmoa.serving.launch import free_port
from tests.integration.server import Served

DMOA = str(Path(sys.executable).with_name("dmoa"))
POOL = """
name: quick
llms: {s: {model: "scripted:echo", engine: scripted}}
agents:
  - {name: one, llm: s, profile: Echoes.}
  - {name: two, llm: s, profile: Echoes as well.}
router: {state_uri: "STATE"}
"""
PROXIES = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1,localhost"}
NOISE = (" E ", "SIGTERM received", "Traceback", "terminate called")


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool.yaml"
    path.write_text(POOL.replace("STATE", (tmp_path / "state").as_uri()), encoding="utf-8")
    return path


def started(pool: Path, *options: str, env: dict[str, str] | None = None) -> Served:
    return Served([DMOA, "serve", "--config", str(pool), "--port", str(free_port()), *options], env)


def hosts() -> list[str]:
    """The loopback addresses of this machine."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return ["::1"]
    except OSError:
        return ["127.0.0.1"]


@pytest.mark.parametrize("host", hosts())
def test_behind_a_proxy_on_its_port_alone_until_its_group_is_ended(pool: Path, host: str) -> None:
    served = started(pool, "--host", host, env=PROXIES | {"RAY_ADDRESS": ""})
    try:
        served.wait_ready()
        question = {"model": "quick", "messages": [{"role": "user", "content": "hello"}]}
        reply = httpx.post(f"{served.url}/v1/chat/completions", json=question, timeout=60, trust_env=False)
        assert reply.json()["choices"][0]["message"]["content"] == "hello"

        port = served.url.rpartition(":")[2]
        command = [DMOA, "serve", "--config", str(pool), "--host", host, "--port", port]
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert second.returncode == 2
        assert f"server.port is {port}; another program listens on " in second.stderr
        assert "Traceback" not in second.stderr

        said = len(served.errors)
        tree = psutil.Process(served.process.pid).children(recursive=True)
        begun = time.monotonic()
        os.killpg(served.process.pid, signal.SIGTERM)
        assert served.process.wait(60) == 0
        assert time.monotonic() - begun < 10.0
        assert psutil.wait_procs(tree, timeout=20)[1] == []
        assert not any(mark in line for line in served.errors[said:] for mark in NOISE), served.errors[said:]
    finally:
        served.stop()


@pytest.mark.parametrize("reach", ["group", "all"])
def test_a_signal_before_it_is_ready_ends_it_cleanly(pool: Path, reach: str) -> None:
    """The group, as `timeout` does; every process, as systemd does."""
    served = started(pool)
    try:
        deadline = time.monotonic() + 120
        while not served.processes("raylet/raylet"):
            assert served.process.poll() is None
            assert time.monotonic() < deadline, "Ray did not start"
            time.sleep(0.05)
        driver = psutil.Process(served.process.pid)
        tree = driver.children(recursive=True)
        begun = time.monotonic()
        if reach == "group":
            os.killpg(driver.pid, signal.SIGTERM)
        else:
            for process in (driver, *tree):
                process.terminate()
        assert served.process.wait(60) == 1
        assert time.monotonic() - begun < 10.0
        assert psutil.wait_procs(tree, timeout=20)[1] == []
        served.stop()
        assert "dmoa: interrupted before it was ready\n" in served.errors
        assert not any(mark in line for line in served.errors for mark in NOISE), served.errors
    finally:
        served.stop()


def test_a_replica_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    """The folder passes what is looked at first, and holds no model all the same."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    text = POOL.replace("STATE", (tmp_path / "state").as_uri()).replace(
        "agents:", f'  t: {{model: "path:{folder}", engine: transformers}}\nagents:'
    )
    text = text.replace(
        'llms: {s: {model: "scripted:echo", engine: scripted}}', 'llms:\n  s: {model: "scripted:echo", engine: scripted}'
    )
    (tmp_path / "pool.yaml").write_text(text.replace("name: two, llm: s", "name: two, llm: t"), encoding="utf-8")
    served = started(tmp_path / "pool.yaml")
    try:
        assert served.process.wait(300) == 2
    finally:
        served.stop()
    (line,) = [line for line in served.errors if line.startswith("dmoa: agent")]
    for part in ("agent two: no replica started: llms.t.model: ", str(folder)):
        assert part in line
    assert not any("Traceback" in line for line in served.errors)
