"""What a pool's scaling becomes in Ray Serve's terms."""

from __future__ import annotations

from typing import Any

import pytest

from dmoa.engine_options import AutoscalingConfig
from dmoa.serving.app import build_app
from dmoa.serving.deployments import bind_hosts, scaling_options
from dmoa.serving.encoder import bind_encoder
from dmoa.testing import scripted_pool


def options_of(**fields: Any) -> dict[str, Any]:
    return scaling_options(AutoscalingConfig(**fields), max_num_seqs=16)


def test_one_replica_is_neither_scaled_nor_chosen_by_conversation() -> None:
    assert options_of() == {"max_ongoing_requests": 64, "max_queued_requests": 256, "num_replicas": 1}


def test_two_queries_may_ask_all_agents_of_a_deployment_at_once() -> None:
    assert scaling_options(AutoscalingConfig(), max_num_seqs=16, num_agents=1024)["max_queued_requests"] == 2048
    found = scaling_options(AutoscalingConfig(max_queued_calls=9), max_num_seqs=16, num_agents=1024)
    assert found["max_queued_requests"] == 9, "who sets a limit has it"


def test_a_limit_on_waiting_calls_holds_in_the_replica_and_in_the_ingress() -> None:
    found = options_of(max_queued_calls=6)
    assert (found["max_ongoing_requests"], found["max_queued_requests"]) == (16 + 6, 6)


def test_several_replicas_are_chosen_by_conversation() -> None:
    for fields in ({"max_replicas": 3}, {"min_replicas": 3, "max_replicas": 3}):
        found = options_of(**fields)
        assert found["request_router_config"]["request_router_class"].endswith(".ConsistentHashRouter")
    assert found["num_replicas"] == 3
    assert "autoscaling_config" not in found


def test_a_replica_that_is_taken_away_finishes_long_replies() -> None:
    assert options_of(max_replicas=2)["graceful_shutdown_timeout_s"] == 120.0
    assert "graceful_shutdown_timeout_s" not in options_of(), "what is not scaled ends with its app"


def test_scaling_from_zero() -> None:
    found = options_of(min_replicas=0, target_ongoing_requests=3.0)["autoscaling_config"]
    assert (found["min_replicas"], found["max_replicas"], found["target_ongoing_requests"]) == (0, 1, 3.0)
    assert (found["upscale_delay_s"], found["downscale_delay_s"], found["downscale_to_zero_delay_s"]) == (5.0, 300.0, 900.0)


@pytest.mark.parametrize(
    ("delay_s", "look_back_s", "report_s"), [(0.0, 2.0, 0.5), (5.0, 5.0, 1.25), (20.0, 20.0, 5.0), (60.0, 30.0, 7.5)]
)
def test_the_load_is_judged_over_no_more_than_the_delay(delay_s: float, look_back_s: float, report_s: float) -> None:
    found = options_of(max_replicas=2, upscale_delay_s=delay_s)["autoscaling_config"]
    assert (found["look_back_period_s"], found["metrics_interval_s"]) == (look_back_s, report_s)


def test_what_died_is_missed_before_long() -> None:
    """Serve looks every ten seconds by default, and nobody calls an ingress that listens itself through Serve."""
    pool = scripted_pool("ab")
    for bound in (build_app(pool), bind_encoder(pool), *bind_hosts(pool).values()):
        assert bound._bound_deployment._deployment_config.health_check_period_s == 0.5
