"""What a look at Serve says: of an app that runs, of one that is gone, and while nobody can tell."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, GetTimeoutError

with warnings.catch_warnings():
    # Ray 2.60's own, with this pydantic.
    warnings.filterwarnings("ignore", message="Using extra keyword arguments", category=DeprecationWarning)
    from dmoa.serving.router.replica_health import ServeSnapshot, read_status

CONTROLLER, REPLICA = "SERVE_CONTROLLER_ACTOR", "SERVE_REPLICA::dmoa#agent-a#1"
DEPLOYMENTS = {"agent-a": SimpleNamespace(status="HEALTHY", replica_states={"RUNNING": 1})}


class Cluster:
    """Stands for Ray and Serve: what they name and tell, or raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str, apps: Any = None) -> None:
        self.names: Any = names
        self.apps = apps
        self.asked = 0
        monkeypatch.setattr("ray.util.list_named_actors", self.named)
        monkeypatch.setattr("ray.serve.status", self.status)

    def named(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        assert all_namespaces
        if isinstance(self.names, Exception):
            raise self.names
        return [{"name": name, "namespace": "serve"} for name in self.names] + [{"name": "router", "namespace": "dmoa"}]

    def status(self) -> Any:
        self.asked += 1
        if isinstance(self.apps, Exception):
            raise self.apps
        return SimpleNamespace(applications=self.apps or {})


def test_an_app_is_seen_with_its_deployments(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, CONTROLLER, REPLICA, apps={"dmoa": SimpleNamespace(deployments=DEPLOYMENTS)})
    assert read_status("dmoa", None) == ServeSnapshot(actors=frozenset({CONTROLLER, REPLICA}), deployments=DEPLOYMENTS)


def test_nothing_is_asked_while_no_actor_comes_or_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, CONTROLLER, REPLICA, apps={"dmoa": SimpleNamespace(deployments=DEPLOYMENTS)})
    assert read_status("dmoa", frozenset({CONTROLLER, REPLICA})) is None
    assert cluster.asked == 0
    assert read_status("dmoa", frozenset({CONTROLLER})) is not None


def test_an_app_is_gone_where_serve_has_others_or_runs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, CONTROLLER, apps={"other": SimpleNamespace(deployments=DEPLOYMENTS)})
    assert read_status("dmoa", None) == ServeSnapshot(actors=frozenset({CONTROLLER}), deployments=None)
    Cluster(monkeypatch, apps=AssertionError("Serve does not run: it must not be asked"))
    assert read_status("dmoa", None) == ServeSnapshot(actors=frozenset(), deployments=None)


def test_a_controller_or_a_control_store_that_restarts_says_nothing_of_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, CONTROLLER, REPLICA, apps=ActorUnavailableError("it restarts", b"0" * 16))
    assert read_status("dmoa", None) is None
    assert cluster.asked == 1
    cluster.names = GetTimeoutError("the control store did not answer")
    assert read_status("dmoa", None) is None
