"""Who is cold and who is gone, by Serve's status, and what /readyz says of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dmoa.config import Config
from dmoa.serving.router.replica_health import presence, sleepers, state_of
from dmoa.types import RouterStatus

CONFIG = Config.model_validate(
    {
        "name": "p",
        "llms": {
            "own": {"model": "scripted:x", "engine": "scripted", "placement": "dedicated"},
            "all": {"model": "scripted:x", "engine": "scripted", "autoscaling": {"min_replicas": 0}},
        },
        "agents": [
            {"name": "busy", "llm": "own", "profile": "Works."},
            {"name": "rare", "llm": "own", "profile": "Sleeps.", "autoscaling": {"min_replicas": 0, "cold": "skip"}},
            {"name": "one", "llm": "all", "profile": "Shares."},
            {"name": "two", "llm": "all", "profile": "Shares."},
        ],
        "summarizer": {"mode": "llm", "llm": "all"},
    }
)


def deployment(status: str = "HEALTHY", **states: int) -> Any:
    return SimpleNamespace(status=status, replica_states=states)


UP = {name: deployment(RUNNING=1) for name in ("agent-busy", "agent-rare", "llm-all")}


def test_who_may_sleep() -> None:
    assert sleepers(CONFIG) == {"rare", "one", "two", "summarizer"}


def test_nobody_is_missing() -> None:
    for deployments in (UP, {}):
        found = presence(CONFIG, deployments)
        assert (found.cold, found.gone, found.is_settled) == (frozenset(), frozenset(), True)


@pytest.mark.parametrize(
    ("asleep", "is_settled"),
    [
        (deployment(), True),
        (deployment("UPSCALING", STARTING=1), False),
        (deployment("DOWNSCALING", STOPPING=1), False),
        (deployment(RUNNING=0), True),
    ],
)
def test_scaled_to_zero_is_cold_and_not_gone(asleep: Any, is_settled: bool) -> None:
    found = presence(CONFIG, UP | {"agent-rare": asleep})
    assert (found.cold, found.gone, found.is_settled) == ({"rare"}, frozenset(), is_settled)


def test_agents_of_one_deployment_are_cold_together() -> None:
    assert presence(CONFIG, UP | {"llm-all": deployment()}).cold == {"one", "two", "summarizer"}


@pytest.mark.parametrize(
    ("name", "where", "gone"),
    [
        ("busy", "agent-busy", deployment("UPDATING", STARTING=1)),
        ("busy", "agent-busy", deployment()),
        ("rare", "agent-rare", deployment("UNHEALTHY", STARTING=1)),
        ("rare", "agent-rare", deployment("DEPLOY_FAILED")),
    ],
)
def test_who_should_have_a_replica_or_cannot_start_one_is_gone(name: str, where: str, gone: Any) -> None:
    found = presence(CONFIG, UP | {where: gone})
    assert (found.cold, found.gone, found.is_settled) == (frozenset(), {name}, False)


@pytest.mark.parametrize(
    ("busy", "gone", "deserted"),
    [
        (deployment("UPDATING", STARTING=1), {"busy"}, {"busy"}),
        (deployment("UPDATING", STOPPING=1, STARTING=1), {"busy"}, set()),  # the one that is replaced ends its calls first
        (deployment("UPDATING", UPDATING=1), {"busy"}, set()),
        (deployment("UPDATING", RECOVERING=1), set(), set()),
        (deployment("UPDATING", PENDING_MIGRATION=1, STARTING=1), set(), set()),  # Serve goes on sending it calls
    ],
)
def test_calls_are_left_to_replicas_that_may_still_answer_them(busy: Any, gone: set[str], deserted: set[str]) -> None:
    found = presence(CONFIG, UP | {"agent-busy": busy})
    assert (found.gone, found.deserted) == (gone, deserted)


def test_readiness_of_those_who_may_sleep_is_the_routers_word() -> None:
    known = RouterStatus(app="dmoa", pool="p", pool_fingerprint="f", pool_version="v", gate_version="v1", agents=("one", "two"))
    status = replace(known, masked=("one",), cold=("rare",))
    assert [state_of(name, status) for name in ("rare", "two")] == ["cold", "up"]
    assert state_of("one", status) == "it does not answer; the router tries it again"
    assert state_of("rare", None) == "unknown: the router is away"
