"""Tells which addresses are this machine's own, and keeps the environment's proxies away from them and from replicas.

Also how long a server, whoever's, asks a client to wait.
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Say whether an address is this machine's own; a name other than `localhost` is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def uses_proxies(url: str) -> bool:
    """Say whether the proxies that the environment names are for this URL: not where it leads to this machine."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return True
    return not (is_loopback(host) or host in ("0.0.0.0", "::"))  # noqa: S104 -- compared, not bound


def ignore_proxies() -> None:
    """Keep the gRPC of this process and of those that it starts from proxies; call before it connects anywhere.

    gRPC would send Ray Serve's calls between replicas through `http_proxy` wherever `no_proxy` does not list the node's own
    address. A `grpc_proxy` that is empty means none. Nothing else reads it.
    """
    os.environ["grpc_proxy"] = ""  # noqa: SIM112 -- gRPC knows it in small letters only


def asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a refusal asks to wait, given as milliseconds, seconds or a date; None where it says nothing."""
    asked = headers.get("retry-after", "").strip()
    for read, text in (
        (lambda text: float(text) / 1e3, headers.get("retry-after-ms", "")),
        (float, asked),
        (lambda text: parsedate_to_datetime(text).timestamp() - time.time(), asked),
    ):
        with suppress(ValueError, TypeError, OverflowError):
            return max(0.0, read(text)) or (0.0 if asked == "0" else None)
    return None
