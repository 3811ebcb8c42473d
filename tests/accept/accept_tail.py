"""P12: the tail of a pool of which one agent is slowed five times, or killed, through real Serve, with and without hedging.

Four agents, three asked a step: two at an *endpoint of ours* that takes 100 ms and can be slow, two scripted ones with a replica
each, of which one is killed (SIGKILL) over and over. No figure speaks of a model. Judged, with `limits: {quorum: 2,
hedge_after_ms: p95}`: p99 of a query's seconds at most twice that of the same pool when all is well, no query failed, and at most
5 % more tokens. Told beside it: the same with hedging alone, and with neither.
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

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import run_check
from tests.accept.endpoint import Endpoint, endpoint
from tests.cluster.swaps import write_pool
from tests.integration.server import Served, serve

QUERIES, IN_FLIGHT, FACTOR, MORE_TOKENS = 300, 4, 2.0, 1.05
SLOWER, EVERY_S = 5.0, 4.0
ARMS = {"quorum and hedging": "quorum: 2, hedge_after_ms: p95, ", "hedging": "hedge_after_ms: p95, ", "neither": ""}
POOL = """
name: tail
llms:
  one: {{model: "openai:one", engine: openai, engine_kwargs: {{base_url: "{url}"}}}}
  two: {{model: "openai:two", engine: openai, engine_kwargs: {{base_url: "{url}"}}}}
  s:
    model: "scripted:echo"
    engine: scripted
    placement: dedicated
    max_num_seqs: 64
    engine_kwargs: {{delay_ms: 100, tokens: 2}}
agents:
  - {{name: one, llm: one, profile: Says one.}}
  - {{name: two, llm: two, profile: Says two.}}
  - {{name: three, llm: s, profile: Says three.}}
  - {{name: four, llm: s, profile: Says four.}}
gate: {{activation: {{rule: fixed, max_agents: 3}}}}
limits: {{{limits}max_steps: 1}}
router: {{state_uri: "STATE"}}
"""


async def load(url: str, count: int) -> dict[str, Any]:
    """Ask queries, four at a time; return their tail, their tokens, and how often each agent was asked."""
    seconds, statuses, asked, tokens = list[float](), Counter[str](), Counter[str](), 0
    numbers = iter(range(count))

    async def stream(client: httpx.AsyncClient) -> None:
        nonlocal tokens
        for number in numbers:
            body = {"model": "tail", "messages": [{"role": "user", "content": f"Question {number}?"}]}
            started = time.monotonic()
            reply = await client.post("/v1/chat/completions", json=body)
            seconds.append(time.monotonic() - started)
            statuses[str(reply.status_code)] += 1
            if reply.status_code == 200:
                tokens += reply.json()["usage"]["total_tokens"]
                for step in reply.json()["dmoa"]["steps"]:
                    asked.update(agent["name"] for agent in step["agents"] if agent["status"] in ("ok", "late", "failed"))

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await asyncio.gather(*(stream(client) for _ in range(IN_FLIGHT)))
    return {
        "statuses": dict(statuses),
        "p50_s": round(float(np.median(seconds)), 3),
        "p99_s": round(float(np.quantile(seconds, 0.99)), 3),
        "tokens": tokens,
        "asked": dict(asked),
    }


async def killing(served: Served, agent: str, is_over: asyncio.Event) -> int:
    """Kill an agent's replica every few seconds; return how often."""
    number = 0
    while not is_over.is_set():
        for process in served.processes(f"ray::ServeReplica:dmoa:agent-{agent}"):
            process.kill()
            number += 1
        await asyncio.sleep(EVERY_S)
    return number


async def arm(folder: Path, models: Endpoint, limits: str) -> dict[str, Any]:
    """Serve one pool, and measure it well, slowed and killed."""
    await asyncio.to_thread(folder.mkdir)
    served = await asyncio.to_thread(serve, write_pool(folder, POOL.format(url=models.url, limits=limits)))
    try:
        await load(served.url, 60)
        well = await load(served.url, QUERIES)
        usual = well["asked"]
        models.slow = {max(("one", "two"), key=lambda name: usual.get(name, 0)): (SLOWER, 1.0)}
        slowed = await load(served.url, QUERIES)
        slowed["agent"], models.slow = next(iter(models.slow)), {}
        await load(served.url, 60)
        is_over, victim = asyncio.Event(), max(("three", "four"), key=lambda name: usual.get(name, 0))
        kills = asyncio.create_task(killing(served, victim, is_over))
        killed = await load(served.url, QUERIES)
        is_over.set()
        killed |= {"agent": victim, "kills": await kills}
    finally:
        models.slow = {}
        await asyncio.to_thread(served.stop)
    found: dict[str, Any] = {"well": well, "slowed": slowed, "killed": killed}
    for one in (slowed, killed):
        one["p99_over_well"] = round(one["p99_s"] / well["p99_s"], 3)
        one["tokens_over_well"] = round(one["tokens"] / well["tokens"], 3)
        one["passed"] = (
            one["p99_over_well"] <= FACTOR and one["tokens_over_well"] <= MORE_TOKENS and set(one["statuses"]) == {"200"}
        )
    return found


async def run(folder: Path, arms: list[str]) -> dict[str, Any]:
    """Measure the arms, one after the other."""
    found: dict[str, Any] = {"agents": "scripted and an endpoint of ours: no figure speaks of a model"}
    async with endpoint() as models:
        for number, name in enumerate(arms):
            found[name] = await arm(folder / str(number), models, ARMS[name])
            print(name, json.dumps(found[name]), flush=True)
    judged = found[next(iter(ARMS))]
    return found | {"passed": judged["slowed"]["passed"] and judged["killed"]["passed"]}


FLAGS = {"--only-judged": {"action": "store_true", "help": "leave out the arms that are only told"}}

if __name__ == "__main__":
    raise SystemExit(run_check(lambda options: run(options.scratch, list(ARMS)[: 1 if options.only_judged else None]), FLAGS))
