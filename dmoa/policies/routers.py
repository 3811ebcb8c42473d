"""Routers without a gate: one agent answers, chosen by chance or by labels from a file.

The file, `data=FILE`, has a JSON line for each reply that was judged: `{"query": TEXT, "agent": NAME, "reward": 0..1}`. These
rewards are labels, which the gate never needs: a table that holds such a router says so. A path must not contain a colon.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmoa.errors import RequestError
from dmoa.policies.options import Count, OneOptions, ask
from dmoa.policies.registry import PolicyContext, policy
from dmoa.protocols import Encoder
from dmoa.reading import home_path, read_bounded
from dmoa.types import FloatArray, QueryState, StepPlan, Stop
from dmoa.validation import describe

_router = partial(policy, cost="1", reads="0", first_step_only=True)


class Judged(BaseModel):
    """One reply that was judged."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)

    query: str = Field(min_length=1)
    """Text of the query."""
    agent: str
    """Who replied; agents that do not take part are passed over."""
    reward: float = Field(ge=0.0, le=1.0)
    """How good the reply was."""


@lru_cache(maxsize=8)
def _read(field: str, path: Path, changed_ns: int) -> tuple[Judged, ...]:
    found = []
    for number, line in enumerate(read_bounded(path, most=1 << 28).decode().split("\n"), 1):
        if line.strip():
            try:
                found.append(Judged.model_validate_json(line))
            except ValidationError as error:
                raise RequestError(f"policy: {field}: {path}, line {number}: {describe(error)}; mend the line") from None
    return tuple(found)


def judged_of(data: str, agents: Sequence[str], field: str = "data") -> tuple[int, tuple[Judged, ...]]:
    """Return when a file changed, and its judged replies, read once; `field` names it.

    Raises RequestError naming file and line, and where no line is of one of the agents that take part.
    """
    path = home_path(data).absolute()
    try:
        changed_ns = path.stat().st_mtime_ns
        rows = _read(field, path, changed_ns)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"policy: {field}: cannot read {data!r}: {error}; give a file of JSON Lines") from error
    if not any(row.agent in agents for row in rows):
        seen = f"judges {', '.join(list(dict.fromkeys(row.agent for row in rows))[:8])}" if rows else "has no line"
        raise RequestError(
            f"policy: {field}: {data!r} {seen}; expected replies of {', '.join(agents)}; name agents as the pool does"
        )
    return changed_ns, rows


class RouterOptions(OneOptions):
    """Parameters of routers that learn from a file."""

    data: str = Field(min_length=1)
    """File of judged replies, its path absolute where workers run elsewhere."""


class _Ranked(ABC):
    """Asks the best agent of a ranking once; the others stand in, best first."""

    name = ""

    def __init__(self, context: PolicyContext) -> None:
        self._context = context
        self._agents: tuple[str, ...] = context.options.agents

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask the agent of the highest score, of equal ones the first."""
        if state.steps:
            return Stop(reason="schedule")
        scores = await self._scores(state)
        order = sorted(range(len(self._agents)), key=lambda a: -scores[a])
        asked = ask(self._agents[a] for a in order)
        return StepPlan(activations=asked[:1], reserves=asked[1:], fold="pass", ends_with="schedule")

    @abstractmethod
    async def _scores(self, state: QueryState) -> Sequence[float]:
        """Return a score per agent, in the order of `options.agents`; the highest is asked."""


@_router(
    "random_router",
    "One agent answers once, drawn evenly; no labels.",
    options=OneOptions,
)
class RandomRouter(_Ranked):
    """As `random` with one step; the query's id decides, so a repeated query repeats."""

    name = "random_router"

    async def _scores(self, state: QueryState) -> Sequence[float]:
        rng = random.Random(f"{state.query.trace_id}/0")  # noqa: S311 -- a baseline, not a secret
        return [rng.random() for _ in self._agents]


class BanditOptions(RouterOptions):
    """Parameters of `bandit`."""

    rule: Literal["thompson", "ucb"] = "thompson"
    """thompson: a draw of each agent's Beta posterior, prior 1, 1; ucb: mean + sqrt(2 ln N / n)."""


@_router(
    "bandit",
    "One agent by its rewards so far, whatever the query: Thompson sampling or UCB1; labels: rewards of a file.",
    options=BanditOptions,
)
class BanditRouter(_Ranked):
    """A bandit over agents whose history is the file; it learns no more while it answers, so a run repeats."""

    name = "bandit"

    async def _scores(self, state: QueryState) -> Sequence[float]:
        options: BanditOptions = self._context.options
        _, rows = judged_of(options.data, self._agents)
        rewards = [[row.reward for row in rows if row.agent == name] for name in self._agents]
        if options.rule == "ucb":
            total = sum(map(len, rewards))
            return [np.mean(r) + np.sqrt(2 * np.log(total) / len(r)) if r else np.inf for r in rewards]
        rng = random.Random(f"{state.query.trace_id}/0")  # noqa: S311 -- a baseline, not a secret
        return [rng.betavariate(1 + sum(r), 1 + len(r) - sum(r)) for r in rewards]


Predictor = Callable[[FloatArray], Sequence[float]]
"""What a router learnt: the expected reward of each agent, for a query's embedding [D]."""
Fitted = TypeVar("Fitted")
_FITTED: WeakKeyDictionary[Encoder, dict[tuple[object, ...], Any]] = WeakKeyDictionary()
_FITTING: WeakKeyDictionary[Encoder, dict[tuple[object, ...], asyncio.Task[Any]]] = WeakKeyDictionary()


async def fitted_to_labels(context: PolicyContext, name: str, fit: Callable[[FloatArray, FloatArray], Fitted]) -> Fitted:
    """Return what `fit` makes of the embeddings [Q, D] and rewards [Q, A] of a policy's file, NaN where there is none.

    Of several rewards of one reply the mean counts. It is fitted when it is asked for first, once for all who wait for it, and
    kept as long as the encoder is.
    """
    options, encoder = context.options, context.encoder
    changed_ns, rows = judged_of(options.data, options.agents)
    known, fitting = _FITTED.setdefault(encoder, {}), _FITTING.setdefault(encoder, {})
    key = (name, options, changed_ns)
    running = (asyncio.get_running_loop(), *key)
    if key not in known:
        if running not in fitting:
            fitting[running] = asyncio.create_task(_fitted(rows, options.agents, encoder, fit))
            fitting[running].add_done_callback(lambda _: fitting.pop(running))
        known[key] = await asyncio.shield(fitting[running])  # who is cancelled leaves it to the others
    found: Fitted = known[key]
    return found


async def _fitted(
    rows: Sequence[Judged], agents: Sequence[str], encoder: Encoder, fit: Callable[[FloatArray, FloatArray], Fitted]
) -> Fitted:
    rows = [row for row in rows if row.agent in agents]
    queries = list(dict.fromkeys(row.query for row in rows))
    place = {query: i for i, query in enumerate(queries)}
    reward_QA = np.full((len(queries), len(agents)), np.nan, np.float32)
    rewards = defaultdict[tuple[int, int], list[float]](list)
    for row in rows:
        rewards[place[row.query], agents.index(row.agent)].append(row.reward)
    for cell, judged in rewards.items():
        reward_QA[cell] = np.mean(judged)
    return fit(np.stack(await encoder.embed(queries)), reward_QA)


class _Learnt(_Ranked):
    """A router that is fitted to embeddings and rewards."""

    async def _scores(self, state: QueryState) -> Sequence[float]:
        predict = await fitted_to_labels(self._context, self.name, self._fit)
        (query_D,) = await self._context.encoder.embed([state.query.text])
        return predict(query_D)

    @abstractmethod
    def _fit(self, query_QD: FloatArray, reward_QA: FloatArray) -> Predictor:
        """Return what embeddings [Q, D] and rewards [Q, A], NaN where there is none, teach."""


def mean_rewards(reward_QA: FloatArray, prior: FloatArray | float = 0.5) -> FloatArray:
    """Return each agent's mean reward over the rows where it has one, with one more row of the prior: [A]."""
    known_QA = ~np.isnan(reward_QA)
    return np.asarray((np.where(known_QA, reward_QA, 0).sum(0) + prior) / (known_QA.sum(0) + 1), np.float32)


class KnnOptions(RouterOptions):
    """Parameters of `knn_router`."""

    k: Count = 10
    """Neighbours."""


@_router(
    "knn_router",
    "The agent with the best mean reward on the k most similar queries; labels: rewards of a file.",
    options=KnnOptions,
)
class KnnRouter(_Learnt):
    """Similarity of sentence embeddings (RouterBench, arXiv 2403.12031); an agent's mean over all is a neighbour more (ours)."""

    name = "knn_router"

    def _fit(self, query_QD: FloatArray, reward_QA: FloatArray) -> Predictor:
        k, prior = self._context.options.k, mean_rewards(reward_QA)

        def predict(query_D: FloatArray) -> Sequence[float]:
            near = np.argsort(-(query_QD @ query_D), kind="stable")[:k]
            return list(map(float, mean_rewards(reward_QA[near], prior)))

        return predict


class LinearOptions(RouterOptions):
    """Parameters of `linear_router`."""

    ridge: Annotated[float, Field(gt=0.0)] = 1.0
    """Weight of the squared weights."""


@_router(
    "linear_router",
    "The agent of the highest reward by a ridge regression on the query's embedding; labels: rewards of a file.",
    options=LinearOptions,
)
class LinearRouter(_Learnt):
    """One regression an agent, around its mean reward."""

    name = "linear_router"

    def _fit(self, query_QD: FloatArray, reward_QA: FloatArray) -> Predictor:
        mean_A, ridge = mean_rewards(reward_QA), self._context.options.ridge * np.eye(query_QD.shape[1])
        center_D = query_QD.mean(0)
        weights = []
        for a, mean in enumerate(mean_A):
            known = ~np.isnan(reward_QA[:, a])
            x = query_QD[known] - center_D
            weights.append(np.linalg.solve(x.T @ x + ridge, x.T @ (reward_QA[known, a] - mean)))
        weight_AD = np.stack(weights)
        return lambda query_D: list(map(float, mean_A + weight_AD @ (query_D - center_D)))


class KmeansOptions(RouterOptions):
    """Parameters of `kmeans`."""

    clusters: Count = 8
    """Clusters; no more than there are queries."""
    seed: int = 0
    """Of the first centres."""


@_router(
    "kmeans",
    "The agent with the best mean reward in the query's cluster of embeddings; labels: rewards of a file.",
    options=KmeansOptions,
)
class KmeansRouter(_Learnt):
    """Lloyd's algorithm from queries drawn by the seed; an agent's mean over all counts as one more of a cluster (ours)."""

    name = "kmeans"

    def _fit(self, query_QD: FloatArray, reward_QA: FloatArray) -> Predictor:
        options: KmeansOptions = self._context.options
        size = min(options.clusters, len(query_QD))
        center_CD = query_QD[np.random.default_rng(options.seed).choice(len(query_QD), size, replace=False)]
        for _ in range(50):
            nearest_Q = _nearest(query_QD, center_CD)
            moved = [query_QD[nearest_Q == c].mean(0) if (nearest_Q == c).any() else center_CD[c] for c in range(size)]
            if np.array_equal(moved, center_CD):
                break
            center_CD = np.stack(moved)
        nearest_Q, prior = _nearest(query_QD, center_CD), mean_rewards(reward_QA)
        reward_CA = np.stack([mean_rewards(reward_QA[nearest_Q == c], prior) for c in range(size)])
        return lambda query_D: list(map(float, reward_CA[_nearest(query_D[None], center_CD)[0]]))


def _nearest(x_QD: FloatArray, center_CD: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.asarray(((x_QD[:, None] - center_CD[None]) ** 2).sum(-1).argmin(1))
