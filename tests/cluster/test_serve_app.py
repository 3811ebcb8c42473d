"""`serve run` on serve_app.py, the other way to start a swarm, with a Ray cluster of its own; and a cluster that is not there."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from dmoa.serving.launch import free_port
from tests.integration.server import Served

ROOT = Path(__file__).parents[2]
POOL = """
name: quick
llms: {s: {model: "scripted:echo", engine: scripted}}
agents:
  - {name: one, llm: s, profile: Echoes.}
  - {name: two, llm: s, profile: Echoes as well.}
router: {state_uri: "STATE"}
"""
SERVE = """
proxy_location: HeadOnly
http_options: {host: 127.0.0.1, port: PORT}
applications: [{name: dmoa, import_path: "serve_app:app", route_prefix: /}]
"""


def test_serve_run_honours_dmoa_config(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "pool.yaml").write_text(POOL.replace("STATE", (tmp_path / "state").as_uri()), encoding="utf-8")
    (tmp_path / "serve.yaml").write_text(SERVE.replace("PORT", str(port)), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("serve")), "run", "--app-dir", str(ROOT), str(tmp_path / "serve.yaml")]
    env = {"DMOA_CONFIG": str(tmp_path / "pool.yaml"), "PYTHONPATH": str(ROOT), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    served = Served(command, env)
    try:
        body = ask_until_up(served, f"http://127.0.0.1:{port}")
    finally:
        served.stop()
    assert body["choices"][0]["message"]["content"] == "hello"
    assert body["dmoa"]["pool"] == "quick"
    assert body["dmoa"]["stop_reason"] == "agreement"


def test_serve_run_builds_nothing_without_keys_where_others_can_reach_serve(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(POOL.replace("STATE", (tmp_path / "state").as_uri()), encoding="utf-8")
    text = SERVE.replace("PORT", str(free_port())).replace("127.0.0.1", "0.0.0.0")
    (tmp_path / "serve.yaml").write_text(text, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("serve")), "run", "--app-dir", str(ROOT), str(tmp_path / "serve.yaml")]
    env = {"DMOA_CONFIG": str(tmp_path / "pool.yaml"), "PYTHONPATH": str(ROOT), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    served = Served(command, env)
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and "Serve on this Ray listens on '0.0.0.0'" not in "".join(served.errors):
            time.sleep(0.2)
    finally:
        served.stop()
    assert "Serve on this Ray listens on '0.0.0.0', which other machines can reach" in "".join(served.errors)


def test_an_address_where_nothing_listens_ends_the_command(tmp_path: Path) -> None:
    """Left to itself Ray goes on trying for longer than the limit here."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    (tmp_path / "pool.yaml").write_text(POOL.replace("STATE", (tmp_path / "state").as_uri()), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("dmoa")), "serve", "--config", str(tmp_path / "pool.yaml")]
    done = subprocess.run([*command, "--address", address], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert f"address is '{address}'; nothing listens there" in done.stderr


def ask_until_up(served: Served, url: str) -> dict[str, Any]:
    deadline = time.monotonic() + 180
    question = {"model": "quick", "messages": [{"role": "user", "content": "hello"}]}
    while time.monotonic() < deadline and served.process.poll() is None:
        try:
            reply = httpx.post(f"{url}/v1/chat/completions", json=question, timeout=30)
            if reply.status_code == 200:
                return reply.json()
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    pytest.fail(f"serve run did not answer:\n{''.join(served.errors[-40:])}")
