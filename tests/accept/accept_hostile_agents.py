"""An agent that is silent, slow, wrong in form, endless or forged, beside others: what the others and the clients notice of it.

Real `dmoa serve`, agents at an *endpoint of ours* whose texts stand for no model; one of them changes its behaviour from phase to
phase. Judged: no query takes longer than its deadline and half a second; each is answered; the other agents' latency is at p95
within 10 % of that of the phase in which all is well; nothing hostile is in another agent's prompt, and of control tokens none
that a template would take for one (their text is a contribution like any other); the ingress keeps less than 200 MB of it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check
from tests.accept.endpoint import HOSTILE, MARK, TOKENS, Endpoint, endpoint
from tests.cluster.swaps import write_pool
from tests.integration.server import Served, serve

GOOD, BAD = ("one", "two", "three"), "bad"
QUERIES, IN_FLIGHT, DEADLINE_S, OVER_S, WITHIN = 48, 4, 2.0, 0.5, 1.1
MEMORY_MB = 200.0
WELL, SILENT, SLOW = "well", "silent", "10 x slow on 5 %"


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


async def phase(client: httpx.AsyncClient, models: Endpoint, ingress: psutil.Process) -> dict[str, Any]:
    """Ask queries of one phase; return what came of them."""
    models.prompts.clear()
    seconds, latencies, statuses, bads = list[float](), list[float](), Counter[str](), Counter[str]()
    numbers = iter(range(QUERIES))

    async def stream() -> None:
        for number in numbers:
            body = {"model": "hostile", "messages": [{"role": "user", "content": f"Question {number}?"}]}
            started = time.monotonic()
            reply = await client.post("/v1/chat/completions", json=body | {"dmoa": {"deadline_s": DEADLINE_S}})
            seconds.append(time.monotonic() - started)
            statuses[str(reply.status_code)] += 1
            for step in reply.json().get("dmoa", {}).get("steps", ()):
                latencies.extend(
                    agent["latency_ms"] for agent in step["agents"] if agent["name"] in GOOD and agent["status"] == "ok"
                )
                bads.update(agent["status"] for agent in step["agents"] if agent["name"] == BAD)

    await asyncio.gather(*(stream() for _ in range(IN_FLIGHT)))
    heard = [text for name in GOOD for text in models.prompts[name]]
    return {
        "statuses": dict(statuses),
        "bad": dict(bads),
        "slowest_query_s": round(max(seconds), 2),
        "p95_of_queries_s": round(float(np.quantile(seconds, 0.95)), 3),
        "p95_of_others_ms": round(float(np.quantile(latencies, 0.95)), 1),
        "prompts": len(heard),
        "prompts_with_its_text": sum(MARK in text for text in heard),
        "prompts_with_a_token": sum(any(token in text for token in TOKENS) for text in heard),
        "ingress_mb": round(ingress.memory_info().rss / 1e6),
    }


def judge(name: str, found: dict[str, Any], well: dict[str, Any]) -> dict[str, bool]:
    """Return what holds of a phase."""
    return {
        "answered": set(found["statuses"]) == {"200"},
        "in_time": found["slowest_query_s"] <= DEADLINE_S + OVER_S,
        "others": found["p95_of_others_ms"] <= WITHIN * well["p95_of_others_ms"],
        "prompts": found["prompts"] > 0
        and not found["prompts_with_a_token"]
        and (name == "control tokens" or not found["prompts_with_its_text"]),
        "memory": found["ingress_mb"] <= well["ingress_mb"] + MEMORY_MB,
    }


async def check(served: Served, models: Endpoint) -> dict[str, Any]:
    """Run all phases."""
    (ingress,) = served.processes(":ingress")
    found: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        await phase(client, models, ingress)
        for name in (WELL, *HOSTILE, SLOW, SILENT):
            models.behaviours = {BAD: HOSTILE[name]} if name in HOSTILE else {}
            models.slow = {BAD: (10.0, 0.05)} if name == SLOW else {}
            models.silent = {BAD} if name == SILENT else set()
            found[name] = await phase(client, models, ingress)
            found[name]["judged"] = judge(name, found[name], found[WELL])
            print(name, json.dumps(found[name]), flush=True)
    return found


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
