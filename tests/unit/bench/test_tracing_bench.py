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


def test_a_turn_counts_the_steps_that_follow_its_first_seconds() -> None:
    asked = iter([[100.0], [1.0, 9.0, 2.0], [5.0]])
    assert tracing.take_ms(lambda: next(asked), warm_s=0.0, take_s=0.0) == [1.0, 9.0, 2.0]


def test_an_exporter_that_is_off_takes_less_than_a_tenth_of_a_millisecond() -> None:
    assert 0.0 < tracing.off_cost_s(2_000) < 1e-4


@pytest.mark.parametrize(("on_ms", "off_s", "passed"), [(10.4, 1e-6, True), (10.6, 3e-3, False)])
def test_figures_are_judged_against_a_step_and_a_query_without_spans(on_ms: float, off_s: float, passed: bool) -> None:
    """One step of three waits while spans are sent: the mean of a turn has it, its median has not."""
    late = 3 * on_ms - 20.0
    turns = {"on": [[10.0, 10.0, late]] * 3, "off": [[10.0, 10.0, 10.0]] * 3}
    found = tracing._results(turns, 1000, off_s)
    assert [(one.id, one.passed) for one in found] == [("otlp", passed), ("otlp.p50", None), ("otlp.off", passed)]
    assert [found[0].value, found[1].value] == pytest.approx([on_ms / 10.0, 1.0])
    assert found[2].value == pytest.approx(off_s * 1e3 / (STEPS * 10.0))
