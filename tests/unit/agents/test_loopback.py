"""Proxies of the environment stand neither before this machine's own addresses nor between Serve's replicas."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dmoa.loopback import uses_proxies


@pytest.mark.parametrize(
    ("url", "uses"),
    [
        ("http://127.0.0.1:8000", False),
        ("http://127.8.9.1/v1", False),
        ("http://localhost:8000/v1", False),
        ("http://LOCALHOST:8000/v1", False),
        ("http://[::1]:8000", False),
        ("http://0.0.0.0:8000", False),
        ("http://[::]:8000", False),
        ("http://10.0.0.7:8000", True),
        ("https://api.example.com/v1", True),
        ("http://localhost.example.com", True),
        ("http://[::2]:8000", True),
        ("http://[", True),
    ],
)
def test_which_addresses_are_this_machines(url: str, uses: bool) -> None:
    assert uses_proxies(url) is uses


CALL = """
import sys
from concurrent import futures
import grpc
if sys.argv[1] == "ours":
    from dmoa.loopback import ignore_proxies
    ignore_proxies()

class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)

server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Echo()])
port = server.add_insecure_port("127.0.0.1:0")
server.start()
try:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        print(channel.unary_unary("/a/b")(b"there", timeout=60).decode())
except grpc.RpcError as error:
    print(error.code().name)
"""


@pytest.mark.contract
@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_grpc_asks_no_proxy(variable: str) -> None:
    """With the bare library the same call goes to the proxy, which is not there."""
    names = ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy")
    env = {name: value for name, value in os.environ.items() if name.lower() not in names}
    env |= {variable: "http://127.0.0.1:9"}

    def said(word: str) -> str:
        command = [sys.executable, "-c", CALL, word]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True).stdout.strip()

    assert said("bare") == "UNAVAILABLE"
    assert said("ours") == "there"
