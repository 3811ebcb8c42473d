"""The HTTP app: its routes over a swarm, and work that is cancelled when the client that waits for it hangs up.

`until_gone` races any work against the disconnect; `EventStream` is the server-sent-events response built on it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from dmoa import __version__
from dmoa.config import ServerConfig
from dmoa.errors import DmoaError, EmptyAnswerError, RequestError
from dmoa.serving.http import errors, page, requests, responses
from dmoa.serving.http.errors import json_response
from dmoa.serving.http.middleware import DOCS_PATH, SHOWN_HEADERS, BodyLimit, ConcurrencyLimit, HostCheck, KeyCheck
from dmoa.serving.http.responses_api import ResponseRendering, ResponsesRequest, responses_order
from dmoa.serving.http.service import SwarmService
from dmoa.serving.trace_list import summary_of_failure, unknown_trace
from dmoa.trace import AnsweredQuery
from dmoa.types import Answer, Event, Query, StepRecord

T = TypeVar("T")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it and raise ClientDisconnect when the client goes away first."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and watch.exception() is None:
            raise ClientDisconnect
        return await task
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends server-sent events; an error before the first event is raised, so that it becomes an HTTP status."""

    # Starlette's own StreamingResponse sends its headers before the first item exists, and stops listening for the disconnect
    # under newer ASGI servers.

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        self.events = events
        self._is_started = False
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send_all(send))
        except ClientDisconnect:
            if not self._is_started:
                raise

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            async for event in events:
                if not self._is_started:
                    self._is_started = True
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                if event:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


logger = logging.getLogger(__name__)
_TRACEPARENT = 64
"""Characters that are read of the header: the format has 55."""


def create_app(
    service_getter: Callable[[], SwarmService],
    *,
    key_hashes: tuple[str, ...],
    admin_hashes: tuple[str, ...] = (),
    server: ServerConfig,
    max_queued_requests: int,
    has_request_ids: bool = False,
) -> FastAPI:
    """Return the app of one server process.

    `service_getter` is called once per request, so the app may exist before its service does. `key_hashes` as
    `middleware.hash_keys` gives them; empty: no key is asked for. `admin_hashes`: keys that see
    all queries and may roll the gate back. `has_request_ids`: a server in front of the app adds
    `X-Request-Id` to every answer; else the app adds the trace's id under that name.
    """
    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(title="dmoa", version=__version__, redirect_slashes=False, docs_url=None, redoc_url=None)
    places, is_strict = ConcurrencyLimit(max_queued_requests), server.unknown_fields == "refuse"
    front = _Front(service=service_getter, places=places, has_request_ids=has_request_ids, refuses_unknown=is_strict)
    errors.install_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_body_bytes=server.max_body_bytes)
    app.add_middleware(KeyCheck, key_hashes=key_hashes, admin_hashes=admin_hashes)
    if not key_hashes:
        app.add_middleware(HostCheck, names=(socket.gethostname(), server.host, *server.allowed_hosts))
    if server.cors_origins:
        app.add_middleware(errors.SurpriseGuard)  # within, so that pages of these origins can read such an answer too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=SHOWN_HEADERS,
        )
    app.add_middleware(errors.LenientPaths)
    app.add_middleware(errors.SurpriseGuard)
    fails, replied = responses.failures, responses.replied
    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    ready = replied(responses.ReadyReply)
    ready["responses"][503] = responses.shown(responses.NotReadyReply, "Agents are down.")
    for method, path, endpoint, document in (
        ("POST", "/v1/chat/completions", front.chat, responses.completions(requests.ChatRequest, responses.ChatReply)),
        ("POST", "/v1/completions", front.completion, responses.completions(requests.CompletionRequest, responses.TextReply)),
        ("POST", "/v1/responses", front.response, responses.completions(ResponsesRequest, None)),
        ("GET", "/v1/models", front.models, {"responses": fails(401)}),
        ("GET", "/v1/models/{model:path}", front.model, {"responses": fails(401, 404)}),
        ("GET", "/healthz", front.healthz, {"responses": fails()}),
        ("GET", "/readyz", front.readyz, ready),
        ("GET", "/metrics", front.metrics, {"responses": text | fails(401)}),
        ("GET", "/v1/dmoa/traces/{trace_id}", front.trace, replied(None, 401, 404)),
        ("POST", "/v1/dmoa/outcomes", front.outcome, responses.posted(responses.OutcomeReply, requests.OutcomeRequest, 429, 503)),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_description="Done.", **document)
    page.add_routes(app, service_getter, front.follow)
    responses.install_document(app, has_keys=bool(key_hashes))
    app.add_route(DOCS_PATH, lambda request: HTMLResponse(responses.docs_page(app.openapi())), methods=["GET"])
    return app


_Render = Callable[..., responses.Rendering]
"""Makes the rendering of an order, given the pool's name and `trace_url`."""


@dataclass(frozen=True, kw_only=True)
class _Front:
    """The routes' handlers, and what they share: the service and the count of queries in flight."""

    service: Callable[[], SwarmService]
    places: ConcurrencyLimit
    has_request_ids: bool
    refuses_unknown: bool
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds from which on the models are there."""

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        order = requests.chat_order(await self._parsed(requests.ChatRequest, request), self.service())
        return await self._respond(request, order, partial(responses.Rendering, is_chat=True))

    async def completion(self, request: Request) -> Response:
        """Answer a plain prompt."""
        order = requests.completion_order(await self._parsed(requests.CompletionRequest, request), self.service())
        return await self._respond(request, order, partial(responses.Rendering, is_chat=False))

    async def response(self, request: Request) -> Response:
        """Answer a conversation as a response, which is not stored."""
        asked = await self._parsed(ResponsesRequest, request)
        order = responses_order(asked, self.service())
        return await self._respond(request, order, partial(ResponseRendering, request=asked))

    async def models(self) -> responses.ModelListReply:
        """List the names that `model` may hold: the pool, the pool under each policy, each agent."""
        return responses.ModelListReply(object="list", data=[self._model(name) for name in requests.model_names(self.service())])

    async def model(self, model: str) -> responses.ModelReply:
        """Describe one model name."""
        service = self.service()
        if model not in requests.model_names(service):
            raise requests.unknown_model(model, service)
        return self._model(model)

    def _model(self, name: str) -> responses.ModelReply:
        return responses.ModelReply(id=name, object="model", created=self.created, owned_by=self.service().pool)

    async def healthz(self) -> responses.AliveReply:
        """Say that the server is alive."""
        return responses.AliveReply(status="alive")

    async def readyz(self, request: Request) -> Response:
        """Say whether every agent is up, or cold: scaled to zero, started when it is asked; which ones, to those with a key."""
        service, is_told = self.service(), request.state.key_hash is not None
        states = await service.ready()
        down = [name for name in service.agents if states.get(name) not in ("up", "cold")]
        shown = states if is_told else {}
        if not down:
            return json_response(responses.ReadyReply(status="ready", agents=shown))
        hidden = f"{len(down)} of {len(service.agents)}; send an API key to see which"
        found = errors.problem(503, f"agents that are not up: {', '.join(down) if is_told else hidden}", "not_ready")
        return json_response(responses.NotReadyReply(error=found.error, agents=shown), 503)

    async def metrics(self) -> Response:
        """Return the router's aggregate."""
        return Response(await self.service().metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def trace(self, request: Request, trace_id: str) -> Response:
        """Return the trace of a query, to the key that made it."""
        found = await self.service().trace(trace_id, page.owner_of(request))
        if found is None:
            raise unknown_trace(trace_id)
        return json_response(found)

    async def outcome(self, request: Request) -> Response:
        """Take what a client knows of how good an answer to one of its queries was, or one agent's reply."""
        service = self.service()
        outcome = requests.outcome_of(await self._parsed(requests.OutcomeRequest, request), service.agents)
        said = await service.judge(outcome, _key_hash(request))
        return json_response(responses.OutcomeReply(trace_id=outcome.trace_id, kept=said))

    async def _parsed(self, model: type[requests.R], request: Request) -> requests.R:
        return await requests.parsed(model, request, refuses_unknown=self.refuses_unknown)

    async def _respond(self, request: Request, order: requests.ParsedRequest, render: _Render) -> Response:
        order = replace(order, query=replace(order.query, traceparent=request.headers.get("traceparent", "")[:_TRACEPARENT]))
        at = f"{str(request.base_url).rstrip('/')}/#/query/{order.query.trace_id}"
        rendering = render(order, self.service().pool, trace_url=at if order.body.is_stored else None)
        headers = rendering.headers | ({} if self.has_request_ids else {"X-Request-Id": order.query.trace_id})
        body, events = order.body, self.service().ask(order.query, order.policy, order.agent)
        told = {"user": body.user, "metadata": body.labels, "is_stored": body.is_stored}
        items = self._kept(order.query, order.policy, events, _key_hash(request), rendering, **told)
        if body.stream:
            return EventStream(_events(items, rendering), headers)
        return json_response(rendering.whole(await until_gone(request.receive, _last(items))), headers=headers)

    async def _kept(
        self,
        query: Query,
        policy: str,
        events: AsyncGenerator[Event],
        key_hash: str,
        rendering: responses.Rendering | None = None,
        **told: Any,
    ) -> AsyncGenerator[Event]:
        """Yield a query's events while holding a place; keep the trace before the answer leaves, and what a lost one met.

        An error names fields as the request of `rendering` does; `told`: what else an `AnsweredQuery` holds.
        """
        started_unix_s, service = time.time(), self.service()
        with self.places.take():
            try:
                async with aclosing(events) as items:
                    async for item in items:
                        if isinstance(item, Answer):
                            service.record(AnsweredQuery(query=query, answer=item, **told), key_hash)
                        yield item
            except DmoaError as error:
                is_stored = told.get("is_stored", True)
                service.page.failed(summary_of_failure(query, policy, error, started_unix_s, is_stored=is_stored), key_hash)
                named = rendering.renamed(error) if rendering and isinstance(error, RequestError) else error
                if named is error:
                    raise
                raise named from error

    async def follow(
        self, request: Request, query: Query, policy: str, events: AsyncGenerator[Event], trace_id: str, step: int
    ) -> Answer:
        """Run a branch from before a step of a trace, which holds a place as any other query, and return its answer."""
        metadata = {"branched_from": trace_id, "branched_at": str(step)}
        items = self._kept(query, policy, events, _key_hash(request), metadata=metadata, branched_at=step)
        return await until_gone(request.receive, _last(items))


async def _last(items: AsyncGenerator[Event]) -> Answer:
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Answer):
                return item
    raise EmptyAnswerError("the query ended without an answer; ask again")


async def _events(items: AsyncGenerator[Event], rendering: responses.Rendering) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a query. An error before the first item is raised, a later one is an event."""
    is_open = False
    try:
        async with aclosing(items):
            async for item in items:
                events = b"" if is_open else rendering.opening()
                if isinstance(item, Answer):
                    yield events + rendering.closing(item)
                    return
                if isinstance(item, StepRecord):
                    events += rendering.step(item)
                else:
                    events += rendering.thought(item.text) if item.is_reasoning else rendering.delta(item.text)
                is_open = True
                yield events
        raise EmptyAnswerError("the query ended without an answer; ask again")
    except Exception as error:  # agents and engines run inside: the client is owed an error event, the log the details
        if not is_open:
            raise
        if errors.described(error)[0] == 500:
            logger.exception("unexpected error in mid-stream")
        yield rendering.failure(error)


def _key_hash(request: Request) -> str:
    return request.state.key_hash
