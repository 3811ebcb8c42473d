"""Joining a running Ray: the token that Ray keeps for this user is sent, unless the environment says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dmoa.serving.launch import _use_token


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
