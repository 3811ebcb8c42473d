"""A router's account of itself, as it leaves the process: JSON of `dmoa router status`, and Prometheus text."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

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
    assert [line for line in exposition(None).splitlines() if not line.startswith("#")] == ["dmoa_router_up 0.0"]
