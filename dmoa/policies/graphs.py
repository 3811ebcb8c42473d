"""Fixed graphs of agents: each reads the answers of those before it and writes a better one; the last one's answer counts.

Source: the topologies of MacNet (arXiv 2406.07155); there an edge is a critic of its own, here whoever reads corrects. A
graph runs level by level, the agents of a level side by side. A lost agent is left out, and whoever would have read it reads what
it read; for the last one the others stand in. The order of `agents` is that of the nodes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Annotated

from pydantic import Field

from dmoa.policies.options import PolicyOptions, ask_one, said
from dmoa.policies.registry import PolicyContext, policy
from dmoa.types import Activation, QueryState, StepPlan, Stop

IMPROVE = (
    "The work above holds answers of other assistants to the question; some may be wrong. Correct their mistakes and write a "
    "better answer, complete and on its own."
)

Graph = Mapping[int, tuple[int, ...]]
"""Node, by its place among the agents -> the nodes whose answers it reads, all of lower place; the last node is the only sink."""


class GraphPolicy:
    """Runs a graph level by level."""

    def __init__(self, name: str, agents: tuple[str, ...], graph: Graph, stand_ins: tuple[str, ...] = ()) -> None:
        """`stand_ins`: for the last agent, beside the others of the graph."""
        self.name = name
        self._stand_ins = dict.fromkeys((*agents, *stand_ins))
        self._agents = agents
        self._graph = graph
        self._levels = levels(graph)

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask the agents of the next level, each with what it reads."""
        done = len(state.steps)
        if done >= len(self._levels):
            return Stop(reason="schedule")
        answers = {reply.agent: reply.text for step in state.steps for reply in said(step)}
        asked = tuple(self._activation(node, answers) for node in self._levels[done])
        if done < len(self._levels) - 1:
            return StepPlan(activations=asked, fold="vote")
        (last,) = asked
        return ask_one(self._stand_ins, last.agent, ends_with="schedule", instruction=last.instruction, history=last.history)

    def _activation(self, node: int, answers: Mapping[str, str]) -> Activation:
        reads: dict[int, set[int]] = {}
        for place in sorted(self._graph):
            reads[place] = {j for i in self._graph[place] for j in ({i} if self._agents[i] in answers else reads[i])}
        seen = tuple(answers[self._agents[i]] for i in sorted(reads[node]))
        return Activation(agent=self._agents[node], instruction=IMPROVE if seen else "", history=seen)


def levels(graph: Graph) -> list[list[int]]:
    """Return the nodes by the length of the longest way to them, in order."""
    depth: dict[int, int] = {}
    for node in sorted(graph):
        depth[node] = max((depth[before] + 1 for before in graph[node]), default=0)
    return [[node for node in depth if depth[node] == level] for level in range(max(depth.values()) + 1)]


def _fixed(name: str, summary: str, reads: str, graph_of: Callable[[int], Graph]) -> Callable[[PolicyContext], GraphPolicy]:
    """Enter the policy whose graph of so many agents `graph_of` returns."""

    @policy(name, f"{summary} (MacNet, arXiv 2406.07155).", options=PolicyOptions, cost="A", reads=reads, first_step_only=False)
    def build(context: PolicyContext) -> GraphPolicy:
        return GraphPolicy(name, context.options.agents, graph_of(len(context.options.agents)))

    return build


def tree_edges(size: int) -> dict[int, tuple[int, ...]]:
    """Return a tree whose root is the last node: numbered from there, the children of node j are 2j + 1 and 2j + 2."""
    children = {j: [child for child in (2 * j + 1, 2 * j + 2) if child < size] for j in range(size)}
    return {size - 1 - j: tuple(sorted(size - 1 - child for child in found)) for j, found in children.items()}


build_chain = _fixed(
    "chain",
    "Agents in a row, each reading the answer before",
    "A - 1",
    lambda size: {i: tuple(range(i))[-1:] for i in range(size)},
)
build_tree = _fixed(
    "tree", "A binary tree: leaves answer, every parent reads its two children, the root answers", "A - 1", tree_edges
)
build_star = _fixed(
    "star",
    "All but the last agent answer, the last one, the hub, reads them all",
    "A - 1",
    lambda size: {i: tuple(range(size - 1)) if i == size - 1 else () for i in range(size)},
)
build_complete = _fixed(
    "complete",
    "Every agent reads the answers of all agents before it, the mesh",
    "A * (A - 1) / 2",
    lambda size: {i: tuple(range(i)) for i in range(size)},
)


class RandomGraphOptions(PolicyOptions):
    """Parameters of `random_graph`."""

    p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Probability of each edge."""
    seed: int = 0
    """Of the edges: one graph for all queries."""


@policy(
    "random_graph",
    "A random graph: each agent reads every agent before it with probability p (MacNet, arXiv 2406.07155).",
    options=RandomGraphOptions,
    cost="A",
    reads="A * (A - 1) / 2 at most",
    first_step_only=False,
)
def build_random_graph(context: PolicyContext) -> GraphPolicy:
    """Return the policy of drawn edges; the last node reads also whoever would be read by nobody (ours)."""
    options: RandomGraphOptions = context.options
    return GraphPolicy("random_graph", options.agents, random_edges(len(options.agents), options.p, options.seed))


def random_edges(size: int, p: float, seed: int) -> dict[int, tuple[int, ...]]:
    """Return a graph of `size` nodes with each edge drawn with probability p, and one sink, the last node."""
    rng = random.Random(f"{seed}/{size}")  # noqa: S311 -- a baseline, not a secret
    edges = [(a, b) for a, b in combinations(range(size), 2) if rng.random() < p]
    read = {a for a, _ in edges}
    edges += [(a, size - 1) for a in range(size - 1) if a not in read]
    return {b: tuple(sorted(a for a, reader in edges if reader == b)) for b in range(size)}
