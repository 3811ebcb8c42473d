"""A `dmoa serve` process for tests: started on a free port, watched through its own output, ended with a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from dmoa.serving.launch import free_port

READY = re.compile(r"dmoa: ready at (\S+) \(pool (\S+), gate (\S+)\)")


class Served:
    """One server process with a Ray cluster of its own."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | dict(env or {}),
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._drains = [
            threading.Thread(target=self._drain, args=(stream, kept), daemon=True)
            for stream, kept in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        ]
        for drain in self._drains:
            drain.start()
        self.url = self.pool = self.gate = ""

    @staticmethod
    def _drain(stream: IO[str], kept: list[str]) -> None:
        with stream:
            for line in stream:
                kept.append(line)

    def wait_ready(self, timeout_s: float = 400.0) -> Served:
        """Wait for the line that says where the server answers."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in list(self.lines):
                found = READY.search(line)
                if found:
                    self.url, self.pool, self.gate = found.groups()
                    return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise AssertionError(f"the server did not get ready:\n{''.join(self.lines[-20:])}\n{''.join(self.errors[-60:])}")

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the cluster's processes whose title contains `title`, such as `ray::RouterActor`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self, timeout_s: float = 60.0) -> int:
        """End the server as a user would (SIGTERM), then make sure that nothing of it is left. Returns the exit status."""
        tree = [self.process, *psutil.Process(self.process.pid).children(recursive=True)] if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait(10)
        for process in tree[1:]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for drain in self._drains:
            drain.join(10)
        return status


def serve(config: Path, *options: str, env: Mapping[str, str] | None = None, port: int | None = None) -> Served:
    """Start `dmoa serve` for a pool file, on a free port by default, and wait until it answers."""
    command = [
        str(Path(sys.executable).with_name("dmoa")),
        "serve",
        "--config",
        str(config),
        "--port",
        str(port or free_port()),
        *options,
    ]
    return Served(command, env).wait_ready()
