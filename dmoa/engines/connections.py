"""Connections to endpoints by aiohttp, for OpenAI's client: a third of the processor time of its own at many calls in flight.

Bodies, redirects, proxies and decoding stay the client's: what is here sends one request and names its failures as httpx2 does.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp
import httpx2
from yarl import URL

_OWN_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""What aiohttp would add."""
_FAILURES: tuple[tuple[type[Exception], type[httpx2.TransportError]], ...] = (
    (aiohttp.ConnectionTimeoutError, httpx2.ConnectTimeout),
    (aiohttp.ServerTimeoutError, httpx2.ReadTimeout),
    (aiohttp.ClientConnectorError, httpx2.ConnectError),
    (aiohttp.ServerDisconnectedError, httpx2.RemoteProtocolError),
    (aiohttp.ClientOSError, httpx2.ReadError),
    (aiohttp.ClientError, httpx2.RemoteProtocolError),
)
"""Failures by their names there and here, the special before the general."""


@contextmanager
def _named(request: httpx2.Request) -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientError, TimeoutError) as error:
        kind = next((ours for theirs, ours in _FAILURES if isinstance(error, theirs)), httpx2.ReadTimeout)
        raise kind(str(error) or "the server closed the connection", request=request) from error


MAX_ERROR_BYTES = 65_536
"""Of what stands beside an error status."""


class _Body(httpx2.AsyncByteStream):
    """A reply's body as it comes."""

    def __init__(self, response: aiohttp.ClientResponse, request: httpx2.Request) -> None:
        self._response, self._request = response, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        most = MAX_ERROR_BYTES if self._response.status >= 400 else math.inf  # a client reads an error to its end
        with _named(self._request):
            async for piece in self._response.content.iter_any():
                yield piece
                most -= len(piece)
                if most <= 0:
                    return

    async def aclose(self) -> None:
        """Give the connection back, or close it where something of the body is left."""
        self._response.release() if self._response.content.at_eof() else self._response.close()


class Connections(httpx2.AsyncBaseTransport):
    """Sends requests over connections that are kept; serves one event loop."""

    def __init__(self, tls: ssl.SSLContext, *, most: int) -> None:
        """`most`: connections at a time. Opens nothing yet."""
        self._tls, self._most = tls, most
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Return the reply, its body unread. Raises httpx2.TransportError."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._most, ssl=self._tls)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, skip_auto_headers=_OWN_HEADERS
            )
        limits = request.extensions["timeout"]
        with _named(request):
            response = await self._session.request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=request.headers.multi_items(),
                data=request.content,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits["connect"], sock_read=limits["read"]),
            )
        return httpx2.Response(response.status, headers=response.raw_headers, stream=_Body(response, request))

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
