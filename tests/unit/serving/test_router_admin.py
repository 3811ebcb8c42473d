"""The router as another process asks it: found by its name at every call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from dmoa.errors import DmoaError
from dmoa.serving.router.admin import RouterAdmin


def actor(status: object) -> Any:
    """An actor whose `status` is this, or raises it."""
    return SimpleNamespace(status=SimpleNamespace(remote=lambda: status))


def test_a_router_that_was_ended_and_served_anew_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[Any] = [actor("the first")]

    def get_actor(name: str, namespace: str) -> Any:
        if not named:
            raise ValueError(f"no actor {name}")
        return named[-1]

    def get(found: object, timeout: float) -> object:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here"))
    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "get", get)
    admin = RouterAdmin("dmoa")
    assert str(admin.status()) == "the first"
    named[-1] = actor(ActorDiedError())
    with pytest.raises(DmoaError, match=r"router: it is away \(ActorDiedError\)"):
        admin.status()
    named.clear()
    with pytest.raises(DmoaError, match="router: it is away"):
        admin.status()
    named.append(actor("the second"))
    assert str(admin.status()) == "the second"
