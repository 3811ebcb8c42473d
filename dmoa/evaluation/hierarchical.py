"""Statistics of a study with several levels: specialists are trained with seeds, gates with seeds, and both meet the same rows.

Rows alone would make an effect of one lucky seed look certain. Shape letters: S specialist sets, G gate seeds, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dmoa.evaluation.statistics import Comparison

Floats = npt.NDArray[np.float64]
DRAWS = 10_000


def hierarchical_bootstrap(difference_SGR: Floats, *, seed: int = 0, draws: int = DRAWS) -> Comparison:
    """Compare two methods by their paired differences: resample sets, then gate seeds within each, then rows for all alike.

    A level with one member stays as it is, and the interval then says nothing about that level. p is twice the smaller
    share of draws on either side of 0, with one more draw counted on both: never 0, at most 1. Source: ours (a percentile
    bootstrap on crossed and nested levels).
    """
    num_sets, num_seeds, num_rows = difference_SGR.shape
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        rows_R = rng.integers(0, num_rows, num_rows)
        sets_S1 = rng.integers(0, num_sets, (num_sets, 1))
        seeds_SG = rng.integers(0, num_seeds, (num_sets, num_seeds))
        # Rows are counted, not copied: the same rows for all sets and seeds.
        weight_R = np.bincount(rows_R, minlength=num_rows) / num_rows
        by_seed_SG = difference_SGR @ weight_R
        means[draw] = by_seed_SG[sets_S1, seeds_SG].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    below, above = ((int(side.sum()) + 1) / (draws + 1) for side in (means <= 0, means >= 0))
    return Comparison(
        n=num_rows,
        difference=float(difference_SGR.mean()),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * min(below, above)),
        test="hierarchical bootstrap",
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted for their number by Holm's step-down method, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
