"""P1 runs in process and reports what the contract asks for; the bar itself is for `dmoa bench`."""

from __future__ import annotations

import torch

from dmoa.bench.gate import run


def test_results_name_the_metric_its_bar_and_the_times_beside_it() -> None:
    before = torch.get_num_threads()
    results = {result.id: result for result in run(rounds=1)}
    assert torch.get_num_threads() == before
    assert list(results) == ["P1", "P1.decide", "P1.products_us", "P1.core_us", "P1.decide_us"]
    assert results["P1"].bar == "<= 1.5"
    assert results["P1"].passed == (results["P1"].value <= 1.5)
    assert results["P1.decide"].passed is None
    assert all(result.value > 0 and result.rounds == 1 for result in results.values())
