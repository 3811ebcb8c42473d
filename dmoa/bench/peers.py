"""peers: what a query costs beside its model calls, against a plain asyncio script and LangGraph, both behind FastAPI.

Three calls a query to one endpoint that answers at once. The servers run in turns, the others frozen: CPU of all their processes
and queries a second with 16 in flight, then latency with one. dmoa is asked questions that it has seen before, and new ones,
which it has to embed; a second one decides in its ingress (`router.decide`). The peers live in an environment of their own, made
once in dmoa's cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

from dmoa.bench.child import Child
from dmoa.bench.harness import BenchResult, interleave, ratio, record, spread
from dmoa.bench.latency import Stage
from dmoa.bench.peer_servers import PEERS, ROLES
from dmoa.bench.serve_process import BenchServer
from dmoa.config import Config
from dmoa.engines.models import cache_root, fetch
from dmoa.errors import DmoaError
from dmoa.serving.launch import SERVE_FLAGS

REQUIREMENTS = ("langgraph==1.2.24", "langchain-openai==1.7.4", "fastapi==0.136.3", "uvicorn[standard]==0.54.0", "openai==3.52.0")
"""Of the environment of the peers."""
IN_FLIGHT = 16
CPU_BAR, NEW_CPU_BAR, SPEED_BAR, LATENCY_BAR = 1.0, 1.5, 1.0, 1.5
QUERIES, ALONE = 320, 60
"""Queries of a round with many in flight, and one at a time."""
_PIP_TIMEOUT_S = 600.0
_SERVERS = Path(__file__).with_name("peer_servers.py")
_ENGINE = "openai"


def environment() -> str:
    """Return the Python of the peers' environment, made on the first call. Raises DmoaError where pip cannot."""
    mark = sha256("\n".join((*REQUIREMENTS, sys.version)).encode()).hexdigest()[:12]
    folder = cache_root() / f"peers-{mark}"
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return str(python)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], install):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
        if done.returncode:
            raise DmoaError(f"bench: the peers' environment {folder}: {done.stderr.strip()[-500:]}")
    (folder / "ready").touch()
    return str(python)


def peers_pool(endpoint: str, num_agents: int = 8, decide: str = "router") -> Config:
    """Return a pool whose gate asks three of its agents at an endpoint, once; `decide`: where."""
    llm = {"model": "openai:null", "engine": "openai", "engine_kwargs": {"base_url": endpoint}, "max_num_seqs": 64}
    agents = [{"name": f"agent-{i}", "llm": "s", "profile": ROLES[i % len(ROLES)]} for i in range(num_agents)]
    tree: dict[str, Any] = {
        "name": "peers",
        "llms": {"s": llm},
        "agents": agents,
        "gate": {"activation": {"rule": "fixed", "max_agents": len(ROLES)}},
        "limits": {"max_steps": 1},
        "router": {"decide": decide},
    }
    return Config.model_validate(tree)


class Peer(Child):
    """One of `peer_servers`."""

    def __init__(self, python: str, kind: str, *args: str) -> None:
        super().__init__(str(_SERVERS), kind, *args, env=os.environ, stop_timeout_s=5.0, python=python)
        self.url = f"http://127.0.0.1:{self.hear()}/v1"


class Caller:
    """One connection to a server, spoken to with little of a CPU."""

    def __init__(self, url: str, model: str) -> None:
        """`url`: base URL with /v1."""
        found = re.fullmatch(r"http://([\d.]+):(\d+)(/.*)", url)
        assert found is not None
        self._place, self._path, self._model = (found[1], int(found[2])), found[3], model

    async def __aenter__(self) -> Caller:
        self._reader, self._writer = await asyncio.open_connection(*self._place, limit=2**20)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._writer.close()

    async def ask(self, question: str) -> float:
        """Ask and return how long the reply took, in ms. Raises DmoaError for any but a 200."""
        body = json.dumps({"model": self._model, "messages": [{"role": "user", "content": question}]}).encode()
        host, port = self._place
        head = f"POST {self._path}/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        began = time.perf_counter()
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        said = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", said, re.IGNORECASE)
        if not said.startswith(b"HTTP/1.1 200 ") or length is None:
            raise DmoaError(f"bench: {self._path}: expected a whole reply, saw {said[:200]!r}")
        await self._reader.readexactly(int(length[1]))
        return (time.perf_counter() - began) * 1e3


async def _ask_all(url: str, model: str, questions: Iterator[str], in_flight: int) -> list[float]:
    """Ask all questions, so many at a time, and return the latencies in ms."""

    async def worker() -> list[float]:
        async with Caller(url, model) as caller:
            return [await caller.ask(question) for question in questions]

    return [ms for some in await asyncio.gather(*(worker() for _ in range(in_flight))) for ms in some]


def cpu_s(processes: Sequence[psutil.Process]) -> dict[int, tuple[str, float]]:
    """Return the processes' names and CPU times so far in seconds, by pid."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            found[process.pid] = (name_of(process.cmdline()), times.user + times.system)
    return found


def name_of(cmdline: Sequence[str]) -> str:
    """Return a short name of a process: the deployment or actor that a worker of Ray runs, else its program."""
    text = " ".join(cmdline)
    for pattern in (r"ray::ServeReplica:[^:]+:(\S+)", r"ray::(\w+)", r"dashboard/(\w+)\.py", r"(?:^|/)(\w+)(?: |$)"):
        found = re.search(pattern, text)
        if found:
            return found[1]
    return "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """One round of one server."""

    cpu_ms: float
    """CPU a query of all its processes."""
    queries_per_s: float
    p50_ms: float
    """With one query in flight."""
    parts: Mapping[str, float]
    """CPU a query in ms, by process."""


def take(url: str, model: str, processes: Callable[[], Sequence[psutil.Process]], questions: Iterator[str]) -> Taken:
    """Measure one server for one round."""
    before, began = cpu_s(processes()), time.perf_counter()
    done = asyncio.run(_ask_all(url, model, itertools.islice(questions, QUERIES), IN_FLIGHT))
    seconds, after = time.perf_counter() - began, cpu_s(processes())
    parts: dict[str, float] = {}
    for pid, (name, used) in after.items():
        parts[name] = parts.get(name, 0.0) + (used - before.get(pid, (name, 0.0))[1]) / len(done) * 1e3
    alone = asyncio.run(_ask_all(url, model, itertools.islice(questions, ALONE), 1))
    return Taken(cpu_ms=sum(parts.values()), queries_per_s=len(done) / seconds, p50_ms=statistics.median(alone), parts=parts)


def _questions(*, are_new: bool) -> Iterator[str]:
    seen = itertools.cycle(range(8))
    for number in itertools.count() if are_new else seen:
        yield f"A farmer has {number} boxes with twelve apples each and sells five apples. How many apples are left over?"


def run(rounds: int = 5) -> list[BenchResult]:
    """Measure all arms in turns. A round takes some half a minute on two cores."""
    python = environment()
    fetch("minilm")
    rows: dict[str, list[Taken]] = {}
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(Peer(sys.executable, "null"))
        ours = {
            arm: stack.enter_context(BenchServer({"peers": peers_pool(endpoint.url, decide=decide)}, env=SERVE_FLAGS))
            for arm, decide in (("dmoa", "router"), ("dmoa_ingress", "ingress"))
        }
        servers: dict[str, Any] = {kind: stack.enter_context(Peer(python, kind, endpoint.url)) for kind in PEERS}
        urls = {kind: server.url for kind, server in servers.items()}
        urls |= {arm: f"{server.wait().urls['peers']}/v1" for arm, server in ours.items()}
        servers |= ours
        stage = Stage([*servers.values()])
        arms = {kind: kind for kind in servers} | {"dmoa_new": "dmoa"}
        questions = {arm: _questions(are_new=arm == "dmoa_new") for arm in arms}

        def arm_of(arm: str) -> float:
            kind = arms[arm]
            server = servers[kind]
            found: list[Taken] = []

            def measure() -> list[float]:
                found.append(take(urls[kind], "peers", server.processes, questions[arm]))
                return []

            stage.measure(server, measure)
            rows.setdefault(arm, []).append(found[-1])
            return found[-1].cpu_ms

        interleave({arm: partial(arm_of, arm) for arm in arms}, rounds)
    return results({arm: taken[1:] for arm, taken in rows.items()})


def results(rows: Mapping[str, Sequence[Taken]]) -> list[BenchResult]:
    """Return the ratios to LangGraph, which have bars, and what lies behind them."""
    found = []
    cpu = {arm: [one.cpu_ms for one in taken] for arm, taken in rows.items()}
    speed = {arm: [one.queries_per_s for one in taken] for arm, taken in rows.items()}
    p50 = {arm: [one.p50_ms for one in taken] for arm, taken in rows.items()}
    what = f"dmoa over LangGraph behind FastAPI, {len(ROLES)} calls a query to an endpoint that answers at once"
    for id_, figures, arm, note, bars in (
        ("peers.cpu", cpu, "dmoa", "CPU a query, all processes; texts seen before", {"at_most": CPU_BAR}),
        ("peers.cpu_new", cpu, "dmoa_new", "CPU a query, all processes; every text embedded", {"at_most": NEW_CPU_BAR}),
        ("peers.speed", speed, "dmoa", f"queries/s at {IN_FLIGHT} in flight", {"at_least": SPEED_BAR}),
        ("peers.p50", p50, "dmoa", "p50 latency at 1 in flight", {"at_most": LATENCY_BAR}),
    ):
        against = ratio(figures[arm], figures["langgraph"])
        found.append(record(id_, against, "x", engine=_ENGINE, note=f"{note}; {what}", bar_unit="x", **bars))
    for arm, taken in rows.items():
        for name, figures, unit in (("cpu", cpu, "ms"), ("speed", speed, "queries/s"), ("p50", p50, "ms")):
            note = _parts_note(taken) if name == "cpu" else ""
            found.append(record(f"peers.{arm}.{name}", spread(figures[arm]), unit, engine=_ENGINE, note=note))
    return found


def _parts_note(taken: Sequence[Taken]) -> str:
    names = {name for one in taken for name in one.parts}
    medians = {name: statistics.median(one.parts.get(name, 0.0) for one in taken) for name in names}
    largest = sorted(medians.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {ms:.1f}" for name, ms in largest if ms >= 0.05)
