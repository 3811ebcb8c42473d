"""The bare Serve chain that P4 compares the swarm with: the same hops and payloads, nothing computed.

ingress -> actor (where the router stands) -> deployments in parallel (agents) -> one deployment (summarizer). What
travels are the swarm's own records, the same ones again and again, or bytes of their sizes; calls, options of the actor
and of the deployments are the plain ones.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dmoa.types import AgentCall, AgentReply, Message, RouteDecision, RouteRequest, Sampling

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.requests import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Payloads:
    """What travels on the way out and back of every hop."""

    route_out: object
    route_back: object
    call_out: object
    fold_out: object
    reply: object

    def as_bytes(self) -> Payloads:
        """Return zeros of the records' pickled sizes."""
        names = ("route_out", "route_back", "call_out", "fold_out", "reply")
        return Payloads(**{name: bytes(len(pickle.dumps(getattr(self, name)))) for name in names})


def records(num_agents: int) -> Payloads:
    """Return records as the swarm sends them half-way through a query of twenty short steps."""
    names = tuple(f"agent-{i}" for i in range(num_agents))
    work = "\n\n".join(f"Work so far, step {step}:\nwork" for step in range(1, 11))
    messages = (Message(role="system", content="You work with others. " * 4), Message(role="user", content=work + "x" * 60))
    call = AgentCall(trace_id="0" * 32, step=10, agent=names[0], messages=messages, sampling=Sampling())
    return Payloads(
        route_out=RouteRequest(
            input_X=np.ones(772, np.float32), hidden_H=np.ones(128, np.float32), gate_version="untrained-0123456789ab"
        ),
        route_back=RouteDecision(
            gate_version="untrained-0123456789ab",
            agents=names,
            probability_A=np.full(num_agents, 1 / num_agents, np.float32),
            ranking=tuple(range(num_agents)),
            k=3,
            mass=0.9,
            hidden_H=np.ones(128, np.float32),
        ),
        call_out=call,
        fold_out=call,
        reply=AgentReply(agent=names[0], status="ok", text="work", entropy_sum_nats=1.0, entropy_tokens=8, engine="scripted"),
    )


class Echo:
    """One hop: answers records with its record, bytes with its bytes. As an actor it stands for the router."""

    def __init__(self, reply: object, reply_bytes: bytes) -> None:
        self._reply = reply
        self._reply_bytes = reply_bytes

    async def call(self, payload: object) -> object:
        """Return the fixed reply of the payload's kind."""
        return self._reply_bytes if isinstance(payload, bytes) else self._reply


class ChainIngress:
    """Runs the steps of one request one after another, and returns how long each took in milliseconds."""

    def __init__(self, payloads: Payloads, agents: list[DeploymentHandle], last: DeploymentHandle) -> None:
        import ray

        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000}
        self._payloads = {"records": payloads, "bytes": payloads.as_bytes()}
        back = [kind.route_back for kind in self._payloads.values()]
        self._router = ray.remote(Echo).options(**options).remote(*back)
        self._agents = agents
        self._last = last

    async def __call__(self, request: Request) -> list[float]:
        """Answer `GET ?steps=N&payload=records|bytes`."""
        payloads = self._payloads[request.query_params["payload"]]
        return [await self._step(payloads) for _ in range(int(request.query_params["steps"]))]

    async def _step(self, payloads: Payloads) -> float:
        started = time.perf_counter()
        await self._router.call.remote(payloads.route_out)
        await asyncio.gather(*(self._ask(agent, payloads.call_out) for agent in self._agents))
        await self._ask(self._last, payloads.fold_out)
        return (time.perf_counter() - started) * 1e3

    async def _ask(self, handle: DeploymentHandle, payload: object) -> None:
        await handle.call.remote(payload)


def bind_chain(width: int, num_agents: int) -> Any:
    """Return the bound Serve application of a chain with `width` deployments in parallel, of a pool of `num_agents`."""
    from ray import serve

    payloads = records(num_agents)
    replies = (payloads.reply, payloads.as_bytes().reply)
    light: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 64, "max_queued_requests": 256}
    hops = [serve.deployment(Echo).options(name=f"hop-{i}", **light).bind(*replies) for i in range(width + 1)]
    ingress = serve.deployment(ChainIngress).options(name="ingress", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    return ingress.bind(payloads, hops[:-1], hops[-1])
