"""Checks the address that a server listens on: whether it is free, and whose answers come from there."""

from __future__ import annotations

import errno
import socket
import time
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmoa.errors import ConfigError, NoAgentError

MARK_HEADER = "x-dmoa-launch"
"""Header of /readyz by which a launch knows its own server among those that may share its port."""
READY_TIMEOUT_S = 10.0
_NUM_SURE = 20
"""Connections in a row that have to reach the own server: the kernel deals them out where another listens there too."""
FOREIGN_PATIENCE_S = 20.0
"""How long answers of others are waited out: the own proxy answers 404 until it has heard of the app."""
_PAUSE_S = 0.1


def bare(host: str) -> str:
    """Return a host without the brackets that an IPv6 address has in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def base_url(host: str, port: int, route_prefix: str = "/") -> str:
    """Return the URL at which a server that listens on `host` is reached from this machine."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- compared, not bound
    where = f"[{reached}]" if ":" in reached else reached
    return f"http://{where}:{port}{route_prefix.rstrip('/')}"


def probe(host: str, port: int) -> OSError | None:
    """Return why nothing can listen there, None if the address is free.

    Asks without SO_REUSEPORT: with it, two servers could share the port, and the kernel would deal the clients out to both.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return error if isinstance(error, OSError) else OSError(errno.EINVAL, "not a host name")
    faults = [_probe(family, where) for family, _, _, _, where in found]
    # `localhost` may have an address of a family that this machine lacks.
    real = [fault for fault in faults if fault and fault.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)]
    return real[0] if real else None if None in faults else faults[0]


def _probe(family: int, where: Any) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probed:
            probed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probed.bind(where)
            probed.listen()
    except OSError as error:
        return error
    return None


def check_free(host: str, port: int) -> None:
    """Raise ConfigError where nothing can listen on an address, saying why."""
    fault = probe(host, port)
    if fault is None:
        return
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if fault.errno == errno.EADDRINUSE:
        raise ConfigError(
            f"server.port is {port}; another program listens on {place} already; stop it, or choose another port (--port)"
        )
    if fault.errno in (errno.EACCES, errno.EPERM):
        raise ConfigError(
            f"server.port is {port}; this user may not listen on {place} ({fault.strerror}); choose one from 1024 on (--port)"
        )
    raise ConfigError(
        f"server.host is {host!r}; nothing can listen there ({fault.strerror or fault}); give an address of this "
        "machine, such as 127.0.0.1, or 0.0.0.0 for all of them (--host)"
    )


class LaunchMark:
    """Middleware that says on /readyz which launch the server is of."""

    def __init__(self, app: ASGIApp, mark: str) -> None:
        self._app = app
        self._mark = mark.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, with the mark where it is asked whether the server is ready."""
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith("/readyz"):
            await self._app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (MARK_HEADER.encode(), self._mark)]}
            await send(message)

        await self._app(scope, receive, marked)


def wait_ready(url: str, mark: str, timeout_s: float, *, patience_s: float = FOREIGN_PATIENCE_S) -> None:
    """Return once the server of this launch, and no other, answers that it is ready; others are waited out for `patience_s`.

    Raises ConfigError where another one answers on the same port, NoAgentError if it is not ready in time.
    """
    deadline = time.monotonic() + timeout_s
    last, in_a_row, foreign_since = "no answer", 0, None
    # A new connection every time, and none through a proxy: it is the own server that is asked.
    with httpx.Client(timeout=READY_TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        while time.monotonic() < deadline:
            try:
                reply = client.get(f"{url}/readyz")
            except httpx.HTTPError as error:
                last, in_a_row = str(error) or type(error).__name__, 0
            else:
                is_own = reply.headers.get(MARK_HEADER) == mark
                in_a_row = in_a_row + 1 if is_own and reply.status_code == httpx.codes.OK else 0
                if in_a_row == _NUM_SURE:
                    return
                if is_own and in_a_row:
                    continue
                last = reply.text[:500]
                if not is_own and reply.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
                    foreign_since = foreign_since or time.monotonic()
                    if time.monotonic() - foreign_since > patience_s:
                        seen = f"another server answers at {url} as well (status {reply.status_code})"
                        raise ConfigError(f"server.port: {seen}; stop it, or choose another port (--port)")
            time.sleep(_PAUSE_S)
    raise NoAgentError(f"{url} is not ready after {timeout_s:.0f} s: {last}")
