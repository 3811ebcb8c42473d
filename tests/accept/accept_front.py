"""What clients may do to a served pool of *scripted agents*: attacks, streams cut and unread, overload, deaths, a drain.

One `dmoa serve` with a Ray of its own. Judged, in this order:
1. an endless header line is 431, a chunked body over the limit 413 while it is being sent; 1,050 half-sent bodies and 200
   half-sent headers leave probes and queries alone and are closed in time; proxy and ingress keep nothing of it;
2. one hundred streams, fifty cut midway, ten never read: five seconds later all places are free again;
3. five times the capacity for a minute: every refusal is 429 within 100 ms, accepted queries take at most twice as long (p95)
   as at capacity, memory grows by less than 200 MB and is back within a minute, and the next queries are as quick as before;
4. the proxy killed, the ingress killed, and a drain under load: whatever is answered is an answer or an error object that an
   SDK repeats, and the port is back within 10 s.
Times are those of a quiet machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check, wait_ready
from tests.cluster.swaps import POOL, write_pool
from tests.integration.server import Served, serve

PLACES = 32
CHAT = "/v1/chat/completions"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
MEGABYTE = 1_000_000
RETRIED = (429, 503)
"""Statuses that clients repeat."""


def question(text: str, *, stream: bool = False) -> dict[str, Any]:
    """Return the body of a query."""
    return {"model": "swaps", "messages": [{"role": "user", "content": text}], "stream": stream}


class Pool:
    """The served pool, and what is asked of it: over raw connections, because a client library would be the slower end."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.port = int(served.url.rpartition(":")[2])
        self._watched: list[psutil.Process] = []

    async def ask(self, text: str) -> tuple[int, float, str]:
        """Ask one query; return its status (0: no answer), its seconds and its content type."""
        body = json.dumps(question(text)).encode()
        return await self._asked(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def probe_s(self) -> float:
        """Return the seconds that a probe took; infinite where it failed."""
        status, seconds, _ = await self._asked(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return seconds if status == 200 else float("inf")

    async def _asked(self, request: bytes) -> tuple[int, float, str]:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(120.0):
                reader, writer = await self.open(request)
                answer = await reader.read()
            writer.close()
        except (OSError, TimeoutError) as error:
            return 0, time.perf_counter() - started, type(error).__name__
        head = answer.partition(b"\r\n\r\n")[0].decode("latin-1").splitlines()
        kinds = [line.partition(": ")[2] for line in head if line.lower().startswith("content-type: ")]
        return int(head[0].split()[1]) if head else 0, time.perf_counter() - started, "".join(kinds)

    async def open(self, *pieces: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection and send what is given."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return reader, writer

    def memory(self) -> int:
        """Return the resident bytes of the proxy and the ingress, which are found once: the client shares their cores."""
        if not self._watched:
            self._watched = [*self.served.processes("ray::ProxyActor"), *self.served.processes(":ingress")]
        return sum(process.memory_info().rss for process in self._watched)


async def status_of(reader: asyncio.StreamReader, seconds: float = 30.0) -> int:
    """Return the status of the answer that a connection gets; 0 where it is closed or reset without one, -1 where none comes."""
    try:
        line = await asyncio.wait_for(reader.readline(), seconds)
    except ConnectionError:
        return 0
    except TimeoutError:
        return -1
    return int(line.split()[1]) if line else 0


def p95(values: list[float]) -> float:
    """Return the 95th percentile; 0 of nothing."""
    return sorted(values)[int(0.95 * (len(values) - 1))] if values else 0.0


async def endless(pool: Pool, head: bytes, piece: bytes, limit: int) -> dict[str, float]:
    """Send pieces until there is an answer or `limit` bytes are sent; return the status, what was sent, and the seconds."""
    started, sent = time.perf_counter(), len(head)
    reader, writer = await pool.open(head)
    answer = asyncio.create_task(status_of(reader))
    with contextlib.suppress(ConnectionError):
        while sent < limit and not answer.done():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
            sent += len(piece)
    status = await answer
    writer.close()
    return {"status": status, "sent_bytes": sent, "seconds": round(time.perf_counter() - started, 2)}


async def attacks(pool: Pool) -> dict[str, Any]:
    """Judge item 1."""
    await pool.ask("Warm up?")
    before, piece = pool.memory(), b"a" * 65_536
    header = await endless(pool, b"GET / HTTP/1.1\r\nX: ", piece, 200 * MEGABYTE)
    chunk = b"%x\r\n" % len(piece) + piece + b"\r\n"
    chunked = await endless(pool, POST + b"Transfer-Encoding: chunked\r\n\r\n", chunk, 1000 * MEGABYTE)
    began = time.perf_counter()
    bodies = [await pool.open(POST + b"Content-Length: 1000\r\n\r\n{") for _ in range(1050)]
    heads = [await pool.open(POST) for _ in range(200)]
    probes = [await pool.probe_s() for _ in range(5)]
    asked = await asyncio.gather(*(pool.ask(f"Beside {i}?") for i in range(4)))
    closed = await asyncio.gather(*(status_of(reader) for reader, _ in (*bodies, *heads)))
    seconds = time.perf_counter() - began
    for _, writer in (*bodies, *heads):
        writer.close()
    grown = (pool.memory() - before) / MEGABYTE
    return {
        "endless_header": header,
        "chunked_body": chunked,
        "half_sent": Counter(map(str, closed)),
        "half_sent_closed_within_s": round(seconds, 1),
        "probe_s": max(probes),
        "beside": [status for status, _, _ in asked],
        "memory_grown_mb": round(grown, 1),
        "passed": header["status"] == 431
        and chunked["status"] == 413
        and max(header["seconds"], chunked["seconds"]) < 5.0
        and set(closed) <= {0, 408}
        and seconds < 30.0
        and max(probes) < 1.0
        and all(status == 200 for status, _, _ in asked)
        and grown < 100.0,
    }


async def one_stream(pool: Pool, number: int) -> str:
    """Read a stream to its end, cut it after its first line (the first fifty), or never read it (the next ten)."""
    body = json.dumps(question(f"Stream {number}?", stream=True)).encode()
    reader, writer = await pool.open(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    if 50 <= number < 60:
        await asyncio.sleep(5.0)
        writer.transport.abort()
        return "unread"
    status = await status_of(reader)
    if status != 200:
        writer.close()
        return str(status)
    if number < 50:
        await reader.readuntil(b"data: ")
        writer.transport.abort()
        return "cut"
    rest = await reader.readuntil(b"[DONE]")
    writer.close()
    return "whole" if b"dmoa" in rest else "no end"


async def streams(pool: Pool) -> dict[str, Any]:
    """Judge item 2: 25 at a time, so that none is refused; then as many queries as there are places, at once."""
    ends: Counter[str] = Counter()
    gate = asyncio.Semaphore(25)

    async def one(number: int) -> None:
        async with gate:
            ends[await one_stream(pool, number)] += 1

    await asyncio.gather(*(one(number) for number in range(100)))
    await asyncio.sleep(5.0)
    burst = Counter(status for status, _, _ in await asyncio.gather(*(pool.ask(f"Place {i}?") for i in range(PLACES))))
    passed = ends == {"whole": 40, "cut": 50, "unread": 10} and burst == {200: PLACES}
    return {"ends": ends, "queries_in_all_places": {str(status): number for status, number in burst.items()}, "passed": passed}


async def at_capacity(pool: Pool, seconds: float) -> tuple[float, float]:
    """Keep all places busy; return the queries a second and the p95 of their seconds."""
    took: list[float] = []
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        while time.perf_counter() < end:
            status, seconds_, _ = await pool.ask(f"Capacity {number}?")
            if status == 200:
                took.append(seconds_)

    await asyncio.gather(*(one(number) for number in range(PLACES)))
    return len(took) / seconds, p95(took)


async def overload(pool: Pool, seconds: float) -> dict[str, Any]:
    """Judge item 3."""
    rate, quiet_p95 = await at_capacity(pool, min(15.0, seconds))
    before, peak = pool.memory(), 0
    asked: list[asyncio.Task[tuple[int, float, str]]] = []
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        due = int(5 * rate * elapsed)
        asked += [asyncio.create_task(pool.ask(f"Query {number}?")) for number in range(len(asked), due)]
        peak = max(peak, pool.memory()) if len(asked) % 50 == 0 else peak
        await asyncio.sleep(0.01)
    peak = max(peak, pool.memory())
    results = await asyncio.gather(*asked)
    ended = time.perf_counter()
    _, after_p95 = await at_capacity(pool, 5.0)
    recovered = time.perf_counter() - ended
    left = before + 50 * MEGABYTE
    while pool.memory() > left and time.perf_counter() - ended < 60.0:  # noqa: ASYNC110 -- another process's memory
        await asyncio.sleep(1.0)
    taken = [took for status, took, _ in results if status == 200]
    refused = [took for status, took, _ in results if status == 429]
    kinds = Counter(str(status) for status, _, _ in results)
    grown = (peak - before) / MEGABYTE
    return {
        "capacity_per_s": round(rate, 1),
        "offered_per_s": round(len(results) / seconds, 1),
        "statuses": kinds,
        "p95_at_capacity_s": round(quiet_p95, 3),
        "p95_accepted_s": round(p95(taken), 3),
        "p95_refused_ms": round(1000 * p95(refused), 1),
        "slowest_refusal_ms": round(1000 * max(refused, default=0.0), 1),
        "p95_after_s": round(after_p95, 3),
        "memory_grown_mb": round(grown, 1),
        "memory_left_mb": round((pool.memory() - before) / MEGABYTE, 1),
        "passed": set(kinds) <= {"200", "429"}
        and p95(refused) <= 0.1
        and p95(taken) <= 2 * quiet_p95
        and after_p95 <= 1.5 * quiet_p95
        and recovered <= 15.0
        and grown < 200.0
        and pool.memory() <= left,
    }


async def deaths(pool: Pool) -> dict[str, Any]:
    """Judge the first two of item 4."""
    (proxy,) = pool.served.processes("ray::ProxyActor")
    proxy.kill()
    began = time.perf_counter()
    while await pool.probe_s() == float("inf"):  # noqa: ASYNC110 -- another process's port
        await asyncio.sleep(0.1)
    away = time.perf_counter() - began
    asking = [asyncio.create_task(pool.ask(f"Lost {i}?")) for i in range(8)]
    await asyncio.sleep(0.1)
    (ingress,) = pool.served.processes(":ingress")
    ingress.kill()
    results = await asyncio.gather(*asking)
    lost_s = time.perf_counter()
    while (back := await pool.ask("After it?"))[0] != 200 and time.perf_counter() - lost_s < 60.0:
        results.append(back)
        await asyncio.sleep(0.1)
    back_s = time.perf_counter() - lost_s
    found = Counter(f"{status} {kind}" for status, _, kind in results)
    return {
        "proxy_away_s": round(away, 1),
        "ingress_killed": found,
        "ingress_away_s": round(back_s, 1),
        "passed": max(away, back_s) < 10.0
        and any(status == 503 for status, _, _ in results)
        and all((status == 200 or status in RETRIED) and kind == "application/json" for status, _, kind in results),
    }


async def drain(pool: Pool) -> dict[str, Any]:
    """Judge the last of item 4; the server is gone after it."""
    results: list[tuple[int, float, str]] = []
    is_over = False

    async def one(number: int) -> None:
        while not is_over:
            results.append(await pool.ask(f"Drain {number}?"))
            await asyncio.sleep(0.02 if results[-1][0] else 0.2)

    asking = [asyncio.create_task(one(number)) for number in range(8)]
    await asyncio.sleep(2.0)
    pool.served.process.send_signal(signal.SIGTERM)
    exit_status = await asyncio.to_thread(pool.served.process.wait, 60)
    is_over = True
    await asyncio.gather(*asking)
    found = Counter(f"{status} {kind}" for status, _, kind in results)
    answered = [(status, kind) for status, _, kind in results if status]
    return {
        "exit_status": exit_status,
        "answers": found,
        "passed": exit_status == 0
        and any(status == 503 for status, _ in answered)
        and all((status == 200 or status in RETRIED) and kind == "application/json" for status, kind in answered),
    }


async def check(folder: Path, seconds: float) -> dict[str, Any]:
    """Serve, and judge one item after the other."""
    served = serve(write_pool(folder, POOL.replace("max_steps: 4", f"max_steps: 4, max_queued_requests: {PLACES}")))
    wait_ready(served)
    pool = Pool(served)
    found: dict[str, Any] = {"agents": "scripted: no figure speaks of a model", "load_before": psutil.getloadavg()[0]}
    try:
        for name, judged in (
            ("attacks", attacks(pool)),
            ("streams", streams(pool)),
            ("overload", overload(pool, seconds)),
            ("deaths", deaths(pool)),
            ("drain", drain(pool)),
        ):
            found[name] = await judged
            print(name, json.dumps(found[name]), flush=True)
    finally:
        served.stop()
    found["passed"] = all(part["passed"] for part in found.values() if isinstance(part, dict))
    return found


FLAGS = {"--seconds": {"type": float, "default": 60.0, "help": "of overload"}}

if __name__ == "__main__":
    raise SystemExit(run_check(lambda options: check(options.scratch, options.seconds), FLAGS))
