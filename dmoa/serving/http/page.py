"""The page of a server, `GET /`, and the routes under /v1/dmoa/ that it reads: status, traces, gates, what if, branch.

The page is static: small ES modules, a style sheet and a document without data, served from the wheel under a strict
Content-Security-Policy. What it shows comes from these routes, with the key of whoever looks; an admin key sees the queries of
all keys and may roll the gate back.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dmoa.errors import RequestError
from dmoa.serving.http.errors import LenientPaths, install_handlers, json_response
from dmoa.serving.http.fields import WHOLE, RequestModel
from dmoa.serving.http.requests import parsed
from dmoa.serving.http.responses import failures, posted, replied
from dmoa.serving.http.service import SwarmService
from dmoa.serving.trace_list import AgentStatistics, TraceFilter, TracePage, described_filter, unknown_trace
from dmoa.serving.what_if import DecidedStep
from dmoa.trace import ReplyDmoa, Trace, reply_dmoa
from dmoa.types import Answer, Event, Query

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class StatusReply(BaseModel):
    """Body of GET /v1/dmoa/status."""

    pool: str
    agents: dict[str, str]
    """Agent -> up, cold, or why it is neither."""
    policies: list[str]
    is_admin: bool
    """Whether the key of this request may change the gate."""
    can_ask: bool
    """false where the page shows files and no server."""
    router: dict[str, Any] | None
    """As `dmoa router status`; null while the router is away."""
    statistics: list[AgentStatistics]
    """What each agent did in the traces that the key may see."""


class GatesReply(BaseModel):
    """Body of GET /v1/dmoa/gates."""

    current: str | None
    history: list[dict[str, Any]]
    """As `dmoa router history`, oldest first."""


class RollbackRequest(RequestModel):
    """Body of POST /v1/dmoa/gates/rollback."""

    version: str | None = Field(default=None, max_length=200)
    """Version to go back to; null: the one before the trial that runs, else before the current one."""
    note: str = Field(default="", max_length=500)
    """Words for the history."""


class RollbackReply(BaseModel):
    """Body of the answer to a rollback."""

    version: str
    previous: str | None
    changed: bool


class WhatIfRequest(RequestModel):
    """Body of POST /v1/dmoa/traces/{trace_id}/what-if: one of the two."""

    gate_version: str | None = Field(default=None, min_length=1, max_length=200)
    """Version that decides on the recorded inputs; the router keeps those of its history."""
    policy: str | None = Field(default=None, max_length=200)
    """Policy that says whom it would ask at each recorded state."""


class WhatIfReply(BaseModel):
    """Body of the answer to what if."""

    trace_id: str
    steps: list[DecidedStep]


class BranchRequest(RequestModel):
    """Body of POST /v1/dmoa/traces/{trace_id}/branch."""

    step: Annotated[int, WHOLE] = Field(ge=0, le=1000)
    """Counts from 0: the steps before it are taken as they were."""
    policy: str | None = Field(default=None, max_length=200)
    """Policy to go on with; null: the recorded one."""
    agents: list[str] = Field(default_factory=list, max_length=64)
    """Whom the step asks in place of the policy's choice."""


class BranchReply(BaseModel):
    """Body of the answer to a branch."""

    answer: str
    dmoa: ReplyDmoa
    """As in a chat reply with `dmoa.trace`."""


class RunLine(BaseModel):
    """One training or evaluation in a list."""

    id: str
    name: str
    kind: Literal["training", "evaluation"]
    unix_s: float | None
    """When it was last written."""


class RunsReply(BaseModel):
    """Body of GET /v1/dmoa/runs."""

    data: list[RunLine]


Follow = Callable[[Request, Query, str, AsyncGenerator[Event], str, int], Awaitable[Answer]]


@cache
def _asset(name: str) -> bytes | None:
    found = files("dmoa") / "serving" / "page" / name
    return found.read_bytes() if "/" not in name and found.is_file() else None


async def page(request: Request) -> Response:
    """Return the page, which holds no data."""
    root = request.scope.get("root_path", "").rstrip("/")
    text = (_asset("index.html") or b"").replace(b"@root@", root.encode())
    return Response(text, headers=HEADERS, media_type="text/html; charset=utf-8")


async def asset(name: str) -> Response:
    """Return a file that the page is made of."""
    kind, found = _TYPES.get(name.rpartition(".")[2]), _asset(name)
    if found is None or kind is None or name == "index.html":
        raise RequestError(f"page/{name[:80]}: there is no such file", code="unknown_url", status=404)
    return Response(found, headers=HEADERS, media_type=f"{kind}; charset=utf-8")


def owner_of(request: Request, *, mine: bool = False) -> str | None:
    """Return whose traces a request may see: those of its key; None for everybody's, where it is an admin's."""
    key_hash: str = request.state.key_hash
    return None if request.state.is_admin and not mine else key_hash


class PageRoutes:
    """Handlers of the routes, over the service of each request."""

    def __init__(self, getter: Callable[[], SwarmService], follow: Follow) -> None:
        self._service = getter
        self._follow = follow

    async def status(self, request: Request) -> Response:
        """Tell of the pool: agents, gate, and what the agents did in the queries of the key."""
        service = self._service()
        states = await service.ready()
        return json_response(
            StatusReply(
                pool=service.pool,
                agents=states,
                policies=list(service.policies),
                is_admin=request.state.is_admin,
                can_ask=True,
                router=await service.page.status(),
                statistics=await service.page.statistics(owner_of(request)),
            )
        )

    async def traces(self, request: Request) -> Response:
        """List the queries of the key, newest first; with an admin key those of all keys."""
        wanted = TraceFilter.parse(request.query_params)
        return json_response(await self._service().page.traces(wanted, owner_of(request, mine=wanted.mine)))

    async def gates(self) -> Response:
        """Tell which gates were current, and why."""
        return json_response(await self._service().page.gates())

    async def rollback(self, request: Request) -> Response:
        """Make an earlier gate current again; only with an admin key."""
        if not request.state.is_admin:
            why = "rollback: it needs an admin key; send one of DMOA_ADMIN_KEYS, or use `dmoa router rollback`"
            raise RequestError(why, code="admin_only", status=403)
        wanted = await parsed(RollbackRequest, request)
        done = await self._service().page.rollback(wanted.version, wanted.note)
        return json_response({name: done[name] for name in RollbackReply.model_fields})

    async def _trace(self, request: Request, trace_id: str) -> Trace:
        found = await self._service().trace(trace_id, owner_of(request))
        if found is None:
            raise unknown_trace(trace_id)
        return Trace.model_validate(found)

    async def what_if(self, request: Request, trace_id: str) -> Response:
        """Decide the steps of a query of the key again, by another gate version or policy; asks no agent."""
        wanted = await parsed(WhatIfRequest, request)
        if (wanted.gate_version is None) == (wanted.policy is None):
            raise RequestError("gate_version: send it, or policy, and not both", param="gate_version", code="invalid_value")
        trace = await self._trace(request, trace_id)
        steps = await self._service().page.what_if(trace, gate_version=wanted.gate_version, policy=wanted.policy)
        return json_response(WhatIfReply(trace_id=trace_id, steps=steps))

    async def branch(self, request: Request, trace_id: str) -> Response:
        """Ask again from before a step of a query of the key; what comes of it is a query of its own."""
        wanted = await parsed(BranchRequest, request)
        trace, service = await self._trace(request, trace_id), self._service()
        query, events = service.page.branch(
            trace, uuid.uuid4().hex, step=wanted.step, policy=wanted.policy, agents=tuple(wanted.agents)
        )
        answer = await self._follow(request, query, wanted.policy or trace.dmoa.policy, events, trace_id, wanted.step)
        return json_response(BranchReply(answer=answer.text, dmoa=reply_dmoa(answer, pool=service.pool, with_texts=True)))

    async def runs(self) -> Response:
        """List the trainings and evaluations that the page can show."""
        return json_response(RunsReply(data=[]))  # a server has none: `dmoa view` shows those on a disk

    async def run(self, run_id: str) -> Response:
        """Tell of one training or evaluation."""
        raise unknown_run(run_id)


def unknown_run(run_id: str) -> RequestError:
    """Return the error of a run that is not there."""
    message = f"run_id is {run_id[:80]!r}; there is no such run"
    return RequestError(message, param="run_id", code="unknown_run", status=404)


def add_routes(app: FastAPI, getter: Callable[[], SwarmService], follow: Follow) -> None:
    """Add the page and its routes to an app; `follow` runs a query that the page has made, and keeps it."""
    routes, base = PageRoutes(getter, follow), "/v1/dmoa"
    html = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
    listed = replied(TracePage, 400, 401, 503) | {"openapi_extra": {"parameters": described_filter()}}
    app.add_api_route("/page/{name}", asset, methods=["GET"], include_in_schema=False)
    for method, path, endpoint, document in (
        ("GET", "/", page, {"responses": html | failures()}),
        ("GET", f"{base}/status", routes.status, replied(StatusReply, 401)),
        ("GET", f"{base}/traces", routes.traces, listed),
        ("GET", f"{base}/gates", routes.gates, replied(GatesReply, 401, 503)),
        ("POST", f"{base}/gates/rollback", routes.rollback, posted(RollbackReply, RollbackRequest, 403, 503)),
        ("POST", f"{base}/traces/{{trace_id}}/what-if", routes.what_if, posted(WhatIfReply, WhatIfRequest, 503)),
        ("POST", f"{base}/traces/{{trace_id}}/branch", routes.branch, posted(BranchReply, BranchRequest, 429, 503, 504)),
        ("GET", f"{base}/runs", routes.runs, replied(RunsReply, 401)),
        ("GET", f"{base}/runs/{{run_id}}", routes.run, replied(None, 401, 404)),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_description="Done.", **document)


class PageFiles(Protocol):
    """What the page shows where there are files and no server."""

    def status(self) -> dict[str, Any]:
        """Return the values of a StatusReply."""

    def traces(self, wanted: TraceFilter) -> TracePage:
        """Return a page of the traces, newest first."""

    def trace(self, trace_id: str) -> dict[str, Any] | None:
        """Return a trace, None where there is none of that id."""

    def runs(self) -> list[dict[str, Any]]:
        """Return the trainings and evaluations, the values of a RunLine each."""

    def run(self, run_id: str) -> dict[str, Any] | None:
        """Return what is shown of one of them, None where there is none such."""


def create_view(shown: PageFiles) -> FastAPI:
    """Return an app that shows files on the same page; it answers requests to this machine's own names alone."""
    app = FastAPI(title="dmoa view", docs_url=None, redoc_url=None, openapi_url=None)
    install_handlers(app)
    app.add_middleware(LenientPaths)
    # A page elsewhere could have its own name lead to this machine, and so read what is here.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])

    def found(value: dict[str, Any] | None, missing: RequestError) -> Response:
        if value is None:
            raise missing
        return json_response(value)

    def traces(request: Request) -> Response:
        return json_response(shown.traces(TraceFilter.parse(request.query_params)))

    for path, endpoint in (
        ("/", page),
        ("/page/{name}", asset),
        ("/v1/dmoa/status", lambda: json_response(StatusReply.model_validate(shown.status()))),
        ("/v1/dmoa/traces", traces),
        ("/v1/dmoa/traces/{trace_id}", lambda trace_id: found(shown.trace(trace_id), unknown_trace(trace_id))),
        ("/v1/dmoa/runs", lambda: json_response(RunsReply(data=[RunLine.model_validate(one) for one in shown.runs()]))),
        ("/v1/dmoa/runs/{run_id:path}", lambda run_id: found(shown.run(run_id), unknown_run(run_id))),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    return app
