"""How much a client may send and how many queries may be in flight: 413 and 429.

`BodyLimit` wraps the app; `Places` is counted by the routes that start a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmoa.errors import RequestError
from dmoa.serving.problems import error_response


class BodyLimit:
    """ASGI middleware: counts the bytes of a body as they arrive and answers 413 above the limit.

    A declared Content-Length over the limit is refused before the app runs, a longer body without one where the app
    reads it. (Starlette 1.10 has such a limit too, but it answers in plain text, even in place of our 401.)
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen_bytes = 0

        async def counted() -> Message:
            nonlocal seen_bytes
            message = await receive()
            seen_bytes += len(message.get("body", b""))
            if seen_bytes > self.max_body_bytes:
                raise self._too_large(f"more than {self.max_body_bytes}")
            return message

        declared = _content_length(scope)
        if declared is not None and declared > self.max_body_bytes:
            await error_response(self._too_large(str(declared)))(scope, receive, send)
            return
        await self.app(scope, counted, send)

    def _too_large(self, seen: str) -> RequestError:
        message = f"body: {seen} bytes; allowed: {self.max_body_bytes} bytes (server.max_body_bytes); send a shorter request"
        return RequestError(message, code="request_too_large", status=413)


def _content_length(scope: Scope) -> int | None:
    value = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"")
    # More digits than this are over any limit, and int() refuses more than 4300.
    return int(value[:20]) if value.isdigit() else None


class Places:
    """Counts the queries in flight of one server process."""

    def __init__(self, max_queued_requests: int) -> None:
        self.max_queued_requests = max_queued_requests
        self.taken = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold one place. Raises RequestError (429) when all are taken."""
        if self.taken >= self.max_queued_requests:
            raise RequestError(
                f"{self.taken} queries are in flight; allowed: {self.max_queued_requests} (limits.max_queued_requests); "
                "try again after the seconds in Retry-After",
                code="too_many_requests",
                status=429,
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
