"""What a client may get wrong about an address: slashes too many, HEAD for GET, a path that is a little off.

`LenientPaths` mends the first two before anything reads the path; `advice` names the right path for the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
        # A copy, because the server itself looks at the method of the scope that it made.
        mended = {**scope, "path": tidy(scope["path"]), "method": "GET" if is_head else scope["method"]}
        await self.app(mended, receive, send_head if is_head else send)


def tidy(path: str) -> str:
    """Return a path without trailing and doubled slashes; the root stays `/`."""
    return re.sub("/{2,}", "/", path).rstrip("/") or "/"


def advice(path: str, routes: Iterable[BaseRoute]) -> str:
    """Return what to do about a path that is not served: the one that was probably meant, or all that there are."""
    served = {route.path_format: route for route in routes if isinstance(route, APIRoute)}
    shown = {known: f"{' '.join(sorted(route.methods))} {known}" for known, route in served.items()}
    if "responses" in path.split("/"):
        return f"the Responses API is not supported; use {shown['/v1/chat/completions']}"
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
