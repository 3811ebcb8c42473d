"""Graphs that are learnt from labels: what a graph is worth by hand, what is learnt, and that it is run as it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dmoa.policies.learned_graphs import GraphWeights, components, learn, likeliest, usable_edges, worth
from dmoa.testing import embedding, query
from tests.unit.policies.schedules import run, schedule_of, words_of

TEXTS = {"a": "one", "b": "two", "c": "three", "d": "four"}


def write(path: Path, *, right: dict[str, str]) -> Path:
    rows = [{"query": text, "agent": agent, "reward": float(agent == best)} for text, best in right.items() for agent in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def drawn(*edges: str) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    found = np.zeros((1, 4, 4), dtype=bool)
    for edge in edges:
        found[0, "abcd".index(edge[0]), "abcd".index(edge[1])] = True
    return found


@pytest.mark.parametrize(
    ("edges", "last", "expected"),
    [
        ((), "c", 0.5),
        (("ac",), "c", (0.5 + 1.0) / 2 - 0.1 * 1.1),
        (("ab", "bc", "dc"), "c", (0.5 + (0.0 + 1.0) / 2 + 0.2) / 3 - 0.1 * 3.3),
        (("ab", "cd", "ba"), "c", 0.5),  # nothing leads to c: neither what leaves it nor what goes back
        (("ad", "db"), "b", (0.0 + 0.6) / 2 - 0.1 * 2.2),  # d reads a: (0.2 + 1) / 2
    ],
)
def test_a_graph_is_worth_the_mean_of_what_is_read_less_its_price(edges: tuple[str, ...], last: str, expected: float) -> None:
    reward_BA = np.array([[1.0, 0.0, 0.5, 0.2]])
    assert worth(drawn(*edges), np.array(["abcd".index(last)]), reward_BA, 0.1) == pytest.approx([expected])


def test_edges_that_lead_nowhere_are_left_out() -> None:
    (found,) = usable_edges(drawn("ab", "bd", "ac", "dc", "ca"), np.array([3]))
    assert {("abcd"[i], "abcd"[j]) for i, j in zip(*np.nonzero(found), strict=True)} == {("a", "b"), ("b", "d")}


def test_reinforce_finds_the_agent_that_is_right_and_with_features_one_for_each_kind_of_query() -> None:
    query_QD = np.stack([embedding(text) for text in TEXTS.values()])
    alone, right_QA = np.ones((4, 1)), np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]], dtype=np.float64)
    fixed = learn(alone, right_QA, sparsity=0.05, rounds=300, seed=0)
    assert likeliest(fixed, np.ones(1))[0] == (2,)
    features = components(query_QD, 16)
    feature_QZ = np.stack([features(row) for row in query_QD])
    fitting = learn(feature_QZ, right_QA, sparsity=0.05, rounds=300, seed=0)
    assert [likeliest(fitting, row)[0][-1] for row in feature_QZ] == [0, 2, 2, 2]


def test_agents_are_added_where_they_cost_less_than_they_bring() -> None:
    """With a reward for every agent and edge the learnt graph is the complete one."""
    weights = learn(np.ones((1, 1)), np.full((1, 4), 0.5), sparsity=-0.5, rounds=300, seed=1)
    order, graph = likeliest(weights, np.ones(1))
    assert len(order) == 4
    assert sum(map(len, graph.values())) >= 5


def test_the_likeliest_graph_is_in_an_order_in_which_it_can_run() -> None:
    edge_ZAA = np.full((1, 4, 4), -1.0)
    edge_ZAA[0, 0, 2] = edge_ZAA[0, 2, 1] = edge_ZAA[0, 3, 1] = 1.0
    order, graph = likeliest(GraphWeights(last_ZA=np.array([[0.0, 2.0, 0.0, 0.0]]), edge_ZAA=edge_ZAA), np.ones(1))
    assert (order, graph) == ((0, 2, 3, 1), {0: (), 1: (0,), 2: (), 3: (1, 2)})


async def test_gptswarm_runs_one_graph_for_all_queries_and_g_designer_one_for_each(tmp_path: Path) -> None:
    data = write(tmp_path / "rewards.jsonl", right={"one": "a", "two": "c", "three": "c", "four": "c"})
    for text, best in (("one", "a"), ("two", "c"), ("four", "c")):
        for policy, agent in (("gptswarm", "c"), ("g_designer", best)):
            answer, calls = await run(f"{policy}:data={data}", asked=query(text, max_steps=9))
            assert schedule_of(calls) == [f"{agent}.0"]
            assert (answer.text[:5], answer.stop_reason) == (f"[{agent}.0]", "schedule")


@pytest.mark.parametrize("policy", ["gptswarm", "g_designer"])
async def test_calls_and_tokens_are_those_of_the_learnt_graph_and_at_most_the_formula(policy: str, tmp_path: Path) -> None:
    """Calls that see others' answers see those of agents that were asked before, and the tokens are those of the edges."""
    data = write(tmp_path / "rewards.jsonl", right=dict.fromkeys(TEXTS.values(), "b"))
    answer, calls = await run(f"{policy}:sparsity=-1:data={data}")
    edges = sum(len(line.split()) - 2 for line in schedule_of(calls) if "<-" in line)
    assert 1 < len(calls) <= 4
    assert 0 < edges <= 4 * 3 / 2
    expected = words_of(calls[0]) * len(calls) + 3001 * (len(calls) + edges)  # the first call reads nobody
    assert abs(answer.usage.total - expected) <= 0.01 * expected
