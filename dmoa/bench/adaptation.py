"""P15: what learning while serving costs those who ask: p50 latency with adaptation on, over that with it off.

Two servers with the same pool, one with `router.adaptation: on` to which a gate is offered every two seconds, so that guards run
and trials with them; in turns, the other frozen. Queries come at random moments (Poisson), at 60 % of what the server without
adaptation answers when eight ask in turn. The learner itself does not run: how much of a CPU it takes is its configuration.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx

from dmoa.agents.pool import load_pool
from dmoa.bench.harness import BenchResult, Spread, interleave, record
from dmoa.bench.latency import ENGINE, QUESTIONS, Stage, engine_label, null_pool
from dmoa.bench.serve_process import BenchServer
from dmoa.config import Config
from dmoa.serving.launch import SERVE_FLAGS

BAR = 1.05
LOAD = 0.6
"""Share of the closed-loop throughput at which queries come."""
CONCURRENCY = 8
_STEPS = 4
_THREADS = 64


def adapting(pool: Config, mode: str) -> Config:
    """Return a pool whose router takes every offer that its guards let through, from queries without a key too."""
    guards = pool.router.guards.model_copy(update={"cooldown_s": 0.0})
    router = pool.router.model_copy(update={"adaptation": mode, "guards": guards, "feedback_anonymous": True})
    return pool.model_copy(update={"router": router})


def latency_ms(client: httpx.Client, url: str, model: str, question: str) -> float:
    """Ask one question and return how long that took, in ms."""
    began = time.perf_counter()
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    client.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    return (time.perf_counter() - began) * 1e3


def arrivals_s(count: int, rate: float, seed: int) -> list[float]:
    """Return moments at which queries come: a Poisson process of `rate` a second."""
    rng, at, found = random.Random(seed), 0.0, []  # noqa: S311 -- a schedule, not a secret
    for _ in range(count):
        at += rng.expovariate(rate)
        found.append(at)
    return found


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
    from scipy.stats import t

    logs = [math.log(ratio) for ratio in ratios]
    mean, count = statistics.fmean(logs), len(logs)
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(logs) / math.sqrt(count) if count > 1 else math.inf
    return Spread(math.exp(mean), math.exp(mean - half), math.exp(min(mean + half, 50.0)), count)


def _measured(pool: Config, queries: int, rounds: int) -> tuple[Spread, str, float]:
    """Return the ratio of p50 latencies, the engine's label, and the rate of queries a second."""
    label = ENGINE
    with contextlib.ExitStack() as stack:
        servers = {
            mode: stack.enter_context(BenchServer({mode: adapting(pool, mode)}, env=SERVE_FLAGS, offers=mode == "on"))
            for mode in ("off", "on")
        }
        client = stack.enter_context(httpx.Client(timeout=300, trust_env=False, limits=httpx.Limits(max_connections=_THREADS)))
        stage = Stage([server.wait() for server in servers.values()])
        asks = {mode: partial(latency_ms, client, server.urls[mode], pool.name) for mode, server in servers.items()}
        (rate,) = stage.measure(servers["off"], lambda: [closed_loop(asks["off"], queries)])
        if pool.name != "null":
            url = servers["off"].urls["off"]
            body = {"model": pool.name, "messages": [{"role": "user", "content": QUESTIONS[0]}]}
            label = engine_label(client.post(f"{url}/v1/chat/completions", json=body).json()["dmoa"])
        schedules = iter(range(10_000))

        def take(mode: str) -> float:
            moments = arrivals_s(queries, LOAD * rate, next(schedules) // 2)  # the same schedule for both arms of a round
            return statistics.median(stage.measure(servers[mode], partial(open_loop, asks[mode], moments)))

        found = interleave({mode: partial(take, mode) for mode in servers}, rounds)
    return interval([on / off for on, off in zip(found["on"], found["off"], strict=True)]), label, rate


def run_p15(rounds: int, kinds: Iterable[str] = ("null", "real")) -> list[BenchResult]:
    """Measure P15 with scripted agents, and reported beside it with the default pool's model."""
    results = []
    for kind in kinds:
        if kind == "null":
            limited = null_pool(8, placement="shared", mode="select").limits.model_copy(update={"max_steps": _STEPS})
            pool, queries = null_pool(8, placement="shared", mode="select").model_copy(update={"limits": limited}), 120
        else:
            pool, queries = load_pool(None), 16
        found, label, rate = _measured(pool, queries, rounds if kind == "null" else max(2, rounds // 3))
        note = (
            f"p50 latency with adaptation on over off, at {LOAD:.0%} of {rate:.3g} queries/s, a gate offered every 2 s; spread: "
        )
        note += "Student's 95 % interval over rounds, whose upper end has the bar"
        result = record("P15" if kind == "null" else "P15.real", found, "x", engine=label, note=note)
        results.append(result.model_copy(update={"bar": f"high <= {BAR}x", "passed": found.high <= BAR}))
    return results


def run(ids: Iterable[str], rounds: int | None = None) -> list[BenchResult]:
    """Measure P15."""
    return run_p15(rounds or 10) if "P15" in set(ids) else []
