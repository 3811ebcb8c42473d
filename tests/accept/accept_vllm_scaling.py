"""A vLLM agent that scales to zero and comes back; run by `make accept` after `make test-vllm`, which installs vLLM.

Behind `dmoa serve` one agent on vLLM starts without a replica, is woken by a query, goes back to zero when idle, with all of
vLLM's processes, and is woken again: same greedy text, exact entropies. Prints one JSON object (or writes it to
`--json FILE`) and exits 1 if a bar is missed, 3 where no vLLM is installed.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, `tests` is not importable by itself

from tests.accept.checks import need_vllm, run_check
from tests.integration.server import Served, serve

POOL = """
name: scaling
llms:
  quick: {model: "scripted:quick", engine: scripted}
  real:
    model: embedded:smollm2-135m
    engine: vllm
    placement: dedicated
    engine_kwargs: {dtype: float32, max_model_len: 1024}
agents:
  - name: sleeper
    llm: real
    profile: Answers questions.
    autoscaling: {min_replicas: 0, cold: wait, downscale_to_zero_delay_s: 5}
  - {name: up, llm: quick, profile: Is always there.}
gate: {activation: {rule: fixed, max_agents: 2}}
limits: {max_steps: 1, deadline_s: 400}
router: {state_uri: "STATE"}
"""
WAIT_S = 400.0
_ASKED = "Name the capital of France."


def replicas(server: Served) -> int:
    """Return how many replicas the agent has."""
    return len(server.processes("ray::ServeReplica:dmoa:agent-sleeper"))


def cores(server: Served) -> int:
    """Return how many of vLLM's own engine processes there are."""
    return len(server.processes("EngineCore"))


def wait_for(condition: Callable[[], bool], what: str) -> float:
    """Wait until a condition holds; return the seconds it took. Raises AssertionError past the deadline."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < WAIT_S, f"waited {WAIT_S} s for {what}"
        time.sleep(0.1)
    return round(time.monotonic() - began, 1)


def state(server: Served) -> str:
    """Return what /readyz tells of the agent; it must answer 200 all along."""
    reply = httpx.get(f"{server.url}/readyz", timeout=30)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["agents"]["sleeper"])


def ask(server: Served) -> dict[str, Any]:
    """Ask both agents; return the contribution of the one on vLLM, with the seconds that the query took."""
    question = {"model": "scaling", "messages": [{"role": "user", "content": _ASKED}], "dmoa": {"trace": True}}
    began = time.monotonic()
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=question | {"max_tokens": 24}, timeout=WAIT_S)
    assert reply.status_code == 200, reply.text
    (step,) = reply.json()["dmoa"]["steps"]
    found: dict[str, Any] = next(agent for agent in step["agents"] if agent["name"] == "sleeper")
    return found | {"query_s": round(time.monotonic() - began, 1)}


def scaled(server: Served) -> dict[str, Any]:
    """Take the agent from zero to one and back, twice."""
    at_first = replicas(server)
    first = ask(server)
    awake = (replicas(server), cores(server))
    warm = ask(server)
    idle_s = wait_for(lambda: replicas(server) == 0 and cores(server) == 0, "the idle agent to reach zero")
    wait_for(lambda: state(server) == "cold", "the router to see that it is cold")
    again = ask(server)
    asked = (first, warm, again)
    passed = {
        "begins_at_zero": at_first == 0,
        "woken": awake[0] == 1 and awake[1] >= 1,
        "answers": all(one["status"] == "ok" and one["text"] for one in asked),
        "told": [str(one.get("error") or "").startswith("it was cold") for one in asked] == [True, False, True],
        "same_text": len({one["text"] for one in asked}) == 1,
        "exact": all(one["entropy_kind"] == "exact" and one["entropy_tokens"] == one["completion_tokens"] for one in asked),
    }
    seconds = {"first": first["query_s"], "warm": warm["query_s"], "to_zero": idle_s, "again": again["query_s"]}
    return {"seconds": seconds, "text": first["text"], "passed": passed}


def check(options: Namespace) -> dict[str, Any]:
    """Serve the pool and judge it."""
    need_vllm()
    pool = options.scratch / "pool.yaml"
    pool.write_text(POOL.replace("STATE", (options.scratch / "state").as_uri()), encoding="utf-8")
    server = serve(pool)
    try:
        return scaled(server)
    finally:
        server.stop()


if __name__ == "__main__":
    raise SystemExit(run_check(check))
