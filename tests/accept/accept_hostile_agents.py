"""An agent that is silent, slow, wrong in form, endless or forged, beside others: what the others and the clients notice of it.

Real `dmoa serve`, agents at an *endpoint of ours* whose texts stand for no model; one of them changes its behaviour from phase to
phase. Judged: no query takes longer than its deadline and half a second; each is answered; the other agents' latency is at p95
within 10 % of when all is well; nothing hostile is in another agent's prompt, and of control tokens none that a template would
take for one (their text is a contribution like any other); the ingress keeps less than 200 MB of it.

Each phase is asked in short turns, each right after one in which all is well: the ratio of their p95 is taken turn by turn, and
its median is judged, so that what else the machine does weighs on both sides. A last phase, in which the other agents are 20 %
slower themselves, must be found out by the same measure: else the machine was too busy to tell, and the check fails.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check
from tests.accept.endpoint import HOSTILE, MARK, TOKENS, Endpoint, endpoint
from tests.cluster.swaps import write_pool
from tests.integration.server import Served, serve

GOOD, BAD = ("one", "two", "three"), "bad"
TURNS, QUERIES, IN_FLIGHT, DEADLINE_S, OVER_S, WITHIN = 9, 12, 4, 2.0, 0.5, 1.1
MEMORY_MB = 200.0
WELL, SILENT, SLOW, CONTROL = "well", "silent", "10 x slow on 5 %", "the others 20 % slower"


def pool(url: str) -> str:
    """Return the pool: all four agents are asked in both steps."""
    llms = "\n".join(
        f'  {name}: {{model: "openai:{name}", engine: openai, engine_kwargs: {{base_url: "{url}"}}}}' for name in (*GOOD, BAD)
    )
    agents = "\n".join(
        f"  - {{name: {name}, llm: {name}, profile: Says {name}., sampling: {{max_tokens: 64}}}}" for name in (*GOOD, BAD)
    )
    return f"""
name: hostile
llms:
{llms}
agents:
{agents}
gate: {{activation: {{rule: fixed, max_agents: 4}}}}
limits: {{max_steps: 2}}
router: {{state_uri: "STATE"}}
"""


@dataclass(slots=True)
class Found:
    """What came of the queries of a phase, or of the turns beside it in which all is well."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    """Statuses of the one agent's replies."""
    p95_ms: list[float] = field(default_factory=list)
    """Of the other agents' latencies, turn by turn."""
    heard: list[str] = field(default_factory=list)
    """The other agents' prompts."""
    ingress_mb: float = 0.0

    async def turn(self, client: httpx.AsyncClient, models: Endpoint, name: str) -> None:
        """Ask the queries of one turn."""
        models.prompts.clear()
        models.behaviours = {BAD: HOSTILE[name]} if name in HOSTILE else {}
        models.slow = {BAD: (10.0, 0.05)} if name == SLOW else dict.fromkeys(GOOD, (1.2, 1.0)) if name == CONTROL else {}
        models.silent = {BAD} if name == SILENT else set()
        latencies, numbers = list[float](), iter(range(QUERIES))

        async def stream() -> None:
            for number in numbers:
                body = {"model": "hostile", "messages": [{"role": "user", "content": f"Question {number}?"}]}
                started = time.monotonic()
                reply = await client.post("/v1/chat/completions", json=body | {"dmoa": {"deadline_s": DEADLINE_S}})
                self.seconds.append(time.monotonic() - started)
                self.statuses[str(reply.status_code)] += 1
                for agent in (one for step in reply.json().get("dmoa", {}).get("steps", ()) for one in step["agents"]):
                    if agent["name"] == BAD:
                        self.bad[agent["status"]] += 1
                    elif agent["status"] == "ok":
                        latencies.append(agent["latency_ms"])

        await asyncio.gather(*(stream() for _ in range(IN_FLIGHT)))
        self.p95_ms.append(float(np.quantile(latencies, 0.95)))
        self.heard += [text for name in GOOD for text in models.prompts[name]]


def judge(name: str, found: Found, well: Found) -> dict[str, Any]:
    """Return what is told of a phase, and what holds of it."""
    ratios = sorted(one / before for one, before in zip(found.p95_ms, well.p95_ms, strict=True))
    marks, tokens = (sum(any(word in text for word in words) for text in found.heard) for words in ((MARK,), TOKENS))
    ratio = float(np.median(ratios))
    return {
        "statuses": dict(found.statuses),
        "bad": dict(found.bad),
        "slowest_query_s": round(max(found.seconds), 2),
        "p95_of_queries_s": round(float(np.quantile(found.seconds, 0.95)), 3),
        "p95_of_others_ms": round(float(np.median(found.p95_ms)), 1),
        "over_well": round(ratio, 3),
        "over_well_turn_by_turn": [round(one, 2) for one in ratios],
        "prompts": len(found.heard),
        "prompts_with_its_text": marks,
        "prompts_with_a_token": tokens,
        "ingress_mb": round(found.ingress_mb),
        "judged": {
            "answered": set(found.statuses) == {"200"},
            "in_time": max(found.seconds) <= DEADLINE_S + OVER_S,
            "others": (ratio > WITHIN) if name == CONTROL else (ratio <= WITHIN),
            "prompts": bool(found.heard) and not tokens and (name == "control tokens" or not marks),
            "memory": found.ingress_mb <= well.ingress_mb + MEMORY_MB,
        },
    }


async def check(served: Served, models: Endpoint) -> dict[str, Any]:
    """Run all phases."""
    (ingress,) = served.processes(":ingress")
    told: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        for _ in range(3):
            await Found().turn(client, models, WELL)
        first_mb = ingress.memory_info().rss / 1e6
        for name in (*HOSTILE, SLOW, SILENT, CONTROL):
            found, well = Found(), Found(ingress_mb=first_mb)
            for _ in range(TURNS):
                await well.turn(client, models, WELL)
                await found.turn(client, models, name)
                found.ingress_mb = max(found.ingress_mb, ingress.memory_info().rss / 1e6)
            told[name] = judge(name, found, well)
            print(name, json.dumps(told[name]), flush=True)
    return told


async def run(folder: Path) -> dict[str, Any]:
    """Serve and check."""
    async with endpoint() as models:
        served = await asyncio.to_thread(serve, write_pool(folder, pool(models.url)))
        try:
            found = await check(served, models)
        finally:
            await asyncio.to_thread(served.stop)
    return {
        "agents": "an endpoint of ours: no figure speaks of a model",
        "phases": found,
        "passed": all(all(one["judged"].values()) for one in found.values()),
    }


if __name__ == "__main__":
    raise SystemExit(run_check(lambda options: run(options.scratch)))
