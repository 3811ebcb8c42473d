"""A served pool of *scripted agents* at half its load for an hour: what its processes keep, and that nothing is lost.

The load is half of what it answers with all places busy, by a client with kept connections, one query in ten as a stream, one in
twenty cut in mid-stream. Judged after the warm-up (a fifth of the time): resident memory of all processes grows by less
than 1 MB a minute (a line through a sample every ten seconds), and of none by more; file descriptors are flat (less than one
more in ten minutes); every query is answered, and every answer has a trace of its own.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check
from tests.cluster.swaps import POOL, write_pool
from tests.integration.server import Served, serve

PLACES, SAMPLE_S, MB_A_MINUTE, FILES_A_MINUTE = 8, 10.0, 1.0, 0.1


class Load:
    """Queries at a rate, and what came of them."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.ends: Counter[str] = Counter()
        self.traces: set[str] = set()
        self.answers = 0

    async def ask(self, number: int) -> None:
        """Ask one query: every tenth as a stream, every twentieth of all cut in mid-stream."""
        body: dict[str, Any] = {"model": "swaps", "messages": [{"role": "user", "content": f"Query {number}?"}]}
        try:
            if number % 10 == 0:
                async with self.client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
                    text = ""
                    async for piece in reply.aiter_text():
                        text += piece
                        if number % 20 == 0:
                            break
                self.ends["cut" if number % 20 == 0 else "stream" if "[DONE]" in text else "no end"] += 1
                return
            reply = await self.client.post("/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            self.ends[type(error).__name__] += 1
            return
        self.ends[str(reply.status_code)] += 1
        if reply.status_code == 200:
            self.answers += 1
            self.traces.add(reply.json()["dmoa"]["trace_id"])

    async def capacity(self, seconds: float) -> float:
        """Keep all places busy; return the queries a second."""
        end, before = time.monotonic() + seconds, self.answers

        async def busy(place: int) -> None:
            number = 20 * place + 1  # no stream
            while time.monotonic() < end:
                await self.ask(number)

        await asyncio.gather(*(busy(place) for place in range(PLACES)))
        return (self.answers - before) / seconds

    async def at_rate(self, rate: float, seconds: float) -> None:
        """Ask at a rate."""
        began, number, asking = time.monotonic(), 0, set[asyncio.Task[None]]()
        while (elapsed := time.monotonic() - began) < seconds:
            while number < rate * elapsed:
                task = asyncio.create_task(self.ask(number))
                asking.add(task)
                task.add_done_callback(asking.discard)
                number += 1
            await asyncio.sleep(0.5 / rate)
        await asyncio.gather(*asking)


class Samples:
    """Memory and descriptors of every process of the server."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._names: dict[int, str] = {}
        self.at_s: list[float] = []
        self.mb: defaultdict[str, list[float]] = defaultdict(list)
        self.files: defaultdict[str, list[float]] = defaultdict(list)

    def take(self, at_s: float) -> None:
        """Look once."""
        found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for process in (psutil.Process(self._served.process.pid), *self._served.processes("")):
            try:
                name = " ".join(process.cmdline()) or process.name()
                if "ray::IDLE" in name:
                    continue
                name = name.split()[0].rpartition("/")[2] if name.startswith("ray::") else Path(name.split()[0]).name
                name = self._names.setdefault(process.pid, name)  # an actor's title tells what it is at
                found[f"{name} {process.pid}"][0] += process.memory_info().rss / 1e6
                found[f"{name} {process.pid}"][1] += process.num_fds()
            except psutil.Error:
                continue
        self.at_s.append(at_s)
        for name, (mb, files) in found.items():
            self.mb[name].append(mb)
            self.files[name].append(files)

    def slopes(self, since: int) -> tuple[dict[str, float], dict[str, float]]:
        """Return what each process that was there throughout, and all of them, grew by a minute: MB, and descriptors."""
        minutes = np.array(self.at_s[since:]) / 60
        whole = [name for name, values in self.mb.items() if len(values) == len(self.at_s)]
        rows = []
        for kept in (self.mb, self.files):
            series = {name: np.array(kept[name][since:]) for name in whole}
            series["all"] = np.sum(list(series.values()), axis=0)
            rows.append({name: round(float(np.polyfit(minutes, values, 1)[0]), 3) for name, values in series.items()})
        return rows[0], rows[1]


async def check(served: Served, minutes: float) -> dict[str, Any]:
    """Load and look."""
    samples = Samples(served)
    async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=httpx.Limits(max_connections=64)) as client:
        load = Load(client)
        rate = await load.capacity(15.0) / 2
        load.ends.clear()
        load.answers, load.traces = 0, set()
        began = time.monotonic()
        loading = asyncio.create_task(load.at_rate(rate, 60 * minutes))
        while not loading.done():
            samples.take(time.monotonic() - began)
            await asyncio.wait({loading}, timeout=SAMPLE_S)
    mb, files = samples.slopes(len(samples.at_s) // 5)
    judged = {
        "memory": max(mb.values()) < MB_A_MINUTE,
        "files": max(files.values()) < FILES_A_MINUTE,
        "answered": set(load.ends) == {"200", "stream", "cut"},
        "traces": len(load.traces) == load.answers > 0,
    }
    ends = sorted(((values[-1], name) for name, values in samples.mb.items()), reverse=True)
    totals = [sum(values[i] for values in samples.mb.values() if len(values) > i) for i in range(0, len(samples.at_s), 6)]
    return {
        "agents": "scripted: no figure speaks of a model",
        "minutes": minutes,
        "rate_per_s": round(rate, 2),
        "ends": dict(load.ends),
        "mb_a_minute": dict(sorted(mb.items(), key=lambda row: -row[1])[:8]) | {"all": mb["all"]},
        "files_a_minute": dict(sorted(files.items(), key=lambda row: -row[1])[:5]) | {"all": files["all"]},
        "mb_at_the_end": {name: round(value) for value, name in ends[:8]},
        "all_mb_each_minute": [round(value) for value in totals],
        "judged": judged,
        "passed": all(judged.values()),
    }


def soak(folder: Path, minutes: float) -> dict[str, Any]:
    """Serve, load and look."""
    served = serve(write_pool(folder, POOL.replace("num_traces: 100000", "num_traces: 1000")))
    try:
        return asyncio.run(check(served, minutes))
    finally:
        served.stop()


FLAGS = {"--minutes": {"type": float, "default": 60.0}}

if __name__ == "__main__":
    raise SystemExit(run_check(lambda options: soak(options.scratch, options.minutes), FLAGS))
