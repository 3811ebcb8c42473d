"""What stands before the routes: API keys, the server's names, the size of bodies, and a bound on queries in flight.

Keys come from the environment variable `DMOA_API_KEYS`, are kept as SHA-256 hashes only, and appear in no log. The
hash of the key that made a query is the owner of its trace.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmoa.errors import ConfigError, RequestError
from dmoa.loopback import is_loopback
from dmoa.serving.http.errors import error_response

_HOST = re.compile(r"(?:\[(?P<address>[\da-f:.%]+)\]|(?P<name>[^:\[\]@/,\s]+))(?::\d*)?")
VARIABLE = "DMOA_API_KEYS"
DOCS_PATH = "/docs"
ADMIN_VARIABLE = "DMOA_ADMIN_KEYS"
ON_THIS_RAY = "Serve on this Ray listens on"
OPEN_PATHS = ("/healthz", "/readyz", "/", DOCS_PATH)
"""What is read without a key: by the probes of a cluster, and the pages, which hold no data themselves."""
ASSETS = "/page/"
"""Begins the paths of what the page is made of."""
SHOWN_HEADERS = ("x-request-id", "x-dmoa-ignored", "retry-after")
"""What a page of another origin may read of an answer's headers."""


def is_open(path: str) -> bool:
    """Tell whether a path, without the prefix of its app, is read without a key."""
    return path in OPEN_PATHS or path.startswith(ASSETS)


def hash_keys(env: Mapping[str, str], variable: str = VARIABLE) -> tuple[str, ...]:
    """Return SHA-256 hex digests of comma-separated keys in a variable, none if unset. Raises ConfigError for commas alone."""
    raw = env.get(variable, "")
    keys = [key for part in raw.split(",") if (key := part.strip())]
    if raw and not keys:
        raise ConfigError(f"{variable}: it is set but holds no key; give keys separated by commas, or unset it")
    return tuple(dict.fromkeys(_digest(key.encode("utf-8", "surrogateescape")) for key in keys))


def check_exposure(host: str, key_hashes: tuple[str, ...], insecure: bool, where: str = "server.host is") -> None:
    """Raise ConfigError for an address that others can reach, without keys, unless the operator insists; `where` it stands."""
    if key_hashes or insecure or is_loopback(host):
        return
    raise ConfigError(
        f"{where} {host!r}, which other machines can reach, and there are no API keys; without keys it must be a "
        f"loopback address such as 127.0.0.1; set {VARIABLE}, or pass --insecure if the network itself is trusted"
    )


def header_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Return the first value of a header, empty where it was not sent; `name` in lower case."""
    return next((value for known, value in headers if known.lower() == name), b"")


def identify(headers: Iterable[tuple[bytes, bytes]], key_hashes: tuple[str, ...]) -> str:
    """Return the hash of the key that a request carries, "" where no keys are configured.

    Every configured hash is compared in constant time. Raises RequestError (401) for a missing or unknown key.
    """
    if not key_hashes:
        return ""
    value = header_of(headers, b"authorization")
    found = _known(value, key_hashes)
    if not found:
        what = "no API key" if not value else "this API key is not known"
        raise RequestError(f"Authorization: {what}; send `Authorization: Bearer KEY`", code="invalid_api_key", status=401)
    return found


def _known(value: bytes, key_hashes: tuple[str, ...]) -> str:
    """Return which of the hashes is that of the key in an Authorization header, "" for none of them."""
    scheme, _, key = value.partition(b" ")
    seen, found = _digest(key.strip()) if scheme.lower() == b"bearer" else "", ""
    for known in key_hashes:
        if hmac.compare_digest(seen, known):
            found = known
    return found


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


class KeyCheck:
    """ASGI middleware: answers 401 without a known key; leaves the key's hash in the request's state as `key_hash`.

    Open paths are answered to anybody: with None for it where a key is asked for and none came. An admin key is a key too;
    `is_admin` in the state says whether it was one. Where there are admin keys alone, everybody else comes without a key.
    """

    def __init__(self, app: ASGIApp, key_hashes: tuple[str, ...], admin_hashes: tuple[str, ...] = ()) -> None:
        self.app = app
        self.key_hashes = key_hashes
        self.admin_hashes = admin_hashes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", "")) or "/"
        if scope["type"] == "http":
            admin, key_hash = _known(header_of(scope["headers"], b"authorization"), self.admin_hashes), None
            try:
                key_hash = admin or identify(scope["headers"], self.key_hashes)
            except RequestError as error:
                if not is_open(path):
                    await error_response(error)(scope, receive, send)
                    return
            state = scope.setdefault("state", {})
            state["key_hash"], state["is_admin"] = key_hash, bool(admin)
        await self.app(scope, receive, send)


def cors_headers(scope: Scope, origins: Iterable[str]) -> dict[str, str]:
    """Return the headers by which a page of one of the origins, which a request may come from, can read its answer."""
    origin = header_of(scope["headers"], b"origin").decode("latin-1")
    if not origin or not {"*", origin} & set(origins):
        return {}
    allowed = (
        {"Access-Control-Allow-Origin": "*"} if "*" in origins else {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
    )
    return {**allowed, "Access-Control-Expose-Headers": ", ".join(SHOWN_HEADERS)}


class HostCheck:
    """ASGI middleware of a server without keys: answers 421 where it is asked by a name that is not its own.

    A page of another origin can have its own name resolve to this machine, and would then read the answers. It cannot choose an
    address or `localhost` as its name, so those are taken, as are `names`; `*` among them takes any.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self.app = app
        self.names = {name.lower().removesuffix(".") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = b",".join(value for name, value in scope.get("headers", ()) if name.lower() == b"host")
        if scope["type"] == "http" and asked and not self._is_own(asked.decode("latin-1").strip().lower()):
            message = (
                f"Host: {asked[:80].decode('latin-1')!r} is not a name of this server; use its address, set API keys "
                f"({VARIABLE}), or name it in server.allowed_hosts"
            )
            await error_response(RequestError(message, code="unknown_host", status=421))(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_own(self, asked: str) -> bool:
        found = _HOST.fullmatch(asked)
        if found is None or "*" in self.names:
            return "*" in self.names
        host = (found["address"] or found["name"]).removesuffix(".")
        if host in self.names or host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True


class BodyLimit:
    """ASGI middleware: where the app reads a body, answers 413 above the limit, as it arrives, and 415 for a packed one.

    (Starlette 1.10 has such a limit too, but it answers in plain text, even in place of our 401.)
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen_bytes, declared = 0, declared_bytes(scope) or 0
        coding = b", ".join(value for name, value in scope["headers"] if name.lower() == b"content-encoding").decode("latin-1")

        async def counted() -> Message:
            nonlocal seen_bytes
            if coding.strip().lower() not in ("", "identity"):
                seen = f"Content-Encoding is {coding[:80]!r}; expected identity; send the body as it is, not packed"
                raise RequestError(seen, code="unsupported_content_encoding", status=415)
            if declared > self.max_body_bytes:
                raise body_too_large(str(declared), self.max_body_bytes)
            message = await receive()
            seen_bytes += len(message.get("body", b""))
            if seen_bytes > self.max_body_bytes:
                raise body_too_large(f"more than {self.max_body_bytes}", self.max_body_bytes)
            return message

        await self.app(scope, counted, send)


def body_too_large(seen: str, max_bytes: int) -> RequestError:
    """Return the refusal of a body."""
    message = f"body: {seen} bytes; expected at most {max_bytes} (server.max_body_bytes); send a shorter request"
    return RequestError(message, code="request_too_large", status=413)


def declared_bytes(scope: Scope) -> int | None:
    """Return the length that a request declares for its body; None where it declares none."""
    value = header_of(scope["headers"], b"content-length")
    # More digits than this are over any limit, and int() refuses more than 4300.
    return int(value[:20]) if value.isdigit() else None


class ConcurrencyLimit:
    """Counts the queries in flight of one server process."""

    def __init__(self, max_queued_requests: int) -> None:
        self.max_queued_requests = max_queued_requests
        self.taken = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold one place. Raises RequestError (429) when all are taken."""
        if self.taken >= self.max_queued_requests:
            message = (
                f"{self.taken} queries are in flight, and {self.max_queued_requests} is the limit (limits.max_queued_requests); "
                "try again after the seconds in Retry-After"
            )
            raise RequestError(message, code="too_many_requests", status=429)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
