"""P3: what orchestration adds to the engine's own time, one query at a time, on the embedded model.

Share = (wall time of the query - engine time on the critical path) / that engine time. The critical path of a step is
its slowest active agent and then the summarizer; an agent's engine time runs from the engine's accept to its last token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import httpx

from dmoa.agents.pool import load_pool
from dmoa.bench.measure import BenchResult, spread
from dmoa.bench.server import BenchServer
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


def run(rounds: int) -> list[BenchResult]:
    """Measure P3 on the default pool; a round asks every question once."""
    pool = load_pool(None)
    walls: list[float] = []
    engines: list[float] = []
    label = ""
    with BenchServer({"default": pool}, env=SERVE_FLAGS).wait() as server, httpx.Client(timeout=300, trust_env=False) as client:
        url = server.urls["default"]
        _ask(client, url, pool.name, QUESTIONS[0])
        for _ in range(rounds):
            for question in QUESTIONS:
                dmoa = _ask(client, url, pool.name, question)
                walls.append(_wall_ms(client, url, dmoa["trace_id"]))
                engines.append(critical_path_ms(dmoa))
                label = engine_label(dmoa)
    singles = [(wall - engine) / engine for wall, engine in zip(walls, engines, strict=True)]
    shares = spread(singles)
    overall = (sum(walls) - sum(engines)) / sum(engines)
    added = spread([wall - engine for wall, engine in zip(walls, engines, strict=True)])
    common: dict[str, Any] = {"rounds": rounds, "engine": label}
    return [
        BenchResult(
            id="P3",
            value=overall,
            unit="share",
            low=shares.low,
            high=shares.high,
            bar=f"<= {BAR}",
            passed=overall <= BAR,
            note=f"all of {len(walls)} queries together, c = 1, default pool; spread: quartiles of single queries; "
            f"largest of one query {max(singles):.4f}",
            **common,
        ),
        BenchResult(
            id="P3.added_ms",
            value=added.value,
            unit="ms",
            low=added.low,
            high=added.high,
            bar="",
            passed=None,
            note=f"per query, beside {sum(engines) / len(engines):.0f} ms of engine time",
            **common,
        ),
    ]


def critical_path_ms(dmoa: Mapping[str, Any]) -> float:
    """Return the engine time of a reply's `dmoa` object: of every step the slowest agent's and the summarizer's, in ms."""
    steps = dmoa["steps"]
    return float(sum(max(agent["engine_ms"] for agent in step["agents"]) + step["summarizer"]["engine_ms"] for step in steps))


def engine_label(dmoa: Mapping[str, Any]) -> str:
    """Return the engines that a reply's `dmoa` object names."""
    return ", ".join(sorted({agent["engine"] for step in dmoa["steps"] for agent in step["agents"]} - {""}))


def _ask(client: httpx.Client, url: str, model: str, question: str) -> dict[str, Any]:
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
