"""Dealt-out evidence: the same multiset where it must stay, nothing else touched."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa

from dmoa.training.ablations import EVIDENCE, across_rows, within_rows

AGENTS = ("a", "b", "c")


def rollouts(num_queries: int = 40) -> pa.Table:
    rows = [(f"q{n}", agent) for n in range(num_queries) for agent in AGENTS]
    count = len(rows)
    return pa.table(
        {
            "query_id": [query for query, _ in rows],
            "step": [0] * count,
            "agent": [agent for _, agent in rows],
            "text": [f"{query}/{agent}" for query, agent in rows],
            "entropy_sum_nats": [float(n) for n in range(count)],
            "entropy_sq_sum": [float(n) ** 2 for n in range(count)],
            # The last reply generated nothing: it has no evidence to deal out.
            "entropy_tokens": [n + 1 for n in range(count - 1)] + [0],
            "entropy_kind": ["exact"] * count,
            "entropy_slack_nats": [0.0] * count,
            "finish_reason": ["stop"] * count,
        }
    )


def by_group(table: pa.Table, key: str) -> dict[str, Counter[float]]:
    found: dict[str, Counter[float]] = {}
    for name, value in zip(table[key].to_pylist(), table["entropy_sum_nats"].to_pylist(), strict=True):
        found.setdefault(name, Counter())[value] += 1
    return found


def test_within_rows_keeps_each_steps_evidence_and_breaks_the_agents() -> None:
    before, after = rollouts(), within_rows(rollouts(), seed=1)
    assert by_group(before, "query_id") == by_group(after, "query_id")
    assert by_group(before, "agent") != by_group(after, "agent")


def test_across_rows_keeps_each_agents_evidence_and_breaks_the_queries() -> None:
    before, after = rollouts(), across_rows(rollouts(), seed=1)
    assert by_group(before, "agent") == by_group(after, "agent")
    assert by_group(before, "query_id") != by_group(after, "query_id")


def test_evidence_moves_together_and_the_rest_stays() -> None:
    before = rollouts()
    for after in (within_rows(before, seed=1), across_rows(before, seed=1)):
        assert after.schema == before.schema
        for column in set(before.column_names) - set(EVIDENCE):
            assert after[column].to_pylist() == before[column].to_pylist()
        sums, squares = after["entropy_sum_nats"].to_pylist(), after["entropy_sq_sum"].to_pylist()
        assert squares == [value**2 for value in sums]
        assert after["entropy_tokens"].to_pylist()[-1] == 0


def test_a_seed_repeats() -> None:
    assert within_rows(rollouts(), seed=3) == within_rows(rollouts(), seed=3)
    assert within_rows(rollouts(), seed=3) != within_rows(rollouts(), seed=4)
