"""A Serve cluster of its own for a bench: a child process that starts apps, says where they answer, and ends with its parent.

The parent's side is `BenchServer`; `python -m dmoa.bench.serve_process` is the child's. They exchange one JSON line of what to
start and one of URLs; the end of the child's standard input is the word to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from dmoa.bench.child import Child, to_parent
from dmoa.config import Config
from dmoa.serving.launch import free_port, launch, stop
from dmoa.types import AgentCall, AgentReply, EntropySum, Message, RouteDecision, RouteRequest, Sampling
from dmoa.workflows.adapt_online import stand_back

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.requests import Request


STOP_TIMEOUT_S = 60.0
OFFER_S = 2.0
"""How often a gate is offered, where any is."""
_SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "RAY_worker_niceness": "0"}
"""Ray starts its workers at niceness 15: whatever else runs on the machine would be measured instead of them."""
_NOT_OURS = ("RAY_ADDRESS", "DMOA_API_KEYS")


class BenchServer(Child):
    """Apps on a Ray of their own; use it as a context manager."""

    def __init__(
        self, pools: Mapping[str, Config], *, chain: tuple[int, int] | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        """Start one app per entry of `pools`, and beside them a bare chain where `chain` says how wide, and of what pool size.

        The child starts at once and in parallel with others; `wait` returns once it answers.
        """
        self.urls: dict[str, str] = {}
        """App -> base URL without /v1; the chain's is called `chain`. Empty before `wait`."""
        kept = {name: text for name, text in os.environ.items() if name not in _NOT_OURS}
        super().__init__("dmoa.bench.serve_process", env=kept | _SETTINGS | dict(env or {}), stop_timeout_s=STOP_TIMEOUT_S)
        self.say({"pools": {app: config.model_dump_json() for app, config in pools.items()}, "chain": chain})

    def wait(self) -> BenchServer:
        """Return once every app answers. Raises DmoaError with the child's last words if it ends instead."""
        self.urls = self.hear()
        return self

    def offer(self, app: str | None) -> None:
        """Offer gates to the router of an app from now on (`router.adaptation`), the first at once; None: to nobody."""
        self.say(app)

    def export_spans(self, app: str, endpoint: str | None) -> None:
        """Have the trace store of an app send spans to a collector from now on, or to nobody; returns once it does."""
        self.say({"app": app, "endpoint": endpoint})
        self.hear()

    def stop(self) -> None:
        """End the apps and their Ray, frozen or not."""
        self.resume()
        super().stop()


def main() -> None:
    """Run the child's side: start what the first line of standard input asks for, and stop at its end."""
    answers = to_parent()
    order = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as state_dir:
        apps: list[str] = []
        try:
            urls = _start(order["pools"], order["chain"], state_dir, apps)
            print(json.dumps(urls), file=answers)
            _follow(sys.stdin, answers)
        finally:
            _stop(apps)


def _start(pools: Mapping[str, str], chain: tuple[int, int] | None, state_dir: str, apps: list[str]) -> dict[str, str]:
    port = free_port()
    urls: dict[str, str] = {}
    for app, text in pools.items():
        config = Config.model_validate_json(text)
        config = config.changed("router", state_uri=f"file://{state_dir}/{app}")
        if chain or len(pools) > 1:
            config = config.changed("server", listener="proxy")  # which apps share
        apps.append(app)
        urls[app] = launch(config, port=port, app=app, route_prefix=f"/{app}").url
    if chain is not None:
        from ray import serve

        serve.run(bind_chain(*chain), name="chain", route_prefix="/chain")
        urls["chain"] = f"http://127.0.0.1:{port}/chain"
    return urls


def _follow(orders: Iterable[str], answers: TextIO) -> None:
    """Follow orders, a JSON line each, until their end: offer gates to the app of the newest one, or export spans."""
    changed = threading.Condition()
    wanted: list[str | None] = [None]

    def offer_often() -> None:
        stand_back()  # as the learner does, whose part this thread takes
        while True:
            with changed:
                changed.wait_for(lambda: wanted[0] is not None)
                app = wanted[0]
            assert app is not None
            _offer(app)
            with changed:
                changed.wait(OFFER_S)

    threading.Thread(target=offer_often, daemon=True).start()
    for order in map(json.loads, orders):
        if isinstance(order, dict):
            _export_spans(**order)
            print("true", file=answers)
            continue
        with changed:
            wanted[0] = order
            changed.notify()


def _export_spans(app: str, endpoint: str | None) -> None:
    import ray

    from dmoa.config import RouterConfig, TracingConfig
    from dmoa.serving.actors import find_actor

    store = find_actor("traces", app)
    ray.get(store.configure.remote(RouterConfig(), TracingConfig(otlp_endpoint=endpoint)))


def _offer(app: str) -> None:
    """Offer the current gate with a little noise on its weights."""
    import ray
    import torch
    from ray.exceptions import RayError

    from dmoa.checkpoint import describe_gate, files_of, read_files
    from dmoa.serving.actors import find_actor

    with contextlib.suppress(RayError, ValueError):
        router = find_actor("router", app)
        status = ray.get(router.status.remote())
        gate, old = read_files(ray.get(router.weights.remote(status.gate_version)), "the current gate")
        with torch.no_grad():
            weight = next(gate.parameters())
            weight.add_(1e-4 * torch.randn_like(weight))
        new = describe_gate(gate, fingerprint=old.pool_fingerprint, trained_on={"bench": 1})
        said = {"base_version": status.gate_version, "update": status.adaptation["ledger"] + 1, "source": "bench"}
        ray.get(router.offer.remote(files_of(gate, new), said))


def _stop(apps: Sequence[str]) -> None:
    for number, app in enumerate(reversed(apps), 1):
        stop(app, end_ray=number == len(apps))


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
            input_X=np.ones(772, np.float32),
            hidden_H=np.ones(128, np.float32),
            gate_version="untrained-0123456789ab",
            trace_id="0" * 32,
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
        reply=AgentReply(agent=names[0], status="ok", text="work", entropy=EntropySum(sum_nats=1.0, tokens=8), engine="scripted"),
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


if __name__ == "__main__":
    main()
