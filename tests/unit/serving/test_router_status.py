"""A router's account of itself, as it leaves the process: JSON of `dmoa router status`, and Prometheus text."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from dmoa.cli.router import adaptation_lines
from dmoa.serving.metrics import exposition
from dmoa.types import RouterStatus

STATUS = RouterStatus(app="dmoa", pool="p", pool_fingerprint="f", pool_version="v", gate_version="v1", agents=("a", "b"))


def test_the_json_has_these_fields_in_this_order() -> None:
    told = json.loads(json.dumps(asdict(replace(STATUS, activations={"a": 2}, masked=("b",)))))
    assert list(told) == [
        "app",
        "pool",
        "pool_fingerprint",
        "pool_version",
        "gate_version",
        "configured_version",
        "untrained",
        "installed_unix_s",
        "recent_inputs",
        "masked",
        "cold",
        "gone",
        "agents",
        "supervision",
        "score",
        "activations",
        "decisions",
        "batches",
        "started_unix_s",
        "adaptation",
        "state_lost",
    ]
    assert (told["activations"], told["masked"]) == ({"a": 2}, ["b"])


def test_the_exposition_tells_the_counters_or_that_the_router_is_away() -> None:
    status = replace(STATUS, decisions=7, batches=3, masked=("a",), cold=("b", "c"), activations={"a": 5, "d": 2})
    lines = exposition(status).splitlines()
    for line in (
        "dmoa_router_up 1.0",
        "dmoa_router_decisions_total 7.0",
        "dmoa_router_batches_total 3.0",
        "dmoa_router_masked_agents 1.0",
        "dmoa_router_cold_agents 2.0",
        'dmoa_router_gate{pool="p",version="v1"} 1.0',
        'dmoa_router_activations_total{agent="a"} 5.0',
        'dmoa_router_activations_total{agent="d"} 2.0',
    ):
        assert line in lines
    assert "_created" not in exposition(status), "the moment of a scrape is not when a counter began"
    assert [line for line in exposition(None).splitlines() if not line.startswith("#")] == ["dmoa_router_up 0.0"]


def test_the_exposition_tells_what_became_of_offers_where_there_are_any() -> None:
    trial = {
        "control": "v1",
        "candidate": "v2",
        "update": 3,
        "queries": {},
        "signals": {"failures": {"pairs": 4, "evidence": 2.5}},
    }
    told = {
        "mode": "canary",
        "ledger": 3,
        "frozen": None,
        "cooldown_s": 0.0,
        "held_back": 40,
        "trial": trial,
        "distrusted": ["a"],
    }
    told |= {"counts": {"refused": 2, "canary": 1}, "failures": {"load": 2}}
    lines = exposition(replace(STATUS, adaptation=told)).splitlines()
    for line in (
        'dmoa_router_offers_total{state="refused"} 2.0',
        'dmoa_router_offers_total{state="canary"} 1.0',
        'dmoa_router_guard_total{guard="load"} 2.0',
        "dmoa_router_adaptation_ledger 3.0",
        "dmoa_router_adaptation_frozen 0.0",
        "dmoa_router_adaptation_trial 1.0",
        "dmoa_router_adaptation_distrusted_agents 1.0",
        "dmoa_router_trial_failures 2.5",
    ):
        assert line in lines
    assert "adaptation" not in exposition(replace(STATUS, adaptation=told | {"mode": "off"}))


def test_a_freeze_is_told_also_where_adaptation_is_off() -> None:
    """It lasts: a deploy with adaptation on finds it again."""
    told = {"mode": "off", "ledger": 3, "counts": {}, "frozen": "release day", "cooldown_s": 9.0, "trial": None}
    assert adaptation_lines(told) == [("adaptation", "off"), ("", "frozen: release day; `dmoa router thaw` ends that")]
    assert adaptation_lines(told | {"frozen": None}) == [("adaptation", "off")]
