"""API keys: hashed, compared whole, and demanded where others can reach the server."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import ray
from ray.serve import context

from dmoa.errors import ConfigError, RequestError
from dmoa.serving.deploy import build_with_keys
from dmoa.serving.http.middleware import check_exposure, hash_keys, identify
from dmoa.testing import scripted_pool, scripted_pool_yaml
from tests.unit.serving.fake_service import FakeService, connect, make_app


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize(("value", "keys"), [("", []), ("a", ["a"]), (" a , b,,a ", ["a", "b"]), ("sk-äö", ["sk-äö"])])
def test_keys_are_kept_as_hashes_without_doubles(value: str, keys: list[str]) -> None:
    assert hash_keys({"DMOA_API_KEYS": value}) == tuple(digest(key) for key in keys)


def test_no_variable_means_no_keys() -> None:
    assert hash_keys({}) == ()


@pytest.mark.parametrize("value", [",", " ", " , "])
def test_a_variable_without_a_key_is_a_mistake(value: str) -> None:
    with pytest.raises(ConfigError, match="DMOA_API_KEYS: it is set but holds no key"):
        hash_keys({"DMOA_API_KEYS": value})


def test_the_owner_is_the_hash_of_the_key_that_was_sent() -> None:
    hashes = hash_keys({"DMOA_API_KEYS": "one,two,sk-äö"})
    assert identify([(b"Authorization", b"Bearer two")], hashes) == digest("two")
    assert identify([(b"authorization", "Bearer sk-äö".encode())], hashes) == digest("sk-äö")
    assert identify([], ()) == ""
    assert identify([(b"authorization", b"Bearer any")], ()) == ""


@pytest.mark.parametrize(
    "headers", [[], [(b"authorization", b"Bearer on")], [(b"authorization", b"two")], [(b"x-api-key", b"two")]]
)
def test_anything_else_is_401(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(RequestError) as caught:
        identify(headers, hash_keys({"DMOA_API_KEYS": "one,two"}))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(host, (), insecure=False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.4", "example.org", "localhost.example.org", "127.0.0.1.example.org"]
)
def test_other_hosts_need_keys_or_an_operator_who_insists(host: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.host is .*DMOA_API_KEYS, or pass --insecure"):
        check_exposure(host, (), insecure=False)
    check_exposure(host, (digest("a"),), insecure=False)
    check_exposure(host, (), insecure=True)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("10.1.2.3", 200),
        ("localhost:8000", 200),
        ("LOCALHOST.", 200),
        ("dev.localhost", 200),
        ("pool.example.org:80", 200),
        ("own.example.org", 200),
        ("evil.example.org", 421),
        ("127.0.0.1.example.org", 421),
        ("localhost.example.org", 421),
        ("[evil]", 421),
        ("[::1].example.org", 421),
        ("localhost:80:example.org", 421),
        ("localhost@example.org", 421),
        ("localhost,evil.example.org", 421),
    ],
)
async def test_a_server_without_keys_answers_to_its_own_names_alone(host: str, status: int) -> None:
    """Or a page of another origin whose name resolves to this machine would read its answers."""
    settings = {"host": "own.example.org", "allowed_hosts": ("Pool.example.org",)}
    async with connect(make_app(FakeService(), **settings), host=host) as client:
        answer = await client.get("/healthz")
    assert answer.status_code == status
    if status == 421:
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("unknown_host", "invalid_request_error")
        assert error["message"].endswith("or name it in server.allowed_hosts")


async def test_with_keys_or_a_star_any_name_will_do() -> None:
    for settings in ({"keys": (digest("a"),)}, {"allowed_hosts": ("*",)}):
        async with connect(make_app(FakeService(), **{"allowed_hosts": (), **settings}), host="any.example.org") as client:
            assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize("prefix", ["/page", "/healthz", "/b"])
async def test_an_app_below_a_prefix_opens_its_own_paths_alone(prefix: str) -> None:
    """Whatever the prefix is called."""
    app = make_app(FakeService(), keys=hash_keys({"DMOA_API_KEYS": "one"}))
    transport = httpx.ASGITransport(app, root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        opened = dict.fromkeys(("/healthz", "/readyz", "", "/", "/page/app.js"), 200)
        for path, status in (opened | {"/v1/models": 401}).items():
            assert (await client.get(prefix + path)).status_code == status, path


def test_serve_app_knows_the_admin_keys_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(scripted_pool_yaml())
    for name, value in (("DMOA_CONFIG", str(tmp_path / "pool.yaml")), ("DMOA_API_KEYS", "user"), ("DMOA_ADMIN_KEYS", "boss")):
        monkeypatch.setenv(name, value)
    app = runpy.run_path(str(Path(__file__).parents[3] / "serve_app.py"))["app"]
    given = app._bound_deployment.init_args
    assert (digest("user"),) in given
    assert (digest("boss"),) in given


@pytest.mark.parametrize(("host", "is_refused"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_without_keys_nothing_is_built_for_a_serve_that_others_can_reach(
    monkeypatch: pytest.MonkeyPatch, host: str, is_refused: bool
) -> None:
    """`serve deploy` and `serve run` listen where Serve does, whatever address the pool names."""
    monkeypatch.delenv("DMOA_API_KEYS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(context, "_get_global_client", lambda **_: SimpleNamespace(http_config=SimpleNamespace(host=host)))
    if not is_refused:
        assert build_with_keys(scripted_pool("ab")) is not None
        return
    with pytest.raises(ConfigError, match=r"Serve on this Ray listens on '0\.0\.0\.0', which other machines can reach"):
        build_with_keys(scripted_pool("ab"))
