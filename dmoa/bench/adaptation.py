"""P15: what learning while serving costs those who ask: p50 latency with adaptation on, over that with it off.

Two apps with the same pool on one Ray, one with `router.adaptation: on`. They are measured in short turns, at the same moments
(one in every interval, by chance within it, at 60 % of what the app without adaptation answers when eight ask in turn) with the
same questions; a gate is offered to the adapting one as often as its router takes them, every two seconds at most, so that guards
run and trials with them, and it explores. The learner itself does not run: it takes what CPU is idle, and of that its share; what
offers in its place stands back as it does. A turn is a number of seconds, so the length of the whole is known before.

Many short turns, and moments that are spread evenly: the queues of a Poisson process differ more from turn to turn than what is
measured, and their noise was ten times the bar.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import httpx
from scipy.stats import t

from dmoa.agents.pool import load_pool
from dmoa.bench.harness import BenchResult, Spread, interleave, record
from dmoa.bench.latency import ENGINE, QUESTIONS, ask, engine_label, null_pool
from dmoa.bench.serve_process import BenchServer
from dmoa.config import Config
from dmoa.serving.launch import SERVE_FLAGS

BAR = 1.05
LOAD = 0.6
"""Share of the closed-loop throughput at which queries come."""
CONCURRENCY = 8
_STEPS = 2
MODES = ("off", "on")
_TOKENS = 8
"""Of an answer: a turn shall hold many queries, also of a real model."""
_THREADS = 64


def adapting(pool: Config, mode: str) -> Config:
    """Return a pool whose router takes every offer that its guards let through, from queries without a key too."""
    guards = pool.router.guards.model_copy(update={"cooldown_s": 0.0})
    return pool.changed("router", adaptation=mode, guards=guards, feedback_anonymous=True)


def latency_ms(client: httpx.Client, url: str, model: str, question: str) -> float:
    """Ask one question for a short answer and return how long that took, in ms."""
    began = time.perf_counter()
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": _TOKENS}
    client.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    return (time.perf_counter() - began) * 1e3


def arrivals_s(count: int, rate: float, seed: int) -> list[float]:
    """Return moments at which queries come: one in every interval of 1 / `rate` seconds, evenly by chance within it."""
    rng = random.Random(seed)  # noqa: S311 -- a schedule, not a secret
    return [(number + rng.random()) / rate for number in range(count)]


def open_loop(ask: Callable[[str], float], moments: Sequence[float]) -> list[float]:
    """Ask at set moments, whatever is still under way; return the latencies in ms, from the moment that each was due."""
    began = time.perf_counter()

    def due(number: int) -> float:
        wait = moments[number] - (time.perf_counter() - began)
        if wait > 0:
            time.sleep(wait)
        late_ms = max(0.0, (time.perf_counter() - began - moments[number]) * 1e3)
        return late_ms + ask(QUESTIONS[number % len(QUESTIONS)])

    with ThreadPoolExecutor(min(_THREADS, len(moments))) as threads:
        return list(threads.map(due, range(len(moments))))


def closed_loop(ask: Callable[[str], float], count: int) -> float:
    """Return how many queries a second are answered when so many ask in turn."""
    began = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as threads:
        list(threads.map(lambda number: ask(QUESTIONS[number % len(QUESTIONS)]), range(count)))
    return count / (time.perf_counter() - began)


def interval(ratios: Sequence[float]) -> Spread:
    """Return the geometric mean of paired ratios with Student's 95 % interval of their logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, count = statistics.fmean(logs), len(logs)
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(logs) / math.sqrt(count) if count > 1 else math.inf
    return Spread(math.exp(mean), math.exp(mean - half), math.exp(min(mean + half, 50.0)), count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How one kind of pool is measured."""

    kind: str
    pool: Config
    closed: int
    """Queries that tell the rate, before every round."""
    turn_s: float
    rounds: int

    @property
    def id(self) -> str:
        """The name of its metric."""
        return "P15" if self.kind == "null" else f"P15.{self.kind}"

    def app(self, mode: str) -> str:
        """Return the name of its app in a mode."""
        return f"{self.kind}-{mode}"


def loads(rounds: int | None) -> list[Load]:
    """Return the kinds: scripted agents, and the default pool's model with short answers.

    Between two turns of an app lie two of the other and its closed loop: less than the 30 s after which an idle engine forgets
    its prompts, or one arm alone would compute them anew.
    """
    null = null_pool(8, placement="shared", mode="select").changed("limits", max_steps=_STEPS)
    real = load_pool(None).changed("limits", max_steps=1)
    return [
        Load(kind="null", pool=null, closed=40, turn_s=2.5, rounds=rounds or 26),
        Load(kind="real", pool=real, closed=16, turn_s=10.0, rounds=rounds or 7),
    ]


def _measured(server: BenchServer, client: httpx.Client, load: Load) -> tuple[list[float], str, float]:
    """Return the ratio of p50 latencies of every round, the engine's label, and the median rate of queries a second."""
    asks = {mode: partial(latency_ms, client, server.urls[load.app(mode)], load.pool.name) for mode in MODES}
    for mode in MODES:
        server.offer(load.app("on") if mode == "on" else None)  # an offer's modules are loaded at the first
        closed_loop(asks[mode], CONCURRENCY)
    server.offer(None)
    rates: list[float] = []
    told = ask(client, server.urls[load.app("off")], load.pool.name, QUESTIONS[0])
    turns = iter(range(10_000))

    def take(mode: str) -> float:
        seed = next(turns) // 2  # the same moments for both arms of a round
        if seed == len(rates):  # anew: a machine that slows down would else be overloaded
            rates.append(closed_loop(asks["off"], load.closed))
        moments = arrivals_s(max(4, round(load.turn_s * LOAD * rates[seed])), LOAD * rates[seed], seed)
        server.offer(load.app("on") if mode == "on" else None)
        try:
            return statistics.median(open_loop(asks[mode], moments))
        finally:
            server.offer(None)

    found = interleave({mode: partial(take, mode) for mode in MODES}, load.rounds)
    label = ENGINE if load.kind == "null" else engine_label(told)
    return [on / off for on, off in zip(found["on"], found["off"], strict=True)], label, statistics.median(rates)


def run(ids: Collection[str], rounds: int | None = None) -> list[BenchResult]:
    """Measure P15, P15.real or both: on one Ray, one after the other."""
    kinds = [load for load in loads(rounds) if load.id in ids]
    pools = {load.app(mode): adapting(load.pool, mode) for load in kinds for mode in MODES}
    results = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(BenchServer(pools, env=SERVE_FLAGS)).wait()
        client = stack.enter_context(httpx.Client(timeout=120, trust_env=False, limits=httpx.Limits(max_connections=_THREADS)))
        for load in kinds:
            ratios, label, rate = _measured(server, client, load)
            found = interval(ratios)
            note = (
                f"p50 latency with adaptation on over off, at {LOAD:.0%} of {rate:.3g} queries/s, turns of {load.turn_s:.3g} s, "
                "a gate offered as often as the router takes them; spread: Student's 95 % interval over rounds, whose upper "
                "end has the bar"
            )
            result = record(load.id, found, "x", engine=label, note=note)
            results.append(result.model_copy(update={"bar": f"high <= {BAR}x", "passed": found.high <= BAR}))
    return results
