"""A port belongs to one server: what holds it is seen before Ray starts, and what shares it afterwards."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn
from fastapi import FastAPI, Response

from dmoa.errors import ConfigError, NoAgentError
from dmoa.serving.listening import LaunchMark, bare, base_url, check_free, probe, wait_ready
from tests.unit.serving.fake_service import QuietServer


@contextmanager
def listener(host: str, port: int = 0, *, shares: bool = False) -> Iterator[int]:
    """A socket that listens, as a plain program's or, with SO_REUSEPORT, as that of Ray Serve."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shares:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind((host, port))
        opened.listen()
        yield opened.getsockname()[1]


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(
    ("held", "asked"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("127.0.0.1", "localhost")],
)
def test_a_port_that_is_held_is_refused(held: str, asked: str, shares: bool) -> None:
    with listener(held, shares=shares) as port:
        with pytest.raises(ConfigError) as caught:
            check_free(asked, port)
        assert f"server.port is {port}; another program listens on {asked}:{port} already" in str(caught.value)
    check_free(asked, port)


def has_ipv6() -> bool:
    return probe("::1", 0) is None


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6_is_looked_at_on_its_own() -> None:
    with listener("127.0.0.1") as port:
        assert probe("::1", port) is None
        with pytest.raises(ConfigError, match="another program listens on"):
            check_free("::", port)  # takes IPv4 as well
    with listener("::1") as port, pytest.raises(ConfigError) as caught:
        check_free("::1", port)
    assert f"listens on [::1]:{port}" in str(caught.value)


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid", "a" * 300])
def test_an_address_of_another_machine_is_named(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_free(host, 8000)
    assert f"server.host is {host!r}; nothing can listen there" in str(caught.value)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:81/x"),
        ("0.0.0.0", "http://127.0.0.1:81/x"),
        ("::", "http://[::1]:81/x"),
        ("::1", "http://[::1]:81/x"),
        ("[::1]", "http://[::1]:81/x"),
        ("localhost", "http://localhost:81/x"),
    ],
)
def test_the_url_of_a_host(host: str, url: str) -> None:
    assert base_url(bare(host), 81, "/x/") == url


Serving = Callable[[str, int], None]


@pytest.fixture
def serving() -> Iterator[Serving]:
    """Start servers that share a port of 127.0.0.1, each with its mark and its status of /readyz."""
    with ExitStack() as stack:
        yield lambda mark, port: stack.enter_context(server(mark, port))


@contextmanager
def server(mark: str, port: int, status: int = 200) -> Iterator[None]:
    app = FastAPI()
    app.get("/readyz")(lambda: Response("here", status_code=status))
    app.add_middleware(LaunchMark, mark=mark)
    with socket.socket() as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind(("127.0.0.1", port))
        opened.listen()
        runner = QuietServer(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            yield
        finally:
            runner.should_exit = True
            thread.join(30)


def free_port() -> int:
    with listener("127.0.0.1") as port:
        return port


def test_the_own_server_is_believed_without_its_proxies(monkeypatch: pytest.MonkeyPatch, serving: Serving) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    port = free_port()
    serving("ours", port)
    wait_ready(f"http://127.0.0.1:{port}", "ours", 60.0)


@pytest.mark.parametrize("marks", [("ours", "theirs"), ("ours", "theirs", "ours"), ("theirs",)])
def test_another_server_on_the_port_is_not(serving: Serving, marks: tuple[str, ...]) -> None:
    port = free_port()
    for mark in marks:
        serving(mark, port)
    with pytest.raises(
        ConfigError, match=rf"server.port: another server answers at http://127.0.0.1:{port} as well \(status 200\)"
    ):
        wait_ready(f"http://127.0.0.1:{port}", "ours", 60.0, patience_s=0.2)


def test_a_server_that_is_not_ready_says_why() -> None:
    port = free_port()
    with server("ours", port, status=503), pytest.raises(NoAgentError, match="is not ready after 1 s: here"):
        wait_ready(f"http://127.0.0.1:{port}", "ours", 1.0)
