"""Fixed graphs: each edge of the topology is a text that is read, and nothing else is."""

from __future__ import annotations

import pytest

from dmoa.policies.graphs import levels, random_edges
from tests.unit.policies.schedules import check_cost, run, schedule_of


@pytest.mark.parametrize(
    ("policy", "schedule"),
    [
        ("chain", ["a.0", "b.1 <- a.0", "c.2 <- b.1", "d.3 <- c.2"]),
        ("star", ["a.0", "b.0", "c.0", "d.1 <- a.0 b.0 c.0"]),
        # From the root d: its children are c and b, and b's heap place 2 has no child among four; a is a child of c.
        ("tree", ["a.0", "b.0", "c.1 <- a.0", "d.2 <- b.0 c.1"]),
        ("complete", ["a.0", "b.1 <- a.0", "c.2 <- a.0 b.1", "d.3 <- a.0 b.1 c.2"]),
        ("chain:agents=d+b", ["d.0", "b.1 <- d.0"]),
        ("random_graph:p=0", ["a.0", "b.0", "c.0", "d.1 <- a.0 b.0 c.0"]),
        ("random_graph:p=1", ["a.0", "b.1 <- a.0", "c.2 <- a.0 b.1", "d.3 <- a.0 b.1 c.2"]),
        ("star:c", ["c.0"]),
    ],
)
async def test_each_agent_reads_those_that_the_graph_says(policy: str, schedule: list[str]) -> None:
    answer, calls = await run(policy)
    assert schedule_of(calls) == schedule
    assert answer.text.startswith(f"[{schedule[-1].split()[0]}]")
    assert answer.stop_reason == "schedule"


@pytest.mark.parametrize("policy", ["chain", "tree", "star", "complete", "random_graph:p=1", "tree:agents=a+b+c"])
async def test_calls_and_tokens_are_those_of_the_formula(policy: str) -> None:
    await check_cost(policy)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_graph_has_one_sink_and_no_way_back(seed: int) -> None:
    graph = random_edges(9, 0.3, seed)
    assert all(before < node for node, found in graph.items() for before in found)
    assert set(range(8)) == {before for found in graph.values() for before in found}
    assert levels(graph)[-1] == [8]
    assert graph == random_edges(9, 0.3, seed)
    # Every agent runs in a level after all that it reads.
    place = {node: number for number, level in enumerate(levels(graph)) for node in level}
    assert all(place[before] < place[node] for node, found in graph.items() for before in found)


def test_edges_are_as_many_as_their_probability_says() -> None:
    counts = [sum(map(len, random_edges(10, 0.5, seed).values())) for seed in range(200)]
    # 45 edges at 1/2, standard error of the mean 3.4 / 200 ** 0.5 = 0.24, and at most some edges more for the one sink.
    assert 21.5 < sum(counts) / 200 < 24.5
