"""Tells which addresses are this machine's own, and keeps the environment's proxies away from them and from replicas."""

from __future__ import annotations

import ipaddress
import os
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
