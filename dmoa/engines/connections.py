"""Connections to one endpoint by aiohttp, and the names of what fails on them: nothing of a request is made twice.

OpenAI's own client takes ten times the processor time: it checks, copies and merges every message, header and URL at each call.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Literal
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

FAILURES = (aiohttp.ClientError, TimeoutError)
"""What `Connections.post`, and reading what it returns, raise."""
Failure = Literal["ConnectTimeout", "ReadTimeout", "ConnectError", "RemoteProtocolError", "ReadError", "DecodingError"]
_NAMES: tuple[tuple[type[Exception], Failure], ...] = (
    (aiohttp.ConnectionTimeoutError, "ConnectTimeout"),
    (TimeoutError, "ReadTimeout"),
    (aiohttp.ClientConnectorError, "ConnectError"),
    (aiohttp.ServerDisconnectedError, "RemoteProtocolError"),
    (aiohttp.ClientOSError, "ReadError"),
    (aiohttp.ClientError, "RemoteProtocolError"),
)
"""Failures and their usual names, the special before the general."""


def failure_of(error: BaseException) -> Failure:
    """Return the name of one of `FAILURES`."""
    if isinstance(error, aiohttp.ClientPayloadError) and "content-encoding" in str(error):
        return "DecodingError"
    return next(name for kind, name in _NAMES if isinstance(error, kind))


MAX_ERROR_BYTES = 65_536
"""Of what stands beside an error status."""


async def read_error(response: aiohttp.ClientResponse) -> bytes:
    """Return what stands beside an error status, to a bound. Raises one of `FAILURES`."""
    data = b""
    async for piece in response.content.iter_any():
        data += piece
        if len(data) >= MAX_ERROR_BYTES:
            break
    return data


class Connections:
    """Posts to one URL over connections that are kept; serves one event loop."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        tls: ssl.SSLContext,
        most: int,
        connect_s: float,
        silent_s: float,
        is_proxied: bool,
    ) -> None:
        """`most`: connections at a time; `is_proxied`: by what the environment names. Opens nothing yet."""
        self._url = URL(url)
        self._headers = {"Accept": "*/*", "Connection": "keep-alive", "Content-Type": "application/json", **headers}
        self._tls, self._most = tls, most
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=silent_s)
        # Not aiohttp's own way, which reads keys from ~/.netrc too.
        named = getproxies() if is_proxied and not proxy_bypass(self._url.host or "") else {}
        self._proxy = named.get(self._url.scheme) or named.get("all")
        self._session: aiohttp.ClientSession | None = None

    async def post(self, body: bytes) -> aiohttp.ClientResponse:
        """Return the reply, its body unread; whoever takes it closes it. Raises one of `FAILURES`."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._most, ssl=self._tls),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                timeout=self._timeout,
            )
        return await self._session.post(self._url, data=body, allow_redirects=False, proxy=self._proxy)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
