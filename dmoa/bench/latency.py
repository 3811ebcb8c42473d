"""P3, P4 and growth: what orchestration adds to a query, Serve's hops to a step, and more agents on one deployment to a step.

P3's share = (wall time of the query - engine time on the critical path) / that engine time. The critical path of a step is
its slowest active agent and then the summarizer; an agent's engine time runs from the engine's accept to its last token.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
from scipy.stats import linregress

from dmoa.agents.pool import load_pool
from dmoa.bench.harness import BenchResult, Spread, interleave, ratio, record, spread
from dmoa.bench.serve_process import BenchServer
from dmoa.config import Config
from dmoa.errors import DmoaError
from dmoa.serving.launch import SERVE_FLAGS

BAR = 0.03
QUESTIONS = (
    "What is 12 + 7?",
    "Write a Python function that returns the larger of two numbers.",
    "What is the capital of France, and what is it known for?",
    "A farmer has 3 boxes with 12 apples each and sells 5 apples. How many are left?",
    "Why is the sky blue?",
    "What helps against a sore throat?",
)
_TRACE_TIMEOUT_S = 30.0


def run_p3(rounds: int = 1) -> list[BenchResult]:
    """Measure P3 on the default pool; a round asks every question once."""
    pool = load_pool(None)
    walls: list[float] = []
    engines: list[float] = []
    label = ""
    with BenchServer({"default": pool}, env=SERVE_FLAGS).wait() as server, httpx.Client(timeout=300, trust_env=False) as client:
        url = server.urls["default"]
        ask(client, url, pool.name, QUESTIONS[0])
        for _ in range(rounds):
            for question in QUESTIONS:
                dmoa = ask(client, url, pool.name, question)
                walls.append(_wall_ms(client, url, dmoa["trace_id"]))
                engines.append(critical_path_ms(dmoa))
                label = engine_label(dmoa)
    singles = [(wall - engine) / engine for wall, engine in zip(walls, engines, strict=True)]
    shares = spread(singles)
    overall = (sum(walls) - sum(engines)) / sum(engines)
    added = spread([wall - engine for wall, engine in zip(walls, engines, strict=True)])
    what = f"all of {len(walls)} queries together, c = 1, default pool; spread: quartiles of single queries; "
    what += f"largest of one query {max(singles):.4f}"
    beside = f"per query, beside {sum(engines) / len(engines):.0f} ms of engine time"
    return [
        record("P3", replace(shares, value=overall, rounds=rounds), "share", engine=label, note=what, at_most=BAR),
        record("P3.added_ms", replace(added, rounds=rounds), "ms", engine=label, note=beside),
    ]


def critical_path_ms(dmoa: Mapping[str, Any]) -> float:
    """Return the engine time of a reply's `dmoa` object: of every step the slowest agent's and the summarizer's, in ms."""
    steps = dmoa["steps"]
    return float(sum(max(agent["engine_ms"] for agent in step["agents"]) + step["summarizer"]["engine_ms"] for step in steps))


def engine_label(dmoa: Mapping[str, Any]) -> str:
    """Return the engines that a reply's `dmoa` object names."""
    return ", ".join(sorted({agent["engine"] for step in dmoa["steps"] for agent in step["agents"]} - {""}))


def ask(client: httpx.Client, url: str, model: str, question: str) -> dict[str, Any]:
    """Ask one question and return the reply's `dmoa` object."""
    reply = client.post(f"{url}/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": question}]})
    reply.raise_for_status()
    dmoa: dict[str, Any] = reply.json()["dmoa"]
    return dmoa


def _wall_ms(client: httpx.Client, url: str, trace_id: str) -> float:
    deadline = time.monotonic() + _TRACE_TIMEOUT_S
    while time.monotonic() < deadline:
        reply = client.get(f"{url}/v1/dmoa/traces/{trace_id}")
        if reply.status_code == httpx.codes.OK:
            return float(reply.json()["wall_ms"])
        time.sleep(0.05)
    raise DmoaError(f"bench: trace {trace_id} did not come within {_TRACE_TIMEOUT_S:.0f} s")


ENGINE = "scripted"
STEPS = 20
WIDTH = 3
"""K: agents asked in a step."""
NUM_AGENTS = 8
"""A of P4."""
CONCURRENCY = 8
"""Queries in flight where the flags are compared under load."""
SIZES = (2, 16, 64, 256, 1024)
"""Pools of the growth bench, by number of agents."""
P4_BAR, FLAGS_BAR, GROWTH_BAR = 1.3, 2.0, 0.2


def null_pool(num_agents: int, *, placement: str, mode: str) -> Config:
    """Return a pool of agents that answer at once with one word and never end a query before its steps are used up."""
    names = [f"agent-{i}" for i in range(num_agents)]
    replies = {name: "same words\nsay it again " + name for name in names} | {"summarizer": "CONTINUE\nwork"}
    tree: dict[str, Any] = {
        "name": "null",
        "llms": {
            "s": {"model": "scripted:null", "engine": "scripted", "placement": placement, "engine_kwargs": {"replies": replies}}
        },
        "agents": [{"name": name, "llm": "s", "profile": f"Does part {name}."} for name in names],
        "summarizer": {"mode": mode, "llm": "s"},
        "gate": {"activation": {"rule": "fixed", "max_agents": WIDTH}},
        "limits": {"max_steps": STEPS},
    }
    return Config.model_validate(tree)


class Stage:
    """Lets one server run at a time."""

    def __init__(self, servers: Sequence[BenchServer]) -> None:
        self._servers = servers
        self._running: BenchServer | None = None

    def measure(self, server: BenchServer, take: Callable[[], list[float]]) -> list[float]:
        """Return what `take` returns with the other servers frozen; its first go after a change of servers is thrown away."""
        if self._running is not server:
            for other in self._servers:
                if other is not server:
                    other.suspend()
            server.resume()
            self._running = server
            take()
        return take()


def run_p4(rounds: int = 8) -> list[BenchResult]:
    """Measure P4: against the bare chain, and the shipped flags against Serve's own."""
    pool = null_pool(NUM_AGENTS, placement="dedicated", mode="llm")
    flags = {"shipped": SERVE_FLAGS, "default": dict.fromkeys(SERVE_FLAGS, "0")}
    steps_ms: dict[str, list[list[float]]] = {}
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(BenchServer({"swarm": pool}, chain=(WIDTH, NUM_AGENTS), env=env))
            for name, env in flags.items()
        }
        client = stack.enter_context(httpx.Client(timeout=120, trust_env=False))
        stage = Stage([server.wait() for server in servers.values()])
        arms: dict[str, Callable[[], float]] = {}
        for name, server in servers.items():
            for arm, take in _arms(client, server).items():
                keep = steps_ms.setdefault(f"{name}_{arm}", [])
                arms[f"{name}_{arm}"] = partial(_kept, keep, partial(stage.measure, server, take))
        medians = interleave(arms, rounds)
    return [*_against_chain(medians), *_flags(medians), *_percentiles(steps_ms)]


def _arms(client: httpx.Client, server: BenchServer) -> dict[str, Callable[[], list[float]]]:
    return {
        "swarm": partial(swarm_steps, client, server.urls["swarm"]),
        "chain": partial(chain_steps, client, server.urls["chain"], "records"),
        "bytes_chain": partial(chain_steps, client, server.urls["chain"], "bytes"),
        "swarm_c8": partial(_concurrent_steps, client, server.urls["swarm"]),
    }


def swarm_steps(client: httpx.Client, url: str) -> list[float]:
    """Ask one question and return the wall time of its steps in ms, as the ingress measured them."""
    found = [float(step["wall_ms"]) for step in ask(client, url, "null", "What is this?")["steps"]]
    if len(found) != STEPS:
        raise DmoaError(
            f"bench: a query took {len(found)} steps of {STEPS}: the pool ended it early, and the figures mean nothing"
        )
    return found


def _concurrent_steps(client: httpx.Client, url: str) -> list[float]:
    """Ask so many questions at once; return the wall time in ms by the number of all their steps."""
    with ThreadPoolExecutor(CONCURRENCY) as threads:
        began = time.perf_counter()
        done = list(threads.map(lambda _: len(swarm_steps(client, url)), range(CONCURRENCY)))
        return [(time.perf_counter() - began) * 1e3 / sum(done)]


def chain_steps(client: httpx.Client, url: str, payload: str) -> list[float]:
    """Run the bare chain's steps in one request and return their wall times in ms; `payload` is records or bytes."""
    reply = client.get(url, params={"steps": STEPS, "payload": payload})
    reply.raise_for_status()
    return [float(ms) for ms in reply.json()]


def _kept(keep: list[list[float]], take: Callable[[], list[float]]) -> float:
    """Return the median of the steps that `take` measures, and keep them all."""
    keep.append(take())
    return statistics.median(keep[-1])


def _against_chain(medians: dict[str, list[float]]) -> list[BenchResult]:
    """Return the ratios to the bare chains; the one with the shipped flags and the same records has the bar."""
    results = []
    for id_, flags, chain, payload in (
        ("P4", "shipped", "chain", "the same records"),
        ("P4.bytes", "shipped", "bytes_chain", "bytes of the records' sizes, which need no pickling"),
        ("P4.default_flags", "default", "chain", "the same records"),
    ):
        found = ratio(medians[f"{flags}_swarm"], medians[f"{flags}_{chain}"])
        note = f"p50 of a step over a bare Serve chain of the same hops that carries {payload}; {flags} flags in both"
        note += f"; A={NUM_AGENTS} dedicated, K={WIDTH}, llm summarizer, embeddings cached"
        results.append(record(id_, found, "x", engine=ENGINE, note=note, at_most=P4_BAR if id_ == "P4" else None, bar_unit="x"))
    return results


def _flags(medians: dict[str, list[float]]) -> list[BenchResult]:
    """Return how much the shipped flags gain: the time of a step alone, which has the bar, and under load."""
    results = []
    for id_, arm, what, bar in (
        ("P4.flags", "swarm", "p50 of a step of one query at a time", FLAGS_BAR),
        ("P4.flags_c8", "swarm_c8", f"wall time by steps of {CONCURRENCY} queries at a time", None),
    ):
        found = ratio(medians[f"default_{arm}"], medians[f"shipped_{arm}"])
        note = f"{what}: Serve's default flags over the flags that dmoa ships"
        results.append(record(id_, found, "x", engine=ENGINE, note=note, at_least=bar, bar_unit="x"))
    return results


def _percentiles(steps_ms: dict[str, list[list[float]]]) -> list[BenchResult]:
    """Return p50 and p99 of the steps of every arm that times them one by one, in ms, the warm-up left out."""
    results = []
    for name, rounds in steps_ms.items():
        if len(rounds[0]) < STEPS:
            continue
        cuts = statistics.quantiles([ms for figures in rounds[1:] for ms in figures], n=100, method="inclusive")
        for percent in (50, 99):
            found = Spread(cuts[percent - 1], cuts[24], cuts[74], len(rounds) - 1)
            note = f"p{percent} of a step's time over all rounds; spread: quartiles of single steps"
            results.append(record(f"P4.{name}_p{percent}", found, "ms", engine=ENGINE, note=note))
    return results


def run_growth(rounds: int = 5) -> list[BenchResult]:
    """Measure how the time of a step grows with the number of agents on one shared deployment."""
    pools = {f"pool{size}": null_pool(size, placement="shared", mode="select") for size in SIZES}
    with BenchServer(pools, env=SERVE_FLAGS).wait() as server, httpx.Client(timeout=120, trust_env=False) as client:
        arms: dict[str, Callable[[], float]] = {
            name: partial(_kept, [], partial(swarm_steps, client, server.urls[name])) for name in pools
        }
        medians = interleave(arms, rounds)
    x = [math.log(size) for size in SIZES for _ in range(rounds)]
    y = [math.log(ms) for name in pools for ms in medians[name]]
    fit = linregress(x, y)
    times = ", ".join(f"A={size} {spread(medians[f'pool{size}']).value:.2f} ms" for size in SIZES)
    half = 1.96 * fit.stderr
    found = Spread(float(fit.slope), float(fit.slope - half), float(fit.slope + half), rounds)
    note = f"time of a step against A on one shared deployment, K={WIDTH} (2 of 2 at A=2), 95 % interval: {times}"
    return [record("growth", found, "log-log slope", engine=ENGINE, note=note, at_most=GROWTH_BAR)]
