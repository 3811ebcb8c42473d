"""The page of a server, `GET /`, and the routes under /v1/dmoa/ that it reads: status, traces, gates, what if, branch.

The page is static: small ES modules, a style sheet and a document without data, served from the wheel under a strict
Content-Security-Policy. What it shows comes from these routes, with the key of whoever looks; an admin key sees the queries of
all keys and may roll the gate back.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

from dmoa.errors import RequestError
from dmoa.serving.http.errors import json_response
from dmoa.serving.http.fields import RequestModel
from dmoa.serving.http.requests import parse_body
from dmoa.serving.http.responses import failures
from dmoa.serving.trace_list import AgentStatistics, TraceFilter, TracePage, described_filter

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
    """Version to go back to; null: the one before the current one."""
    note: str = Field(default="", max_length=500)
    """Words for the history."""


class RollbackReply(BaseModel):
    """Body of the answer to a rollback."""

    version: str
    previous: str | None
    changed: bool


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

    def __init__(self, getter: Any) -> None:
        self._service = getter

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
                statistics=[AgentStatistics.model_validate(one) for one in await service.page.statistics(owner_of(request))],
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
            raise RequestError(
                "rollback: it needs an admin key; send one of DMOA_ADMIN_KEYS, or use `dmoa router rollback`",
                code="admin_only",
                status=403,
            )
        wanted = parse_body(RollbackRequest, await request.body(), request.headers.get("content-type", ""))
        done = await self._service().page.rollback(wanted.version, wanted.note)
        return json_response({name: done[name] for name in RollbackReply.model_fields})


BODIES: tuple[type[BaseModel], ...] = (RollbackRequest,)
"""Request records for the OpenAPI document."""


def add_routes(app: FastAPI, getter: Any) -> None:
    """Add the page and its routes to an app; `getter` returns the `SwarmService`, whose `page` they read."""
    routes, body = PageRoutes(getter), {"required": True}
    html = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
    app.add_api_route("/page/{name}", asset, methods=["GET"], include_in_schema=False)
    for method, path, endpoint, document in (
        ("GET", "/", page, {"responses": html | failures()}),
        ("GET", "/v1/dmoa/status", routes.status, {"response_model": StatusReply, "responses": failures(401)}),
        (
            "GET",
            "/v1/dmoa/traces",
            routes.traces,
            {
                "response_model": TracePage,
                "responses": failures(400, 401),
                "openapi_extra": {"parameters": described_filter()},
            },
        ),
        ("GET", "/v1/dmoa/gates", routes.gates, {"response_model": GatesReply, "responses": failures(401, 503)}),
        (
            "POST",
            "/v1/dmoa/gates/rollback",
            routes.rollback,
            {
                "response_model": RollbackReply,
                "responses": failures(400, 401, 403, 404, 413, 503),
                "openapi_extra": {
                    "requestBody": body
                    | {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/RollbackRequest"}}}}
                },
            },
        ),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_description="Done.", **document)
