"""API keys: who may use the server, and which server may run without them.

Keys come from the environment variable `DMOA_API_KEYS`, are kept as SHA-256 hashes only, and appear in no log. The
hash of the key that made a query is the owner of its trace.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from dmoa.errors import ConfigError, RequestError
from dmoa.loopback import is_loopback
from dmoa.serving.problems import error_response

VARIABLE = "DMOA_API_KEYS"
OPEN_PATHS = ("/healthz", "/readyz")
"""What probes of a cluster read, without a key."""


def hash_keys(env: Mapping[str, str]) -> tuple[str, ...]:
    """Return the SHA-256 hex digests of the comma-separated keys in `DMOA_API_KEYS`; empty if it is unset or empty.

    Raises ConfigError if the variable holds separators but no key: whoever set it meant to have one.
    """
    raw = env.get(VARIABLE, "")
    keys = [key for part in raw.split(",") if (key := part.strip())]
    if raw and not keys:
        raise ConfigError(f"{VARIABLE}: set, but holds no key; allowed: keys separated by commas; give one or unset it")
    return tuple(dict.fromkeys(_digest(key.encode("utf-8", "surrogateescape")) for key in keys))


def check_exposure(host: str, key_hashes: tuple[str, ...], insecure: bool) -> None:
    """Raise ConfigError for an address that others can reach, without keys, unless the operator insists."""
    if key_hashes or insecure or is_loopback(host):
        return
    raise ConfigError(
        f"server.host: value seen: {host!r}, which other machines can reach, and no API keys; allowed without keys: a loopback "
        f"address such as 127.0.0.1; set {VARIABLE}, or pass --insecure if the network itself is trusted"
    )


def identify(headers: Iterable[tuple[bytes, bytes]], key_hashes: tuple[str, ...]) -> str:
    """Return the hash of the key that a request carries, "" where no keys are configured.

    Every configured hash is compared in constant time. Raises RequestError (401) for a missing or unknown key.
    """
    if not key_hashes:
        return ""
    value = next((value for name, value in headers if name.lower() == b"authorization"), b"")
    scheme, _, key = value.partition(b" ")
    seen = _digest(key.strip()) if scheme.lower() == b"bearer" else ""
    found = ""
    for known in key_hashes:
        if hmac.compare_digest(seen, known):
            found = known
    if not found:
        what = "no API key" if not value else "this API key is not known"
        raise RequestError(f"Authorization: {what}; send `Authorization: Bearer KEY`", code="invalid_api_key", status=401)
    return found


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


class KeyCheck:
    """ASGI middleware: answers 401 without a known key; leaves the key's hash in the request's state as `key_hash`."""

    def __init__(self, app: ASGIApp, key_hashes: tuple[str, ...]) -> None:
        self.app = app
        self.key_hashes = key_hashes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                key_hash = identify(scope["headers"], self.key_hashes)
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["key_hash"] = key_hash
        await self.app(scope, receive, send)
