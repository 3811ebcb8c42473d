"""Controls for what the gate learns from: rollouts with their entropies dealt out anew, everything else unchanged.

`within_rows` should teach nothing (random routing), `across_rows` only which agent is surest overall (one global favourite).
Used by the study under `jobs/`. Source: ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

EVIDENCE = ("entropy_sum_nats", "entropy_sq_sum", "entropy_tokens", "entropy_kind", "entropy_slack_nats", "finish_reason")
"""The columns that the ranking loss reads of a reply; they move together."""


def within_rows(rollouts: pa.Table, seed: int) -> pa.Table:
    """Deal the evidence of every step out among the agents that ran in it."""
    return _dealt(rollouts, ("query_id", "step"), seed)


def across_rows(rollouts: pa.Table, seed: int) -> pa.Table:
    """Deal the evidence of every agent out among the queries, step by step."""
    return _dealt(rollouts, ("agent", "step"), seed)


def _dealt(rollouts: pa.Table, keys: Sequence[str], seed: int) -> pa.Table:
    """Return the table with the evidence permuted within the groups of `keys`, among replies that have any."""
    rng = np.random.default_rng(seed)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    names = list(zip(*(rollouts[key].to_pylist() for key in keys), strict=True))
    for row, (name, tokens) in enumerate(zip(names, rollouts["entropy_tokens"].to_pylist(), strict=True)):
        if tokens:
            groups[name].append(row)
    source = np.arange(rollouts.num_rows)
    for name in sorted(groups, key=str):
        source[groups[name]] = rng.permutation(groups[name])
    dealt = rollouts
    for column in EVIDENCE:
        place = dealt.schema.get_field_index(column)
        dealt = dealt.set_column(place, dealt.schema.field(place), rollouts[column].take(pa.array(source)))
    return dealt
