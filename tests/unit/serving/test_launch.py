"""Which Ray is joined, and how: its address, and the token that Ray keeps for this user."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray import serve
from ray.serve import context

from dmoa.errors import ConfigError
from dmoa.serving.launch import (
    PROXY_FLAGS,
    SERVE_FLAGS,
    _let_others_join,
    _use_token,
    keep_token_private,
    launch,
    ray_address,
    token_path,
)
from dmoa.serving.router.admin import RouterAdmin
from dmoa.testing import scripted_pool


@pytest.mark.parametrize(
    ("has_file", "env", "mode"),
    [
        (False, {}, None),
        (True, {}, "token"),
        (False, {"RAY_AUTH_TOKEN": "abc"}, "token"),
        (False, {"RAY_AUTH_TOKEN_PATH": "/somewhere"}, "token"),
        (True, {"RAY_AUTH_MODE": "disabled"}, "disabled"),
    ],
)
def test_the_token_is_used_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_file: bool, env: dict[str, str], mode: str | None
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "to be restored")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    if has_file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("abc")
    _use_token()
    assert os.environ.get("RAY_AUTH_MODE") == mode


def test_a_token_is_its_owners_alone_from_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    try:
        keep_token_private(token_path())
    finally:
        os.umask(before)
    path = tmp_path / ".ray" / "auth_token"
    token = path.read_text()
    assert len(token) == 64
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.chmod(0o644)
    path.parent.chmod(0o755)
    keep_token_private(token_path())
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert path.read_text() == token


def test_a_folder_that_is_not_rays_keeps_its_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(shared / "token"))
    keep_token_private(token_path())
    assert ((shared / "token").stat().st_mode & 0o777, shared.stat().st_mode & 0o777) == (0o600, 0o755)


def test_a_token_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"Ray's token: cannot write '.*file/auth_token'"):
        keep_token_private(tmp_path / "file" / "auth_token")


@pytest.mark.parametrize(
    ("given", "variable", "address"),
    [
        (None, None, None),
        (None, "", None),
        (None, "  ", None),
        ("", "", None),
        (None, "local", None),
        ("local", None, None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", "10.0.0.1:6379", "auto"),
    ],
)
def test_a_ray_address_of_nothing_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None, variable: str | None, address: str | None
) -> None:
    for name in (*SERVE_FLAGS, *PROXY_FLAGS, "RAY_AUTH_MODE", "grpc_proxy", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "to be restored")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    if variable is None:
        monkeypatch.delenv("RAY_ADDRESS")
    else:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ray_address(given) == address
    assert os.environ["grpc_proxy"] == ""  # noqa: SIM112 -- gRPC knows it in small letters only
    assert os.environ.get("RAY_ADDRESS") == ((variable or "").strip() or None)  # Ray itself reads it too


@pytest.mark.contract
def test_among_several_rays_none_is_chosen() -> None:
    """Ray finds those of a machine by the command lines of their raylets, which are stood in for here."""
    addresses = [f"127.0.0.1:{port}" for port in (6001, 6002)]
    code = "import sys, time; print('up', flush=True); time.sleep(600)"
    with ExitStack() as stack:
        for address in addresses:
            stand_in = subprocess.Popen(
                ["raylet", "-c", code, f"--gcs-address={address}"], executable=sys.executable, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(stand_in)
            stack.callback(stand_in.kill)
            assert stand_in.stdout is not None
            assert stand_in.stdout.readline() == "up\n"
        with pytest.raises(ConfigError) as caught:
            RouterAdmin("dmoa")
    message = str(caught.value)
    assert message.startswith("address: several Rays run on this machine, and none of them was asked: ")
    for text in (*addresses, "(--address)"):
        assert text in message


def test_a_ray_that_was_joined_opens_no_port_of_one_that_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants

    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    for asked, kept in ((None, None), ("0", None), ("1", "1")):
        monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", asked or "0")
        if asked is None:
            monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        _let_others_join(True)
        assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == kept
    _let_others_join(False)
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert not ray_constants.ENABLE_RAY_CLUSTER


def test_a_serve_that_others_can_reach_gets_no_app_without_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It listens where it was started, whatever address the pool of `dmoa serve --address` names."""
    for name, value in (SERVE_FLAGS | PROXY_FLAGS | {"grpc_proxy": ""}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DMOA_API_KEYS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    running = SimpleNamespace(http_config=SimpleNamespace(host="0.0.0.0", port=8000), get_serve_details=dict)
    deployed: list[object] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(context, "_get_global_client", lambda **_: running)
    monkeypatch.setattr(serve, "run_many", lambda *_, **__: deployed.append("app"))
    with pytest.raises(ConfigError, match=r"Serve on this Ray listens on '0\.0\.0\.0'.* set DMOA_API_KEYS, or pass --insecure"):
        launch(scripted_pool("ab"), address="auto")
    assert deployed == []
