"""Stands before everything: bounds on what clients send and ask at once, and errors that an SDK understands.

It stands in the ingress where that listens itself, else in Serve's proxy. Serve hands a request on as soon as its headers are
there, so that half-sent bodies fill the ingress, and tells in plain text of an app that is being deleted (404) or of an ingress
that died (500). Here a body is read first, within a time and a size;
a query too many is refused before any other process hears of it; and what Serve says itself becomes 503 with Retry-After.

The bounds are those of the pool: its ingress tells them in a header of its answers (`FrontNotice`), so that one front serves
several apps and learns of a new pool by its first answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass

from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmoa.errors import RequestError
from dmoa.serving.http.apart import Passage, serve_apart
from dmoa.serving.http.connection import LINGER_S, MIN_BYTES_PER_S, bound_connections
from dmoa.serving.http.errors import RETRY_AFTER_S, SurpriseGuard, encode_json, error_response, last_event, tidy
from dmoa.serving.http.keeper import APP_VARIABLE, innermost, keep_port, keep_silent
from dmoa.serving.http.middleware import ConcurrencyLimit, body_too_large, cors_headers, declared_bytes, header_of, is_open

BODY_S = 10.0
"""How long a body may take, beside the time that its bytes have at `MIN_BYTES_PER_S`."""
ROUTES_S = 5.0
"""How long a new proxy waits to hear which apps there are, before it tells a client that there is none."""
LAST_LOOK_S = 0.1
"""For what came while this process itself was too busy to read it."""
JOIN_PIECES = 256
MAX_HALF_SENT = 64
"""Half-sent bodies of one key; the oldest one makes room for a new one."""
MAX_OTHERS = 256
"""Requests in flight that are no queries, of one app."""
GONE_S = 60.0
"""How long an app that was there and is not counts as coming back (503); after that its paths are unknown (404)."""
BODY, MAX_CARRIED = "dmoa.body", 65_536
"""Under this name the scope carries a body of at most so many bytes, so that the ingress need not call back for it."""
NUM_KEYS = 4096
"""Keys that are remembered because an app took them."""
SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_ASKED = b"x-dmoa-front"
_TOLD = b"x-dmoa-bounds"
_OWN_PATHS = ("/-/healthz", "/-/routes")
_ORDERS = (_ASKED, b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve_multiplexed_model_id")
"""Headers by which a client would order Serve about; and those that Serve reads as text, of at most so many characters."""
_READ, _MAX_READ = (b"x-request-id", b"x-session-id"), 256
_SERVES_OWN = {b"content-type", b"x-request-id", b"retry-after"}
"""Headers of what Serve's proxy says itself, which never tells a length; Starlette always does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one app holds to."""

    body: int = 16_777_216
    """Bytes of a request's body."""
    queries: int = 256
    """Queries in flight, over all processes of the app."""
    has_keys: bool = True
    origins: tuple[str, ...] = ()
    """Whose pages may read answers from a browser."""


class FrontNotice:
    """ASGI middleware of the ingress: tells the front, and nobody else, what its app holds to."""

    def __init__(self, app: ASGIApp, bounds: Bounds) -> None:
        self.app = app
        self._bounds = {name: value for name, value in asdict(bounds).items() if value != ()}  # older fronts know no origins
        self._told: dict[str, bytes] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or all(name != _ASKED for name, _ in scope["headers"]):
            await self.app(scope, receive, send)
            return
        prefix = scope.get("root_path", "")
        if prefix not in self._told:
            self._told = {prefix: encode_json([prefix, self._bounds])}  # an app has one
        told = self._told[prefix]

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (_TOLD, told)]}
            await send(message)

        await self.app(scope, receive, telling)


class _App:
    """What the front knows of one app, and how many requests to it are in flight."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.gone_since_s: float | None = None
        self._queries, self._others = ConcurrencyLimit(bounds.queries), ConcurrencyLimit(MAX_OTHERS)

    def take(self, *, is_query: bool) -> AbstractContextManager[None]:
        """Hold one place. Raises RequestError (429) when all are taken."""
        self._queries.max_queued_requests = self.bounds.queries
        return (self._queries if is_query else self._others).take()


class Front:
    """ASGI middleware of the proxy."""

    def __init__(self, app: ASGIApp, *, body_s: float = BODY_S, linger_s: float = LINGER_S) -> None:
        self.app = app
        self.body_s = body_s
        self.linger_s = linger_s
        self._apps: dict[str, _App] = {}
        self._any = _App(Bounds())
        """Stands for apps that have not answered yet."""
        self._told: dict[bytes, _App] = {}
        self._keys: OrderedDict[str, None] = OrderedDict()
        self._half_sent: dict[str, dict[asyncio.Timeout, None]] = {}
        self._knows_routes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in _OWN_PATHS:
            await self.app(scope, receive, send)
            return
        if not self._knows_routes:
            await self._learn_routes()
        prefix, app = self._app_at(scope["path"])
        answer = _Answer(self, scope, send, app)
        path = tidy(scope["path"][len(prefix) :])
        try:
            body = await self._body(scope, receive, app)
            with nullcontext() if is_open(path) else app.take(is_query=scope["method"] == "POST"):
                await self._hand_on(scope, receive, body, answer)
        except RequestError as error:
            await self._refuse(scope, receive, send, _refusal(error, scope, app))
        except ClientDisconnect:
            return

    async def _learn_routes(self) -> None:
        """Wait until Serve's proxy, which is new, has heard of an app; what came before it was ready is queued here."""
        routes = getattr(innermost(self.app), "proxy_router", None)
        until_s = asyncio.get_running_loop().time() + ROUTES_S
        while routes is not None and not self._knows_routes and not routes.ready_for_traffic(is_head=True)[0]:
            if asyncio.get_running_loop().time() > until_s:
                break
            await asyncio.sleep(0.02)
        self._knows_routes = True

    async def _hand_on(self, scope: Scope, receive: Receive, body: bytes, answer: _Answer) -> None:
        is_read = False

        async def replayed() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        headers = [(name, value) for name, value in scope["headers"] if not _is_serves(name, value)]
        carried = {BODY: body} if len(body) <= MAX_CARRIED else {}
        await self.app({**scope, **carried, "headers": [*headers, (_ASKED, b"1")]}, replayed, answer.send)
        await answer.finish()

    async def _body(self, scope: Scope, receive: Receive, app: _App) -> bytes:
        """Return the whole body. Raises RequestError (413, 408), ClientDisconnect."""
        most, declared = app.bounds.body, declared_bytes(scope)
        if declared is not None and declared > most:
            raise body_too_large(str(declared), most)
        pieces: list[bytes] = []
        started_s, group = asyncio.get_running_loop().time(), self._group(scope, app)
        for seconds in (self.body_s, LAST_LOOK_S):
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds) as limit:
                    with self._half(group, limit):
                        while await _has_more(receive, pieces, most):
                            if seconds != LAST_LOOK_S:
                                limit.reschedule(started_s + seconds + sum(map(len, pieces)) / MIN_BYTES_PER_S)
                        return b"".join(pieces)
        took_s = asyncio.get_running_loop().time() - started_s
        what = f"body: {sum(map(len, pieces))} bytes came in {took_s:.1f} s"
        message = f"{what}; expected the whole of it within {self.body_s:g} s; send it at once"
        raise RequestError(message, code="request_timeout", status=408)

    @contextmanager
    def _half(self, group: str, limit: asyncio.Timeout) -> Iterator[None]:
        """Count a body that is being read; above the bound the oldest of its group times out now."""
        members = self._half_sent.setdefault(group, {})
        if len(members) >= MAX_HALF_SENT:
            oldest = next(iter(members))
            del members[oldest]
            if not oldest.expired():  # its own time may be over, and its task not yet have heard of it
                oldest.reschedule(0.0)
        members[limit] = None
        try:
            yield
        finally:
            members.pop(limit, None)
            if not members:
                self._half_sent.pop(group, None)

    def _group(self, scope: Scope, app: _App) -> str:
        """Return by what a half-sent body is counted: its key where an app took it before, else all the others together."""
        key = _key_of(scope) if app.bounds.has_keys else ""
        return key if key in self._keys else ""

    def _app_at(self, path: str) -> tuple[str, _App]:
        """Return the app at a path and its prefix: the longest one, as Serve chooses."""
        known = (prefix for prefix in self._apps if not prefix or f"{path}/".startswith(f"{prefix}/"))
        prefix = max(known, key=len, default="")
        return prefix, self._apps.get(prefix, self._any)

    def learn(self, told: bytes, scope: Scope, status: int) -> None:
        """Take what an app says of itself, and a key that it took."""
        app = self._told.get(told)
        if app is None:
            prefix, bounds = json.loads(told)
            app = self._apps.setdefault(prefix, _App(Bounds()))
            app.bounds = Bounds(**{name: value for name, value in bounds.items() if name in Bounds.__dataclass_fields__})
            self._told = {known: other for known, other in self._told.items() if other is not app} | {told: app}
        app.gone_since_s = None
        if status == 200 and scope["method"] == "POST" and (key := _key_of(scope)):
            self._keys[key] = None
            self._keys.move_to_end(key)
            if len(self._keys) > NUM_KEYS:
                self._keys.popitem(last=False)

    def serves_error(self, app: _App, status: int) -> RequestError:
        """Return the error that stands for one of Serve's own."""
        now = asyncio.get_running_loop().time()
        if status == 404:
            app.gone_since_s = app.gone_since_s or now
            is_late = now - app.gone_since_s > GONE_S
            if self._apps and (app is self._any or is_late):
                return RequestError(
                    "no pool is served at this path; look at the server's address", code="unknown_url", status=404
                )
            return _lost("no pool is served here at the moment: it starts, or it stops")
        if status == 429:
            return RequestError("the server's queue is full; try again", code="too_many_requests", status=429)
        return _lost("the process that held this query was lost, or none could take it")

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, response: Response) -> None:
        """Answer with an error; where the body is not read to its end, go on for a while, so that the client reads the answer."""
        if response.status_code == 429:  # its body was read
            await response(scope, receive, send)
            return
        headers = [*response.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(self.linger_s):
                while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _has_more(receive: Receive, pieces: list[bytes], most: int) -> bool:
    """Add what comes to the pieces of a body; tell whether more is to come. Raises RequestError (413), ClientDisconnect."""
    message = await receive()
    if message["type"] != "http.request":
        raise ClientDisconnect
    pieces.append(message.get("body", b""))
    if len(pieces) == JOIN_PIECES:
        pieces[:] = [b"".join(pieces)]
    if sum(map(len, pieces)) > most:
        raise body_too_large(f"more than {most}", most)
    return bool(message.get("more_body", False))


class _Answer:
    """What goes back to one client: the app's answer, or what stands for Serve's own."""

    def __init__(self, front: Front, scope: Scope, send: Send, app: _App) -> None:
        self._front, self._scope, self._send, self._app = front, scope, send, app
        self._status = 0
        self._is_serves = self._is_done = self._is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._started(message)
            if self._is_serves:
                return
        elif self._is_serves:
            if not self._is_done:
                await self._fail(self._front.serves_error(self._app, self._status))
            return
        self._is_done = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    def _started(self, message: Message) -> Message:
        self._status = message["status"]
        headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
        told = next((value for name, value in headers if name == _TOLD), None)
        if told is not None:
            self._front.learn(told, self._scope, self._status)
        elif self._status >= 400:
            self._is_serves = {name for name, _ in headers} <= _SERVES_OWN
        self._is_stream = any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
        return {**message, "headers": [(name, value) for name, value in headers if name != _TOLD]}

    async def finish(self) -> None:
        """End an answer that the app left open: the process behind it was lost."""
        if self._is_done:
            return
        lost = self._front.serves_error(self._app, 500)
        if self._status == 0 or self._is_serves:
            await self._fail(lost)
        elif self._is_stream:
            body = last_event(self._scope["path"], lost)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _fail(self, error: RequestError) -> None:
        self._is_done = True
        response = _refusal(error, self._scope, self._app)
        if error.status == 503:
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        await response(self._scope, _nothing, self._send)


def _refusal(error: RequestError, scope: Scope, app: _App) -> Response:
    """Return the answer that stands for an error, for pages of the app's origins too."""
    response = error_response(error)
    response.headers.update(cors_headers(scope, app.bounds.origins))
    return response


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _lost(what: str) -> RequestError:
    return RequestError(f"{what}; try again after the seconds in Retry-After", code="server_lost", status=503)


def _is_serves(name: bytes, value: bytes) -> bool:
    is_odd = name in _READ and not (value.isascii() and len(value) <= _MAX_READ)
    return is_odd or name.replace(b"-", b"_") == _ORDERS[-1] or name in _ORDERS


def _key_of(scope: Scope) -> str:
    sent = header_of(scope["headers"], b"authorization")
    return hashlib.sha256(sent).hexdigest() if sent else ""


def places_behind(most: int) -> int:
    """Return how many queries an app may hold itself of `most` in flight: twice as many where a front counts before it.

    A query whose client went away has no place in the front any more, and ends a moment later.
    """
    return 2 * most if os.environ.get(SETTING) else most


def middlewares() -> list[Middleware]:
    """Bound this process's connections and return its front; of Serve's processes those that listen call it (`SETTING`)."""
    from ray.serve.context import _get_internal_replica_context

    bound_connections()
    replica, listener = _get_internal_replica_context(), os.environ.get(APP_VARIABLE)
    if listener == (replica and replica.app_name):
        keep_port()
    elif replica is None:
        keep_silent()
    if replica is None:
        return [Middleware(Front), Middleware(SurpriseGuard)]
    serve_apart()
    return [Middleware(Passage, asyncio.get_running_loop()), Middleware(Front), Middleware(SurpriseGuard)]
