"""otlp: what spans cost a step: its time with an exporter to a collector on this machine over that without, and what off costs.

Two apps of P4's hops on one server, in turns: an arm asks for some seconds, then waits until its spans are sent, so that no work
of one falls into the time of the other. Off is one call that returns at once, timed in process, as a share of a query's time.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from dmoa.bench.harness import BenchResult, Spread, interleave, ratio, record, seconds_per_call, spread
from dmoa.bench.latency import ENGINE, STEPS, WIDTH, null_pool, swarm_steps
from dmoa.bench.serve_process import BenchServer
from dmoa.config import TracingConfig
from dmoa.errors import DmoaError
from dmoa.serving.launch import SERVE_FLAGS
from dmoa.serving.otlp import SAVE_S, Exporter
from dmoa.types import Answer, Query

ON_BAR, OFF_BAR = 1.05, 0.01
TAKE_S = 3.0
"""How long an arm asks, one query after the other."""
_OFF_CALLS = 20_000


@contextmanager
def collector() -> Iterator[tuple[str, list[int]]]:
    """Run a collector that reads what it is sent and throws it away; yields its URL and the sizes of the bodies so far."""
    sizes: list[int] = []

    class Taker(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sizes.append(len(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Taker)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sizes
    finally:
        server.shutdown()
        server.server_close()


def take_ms(ask: Callable[[], list[float]], *, take_s: float = TAKE_S, settle_s: float = SAVE_S + 0.5) -> float:
    """Ask for some seconds, then let what is still to be sent go out; return the median time of a step in ms."""
    steps: list[float] = []
    until = time.perf_counter() + take_s
    while not steps or time.perf_counter() < until:
        steps += ask()
    time.sleep(settle_s)
    return statistics.median(steps)


def off_cost_s(calls: int = _OFF_CALLS) -> float:
    """Return what the exporter takes of a query while it is off, in seconds."""
    query = Query(trace_id="0" * 32, text="What is this?")
    answer = Answer(
        trace_id=query.trace_id,
        text="work",
        policy="dmoa",
        stop_reason="max_steps",
        steps=(),
        degraded=False,
        finish_reason="stop",
    )

    async def measured() -> float:
        exporter = Exporter(TracingConfig())
        return seconds_per_call(lambda: exporter.put(query, answer, pool="null", ended_unix_s=0.0), calls)

    return asyncio.run(measured())


def run(ids: Iterable[str], rounds: int | None = None) -> list[BenchResult]:
    """Measure otlp."""
    return run_otlp(rounds or 8) if "otlp" in set(ids) else []


def run_otlp(rounds: int) -> list[BenchResult]:
    """Measure a step with spans against one without, and what remains of it while they are off."""
    pool = null_pool(WIDTH, placement="dedicated", mode="llm")
    with collector() as (url, sizes):
        traced = pool.model_copy(update={"tracing": TracingConfig(otlp_endpoint=url)})
        with (
            BenchServer({"off": pool, "on": traced}, env=SERVE_FLAGS).wait() as server,
            httpx.Client(timeout=120, trust_env=False) as client,
        ):
            arms = {name: partial(take_ms, partial(swarm_steps, client, server.urls[name])) for name in ("off", "on")}
            medians = interleave(arms, rounds)
    if len(sizes) <= rounds:
        raise DmoaError(
            f"bench: the collector was sent {len(sizes)} bodies in {rounds} rounds: spans are missing, and nothing is measured"
        )
    return _results(medians, sum(sizes), off_cost_s())


def _results(medians: dict[str, list[float]], sent_bytes: int, off_s: float) -> list[BenchResult]:
    found = ratio(medians["on"], medians["off"])
    note = f"p50 of a step with spans to a collector over that without, {TAKE_S:g} s of queries an arm and round, {sent_bytes} "
    note += f"bytes sent; A=K={WIDTH} dedicated, llm summarizer; ms without {spread(medians['off']).value:.2f}"
    share = off_s * 1e3 / (STEPS * spread(medians["off"]).value)
    off = Spread(share, share, share, 1)
    beside = f"{off_s * 1e6:.2f} us a query while spans are off, as a share of the {STEPS} steps of one"
    return [
        record("otlp", found, "x", engine=ENGINE, note=note, at_most=ON_BAR, bar_unit="x"),
        record("otlp.off", replace(off, rounds=_OFF_CALLS), "share", engine=ENGINE, note=beside, at_most=OFF_BAR),
    ]
