"""A Ray cluster of several nodes on this machine, with GPUs that are declared and not there, for tests.

Run as a program it holds `ray.cluster_utils.Cluster` in a process of its own, which does what the lines on its standard
input say: Ray's state, flags and processes stay out of pytest's. `Nodes` is the other end of its pipes.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from dmoa.serving.launch import free_port

ROOT = Path(__file__).parents[2]
_CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One living actor of the cluster."""

    name: str
    """Its Ray name; of a replica `SERVE_REPLICA::app#deployment#id`."""
    pid: int
    node: str
    gpus: tuple[str, ...]
    """Ids of its GPUs, as the node counts them; empty where it was not asked or has none."""

    @property
    def deployment(self) -> str:
        """The Serve deployment, empty for what is no replica."""
        return self.name.split("#")[1] if "#" in self.name else ""


class Nodes:
    """The cluster, seen from a test."""

    def __init__(self, gpus: Sequence[int], env: dict[str, str]) -> None:
        """Start one node per entry, with so many declared GPUs; the first is the head."""
        self.env = env
        """What a process needs in its environment to join."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed in `stop`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.nodes"],
            cwd=ROOT,
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self.living: list[str] = []
        """Nodes in the order they were added; the first is the head."""
        for count in gpus:
            self.add(count)

    def _do(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise AssertionError(f"the cluster ended while it was to {command}:\n{self._log.read().decode()[-3000:]}")
        return json.loads(line)

    def add(self, gpus: int) -> str:
        """Add a node and return its id."""
        self.living.append(self._do(do="add", gpus=gpus))
        return self.living[-1]

    def kill(self, node: str) -> None:
        """Kill a node's processes as a power cut would, without notice to anybody."""
        self._do(do="kill", node=node)
        self.living.remove(node)

    def kill_gcs(self) -> None:
        """Kill the control store of the head alone, and start it again on what its Redis holds."""
        self._do(do="kill_gcs")

    def replace_head(self, gpus: int = 0) -> None:
        """Kill all of the head as a power cut would, and start another at its address, on what its Redis holds."""
        self.living[0] = self._do(do="replace_head", gpus=gpus)

    @property
    def environ(self) -> dict[str, str]:
        """This process's environment with `env` in it."""
        return os.environ | self.env

    @property
    def address(self) -> str:
        """HOST:PORT of the cluster."""
        return str(self._do(do="address"))

    def placed(self) -> list[Placed]:
        """Return the living Serve replicas and dmoa's detached actors, with nodes and GPUs."""
        return [Placed(**row | {"gpus": tuple(row["gpus"])}) for row in self._do(do="placed")]

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the cluster's processes whose title contains `title`, such as `ray::ServeController`."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def stop(self) -> None:
        """End the cluster, and make sure that nothing of it is left."""
        tree = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()


@contextmanager
def cluster(*gpus: int, redis: str | None = None) -> Iterator[Nodes]:
    """Run a cluster with tokens, as an operator's; at the end everything that it started is gone.

    `redis`: HOST:PORT of where its head keeps what it must find again after a restart.
    """
    # Short, because Ray's sockets lie under it and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="dn", dir="/tmp"))
    (folder / "token").write_text("f" * 64)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "DMOA_TEST_RAY_FOLDER": str(folder)}
    nodes = Nodes((), env | ({"RAY_REDIS_ADDRESS": redis} if redis else {}))
    try:
        for count in gpus:
            nodes.add(count)
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float = 60.0) -> None:
    """Wait until the condition holds, asking for it twenty times a second."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(0.05)


class _Held:
    """The cluster itself, in the program's process."""

    def __init__(self) -> None:
        from dmoa.serving.launch import set_flags

        set_flags()  # before Ray is imported, here and in every process that the nodes start
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._nodes: dict[str, Any] = {}
        self._port = free_port()

    def add(self, gpus: int) -> str:
        # One CPU: Ray starts a worker ahead for every one, and no part of a scripted pool takes any.
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "include_dashboard": False}
        if self._cluster.head_node is None:
            options |= {"temp_dir": os.environ["DMOA_TEST_RAY_FOLDER"], "gcs_server_port": self._port}
        node = self._cluster.add_node(**options)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def kill_gcs(self) -> None:
        head = self._cluster.head_node
        head.kill_gcs_server()
        head.start_gcs_server()

    def replace_head(self, gpus: int) -> str:
        import ray

        ray.shutdown()  # a driver ends with the head that it joined
        head, self._cluster.head_node = self._cluster.head_node, None
        head.kill_all_processes(check_alive=False, allow_graceful=False)
        del self._nodes[head.node_id]
        return self.add(gpus)

    def kill(self, node: str) -> None:
        self._cluster.remove_node(self._nodes.pop(node), allow_graceful=False)

    def address(self) -> str:
        return str(self._cluster.address)

    def placed(self) -> list[dict[str, Any]]:
        import ray

        if not ray.is_initialized():
            ray.init(address=self._cluster.address, log_to_driver=False)

        def look(_: object) -> tuple[int, str, list[str]]:  # runs inside the actor
            import os

            context = ray.get_runtime_context()
            return os.getpid(), context.get_node_id(), context.get_accelerator_ids().get("GPU", [])

        asked = {}
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == "dmoa" or actor["name"].startswith("SERVE_REPLICA::"):
                with suppress(ValueError):
                    asked[actor["name"]] = ray.get_actor(**actor).__ray_call__.remote(look)
        rows = []
        for name, answer in asked.items():
            with suppress(ray.exceptions.RayError):
                pid, node, gpus = ray.get(answer, timeout=_CALL_TIMEOUT_S)
                rows.append({"name": name, "pid": pid, "node": node, "gpus": gpus})
        return rows

    def stop(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


def _main(commands: IO[str], answers: IO[str]) -> None:
    held = _Held()
    try:
        for line in commands:
            command = json.loads(line)
            answer = getattr(held, command.pop("do"))(**command)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        held.stop()


if __name__ == "__main__":
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints must not get between the answers
    _main(sys.stdin, _answers)
