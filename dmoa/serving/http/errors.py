"""OpenAI's error objects: what each error of ours is as an HTTP reply, and what a client may get wrong about an address.

`LenientPaths` mends slashes too many and HEAD for GET before anything reads the path; `advice` names the right path for one that
is a little off.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from difflib import get_close_matches

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmoa.errors import (
    AgentOverloadedError,
    AgentUnavailableError,
    BrokenStreamError,
    DeadlineError,
    DmoaError,
    EmptyAnswerError,
    NoAgentError,
    RequestError,
)

_BASE = "/v1"
_CLOSE = 0.75
"""Least similarity of a path that is offered in place of an unknown one."""


class LenientPaths:
    """ASGI middleware: drops trailing and doubled slashes, and answers HEAD as GET without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        is_head = scope["method"] == "HEAD"
        path = tidy(scope["path"])
        path += "/" * (path == scope.get("root_path"))  # the page of an app below a prefix
        # A copy, because the server itself looks at the method of the scope that it made.
        mended = {**scope, "path": path, "method": "GET" if is_head else scope["method"]}
        await self.app(mended, receive, send_head if is_head else send)


def tidy(path: str) -> str:
    """Return a path without trailing and doubled slashes; the root stays `/`."""
    return re.sub("/{2,}", "/", path).rstrip("/") or "/"


def advice(path: str, routes: Iterable[BaseRoute]) -> str:
    """Return what to do about a path that is not served: the one that was probably meant, or all that there are."""
    served = {route.path_format: route for route in routes if isinstance(route, APIRoute)}
    shown = {known: f"{' '.join(sorted(route.methods))} {known}" for known, route in served.items()}
    meant = _meant(path, list(served))
    if meant is None:
        return f"its paths: {', '.join(shown.values())}"
    base = f" (the base URL of a client ends in {_BASE})" if meant.startswith(_BASE) and not path.startswith(f"{_BASE}/") else ""
    return f"use {shown[meant]}{base}"


def _meant(path: str, served: list[str]) -> str | None:
    """Return the served path that an unknown one ends with, the base aside, or is the beginning of, or nearly is."""
    ends = [known for known in served if path.endswith(known.removeprefix(_BASE))]
    goes_on = [known for known in served if known.startswith(f"{path}/")]
    if ends or goes_on:
        return max(ends, key=len) if ends else min(goes_on, key=len)
    return next(iter(get_close_matches(path, served, n=1, cutoff=_CLOSE)), None)


logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
CLIENT_GONE_STATUS = 499
"""Written to access logs by convention; no client is left to read it."""
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
_EXPECTED: dict[type[DmoaError], tuple[int, str]] = {
    NoAgentError: (503, "no_agent"),
    AgentUnavailableError: (503, "no_agent"),
    AgentOverloadedError: (503, "no_agent"),
    BrokenStreamError: (503, "stream_lost"),
    EmptyAnswerError: (503, "empty_answer"),
    DeadlineError: (504, "deadline_exceeded"),
}
"""What a swarm may fail by: the HTTP status and the OpenAI code of each error."""
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 415: {"Accept-Encoding": "identity"}, 429: {"Retry-After": str(RETRY_AFTER_S)}}
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
_SURPRISE = "the server met an unexpected error; its log has the details"


def encode_json(content: object) -> bytes:
    """Encode a record or plain values as JSON on one line. Non-finite numbers are an error; what UTF-8 cannot carry becomes `?`.

    Characters at which some client may end a line, and so an event, are escaped; JSON itself escapes those below U+0020.
    """
    plain = content.model_dump(mode="json") if isinstance(content, BaseModel) else content
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_LINE_ENDS).encode("utf-8", "replace")


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response; `content` as in `encode_json`."""
    return Response(encode_json(content), status_code=status, headers=headers, media_type="application/json")


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None


class ErrorReply(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail


def problem(status: int, message: str, code: str | None, param: str | None = None) -> ErrorReply:
    """Return an OpenAI error object."""
    kind = _TYPES.get(status, "invalid_request_error")
    return ErrorReply(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def described(error: Exception) -> tuple[int, ErrorReply]:
    """Return the HTTP status and the OpenAI error object that an error stands for; a surprise gets a generic text."""
    if isinstance(error, RequestError):
        return error.status, problem(error.status, str(error), error.code, error.param)
    status, code = next((found for kind, found in _EXPECTED.items() if isinstance(error, kind)), (500, "internal_error"))
    return status, problem(status, _SURPRISE if status == 500 else str(error), code)


def last_event(path: str, error: RequestError) -> bytes:
    """Return the server-sent events that end a stream at a path where it cannot go on."""
    if path.rstrip("/").endswith("/responses"):
        told = {"type": "error", "code": error.code, "message": str(error), "param": None}
        return b"event: error\ndata: " + encode_json(told) + b"\n\n"
    return b"data: " + encode_json(problem(error.status, str(error), error.code)) + b"\n\ndata: [DONE]\n\n"


def error_response(error: Exception) -> Response:
    """Return the HTTP response of an error."""
    status, reply = described(error)
    return json_response(reply, status, _HEADERS.get(status))


def install_handlers(app: FastAPI) -> None:
    """Register the handlers of every expected error on the app."""

    async def expected(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def unrouted(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, why = request.url.path[:200], str(error.detail)
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        if error.status_code == 404:
            why = f"not a path of this server; {advice(path, request.app.routes)}"
        elif error.status_code == 405:
            why = f"not a method of this path; use {headers.get('allow', '')}"
            headers["allow"] = headers.get("allow", "").replace("GET", "GET, HEAD")
        message = f"{request.method} {path}: {why}"
        return json_response(problem(error.status_code, message, code), error.status_code, headers)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE_STATUS)

    kinds: list[type[DmoaError]] = [RequestError, *_EXPECTED]
    for kind in kinds:
        app.add_exception_handler(kind, expected)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_exception_handler(ClientDisconnect, gone)


class SurpriseGuard:
    """ASGI middleware, the outermost: an unexpected error becomes a plain 500 and a log entry.

    Starlette's own last handler raises again after it answered, which makes a Serve replica count a failed request and
    may cut the connection under the client's answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception as error:  # the last line of defence: nothing may reach a client as a stack trace
            if scope["type"] != "http" or started:
                raise
            logger.exception("unexpected error at %s %r", scope["method"], scope["path"])
            await error_response(error)(scope, receive, send)
