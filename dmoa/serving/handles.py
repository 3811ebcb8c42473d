"""Calls through Serve's handles, each with an id of its own, and requests that bring their bodies along.

Within a request Serve gives all calls the request's internal id (Ray 2.60), and keeps books by it. A router that chooses
replicas by session finds one waiting call per id: of two that wait at a time the other is never sent. And where a client goes
away, Serve cancels whatever bears the id, also what other queries wait for by now, such as a cold agent's start.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve import context
from ray.serve._private import replica
from ray.serve._private.common import StreamingHTTPRequest
from ray.serve._private.http_util import ASGIReceiveProxy

from dmoa.loopback import is_loopback
from dmoa.serving.http.front import BODY

_PROCESS = uuid.uuid4().hex
_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Sent:
    """A call on its way."""

    response: Any
    """Serve's response, to be awaited or iterated."""
    call_id: str
    """Under which Serve keeps books about the call."""

    def is_taken(self) -> bool:
        """Tell whether a replica has the call, or it is over; Serve says it nowhere in public.

        The response alone would tell too late: by gRPC a call that streams nothing is one exchange, and all that Serve hears
        of it comes with the reply.
        """
        return bool(self.response._replica_result_future.done() or context._get_in_flight_requests(self.call_id))


def reach(deployment: str, app: str) -> Any:
    """Return a handle for processes that serve nothing: any event loop of this one may call through it."""
    handle = serve.get_deployment_handle(deployment, app)
    handle._init(_run_router_in_separate_loop=True)  # Serve would take its loop, were that running; our flags have it so
    return handle


def ask(handle: Any, *args: object) -> Sent:
    """Call through a handle. The request's id in Serve's logs stays the client's.

    Serve cancels the call with nothing else: whoever no longer waits for the response must cancel it.
    """
    call_id = f"{_PROCESS}-{next(_NUMBERS)}"
    token = context._serve_request_context.set(replace(context._get_serve_request_context(), _internal_request_id=call_id))
    try:
        return Sent(handle.remote(*args), call_id)
    finally:
        context._serve_request_context.reset(token)


def has_replica(handle: Any) -> bool:
    """Tell whether a handle knows of a replica that lives, as Serve (Ray 2.60) tells nowhere; True before it has heard of any.

    Serve drops a dead one at the first call that does not reach it, seconds before its controller finds out.
    """
    return not handle.running_replicas_populated() or bool(handle._router._asyncio_router.request_router.curr_replicas)


class CarriedBody(ASGIReceiveProxy):
    """Takes a request's body from its scope where the front has put it, else asks Serve's proxy for it, as Serve does.

    Serve (Ray 2.60) has a replica call its proxy for the body, and once more for the disconnect: two calls of an actor, which
    cost both processes more than many a request. Where the client goes away it cancels the request as well, which is enough.
    """

    def __init__(self, scope: Any, *args: Any) -> None:
        super().__init__(scope, *args)
        self._body: bytes | None = scope.pop(BODY, None)

    async def fetch_until_disconnect(self) -> None:
        """Queue what the app receives."""
        if self._body is None:
            await super().fetch_until_disconnect()
        else:
            self.queue.put_nowait({"type": "http.request", "body": self._body, "more_body": False})


_proxys = StreamingHTTPRequest.receive_asgi_messages.fget


def _asked_late(request: StreamingHTTPRequest) -> Callable[[Any], Awaitable[bytes]]:
    """Return what asks the proxy, which is looked up in the cluster only then, where Serve does so for every request."""
    return lambda metadata: _proxys(request)(metadata)


def take_carried_bodies() -> None:
    """Have this process, a replica, take bodies from where the front has put them."""
    replica.ASGIReceiveProxy = CarriedBody
    StreamingHTTPRequest.receive_asgi_messages = property(_asked_late)


def listen_where_ray_does() -> None:
    """Have this replica take calls on loopback where its Ray listens there alone; call in its constructor.

    Serve (Ray 2.60) takes calls between replicas on every interface.
    """
    if is_loopback(ray.util.get_node_ip_address()):
        replica.add_port_to_grpc_server = lambda server, _: add_port_to_grpc_server(server, "127.0.0.1:0")
