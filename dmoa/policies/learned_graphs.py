"""Graphs of agents learnt from labels: edge probabilities (after GPTSwarm), and graphs that fit the query (after G-Designer).

Small stand-ins for the strongest rivals that see labels, marked as such: both papers run each sampled graph to learn what it is
worth; here a table of judged replies (`data=FILE`, as the routers read) stands in for that. In it an agent that reads others is
worth the mean of its own reward and theirs, and a graph what its last agent is worth, less a price of agents and edges (ours).
Both learn by REINFORCE with a running mean as the baseline. Shape letters: B graphs of a batch, A agents, Q queries, D embedding,
Z features of a query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dmoa.policies.graphs import Graph, GraphPolicy
from dmoa.policies.options import PolicyOptions
from dmoa.policies.registry import PolicyContext, policy
from dmoa.policies.routers import fitted_to_labels, mean_rewards
from dmoa.types import FloatArray, QueryState, StepPlan, Stop

Floats = npt.NDArray[np.float64]
_BATCH = 64
_COMPONENTS = 16
_DECAY = 0.05
"""Of the baseline."""
_STEP = 0.3
"""Learning rate, for weights of features of unit scale."""


class LearnedGraphOptions(PolicyOptions):
    """Parameters of the learned graphs."""

    data: str = Field(min_length=1)
    """File of judged replies, its path absolute where workers run elsewhere."""
    sparsity: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.05
    """Reward that one more agent of the graph must bring; an edge costs a tenth of it."""
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 400
    """Batches of 64 sampled graphs that it learns from."""
    seed: int = 0
    """Of the samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphWeights:
    """Logits of the last agent and of each edge, linear in the features of a query (a constant, then Z)."""

    last_ZA: Floats
    edge_ZAA: Floats
    """[.., i, j]: j reads i."""

    def logits(self, feature_BZ: Floats) -> tuple[Floats, Floats]:
        """Return the logits of the last agent [B, A] and of the edges [B, A, A]."""
        return feature_BZ @ self.last_ZA, np.einsum("bz,zij->bij", feature_BZ, self.edge_ZAA)


def learn(feature_QZ: Floats, reward_QA: Floats, *, sparsity: float, rounds: int, seed: int) -> GraphWeights:
    """Return the weights that REINFORCE finds for queries with the rewards of every agent alone."""
    rng, (num_queries, num_agents) = np.random.default_rng(seed), reward_QA.shape
    last_ZA = np.zeros((feature_QZ.shape[1], num_agents))
    edge_ZAA = np.zeros((feature_QZ.shape[1], num_agents, num_agents))
    baseline = 0.0
    for number in range(rounds):
        picked_B = rng.integers(num_queries, size=_BATCH)
        feature_BZ = feature_QZ[picked_B]
        last_BA, edge_BAA = GraphWeights(last_ZA=last_ZA, edge_ZAA=edge_ZAA).logits(feature_BZ)
        chance_BA = np.exp(last_BA - last_BA.max(1, keepdims=True))
        chance_BA /= chance_BA.sum(1, keepdims=True)
        chance_BAA = 1 / (1 + np.exp(-edge_BAA))
        last_B = (chance_BA.cumsum(1) > rng.random((_BATCH, 1))).argmax(1)
        drawn_BAA = rng.random(edge_BAA.shape) < chance_BAA
        worth_B = worth(drawn_BAA, last_B, reward_QA[picked_B], sparsity)
        baseline = worth_B.mean() if number == 0 else (1 - _DECAY) * baseline + _DECAY * worth_B.mean()
        gain_BZ = (worth_B - baseline)[:, None] * feature_BZ / _BATCH
        last_ZA += _STEP * np.einsum("bz,ba->za", gain_BZ, np.eye(num_agents)[last_B] - chance_BA) * num_agents
        edge_ZAA += _STEP * np.einsum("bz,bij->zij", gain_BZ, drawn_BAA - chance_BAA) * num_agents
    return GraphWeights(last_ZA=last_ZA, edge_ZAA=edge_ZAA)


def usable_edges(drawn_BAA: npt.NDArray[np.bool_], last_B: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return the edges that lead to the last agent [B, A, A]: others go from lower to higher places, and nothing leaves it."""
    num_agents = drawn_BAA.shape[1]
    is_last_BA = np.eye(num_agents, dtype=bool)[last_B]
    allowed_BAA = np.triu(np.ones((num_agents, num_agents), dtype=bool), 1) | is_last_BA[:, None, :]
    edges_BAA = drawn_BAA & allowed_BAA & ~is_last_BA[:, :, None]
    reaches_BA = is_last_BA
    for _ in range(num_agents):
        reaches_BA = reaches_BA | (edges_BAA & reaches_BA[:, None, :]).any(2)
    return np.asarray(edges_BAA & reaches_BA[:, None, :])


def worth(drawn_BAA: npt.NDArray[np.bool_], last_B: npt.NDArray[np.int64], reward_BA: Floats, sparsity: float) -> Floats:
    """Return what graphs are worth, each on its query [B]."""
    edges_BAA = usable_edges(drawn_BAA, last_B).astype(np.float64)
    num_agents = reward_BA.shape[1]
    worth_BA = reward_BA.astype(np.float64)
    for j in range(num_agents):  # whoever is read stands lower, or is no reader of the last agent
        worth_BA[:, j] = _read(edges_BAA[:, :, j] * (last_B != j)[:, None], worth_BA, reward_BA[:, j])
    rows = np.arange(len(last_B))
    found_B = _read(edges_BAA[rows, :, last_B], worth_BA, reward_BA[rows, last_B])
    more_B = edges_BAA.any(2).sum(1)  # agents beside the last one
    return np.asarray(found_B - sparsity * (more_B + 0.1 * edges_BAA.sum((1, 2))))


def _read(edge_BA: Floats, worth_BA: Floats, own_B: Floats) -> Floats:
    return np.asarray((own_B + (edge_BA * worth_BA).sum(1)) / (1 + edge_BA.sum(1)))


def likeliest(weights: GraphWeights, feature_Z: Floats) -> tuple[tuple[int, ...], Graph]:
    """Return the agents of the likeliest graph in order, and for each place the places that it reads."""
    last_BA, edge_BAA = weights.logits(feature_Z[None])
    last_B = last_BA.argmax(1)
    (edges_AA,) = usable_edges(edge_BAA > 0, last_B)
    last = int(last_B[0])
    order = (*(i for i in range(len(edges_AA)) if i != last and edges_AA[i].any()), last)
    graph = {place: tuple(order.index(i) for i in order if edges_AA[i, node]) for place, node in enumerate(order)}
    return order, graph


Features = Callable[[FloatArray], Floats]


class _LearnedGraph:
    """Fits a graph to the labels when it is asked first, then runs the likeliest one for each query."""

    name = ""
    num_components = 0

    def __init__(self, context: PolicyContext) -> None:
        self._context = context
        self._options: LearnedGraphOptions = context.options

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask the agents of the graph's next level."""
        found: tuple[Features, GraphWeights] = await fitted_to_labels(self._context, self.name, self._fit)
        features, weights = found
        (query_D,) = await self._context.encoder.embed([state.query.text])
        order, graph = likeliest(weights, features(query_D))
        agents = tuple(self._options.agents[a] for a in order)
        return await GraphPolicy(self.name, agents, graph, self._options.agents).next_step(state)

    def _fit(self, query_QD: FloatArray, reward_QA: FloatArray) -> Any:
        options = self._options
        features = components(query_QD, self.num_components)
        known_QA = np.where(np.isnan(reward_QA), mean_rewards(reward_QA), reward_QA).astype(np.float64)
        feature_QZ = np.stack([features(row) for row in query_QD])
        weights = learn(feature_QZ, known_QA, sparsity=options.sparsity, rounds=options.rounds, seed=options.seed)
        return features, weights


def components(query_QD: FloatArray, count: int) -> Features:
    """Return the features of a query: a constant, and its first principal components of unit variance."""
    center_D = query_QD.mean(0).astype(np.float64)
    _, size_Z, axis_ZD = np.linalg.svd(query_QD - center_D, full_matrices=False)
    kept = min(count, int((size_Z > 1e-6).sum()))
    scale_Z = np.sqrt(len(query_QD)) / size_Z[:kept]
    return lambda query_D: np.concatenate([[1.0], (axis_ZD[:kept] @ (query_D - center_D)) * scale_Z])


@policy(
    "gptswarm",
    "Edges and last agent by learnt probabilities, one graph for all queries (after GPTSwarm, 2402.16823, small); needs labels.",
    options=LearnedGraphOptions,
    cost="A at most",
    reads="A * (A - 1) / 2 at most",
    first_step_only=False,
)
class GptswarmPolicy(_LearnedGraph):
    """The probabilities do not depend on the query."""

    name = "gptswarm"


@policy(
    "g_designer",
    "A graph for each query, by policy gradient on labels (after G-Designer, arXiv 2410.11782, small); needs labels.",
    options=LearnedGraphOptions,
    cost="A at most",
    reads="A * (A - 1) / 2 at most",
    first_step_only=False,
)
class GDesignerPolicy(_LearnedGraph):
    """Logits are linear in the query's principal components, where the paper has a graph auto-encoder."""

    name = "g_designer"
    num_components = _COMPONENTS
