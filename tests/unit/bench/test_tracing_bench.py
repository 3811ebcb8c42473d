"""What the bench of spans measures, without Ray: the collector, an arm's time, the exporter while off, the judged figures."""

from __future__ import annotations

import httpx
import pytest

from dmoa.bench import tracing
from dmoa.bench.latency import STEPS


def test_the_collector_reads_what_it_is_sent() -> None:
    with tracing.collector() as (url, sizes), httpx.Client(trust_env=False) as client:
        assert client.post(f"{url}/v1/traces", content=b"12345").status_code == 200
        client.post(f"{url}/v1/traces", content=b"")
    assert sizes == [5, 0]


def test_an_arm_asks_at_least_once_and_tells_the_median_of_all_steps() -> None:
    asked = iter([[1.0, 9.0, 2.0], [5.0]])
    assert tracing.take_ms(lambda: next(asked), take_s=0.0, settle_s=0.0) == 2.0


def test_an_exporter_that_is_off_takes_less_than_a_tenth_of_a_millisecond() -> None:
    assert 0.0 < tracing.off_cost_s(2_000) < 1e-4


@pytest.mark.parametrize(("on_ms", "off_s", "passed"), [(10.4, 1e-6, [True, True]), (10.6, 3e-3, [False, False])])
def test_figures_are_judged_against_a_step_and_a_query_without_spans(on_ms: float, off_s: float, passed: list[bool]) -> None:
    found = tracing._results({"on": [on_ms, on_ms], "off": [10.0, 10.0]}, 1000, off_s)
    assert [(one.id, one.passed) for one in found] == [("otlp", passed[0]), ("otlp.off", passed[1])]
    assert found[0].value == pytest.approx(on_ms / 10.0)
    assert found[1].value == pytest.approx(off_s * 1e3 / (STEPS * 10.0))
