"""P13: what is judged, and that it is the lower of both modes."""

from __future__ import annotations

from dmoa.bench.throughput import BAR, MODES, Round, Window, rollout_results


def arms(rollouts: tuple[int, float], replay: tuple[int, float]) -> Round:
    """One round: tokens in 10 seconds and calls under way, of each arm."""
    made, bare = (Window(tokens=tokens, seconds=10.0, under_way=under_way) for tokens, under_way in (rollouts, replay))
    return Round(ours=made, replay=bare)


def test_p13_is_the_lower_of_the_medians_of_ratios_taken_round_by_round() -> None:
    figures = {
        "dense": [arms((950, 18.0), (1000, 20.0)), arms((990, 20.0), (1000, 20.0)), arms((500, 19.0), (1000, 20.0))],
        "epsilon": [arms((800, 9.0), (1000, 10.0))],
    }
    results = {result.id: result for result in rollout_results(figures, engine="e")}
    assert list(results) == [
        "P13",
        "P13.dense",
        "P13.epsilon",
        "P13.dense.fill",
        "P13.dense.tokens",
        "P13.epsilon.fill",
        "P13.epsilon.tokens",
    ]
    assert (results["P13"].value, results["P13"].passed, results["P13"].bar) == (0.8, False, f">= {BAR}")
    assert (results["P13.dense"].value, results["P13.dense"].passed, results["P13.dense"].rounds) == (0.95, True, 3)
    assert (results["P13.dense.fill"].value, results["P13.dense.fill"].passed) == (0.95, None)
    assert (results["P13.dense.tokens"].value, results["P13.dense.tokens"].unit) == (95.0, "tokens/s")


def test_p13_passes_at_the_bar_in_both_modes() -> None:
    at_bar = [arms((900, 9.0), (1000, 10.0))]
    (first, *_) = rollout_results(dict.fromkeys(MODES, at_bar), engine="e")
    assert (first.id, first.value, first.passed) == ("P13", BAR, True)
