"""The bare Serve chain that P4 compares the swarm with: the same hops, nothing computed.

ingress -> actor (where the router stands) -> deployments in parallel (agents) -> one deployment (summarizer). What
travels are bytes of the sizes of the swarm's own records; options of actor and deployments are those of the swarm.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class HopSizes:
    """Bytes on the way out and back of every hop: the swarm's records, pickled, half-way through a query of 20 steps."""

    route_out: int = 4000
    """RouteRequest: the gate's input and hidden state."""
    route_back: int = 1000
    """RouteDecision: probabilities, ranking and hidden state."""
    call_out: int = 1300
    """AgentCall with its messages."""
    fold_out: int = 1600
    """AgentCall of the summarizer, with the contributions."""
    reply: int = 700
    """AgentReply."""


class Echo:
    """One hop: takes bytes, returns bytes of a fixed size. As an actor it stands for the router."""

    def __init__(self, reply_bytes: int) -> None:
        self._reply = bytes(reply_bytes)

    async def call(self, payload: bytes) -> bytes:
        """Return the fixed reply."""
        return self._reply


class ChainIngress:
    """Runs the steps of one request one after another, and returns how long each took in milliseconds."""

    def __init__(self, sizes: HopSizes, agents: list[DeploymentHandle], last: DeploymentHandle) -> None:
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000}
        self._router = ray.remote(Echo).options(**options).remote(sizes.route_back)
        self._agents = agents
        self._last = last
        self._route, self._call, self._fold = bytes(sizes.route_out), bytes(sizes.call_out), bytes(sizes.fold_out)

    async def __call__(self, request: Request) -> list[float]:
        """Answer `GET ?steps=N`."""
        return [await self._step() for _ in range(int(request.query_params["steps"]))]

    async def _step(self) -> float:
        started = time.perf_counter()
        await self._router.call.remote(self._route)
        await asyncio.gather(*(self._ask(agent, self._call) for agent in self._agents))
        await self._ask(self._last, self._fold)
        return (time.perf_counter() - started) * 1e3

    async def _ask(self, handle: DeploymentHandle, payload: bytes) -> None:
        await handle.call.remote(payload)


def bind_chain(width: int) -> Any:
    """Return the bound Serve application of a chain with `width` deployments in parallel."""
    sizes = HopSizes()
    light: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 64, "max_queued_requests": 256}
    hops = [serve.deployment(Echo).options(name=f"hop-{i}", **light).bind(sizes.reply) for i in range(width + 1)]
    ingress = serve.deployment(ChainIngress).options(name="ingress", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    return ingress.bind(sizes, hops[:-1], hops[-1])
