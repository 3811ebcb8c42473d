"""otlp: what spans cost a step: P4's with an exporter to a collector on this machine over the same without, and what off costs.

One app, whose trace store is told to export or not, in turns: both arms are the same processes. A turn asks one query after the
other; its first seconds are not counted, until its own spans are sent as often as they are made, and none of the turn before.
The mean of the steps is judged: sending falls on few steps, which a median passes over. Off is one call that returns at once,
timed in process, as a share of a query's time.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from dmoa.bench.adaptation import interval
from dmoa.bench.harness import BenchResult, Spread, interleave, record, seconds_per_call, spread
from dmoa.bench.latency import ENGINE, NUM_AGENTS, STEPS, WIDTH, null_pool, swarm_steps
from dmoa.bench.serve_process import BenchServer
from dmoa.config import TracingConfig
from dmoa.errors import DmoaError
from dmoa.serving.launch import SERVE_FLAGS
from dmoa.serving.otlp import SEND_S, Exporter
from dmoa.trace import AnsweredQuery
from dmoa.types import Answer, Query

ON_BAR, OFF_BAR = 1.05, 0.01
TAKE_S = 4.0
"""How long the counted part of a turn asks."""
WARM_S = SEND_S + 0.5
ROUNDS = 16
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


def take_ms(ask: Callable[[], list[float]], *, warm_s: float = WARM_S, take_s: float = TAKE_S) -> list[float]:
    """Ask for some seconds, then for some more whose steps are counted; return their times in ms."""
    asked_for(ask, warm_s)
    return asked_for(ask, take_s)


def asked_for(ask: Callable[[], list[float]], seconds: float) -> list[float]:
    """Ask at least once, and for so long; return the times of all steps in ms."""
    steps, until = ask(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        steps += ask()
    return steps


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
        exporter, answered = Exporter(TracingConfig()), AnsweredQuery(query=query, answer=answer, pool="null")
        return seconds_per_call(lambda: exporter.put(answered), calls)

    return asyncio.run(measured())


def run(rounds: int = ROUNDS) -> list[BenchResult]:
    """Measure otlp: a step with spans against one without, and what remains of it while they are off."""
    pool = null_pool(NUM_AGENTS, placement="dedicated", mode="llm")
    turns: dict[str, list[list[float]]] = {"off": [], "on": []}
    with (
        collector() as (url, sizes),
        BenchServer({"swarm": pool}, env=SERVE_FLAGS).wait() as server,
        httpx.Client(timeout=120, trust_env=False) as client,
    ):

        def turn(arm: str) -> float:
            server.export_spans("swarm", url if arm == "on" else None)
            turns[arm].append(take_ms(partial(swarm_steps, client, server.urls["swarm"])))
            return statistics.fmean(turns[arm][-1])

        interleave({arm: partial(turn, arm) for arm in turns}, rounds)
    if len(sizes) <= rounds:
        raise DmoaError(
            f"bench: the collector was sent {len(sizes)} bodies in {rounds} rounds: spans are missing, and nothing is measured"
        )
    return _results({arm: found[1:] for arm, found in turns.items()}, sum(sizes), off_cost_s())


def _results(turns: dict[str, list[list[float]]], sent_bytes: int, off_s: float) -> list[BenchResult]:
    """Return the figures of the steps' times in ms, turn by turn of both arms."""
    means, medians = (
        {arm: [measure(steps) for steps in found] for arm, found in turns.items()}
        for measure in (statistics.fmean, statistics.median)
    )
    off_ms = spread(medians["off"]).value
    note = f"mean step with spans to a collector over that without, {TAKE_S:g} s of queries a turn, {sent_bytes} bytes sent; "
    note += f"A={NUM_AGENTS}, K={WIDTH} dedicated, llm summarizer; p50 without {off_ms:.2f} ms; spread: Student's 95 % interval"
    share = off_s * 1e3 / (STEPS * off_ms)
    off = Spread(share, share, share, _OFF_CALLS)
    beside = f"{off_s * 1e6:.2f} us a query while spans are off, as a share of the {STEPS} steps of one"
    return [
        record("otlp", _paired(means), "x", engine=ENGINE, note=note, at_most=ON_BAR, bar_unit="x"),
        record("otlp.p50", _paired(medians), "x", engine=ENGINE, note="the same of the turns' median steps"),
        record("otlp.off", off, "share", engine=ENGINE, note=beside, at_most=OFF_BAR),
    ]


def _paired(figures: dict[str, list[float]]) -> Spread:
    return interval([on / off for on, off in zip(figures["on"], figures["off"], strict=True)])
