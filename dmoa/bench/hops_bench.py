"""P4 and growth: what a step costs on Ray Serve when the agents cost nothing.

Scripted agents without delay, embeddings cached. P4 compares with a bare Serve chain of the same hops on the same Ray
with the same flags, and the shipped flags with Serve's defaults; growth compares pools of 2 to 256 agents. All arms are
up at the same time and take turns.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx

from dmoa.bench.measure import BenchResult, interleave, ratio, spread
from dmoa.bench.server import BenchServer
from dmoa.config import Config
from dmoa.errors import DmoaError
from dmoa.serving.launch import SERVE_FLAGS

ENGINE = "scripted"
STEPS = 20
WIDTH = 3
"""K: agents asked in a step."""
SIZES = (2, 8, 32, 128, 256)
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


def run_p4(rounds: int) -> list[BenchResult]:
    """Measure P4: against the bare chain, and the shipped flags against Serve's own."""
    pool = null_pool(8, placement="dedicated", mode="llm")
    steps_ms: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        flags = {"shipped": SERVE_FLAGS, "default": dict.fromkeys(SERVE_FLAGS, "0")}
        servers = {
            name: stack.enter_context(BenchServer({"swarm": pool}, chain_width=WIDTH, env=env)) for name, env in flags.items()
        }
        client = stack.enter_context(httpx.Client(timeout=120))
        arms: dict[str, Callable[[], float]] = {}
        for name, server in servers.items():
            server.wait()
            arms[f"{name} swarm"] = _kept(steps_ms, f"{name} swarm", partial(swarm_steps, client, server.urls["swarm"]))
            arms[f"{name} chain"] = _kept(steps_ms, f"{name} chain", partial(chain_steps, client, server.urls["chain"]))
        medians = interleave(arms, rounds)
    return [*_against_chain(medians), _flags(medians), *_percentiles(steps_ms)]


def swarm_steps(client: httpx.Client, url: str) -> list[float]:
    """Ask one question and return the wall time of its steps in ms, as the ingress measured them."""
    body = {"model": "null", "messages": [{"role": "user", "content": "What is this?"}]}
    reply = client.post(f"{url}/v1/chat/completions", json=body)
    reply.raise_for_status()
    found = [float(step["wall_ms"]) for step in reply.json()["dmoa"]["steps"]]
    if len(found) != STEPS:
        raise DmoaError(
            f"bench: a query took {len(found)} steps of {STEPS}: the pool ended it early, and the figures mean nothing"
        )
    return found


def chain_steps(client: httpx.Client, url: str) -> list[float]:
    """Run the bare chain's steps in one request and return their wall times in ms."""
    reply = client.get(url, params={"steps": STEPS})
    reply.raise_for_status()
    return [float(ms) for ms in reply.json()]


def _kept(store: dict[str, list[float]], name: str, measure: Callable[[], list[float]]) -> Callable[[], float]:
    def arm() -> float:
        found = measure()
        store.setdefault(name, []).extend(found)
        return statistics.median(found)

    return arm


def _against_chain(medians: dict[str, list[float]]) -> list[BenchResult]:
    results = []
    for name, id_ in (("shipped", "P4"), ("default", "P4.default_flags")):
        found = ratio(medians[f"{name} swarm"], medians[f"{name} chain"])
        has_bar = id_ == "P4"
        results.append(
            BenchResult(
                id=id_, value=found.value, unit="x", low=found.low, high=found.high, rounds=found.rounds,
                bar=f"<= {P4_BAR}x" if has_bar else "", passed=found.value <= P4_BAR if has_bar else None, engine=ENGINE,
                note=f"p50 of a step, {name} flags, over a bare Serve chain with the same; A=8, K={WIDTH}, llm summarizer",
            )
        )  # fmt: skip
    return results


def _flags(medians: dict[str, list[float]]) -> BenchResult:
    found = ratio(medians["default swarm"], medians["shipped swarm"])
    return BenchResult(
        id="P4.flags", value=found.value, unit="x", low=found.low, high=found.high, rounds=found.rounds,
        bar=f">= {FLAGS_BAR}x", passed=found.value >= FLAGS_BAR, engine=ENGINE,
        note="p50 of a step with Serve's default flags over the same with the flags that dmoa ships",
    )  # fmt: skip


def _percentiles(steps_ms: dict[str, list[float]]) -> list[BenchResult]:
    """Return p50 and p99 of all steps of every arm in ms: reported, without a bar."""
    results = []
    for name, figures in steps_ms.items():
        cuts = statistics.quantiles(figures, n=100, method="inclusive")
        results.append(
            BenchResult(
                id=f"P4.{name.replace(' ', '_')}_ms", value=cuts[49], unit="ms", low=cuts[24], high=cuts[98], rounds=len(figures),
                bar="", passed=None, engine=ENGINE, note="time of a step: median, first quartile, 99th percentile; warm-up too",
            )
        )  # fmt: skip
    return results


def run_growth(rounds: int) -> list[BenchResult]:
    """Measure how the time of a step grows with the number of agents on one shared deployment."""
    from scipy.stats import linregress

    pools = {f"pool{size}": null_pool(size, placement="shared", mode="select") for size in SIZES}
    with BenchServer(pools, env=SERVE_FLAGS).wait() as server, httpx.Client(timeout=120) as client:
        arms: dict[str, Callable[[], float]] = {
            name: _kept({}, name, partial(swarm_steps, client, server.urls[name])) for name in pools
        }
        medians = interleave(arms, rounds)
    x = [math.log(size) for size in SIZES for _ in range(rounds)]
    y = [math.log(ms) for name in pools for ms in medians[name]]
    fit = linregress(x, y)
    times = ", ".join(f"A={size} {spread(medians[f'pool{size}']).value:.2f} ms" for size in SIZES)
    return [
        BenchResult(
            id="growth", value=float(fit.slope), unit="log-log slope", low=float(fit.slope - 1.96 * fit.stderr),
            high=float(fit.slope + 1.96 * fit.stderr), rounds=rounds, bar=f"<= {GROWTH_BAR}", passed=fit.slope <= GROWTH_BAR,
            engine=ENGINE, note=f"time of a step against A on one shared deployment, K={WIDTH}: {times}",
        )
    ]  # fmt: skip
