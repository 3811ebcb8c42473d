"""Policies about who is in the pool: agents that are busy yield, a budget chooses a sub-pool, and who keeps failing is replaced.

`capacity_aware` and `knapsack` wrap another policy, which `inner` names and which runs with its defaults. What happened before is
kept in this process, apart for each set of parameters; a restart forgets it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from pydantic import Field, field_validator

from dmoa.config import Config
from dmoa.core.aggregate import answer_key
from dmoa.errors import NoAgentError, RequestError
from dmoa.policies.dmoa import build_dmoa
from dmoa.policies.options import Count, PolicyOptions, Wrapping, ask
from dmoa.policies.registry import POLICIES, PolicyContext, built_from, policy
from dmoa.policies.routers import judged_of
from dmoa.protocols import Encoder, Policy
from dmoa.types import Activation, QueryState, StepPlan, Stop

_SLACK = 1e-9
_MOST_SEARCHED = 16
"""Agents of which every choice is tried."""
_KEPT: WeakKeyDictionary[Encoder, dict[tuple[str, PolicyOptions], Any]] = WeakKeyDictionary()
"""What happened before, by swarm, policy and parameters."""

Kept = TypeVar("Kept")


def _kept(context: PolicyContext, name: str, new: Kept) -> Kept:
    found: Kept = _KEPT.setdefault(context.encoder, {}).setdefault((name, context.options), new)
    return found


def inner_policy(context: PolicyContext, name: str, agents: tuple[str, ...] | None = None) -> Policy:
    """Return another policy with its defaults, over some agents where they are given. Raises RequestError where it cannot be."""
    entry = POLICIES[name]
    words = f"agents={'+'.join(agents or context.config.agent_names)}"
    options = entry.options_of(words, context.config) if entry.options else None
    return built_from(entry, replace(context, agent=None, options=options))


class CapacityOptions(PolicyOptions):
    """Parameters of `capacity_aware`."""

    inner: str = "dmoa"
    """The policy that ranks the agents."""
    factor: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.25
    """How much more than an even share of the window an agent may take."""
    window: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Calls, the newest ones of this process, that shares are counted over."""

    @property
    def capacity(self) -> int:
        """Calls of the window that one agent may take."""
        return max(1, math.ceil(self.factor * self.window / len(self.agents)))


@policy(
    "capacity_aware",
    "Another policy whose overflow goes to the next-ranked agent, past each one's capacity (after GShard, arXiv 2006.16668).",
    options=CapacityOptions,
    cost="inner",
    reads="inner_reads",
    first_step_only=True,
)
class CapacityPolicy(Wrapping):
    """The capacity factor of mixtures of experts, over the newest calls instead of a batch (ours).

    An agent that is full yields to the first reserve with room; where none has room, it is asked all the same. Of an inner policy
    that asks the whole pool, the next-ranked agents that take part stand in for those that do not.
    """

    name = "capacity_aware"

    def __init__(self, context: PolicyContext) -> None:
        self._options: CapacityOptions = context.options
        self._policy = inner_policy(context, self._options.inner, self._options.agents)
        self._newest: deque[str] = _kept(context, self.name, deque(maxlen=self._options.window))

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Return the inner policy's plan, with agents in place of those that are full."""
        plan = await self._policy.next_step(state)
        if isinstance(plan, Stop):
            return plan
        wanted, reserves = self._taking_part(plan)
        taken, asked = Counter(self._newest), list[Activation]()
        for activation in wanted:
            chosen = activation
            if taken[activation.agent] >= self._options.capacity:
                known = {x.agent for x in (*wanted, *asked)}
                has_room = (x for x in reserves if taken[x.agent] < self._options.capacity and x.agent not in known)
                chosen = next(has_room, activation)
            if chosen is not activation:
                reserves.remove(chosen)
                reserves.append(activation)
            asked.append(chosen)
            taken[chosen.agent] += 1
        self._newest.extend(x.agent for x in asked)
        mass = plan.mass if plan.decision is None else sum(x.probability for x in asked)
        explored = tuple(x for x in plan.explored if x.agent in self._options.agents)
        return replace(plan, activations=tuple(asked), reserves=tuple(reserves), explored=explored, mass=mass)

    def _taking_part(self, plan: StepPlan) -> tuple[list[Activation], list[Activation]]:
        """Return whom a plan asks, and who may stand in, of the agents that take part. Raises NoAgentError."""
        found = [x for x in (*plan.activations, *plan.reserves) if x.agent in self._options.agents]
        if not found and plan.decision is not None:
            raise NoAgentError("the agents that take part are all masked")
        if not found:  # who only prepares an answer, as a chooser
            return list(plan.activations), list(plan.reserves)
        return found[: len(plan.activations)], found[len(plan.activations) :]


class KnapsackOptions(PolicyOptions):
    """Parameters of `knapsack`."""

    inner: str = "majority_k"
    """The policy that runs over the chosen agents."""
    gpus: Annotated[float, Field(ge=0.0)] | None = None
    """GPUs that the chosen agents' models may take together; a model counts once, however many agents share it."""
    price: Annotated[float, Field(ge=0.0)] | None = None
    """What a million prompt and a million completion tokens of every chosen agent may cost together."""
    rewards: str | None = None
    """File of judged replies, as routers read, whose mean rewards are what agents are worth; None: the gate's probabilities."""

    @field_validator("inner")
    @classmethod
    def _takes_agents(cls, inner: str) -> str:
        if inner in POLICIES and POLICIES[inner].options is None:
            raise ValueError(f"{inner!r} asks the whole pool; name a policy with `agents`, such as majority_k")
        return inner

    def check_pool(self, config: Config) -> None:
        """Raise RequestError where a price is not known that a budget needs, or no agent of the pool fits the budgets."""
        bids = _bids(self, config)
        unknown = [bid.model for bid in bids if bid.price is None]
        if self.price is not None and unknown:
            raise RequestError(f"policy: knapsack: price: llms.{unknown[0]}.price is not set; set it, or give a budget of gpus")
        most, space = (math.inf if limit is None else limit + _SLACK for limit in (self.price, self.gpus))
        if all((bid.price or 0.0) > most or bid.gpus > space for bid in bids):
            raise RequestError("policy: knapsack: no agent fits the budget; raise gpus or price")


@policy(
    "knapsack",
    "Another policy over the sub-pool that is worth most within a budget of GPUs or price (0/1 knapsack); labels: optional.",
    options=KnapsackOptions,
    cost="inner at most",
    reads="inner_reads at most",
    first_step_only=True,
)
class KnapsackPolicy(Wrapping):
    """Chooses for every query, by what the gate thinks of the agents, or once, by labels. Source: ours."""

    name = "knapsack"

    def __init__(self, context: PolicyContext) -> None:
        self._context = context
        self._options: KnapsackOptions = context.options
        self._gate = build_dmoa(replace(context, agent=None, options=None))
        self._asked: str | None = None

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Choose the agents at the query's first step, or at each stage, and ask the inner policy."""
        if self._asked != state.query.text:
            options, worth = self._options, await self._worth(state)
            bids = _bids(options, self._context.config)
            chosen = best_subset([worth[name] for name in options.agents], bids, options.price, options.gpus)
            self._policy = inner_policy(self._context, options.inner, tuple(options.agents[a] for a in chosen))
            self._asked = state.query.text
        return await self._policy.next_step(state)

    async def _worth(self, state: QueryState) -> dict[str, float]:
        if self._options.rewards is not None:
            rows = judged_of(self._options.rewards, self._options.agents, "rewards")[1]
            of_agent = {name: [row.reward for row in rows if row.agent == name] for name in self._options.agents}
            return {name: (sum(found) + 0.5) / (len(found) + 1) for name, found in of_agent.items()}
        plan = await self._gate.next_step(replace(state, steps=()))
        assert isinstance(plan, StepPlan)
        return {x.agent: x.probability for x in (*plan.activations, *plan.reserves)} | dict.fromkeys(
            plan.decision.masked if plan.decision else (), 0.0
        )


class Bid(NamedTuple):
    """What an agent takes of the budgets."""

    model: str
    price: float | None
    """None: not known, which is as good as nothing where no price is set as a budget."""
    gpus: float
    """Of its model, once for all agents on it."""


def _bids(options: KnapsackOptions, config: Config) -> list[Bid]:
    model_of = {agent.name: agent.llm for agent in config.agents}
    prices = {name: llm.price.prompt_per_1m + llm.price.completion_per_1m for name, llm in config.llms.items() if llm.price}
    return [Bid(model, prices.get(model), config.llms[model].gpus) for model in map(model_of.__getitem__, options.agents)]


def best_subset(worth_A: Sequence[float], bid_A: Sequence[Bid], most_price: float | None, most_gpus: float | None) -> list[int]:
    """Return the agents that are worth most together within the budgets, in order; of equal choices the cheaper one.

    Every subset is tried, of the `_MOST_SEARCHED` agents worth most of those that fit alone.
    """
    price, space = (math.inf if most is None else most + _SLACK for most in (most_price, most_gpus))
    alone = [a for a, bid in enumerate(bid_A) if (bid.price or 0.0) <= price and bid.gpus <= space]
    tried = sorted(sorted(alone, key=lambda a: -worth_A[a])[:_MOST_SEARCHED])
    bits_SA = (np.arange(1, 2 ** len(tried))[:, None] >> np.arange(len(tried))) & 1
    bids = [bid_A[a] for a in tried]
    price_S = bits_SA @ np.array([bid.price or 0.0 for bid in bids])
    gpus_S = np.zeros(len(bits_SA))
    for model, gpus in {bid.model: bid.gpus for bid in bids}.items():
        gpus_S += gpus * (bits_SA @ np.array([bid.model == model for bid in bids]) > 0)
    fits_S = (price_S <= price) & (gpus_S <= space)
    if not fits_S.any():
        return []
    worth_S = np.where(fits_S, (bits_SA @ np.array([worth_A[a] for a in tried])).round(12), -np.inf)
    best = min(np.flatnonzero(worth_S == worth_S.max()), key=lambda s: (price_S[s], gpus_S[s]))
    return [a for a, bit in zip(tried, bits_SA[best], strict=True) if bit]


class FreeAgencyOptions(PolicyOptions):
    """Parameters of `free_agency`: the first of `agents` are the roster, the others free agents."""

    roster: Count = 3
    """Agents that answer."""
    window: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Queries that an agent is judged by."""
    least: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share of queries on which an agent must agree with the vote, or else it goes on probation."""

    @property
    def width(self) -> int:
        """The roster, and a shadow of each."""
        return min(2 * self.roster, len(self.agents))


@dataclass(slots=True)
class Contract:
    """A place of the roster."""

    agent: str
    agreed: list[bool] = field(default_factory=list)
    """Of its newest queries, whether it agreed with the vote."""
    shadow: str | None = None
    """The free agent that is tried beside it while it is on probation."""
    shadow_agreed: list[bool] = field(default_factory=list)


@dataclass(slots=True)
class Roster:
    """Who plays, and who is free, the next one first."""

    places: list[Contract]
    free: deque[str]


@policy(
    "free_agency",
    "A roster votes; who keeps disagreeing is on probation, shadowed by a free agent and replaced (RLFA, arXiv 2501.17903).",
    options=FreeAgencyOptions,
    cost="min(2 * roster, A) at most",
    reads="0",
    first_step_only=True,
)
class FreeAgencyPolicy:
    """The paper rewards agents by their task's measure; here the reward is agreement with the roster's vote, without labels.

    A shadow is asked and never folded, so a query's answer is the roster's. After a window of queries the better of the two
    stays; the other is free.
    """

    name = "free_agency"

    def __init__(self, context: PolicyContext) -> None:
        options = self._options = context.options
        places = [Contract(name) for name in options.agents[: options.roster]]
        self._roster = _kept(context, self.name, Roster(places, deque(options.agents[options.roster :])))

    async def next_step(self, state: QueryState) -> StepPlan | Stop:
        """Ask the roster and its shadows."""
        if state.steps:
            return Stop(reason="schedule")
        shadows = [place.shadow for place in self._roster.places if place.shadow is not None]
        stand_ins = [name for name in self._roster.free if name not in shadows]
        return StepPlan(
            activations=ask(place.agent for place in self._roster.places),
            reserves=ask(stand_ins),
            explored=ask(shadows),
            fold="vote",
            ends_with="schedule",
        )

    def ended(self, state: QueryState) -> str:
        """Note who agreed with the vote, whatever ended the query; return the answer. Who was asked and lost did not agree."""
        step, asked = state.steps[0], state.query.text
        vote = answer_key(step.summary, asked)
        agreed = {reply.agent: reply.status == "ok" and answer_key(reply.text, asked) == vote for reply in step.replies}
        for place in self._roster.places:
            if place.agent not in agreed or (place.shadow is not None and place.shadow not in agreed):
                continue
            place.agreed.append(agreed[place.agent])
            if place.shadow is not None:
                place.shadow_agreed.append(agreed[place.shadow])
            if len(place.agreed) >= self._options.window:
                self._judge(place)
        return state.summary

    def _judge(self, place: Contract) -> None:
        """Begin or end a probation, after a window of queries."""
        if place.shadow is not None:
            out = place.agent if sum(place.shadow_agreed) > sum(place.agreed) else place.shadow
            place.agent = place.shadow if out == place.agent else place.agent
            self._roster.free.append(out)
            place.shadow = None
        elif sum(place.agreed) < self._options.least * len(place.agreed) and self._roster.free:
            place.shadow = self._roster.free.popleft()
        place.agreed, place.shadow_agreed = [], []
