"""Three hundred queries while replicas, the router, the proxy and the ingress die, and one agent hangs, on *scripted agents*.

Eight in flight over HTTP; six SIGKILLs of replicas with agents, two of the router, one of Serve's proxy and one of the ingress,
which listens itself, at moments drawn from a seed; then one dedicated agent is stopped (SIGSTOP) and queries with a deadline of
4 s are asked. Judged: fewer kills than wanted fail the check; every query is answered or refused with a status that clients
repeat, and no connection is lost; none is answered
twice (the client's ledger against the server's traces); p95 at most three times that of a quiet run before; all agents answer
again within 20 s; of the queries beside the stopped agent at most three are late, and none ends over its deadline. Asked by a
raw client, which repeats nothing, and then by OpenAI's own, of which the same is judged after its repetitions.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from openai import AsyncOpenAI, OpenAIError

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import INGRESS, run_check, wait_ready
from tests.cluster.swaps import write_pool
from tests.integration.server import Served, serve

QUERIES, QUIET, IN_FLIGHT = 300, 60, 8
KILLS = ("replica", "router", "replica", "replica", "proxy", "replica", "ingress", "router", "replica", "replica")
TITLES = {"replica": "ray::ServeReplica:dmoa:agent-", "router": "ray::RouterActor", "proxy": "ray::ProxyActor"}
TITLES["ingress"] = INGRESS
RETRYABLE = (408, 409, 429, 500, 502, 503, 504)
BACK_S, FACTOR = 20.0, 3.0
SLOW_S, MAX_SLOW = 0.7, 60
"""From which a query is told of one by one, and how many of them."""
PATIENCE_S = 90.0
"""How long a client tries to connect."""
DEADLINE_S, BESIDE, MAX_LATE = 4.0, 10, 3
POOL = """
name: kills
llms:
  s: {model: "scripted:echo", engine: scripted, placement: dedicated, max_num_seqs: 64, engine_kwargs: {delay_ms: 300}}
agents:
  - {name: one, llm: s, profile: Says one.}
  - {name: two, llm: s, profile: Says two.}
  - {name: three, llm: s, profile: Says three.}
gate: {activation: {rule: fixed, max_agents: 2}}
limits: {max_steps: 2}
router: {state_uri: "STATE", num_traces: 100000}
"""


@dataclass(slots=True)
class Ledger:
    """What a client saw."""

    seconds: list[float] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    """Trace ids."""
    statuses: Counter[str] = field(default_factory=Counter)
    refused_connections: int = 0
    """While nobody listened."""
    slow: list[str] = field(default_factory=list)
    """What took long, and what the server says of it."""
    began: float = field(default_factory=time.monotonic)

    def add(self, started: float, status: str, told: dict[str, Any]) -> None:
        """Count one query."""
        seconds = time.monotonic() - started
        self.seconds.append(seconds)
        self.statuses[status] += 1
        if "trace_id" in told:
            self.answered.append(told["trace_id"])
        if (seconds > SLOW_S or status != "200") and len(self.slow) < MAX_SLOW:
            agents = [
                f"{agent['name']} {agent['status']} {agent['latency_ms']:.0f} ms"
                for step in told.get("steps", ())
                for agent in step["agents"]
                if agent["status"] != "idle"
            ]
            at_s = round(started - self.began, 2)
            what = told.get("message") or f"by {told.get('routed_by')}: {', '.join(agents)}"
            self.slow.append(f"at {at_s}: {seconds:.2f} s, {status}, {what}")


async def ask(client: httpx.AsyncClient, number: int, found: Ledger, **dmoa: Any) -> dict[str, Any]:
    """Ask one query, once; return the reply's `dmoa` object, empty where there is none."""
    body = {"model": "kills", "messages": [{"role": "user", "content": f"Question {number}?"}], "dmoa": dmoa}
    started = time.monotonic()
    try:
        reply = await _taken(client, body, found)
    except httpx.HTTPError as error:
        found.add(started, type(error).__name__, {})
        return {}
    told: dict[str, Any] = reply.json()["dmoa" if reply.status_code == 200 else "error"]
    found.add(started, str(reply.status_code), told)
    if "retry-after" in reply.headers:
        await asyncio.sleep(float(reply.headers["retry-after"]))  # as a client does; this query stays refused
    return told


async def _taken(client: httpx.AsyncClient, body: dict[str, Any], found: Ledger) -> httpx.Response:
    """Send a query; where the connection is refused nobody has it, and it is sent again, as clients do."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await client.post("/v1/chat/completions", json=body)
        except httpx.ConnectError:
            if time.monotonic() > until:
                raise
            found.refused_connections += 1
            await asyncio.sleep(0.25)


async def load(url: str, count: int) -> Ledger:
    """Ask queries, eight at a time."""
    found, numbers = Ledger(), iter(range(count))

    async def stream(client: httpx.AsyncClient) -> None:
        for number in numbers:
            await ask(client, number, found)

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(stream(client) for _ in range(IN_FLIGHT)))
    return found


async def load_by_sdk(url: str, count: int) -> Ledger:
    """Ask queries by OpenAI's own client, eight at a time, as it comes: it repeats what was refused or lost, twice."""
    found, numbers = Ledger(), iter(range(count))

    async def stream(client: AsyncOpenAI) -> None:
        for number in numbers:
            started, text = time.monotonic(), f"Question {number}?"
            try:
                reply = await client.chat.completions.create(model="kills", messages=[{"role": "user", "content": text}])
            except OpenAIError as error:
                found.add(started, type(error).__name__, {"message": str(error)})
            else:
                found.add(started, "200", (reply.model_extra or {})["dmoa"])

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:
        await asyncio.gather(*(stream(client) for _ in range(IN_FLIGHT)))
    return found


async def kill_all(served: Served, rng: random.Random, is_over: asyncio.Event) -> list[tuple[float, str]]:
    """Kill one thing after the other while the load lasts; return what was killed, and when."""
    killed, began = [], time.monotonic()
    for kind in KILLS:
        await asyncio.sleep(rng.uniform(1.0, 2.5))
        if is_over.is_set():
            break
        processes = served.processes(TITLES[kind])
        if processes:
            rng.choice(processes).kill()
            killed.append((round(time.monotonic() - began, 2), kind))
    return killed


async def back_after(url: str, patience_s: float = 120.0) -> float:
    """Return the seconds until every agent is up."""
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        while time.monotonic() < started + patience_s:
            try:
                reply = await client.get("/readyz")
                status = (await client.get("/metrics")).text
            except httpx.HTTPError:
                reply, status = None, ""
            if reply is not None and reply.status_code == 200 and "dmoa_router_masked_agents 0.0" in status:
                break
            await asyncio.sleep(0.2)
    return time.monotonic() - started


async def beside_a_hang(served: Served) -> dict[str, Any]:
    """Stop an agent's process, ask beside it, and let it go on."""
    found = Ledger()
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        first = await ask(client, 0, Ledger())
        chosen = first["steps"][0]["agents"][0]["name"]
        (process,) = served.processes(f"{TITLES['replica']}{chosen}")
        process.suspend()
        try:
            told = [await ask(client, number, found, deadline_s=DEADLINE_S) for number in range(BESIDE)]
        finally:
            process.resume()
    statuses = Counter(agent["status"] for one in told for step in one.get("steps", ()) for agent in step["agents"])
    return {
        "stopped": chosen,
        "seconds": [round(one, 2) for one in found.seconds],
        "over_half_the_deadline": sum(one > DEADLINE_S / 2 for one in found.seconds),
        "answered": len(found.answered),
        "statuses": dict(statuses),
        "passed": len(found.answered) == BESIDE
        and sum(one > DEADLINE_S / 2 for one in found.seconds) <= MAX_LATE
        and max(found.seconds) <= DEADLINE_S + 0.5,
    }


async def under_kills(served: Served, seed: int, loading: Coroutine[Any, Any, Ledger], quiet_p95_s: float) -> dict[str, Any]:
    """Kill under a load, and return what came of it."""
    is_over = asyncio.Event()
    killing = asyncio.create_task(kill_all(served, random.Random(seed), is_over))
    found = await loading
    is_over.set()
    moments = await killing
    killed = Counter(kind for _, kind in moments)
    back_s = await back_after(served.url)
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        kept = [(await client.get(f"/v1/dmoa/traces/{trace_id}")).status_code for trace_id in found.answered[-50:]]
    p95_s = float(np.quantile(found.seconds, 0.95))
    refused = [name for name in found.statuses if name.isdigit() and name != "200"]
    judged = {
        "kills": killed == Counter(KILLS),
        "all_told": found.statuses.total() == QUERIES and all(int(name) in RETRYABLE for name in refused),
        "lost": sum(count for name, count in found.statuses.items() if not name.isdigit()) == 0,
        "once": len(found.answered) == len(set(found.answered)),
        "p95": p95_s <= FACTOR * quiet_p95_s,
        "back": back_s <= BACK_S,
    }
    return {
        "killed": moments,
        "statuses": dict(found.statuses),
        "refused_connections": found.refused_connections,
        "traces_of_the_last_50": dict(Counter(kept)),
        "p95_s": p95_s,
        "p50_s": float(np.median(found.seconds)),
        "back_s": back_s,
        "slow": found.slow,
        "judged": judged,
        "passed": all(judged.values()),
    }


async def check(folder: Path, seed: int) -> dict[str, Any]:
    """Serve, measure in quiet, kill under load of either client, and return what came of it."""
    served = serve(write_pool(folder, POOL))
    try:
        await load(served.url, 16)
        wait_ready(served)
        quiet = await load(served.url, QUIET)
        quiet_p95_s = float(np.quantile(quiet.seconds, 0.95))
        raw = await under_kills(served, seed, load(served.url, QUERIES), quiet_p95_s)
        sdk = await under_kills(served, seed + 1, load_by_sdk(served.url, QUERIES), quiet_p95_s)
        hang = await beside_a_hang(served)
    finally:
        served.stop()
    return {
        "agents": "scripted: no figure speaks of a model",
        "quiet_p95_s": quiet_p95_s,
        "raw_client": raw,
        "openai_client": sdk,
        "hang": hang,
        "passed": raw["passed"] and sdk["passed"] and hang["passed"],
    }


if __name__ == "__main__":
    raise SystemExit(run_check(lambda options: check(options.scratch, options.seed), {"--seed": {"type": int, "default": 0}}))
